"""What holds for every sequence layer, with and without a CMS."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.config import CMSConfig, RopeScaling
from hope_jax.config.layers import LAYERS
from hope_jax.models import language_model, layers
from tests.support.jit import fast_jit
from tests.support.models import CMS, MEMORIES, B, T, init, make
from tests.support.tiers import slow_case

MOSTLY_MEMORIES = [
  slow_case(name) if name in ("titans", "dla", "ttt_linear") else name
  for name in MEMORIES
]
NAMES = tuple(LAYERS)


def check_causal(apply, tokens, full):
  after = apply(tokens.at[:, 21].add(1) % 31).logits
  np.testing.assert_array_equal(full[:, :21], after[:, :21])
  assert jnp.abs(full - after)[:, 21].max() > 1e-4
  assert jnp.abs(full - after)[:, 30:].max() > 1e-5


def check_prefill_and_decode_equal_the_full_pass(apply, tokens, full, state):
  out = apply(tokens[:, :29], state)
  logits = [out.logits]
  for t in range(29, T):
    out = apply(tokens[:, t : t + 1], out.state)
    logits.append(out.logits)
  np.testing.assert_allclose(
    jnp.concatenate(logits, axis=1), full, atol=2e-5, rtol=1e-4
  )


def check_documents_do_not_see_each_other(apply, tokens):
  documents = (jnp.arange(T) >= 16).astype(jnp.int32)[None].repeat(B, 0)
  packed = apply(tokens, documents).logits
  apart = apply(jnp.roll(tokens, -16, axis=1)).logits
  np.testing.assert_allclose(
    packed[:, 16:], apart[:, : T - 16], atol=2e-5, rtol=1e-4
  )


@pytest.mark.parametrize("name", NAMES)
def test_sequence_layer(name, subtests):
  """One test: what is compiled for one check serves the others."""
  config = make(name)
  model, params, tokens = init(config)
  apply = fast_jit(lambda *a: model.apply({"params": params}, *a))
  one = jnp.zeros((B, T), jnp.int32)
  packed = lambda tokens, documents=one: apply(tokens, None, documents)
  full = packed(tokens).logits
  with subtests.test("causal"):
    check_causal(packed, tokens, full)
  with subtests.test("prefill and decode"):
    state = language_model.init_state(config, B)
    check_prefill_and_decode_equal_the_full_pass(apply, tokens, full, state)
  with subtests.test("documents"):
    check_documents_do_not_see_each_other(packed, tokens)


GROUPS = dict(num_heads=4, num_kv_heads=2, tied_embeddings=False)


def test_groups_and_scaled_positions_go_on_from_a_state():
  scaling = RopeScaling(factor=4.0, original_context_length=8)
  config = make("transformer", **GROUPS, rope_scaling=scaling)
  model, params, tokens = init(config)
  assert params["lm_head"]["kernel"].shape == (16, 31)
  assert params["blocks"]["mixer"]["key"]["kernel"].shape == (2, 16, 8)
  apply = fast_jit(lambda *a: model.apply({"params": params}, *a))
  full = apply(tokens).logits
  state = language_model.init_state(config, B)
  assert state.mixer.keys.shape == (2, B, T, 2, 4)
  first = apply(tokens[:, :29], state)
  rest = apply(tokens[:, 29:], first.state).logits
  found = jnp.concatenate([first.logits, rest], axis=1)
  np.testing.assert_allclose(found, full, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["transformer", "hope_attention"])
def test_groups_are_heads_with_the_same_keys_and_values(name):
  config = make(name, **GROUPS)
  model, params, tokens = init(config)
  grouped = fast_jit(model.apply)({"params": params}, tokens).logits
  for part in ("key", "value"):
    for group in (part, f"conv_{part}"):
      kernel = params["blocks"]["mixer"][group]["kernel"]
      heads = kernel.reshape(*kernel.shape[:-1], 2, 4).repeat(2, axis=-2)
      wide = heads.reshape(*kernel.shape[:-1], 16)
      params["blocks"]["mixer"][group]["kernel"] = wide
  whole = dataclasses.replace(config, num_kv_heads=0)
  apply = fast_jit(language_model.LanguageModel(whole).apply)
  found = apply({"params": params}, tokens).logits
  np.testing.assert_allclose(found, grouped, atol=2e-5, rtol=1e-4)


def without_rates(params):
  """All inner learn rates exactly 0, everything else as it is."""

  def change(path, x):
    name = jax.tree_util.keystr(path)
    is_bias = "bias" in name and "gates" in name and "alpha" not in name
    if is_bias or "learn_rate" in name:
      return jnp.full_like(x, -1e9)
    return x

  return jax.tree_util.tree_map_with_path(change, params)


@pytest.mark.parametrize(
  ("name", "read"),
  [
    slow_case("titans", "token_pre"),
    ("titans", "chunk"),
    ("hope", "token_pre"),
    ("hope_attention", "token_pre"),
    slow_case("dla", "token_post"),
    slow_case("memora", "token_pre"),
    ("memora", "chunk"),
    slow_case("ttt_linear", "token_post"),
    ("ttt_mlp", "token_post"),
  ],
)
def test_rates_zero_is_the_twin(name, read):
  config = make(name)
  memory = dataclasses.replace(config.memory, read=read)
  config = dataclasses.replace(config, memory=memory)
  _, params, tokens = init(config)
  params = without_rates(params)
  twin = dataclasses.replace(config, inner_rates="off")
  logits = [
    jax.jit(language_model.LanguageModel(c).apply)(
      {"params": params}, tokens
    ).logits
    for c in (config, twin)
  ]
  if name in ("hope", "memora"):  # they read M_0 + D in one product
    np.testing.assert_allclose(*logits, atol=5e-7)
  else:
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("name", MOSTLY_MEMORIES)
def test_every_initial_state_and_gate_gets_a_gradient(name):
  """And the dynamics that training collects are finite scalars per layer."""
  model, params, tokens = init(make(name))

  def loss(params):
    output, sown = model.apply({"params": params}, tokens, mutable=["dynamics"])
    picked = jnp.take_along_axis(
      nn.log_softmax(output.logits[:, :-1]), tokens[:, 1:, None], axis=-1
    )
    return -jnp.mean(picked), sown

  gradient, sown = fast_jit(jax.grad(loss, has_aux=True))(params)
  assert jax.tree.leaves(sown)
  for leaf in jax.tree.leaves(sown):
    assert leaf.shape == (2,) and jnp.isfinite(leaf).all()
  mixer = gradient["blocks"]["mixer"]
  for group in ("initial", "gates"):
    for leaf_name, leaf in jax.tree_util.tree_leaves_with_path(mixer[group]):
      per_layer = jnp.linalg.norm(leaf.reshape(leaf.shape[0], -1), axis=1)
      assert (per_layer > 0).all(), (group, leaf_name)
  if name == "hope":
    boxes = mixer["initial"]["boxes_hidden"]  # [L, H, G F, K]
    per_box = boxes.reshape(2, 2, 5, 8, 8)
    assert (jnp.linalg.norm(per_box, axis=(3, 4)) > 0).all()
    for level in ("level_0", "level_1"):
      rates = gradient["blocks"]["cms"][level]["learn_rate"]
      assert (rates != 0).all()


@pytest.mark.parametrize(
  "levels",
  [
    ("memory", "alpha", "cms_1"),
    slow_case(("memory", "k", "v", "q", "eta", "alpha", "cms_0", "cms_1")),
  ],
)
def test_every_level_of_hope_changes_the_output(levels):
  config = make("hope")
  model, params, tokens = init(config)
  live = fast_jit(model.apply)({"params": params}, tokens).logits
  assert len(config.fast_levels) == 8
  for level in levels:
    frozen = dataclasses.replace(config, frozen_levels=(level,))
    off = fast_jit(language_model.LanguageModel(frozen).apply)(
      {"params": params}, tokens
    ).logits
    assert jnp.abs(live - off).max() > 1e-6, level


@pytest.mark.parametrize("name", ["transformer", slow_case("hope"), "rwkv7"])
def test_remat_and_dtype_keep_the_function(name):
  config = make(name)
  model, params, tokens = init(config)

  def gradient(**fields):
    changed = language_model.LanguageModel(
      dataclasses.replace(config, **fields)
    )
    loss = lambda p: jnp.sum(changed.apply({"params": p}, tokens).logits ** 2)
    return fast_jit(jax.value_and_grad(loss))(params)

  (plain, g), (saved, h) = gradient(), gradient(remat="full")
  np.testing.assert_allclose(plain, saved, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(h), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * jnp.abs(a).max())
  half = language_model.LanguageModel(
    dataclasses.replace(config, dtype="bfloat16")
  )
  logits = fast_jit(half.apply)({"params": params}, tokens).logits
  full = fast_jit(model.apply)({"params": params}, tokens).logits
  error = jnp.abs(logits - full).mean() / jnp.abs(full).mean()
  assert error < 3e-2


@pytest.mark.parametrize(
  "name", [slow_case("titans"), "titans_mac", slow_case("hope"), "memora"]
)
def test_piece_may_begin_with_a_new_document_anywhere(name):
  """A session goes on with another text, inside a chunk of its memories."""
  config = make(name)
  model, params, tokens = init(config)
  apply = fast_jit(lambda *a: model.apply({"params": params}, *a))
  state = language_model.init_state(config, B)
  _, state = apply(tokens[:, :11], state)
  ours = apply(tokens[:, 11:], state, jnp.ones((B, T - 11), jnp.int32)).logits
  # As if the chunks' first places had been empty.
  empty = jax.tree.map(lambda x: 0 * x if x.ndim > 1 else x, state)
  expected = apply(tokens[:, 11:], empty).logits
  np.testing.assert_allclose(ours, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
  ("name", "read_size"),
  [
    ("titans_mac", None),
    ("hope", 8),
    ("ttt_mlp", 8),
    *(slow_case("titans", length) for length in (None, 8)),
    slow_case("titans_mac", 8),
    slow_case("hope", None),
    slow_case("ttt_mlp", None),
  ],
)
def test_documents_in_pieces_equal_one_pass(name, read_size):
  """A long document goes on in the next piece; a new one starts anew."""
  cms = dataclasses.replace(CMS, chunk_lengths=(4, 20, 0))
  config = make(name, cms=cms if name == "hope" else CMSConfig())
  model, params, tokens = init(config)
  number = jnp.repeat(jnp.arange(3), jnp.array([8, 24, 8]))
  documents = number[None].repeat(B, 0)
  apply = fast_jit(lambda *a: model.apply({"params": params}, *a))
  whole = apply(tokens, None, documents).logits
  state = language_model.init_state(config, B, read_size)
  logits = []
  for first in range(0, T, 8):
    piece = slice(first, first + 8)
    numbers = documents[:, piece] - number[max(first - 1, 0)]
    out = apply(tokens[:, piece], state, numbers)
    logits.append(out.logits)
    state = out.state
  np.testing.assert_allclose(
    jnp.concatenate(logits, axis=1), whole, atol=2e-5, rtol=1e-4
  )


def test_state_for_whole_chunks_refuses_other_pieces():
  config = make("titans")
  model, params, tokens = init(config)
  state = language_model.init_state(config, B, 8)
  with pytest.raises(ValueError, match="6 tokens are not whole chunks of 4"):
    model.apply({"params": params}, tokens[:, :6], state)


def test_convolution_in_pieces_stops_at_documents():
  """Also where a document is shorter than the window."""
  conv = layers.ShortConv(4, jnp.float32)
  x = jax.random.normal(jax.random.key(0), (B, 12, 6))
  number = jnp.repeat(jnp.arange(5), jnp.array([5, 1, 2, 1, 3]))
  documents = number[None].repeat(B, 0)
  params = nn.unbox(conv.init(jax.random.key(1), x))
  whole, _ = conv.apply(params, x, None, documents)
  apart = [
    conv.apply(params, x[:, a:b])[0] for a, b in ((0, 5), (5, 6), (6, 8))
  ]
  np.testing.assert_allclose(
    whole[:, :8], jnp.concatenate(apart, axis=1), atol=1e-6
  )
  for size in (1, 2, 5):
    state, outputs = jnp.zeros((B, 3, 6)), []
    for first in range(0, 12, size):
      piece = slice(first, first + size)
      here = documents[:, piece] - number[max(first - 1, 0)]
      y, state = conv.apply(params, x[:, piece], state, here)
      outputs.append(y)
    np.testing.assert_allclose(
      jnp.concatenate(outputs, axis=1), whole, atol=1e-6
    )
