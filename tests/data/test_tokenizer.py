import json
import pickle

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from hope_jax.config import ConfigError, DataConfig, TextConfig
from hope_jax.data import text, tokenizer

SHAKESPEARE = (text.REPOSITORY / DataConfig().path).read_text()[:50_000]


def train():
  model = tokenizer.train([SHAKESPEARE, "\tÄpfel  日本\n"], 400)
  return tokenizer.SentencePiece(model, "toy")


@pytest.fixture(scope="module")
def trained():
  return train()


TEXT = st.text(st.characters(exclude_categories=("Cs",)))


@given(TEXT)
def test_bytes_decode_inverts_encode(string):
  tokens = tokenizer.Bytes().encode(string)
  assert len(tokens) == len(string.encode())
  assert tokenizer.Bytes().decode(tokens) == string


def test_bytes_replace_what_is_broken():
  assert tokenizer.Bytes().decode(np.array([0xC3, 65])) == "\ufffdA"


@settings(max_examples=200)
@given(string=TEXT)
def test_sentencepiece_decode_inverts_encode(trained, string):
  # Its own mark for a space comes back as a space.
  assert trained.decode(trained.encode(string)) == string.replace("\u2581", " ")


def test_sentencepiece_training_is_deterministic_and_shortens(trained):
  assert train().sha256 == trained.sha256
  assert trained.vocab_size == 400 and trained.eos == 2
  assert len(trained.encode(SHAKESPEARE)) < 0.7 * len(SHAKESPEARE)
  assert pickle.loads(pickle.dumps(trained)).sha256 == trained.sha256


def test_unknown_character_is_named(tmp_path):
  import sentencepiece

  prefix = str(tmp_path / "plain")
  sentencepiece.SentencePieceTrainer.Train(
    sentence_iterator=iter(["abc abc ab"] * 50),
    model_prefix=prefix,
    vocab_size=8,
    minloglevel=2,
  )
  plain = tokenizer.load(f"{prefix}.model")
  assert plain.decode(plain.encode("abc")) == "abc"
  with pytest.raises(ConfigError, match="plain.model has no token for 'é'"):
    plain.encode("abé")


def train_hugging_face(folder):
  """Writes a tokenizer.json of 300 tokens, with an end token."""
  tokenizers = pytest.importorskip("tokenizers")
  from tokenizers import decoders, models, pre_tokenizers, trainers

  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<end>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator([SHAKESPEARE], trainer)
  made.save(str(folder / "tokenizer.json"))
  settings = {"eos_token": {"content": "<end>"}}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def of_hugging_face(tmp_path_factory):
  folder = epath.Path(tmp_path_factory.mktemp("hf"))
  train_hugging_face(folder)
  return tokenizer.load(folder / "tokenizer.json")


def test_tokenizer_json_decode_inverts_encode(of_hugging_face):
  words = of_hugging_face
  string = "To be, or not\n\tÄpfel  日本"
  tokens = words.encode(string)
  assert words.decode(tokens) == string and len(tokens) < len(string.encode())
  assert words.vocab_size == 300 and words.name == "tokenizer.json"
  assert words.eos == 0
  assert list(words.encode("<end>")) == [0] and words.decode([0]) == "<end>"
  again = pickle.loads(pickle.dumps(words))
  assert (again.sha256, again.eos) == (words.sha256, words.eos)


def test_tokenizer_json_is_saved_with_its_end_token(of_hugging_face, tmp_path):
  tokenizer.save(of_hugging_face, epath.Path(tmp_path))
  again = tokenizer.load(tmp_path / "tokenizer.json")
  assert (again.sha256, again.eos) == (of_hugging_face.sha256, 0)
  (tmp_path / "tokenizer_config.json").unlink()
  assert tokenizer.load(tmp_path / "tokenizer.json").eos is None
  for name in ("tokenizer_config.json", "tokenizer.json"):
    (tmp_path / name).write_text("no JSON")
    with pytest.raises(ConfigError, match=f"{name} is not a tokenizer"):
      tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / name).unlink()


def test_tokenizer_json_says_what_stands_before_a_text(
  of_hugging_face, tmp_path
):
  from tokenizers import Tokenizer, processors

  made = Tokenizer.from_buffer(of_hugging_face.files["tokenizer.json"])
  found = []
  for template in ("$A <end>", "<end> $A", "<end> $A <end>"):
    made.post_processor = processors.TemplateProcessing(
      single=template, special_tokens=[("<end>", 0)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    words = tokenizer.load(tmp_path / "tokenizer.json")
    assert len(words.encode("a")) == 1
    found.append(words.bos)
  assert found == [None, 0, 0] and of_hugging_face.bos is None


def test_text_is_read_through_its_tokenizer(of_hugging_face, tmp_path):
  tokenizer.save(of_hugging_face, epath.Path(tmp_path))
  (tmp_path / "text.txt").write_text(SHAKESPEARE[:4000])
  config = DataConfig(
    path=str(tmp_path / "text.txt"),
    text=TextConfig(
      tokenizer=str(tmp_path / "tokenizer.json"), split=(0.5, 0.25)
    ),
    sequence_length=32,
  )
  found = text.load(config, 300)["in_order"]
  tokens = of_hugging_face.encode(SHAKESPEARE[:2000])
  np.testing.assert_array_equal(found[1]["tokens"], tokens[32:64])
  with pytest.raises(
    ConfigError, match="small for tokenizer.json: set it to 3"
  ):
    text.load(config, 299)


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_text_of_broken_bytes_is_refused(kind, trained):
  broken = b"ab\xff".decode("utf-8", errors="surrogateescape")
  with pytest.raises(ConfigError, match="not UTF-8: character 2"):
    (trained if kind == "trained" else tokenizer.Bytes()).encode(broken)


def test_unusable_models_are_refused(tmp_path):
  (tmp_path / "x.model").write_bytes(b"no model")
  with pytest.raises(ConfigError, match="x.model is not a SentencePiece model"):
    tokenizer.load(tmp_path / "x.model")
  with pytest.raises(ConfigError, match="cannot read the tokenizer"):
    tokenizer.load(tmp_path / "none.model")
  with pytest.raises(
    ConfigError, match="5000 tokens: Vocabulary size too high"
  ):
    tokenizer.train(["a b"], 5000)
