import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hope_jax.config import ConfigError, DataConfig
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
