"""Generation against full passes, in batches and pieces."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax import generate
from hope_jax.config import ConfigError
from hope_jax.data import tokenizer
from hope_jax.inference import generation, texts
from hope_jax.inference.sampling import Sampling
from hope_jax.models import language_model
from tests.support.jit import fast_jit
from tests.support.models import init, larger, make
from tests.support.tiers import slow_case

GREEDY = Sampling(temperature=0.0)
PROMPTS = [np.array([5, 1, 7, 20, 30]), np.array([3]), np.arange(9) * 7 % 31]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
  monkeypatch.setattr(generation, "READ_SIZE", 4)
  monkeypatch.setattr(generation, "DECODE_STEPS", 3)


@pytest.fixture(
  scope="module", params=["transformer", slow_case("hope"), "samba"]
)
def model(request):
  config = make(request.param, num_layers=2 if request.param == "samba" else 1)
  _, params, _ = init(config)
  # So large that what comes next depends on all that went before.
  params = larger(params, 8, "mixer")
  return config, params


def run(model, prompts, **kwargs):
  config, params = model
  options = {"count": 8, "sampling": GREEDY, "vocab_size": 31} | kwargs
  return generation.generate(params, prompts, config=config, **options)


def test_greedy_equals_full_passes(model):
  config, params = model
  network = language_model.LanguageModel(config)
  apply = fast_jit(lambda x: network.apply({"params": params}, x[None]).logits)
  found = run(model, PROMPTS)
  for prompt, new in zip(PROMPTS, found, strict=True):
    assert len(new) == 8
    # Causal: what stands behind does not matter.
    tokens = jnp.zeros(20, jnp.int32)
    tokens = tokens.at[: len(prompt) + 8].set(jnp.concatenate([prompt, new]))
    wanted = jnp.argmax(apply(tokens)[0], axis=-1)
    np.testing.assert_array_equal(
      new, wanted[len(prompt) - 1 : len(prompt) + 7]
    )
  assert len({token for new in found for token in new.tolist()}) > 4


def test_batch_equals_each_prompt_alone(model):
  together = run(model, PROMPTS)
  for prompt, new in zip(PROMPTS, together, strict=True):
    np.testing.assert_array_equal(new, run(model, [prompt])[0])


def test_seed_sets_the_draws_and_count_cuts_them(model):
  options = {"sampling": Sampling()}
  drawn = lambda **kwargs: run(model, PROMPTS[:1], **options | kwargs)
  first = drawn(seed=1)[0]
  np.testing.assert_array_equal(first, drawn(seed=1)[0])
  assert (first != drawn(seed=2)[0]).any()
  np.testing.assert_array_equal(first[:6], drawn(seed=1, count=6)[0])


def test_generation_ends_when_all_are_over(model):
  seen = run(model, PROMPTS, is_over=lambda tokens: len(tokens) >= 4)
  assert [len(tokens) for tokens in seen] == [6, 6, 6]


def test_attention_has_a_longest_context(model):
  config, _ = model
  if config.has_longest_context:
    with pytest.raises(ConfigError, match="49 tokens, but .*context_length=40"):
      run(model, PROMPTS, count=40)
  else:
    run(model, PROMPTS, count=40)


def test_state_grows_with_the_context_for_attention_only():
  size = lambda name, length: generation.state_bytes(
    make(name, context_length=length)
  )
  assert size("hope", 100) == size("hope", 1000)
  assert size("samba", 100) == size("samba", 1000)
  assert size("transformer", 1000) > 9 * size("transformer", 100)


@pytest.mark.parametrize(
  ("text", "stop", "expected"),
  [
    ("abc", [], ("abc", False)),
    ("abcab", ["ca"], ("ab", True)),
    ("abcab", ["b", "c"], ("a", True)),
  ],
)
def test_cut_ends_before_the_first_stop(text, stop, expected):
  bytes_ = tokenizer.Bytes()
  assert texts.cut(bytes_.encode(text), bytes_, stop) == expected


def test_cut_ends_at_the_end_token():
  bytes_ = tokenizer.Bytes()
  ends = dataclasses.make_dataclass("Ends", [("eos", int)], bases=(object,))
  ends.decode = staticmethod(bytes_.decode)
  tokens = bytes_.encode("abXcd")
  assert texts.cut(tokens, ends(ord("X")), []) == ("ab", True)


PROBABILITY = np.array([0.05, 0.4, 0.1, 0.3, 0.15])


@pytest.mark.parametrize(
  ("sampling", "kept"),
  [
    (Sampling(), {0, 1, 2, 3, 4}),
    (Sampling(temperature=0.0), {1}),
    (Sampling(top_k=2), {1, 3}),
    (Sampling(top_k=99), {0, 1, 2, 3, 4}),
    (Sampling(top_p=0.39), {1}),
    (Sampling(top_p=0.6), {1, 3}),
    (Sampling(top_p=0.8), {1, 3, 4}),
    (Sampling(top_k=3, top_p=0.9), {1, 3, 4}),
    (Sampling(top_k=2, top_p=0.5), {1}),
  ],
)
def test_draw_keeps_the_likeliest(sampling, kept):
  keys = jax.random.split(jax.random.key(0), 3000)
  logits = jnp.log(jnp.asarray(PROBABILITY, jnp.float32))
  drawn = jax.vmap(lambda key: generation.draw(key, logits, sampling))(keys)
  counts = np.bincount(drawn, minlength=5)
  assert set(np.nonzero(counts)[0]) == kept
  if sampling.temperature:
    want = np.where(np.isin(np.arange(5), list(kept)), PROBABILITY, 0)
    np.testing.assert_allclose(counts / 3000, want / want.sum(), atol=0.03)


def test_draw_temperature_sharpens():
  keys = jax.random.split(jax.random.key(0), 3000)
  logits = jnp.log(jnp.asarray(PROBABILITY, jnp.float32))
  drawn = jax.vmap(lambda key: generation.draw(key, logits, Sampling(0.5)))(
    keys
  )
  want = PROBABILITY**2 / (PROBABILITY**2).sum()
  counts = np.bincount(drawn, minlength=5)
  np.testing.assert_allclose(counts / 3000, want, atol=0.03)


ONE_MODEL = pytest.mark.parametrize("model", ["transformer"], indirect=True)


@ONE_MODEL
def test_draws_differ_between_blocks(model):
  config, params = model
  silent = jax.tree.map(jnp.zeros_like, params)  # all tokens equally likely
  (new,) = run(
    (config, silent), PROMPTS[:1], count=30, sampling=Sampling(), seed=3
  )
  blocks = {tuple(block) for block in new.reshape(10, 3).tolist()}
  assert len(blocks) == 10
  assert len(set(new.tolist())) > 10  # nor are those of a block the same


@ONE_MODEL
def test_draws_depend_on_the_number_of_a_sequence(model):
  drawn = lambda numbers: [
    new.tolist()
    for new in run(
      model, PROMPTS[:1] * len(numbers), sampling=Sampling(), numbers=numbers
    )
  ]
  first, second, third = drawn([4, 4, 7])
  assert first == second != third
  assert drawn([7]) == [third]


@ONE_MODEL
def test_no_token_beyond_the_vocabulary_is_drawn(model):
  options = {"sampling": Sampling(2.0), "vocab_size": 3}
  found = np.concatenate(run(model, PROMPTS, **options))
  assert set(found.tolist()) == {0, 1, 2}


@ONE_MODEL
def test_sequences_go_on_until_the_last_is_over(model):
  first = run(model, PROMPTS, count=3)
  assert (first[0] != first[2]).any()
  is_over = lambda tokens: (tokens[:3] == first[0]).all()
  found = run(model, PROMPTS, is_over=is_over)
  assert [len(tokens) for tokens in found] == [8, 8, 8]


def test_prompts_are_lines(tmp_path):
  file = tmp_path / "prompts.txt"
  file.write_bytes("a\x0cb\u2028c\r\n\nd\x85e\n".encode())
  assert generate.read_prompts(str(file)) == ["a\x0cb\u2028c", "", "d\x85e"]


@ONE_MODEL
def test_logits_that_are_not_finite_are_no_text(model):
  config, params = model
  bad = jax.tree.map(lambda x: x * jnp.nan, params)
  with pytest.raises(ConfigError, match="logits are not finite"):
    run((config, bad), PROMPTS[:1], count=2)
