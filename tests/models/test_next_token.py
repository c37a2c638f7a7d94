"""CMS levels that learn by the next-token loss: a loop of `jax.grad` steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from hope_jax.config import CMSConfig, ConfigError, MemoryConfig, ModelConfig
from hope_jax.models import (
  cms,
  language_model,
  next_token,
  next_token_levels,
)
from hope_jax.models.fast_state import BlockState
from tests.support.jit import fast_jit
from tests.support.tiers import slow_case

B, T, V, LAYERS = 2, 22, 11, 3
CHUNKS, LEARNING = (4, 8), 2
CMS = CMSConfig(
  hidden=(6, 6, 7),
  chunk_lengths=(*CHUNKS, 0),
  signal="next_token",
  learning_share=0.67,
  initial_learn_rate=1.0,
  error_clip=0.4,
)
CONFIG = ModelConfig(
  sequence_layer="transformer",
  vocab_size=V,
  width=8,
  num_layers=LAYERS,
  num_heads=2,
  ffn_hidden=18,
  context_length=T,
  cms=CMS,
  memory=MemoryConfig(chunk_length=2, projection_chunk_length=8, adaptive=()),
)


def make(**fields):
  names = {field.name for field in dataclasses.fields(CMSConfig)}
  changed = {k: fields.pop(k) for k in list(fields) if k in names}
  return dataclasses.replace(
    CONFIG, cms=dataclasses.replace(CMS, **changed), **fields
  )


@functools.cache
def init(config):
  model = language_model.LanguageModel(config)
  tokens = jax.random.randint(jax.random.key(1), (B, T), 0, V)
  params = nn.unbox(fast_jit(model.init)(jax.random.key(0), tokens))["params"]
  # Large enough that a step of the levels shows.
  return (
    model,
    jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, params),
    tokens,
  )


def jitted(model):
  return fast_jit(functools.partial(language_model.forward, model))


def blocks_of(config, params):
  """Per fast level: (its rates' parameters, the hidden width of its block)."""
  group, hidden = params["blocks"]["cms"], config.cms.hidden
  if config.cms.connection != "nested":
    return [(group[f"level_{i}"], hidden[i]) for i in range(len(CHUNKS))]
  group = group["levels"]
  names = ("learn_rate", "forget")
  return [
    ({n: group[f"{n}_{i}"] for n in names if f"{n}_{i}" in group}, sum(hidden))
    for i in range(len(CHUNKS))
  ]


def given(fast):
  """D of all layers, as the model takes it."""
  levels = {}
  for i, weights in enumerate(fast):
    missing = jnp.zeros((LAYERS - LEARNING, *weights[0].shape[1:]))[..., :1, :1]
    padded = [
      jnp.concatenate(
        [jnp.broadcast_to(missing, (LAYERS - LEARNING, *w.shape[1:])), w]
      )
      for w in weights
    ]
    levels[f"cms_{i}"] = cms.GivenLevel(cms.cms.LevelWeights(*padded), None)
  return levels


def stepped(weights, sums, block, i, cfg):
  """alpha^C D - eta g / max(1, |g| / clip), |g| of a sequence."""
  mean = [g * CHUNKS[0] / CHUNKS[i] for g in sums]
  eta = jax.nn.softplus(block["learn_rate"][-LEARNING:])
  alpha = jnp.ones(LEARNING)
  if cfg.half_life:
    alpha = jnp.exp(-CHUNKS[i] * jax.nn.softplus(block["forget"][-LEARNING:]))
  factor = jnp.ones(B)
  if cfg.error_clip:
    norm = [sum(jnp.sum(g[:, b] ** 2) for g in mean) ** 0.5 for b in range(B)]
    factor = 1 / jnp.maximum(1, jnp.stack(norm) / cfg.error_clip)
  return [
    jnp.einsum("l,lbij->lbij", alpha, w)
    - jnp.einsum("l,b,lbij->lbij", eta, factor, g)
    for w, g in zip(weights, mean, strict=True)
  ]


def loop(config, model, params, tokens):
  """Chunk by chunk: read, then one step of `jax.grad` for every level that is
  due, at the weights that the chunk was read with."""
  blocks, size = blocks_of(config, params), CHUNKS[0]
  fast = []
  for _, hidden in blocks:
    shapes = (8, hidden), (8, hidden), (hidden, 8)
    fast.append([jnp.zeros((LEARNING, B, *shape)) for shape in shapes])
  sums = jax.tree.map(jnp.zeros_like, fast)

  def read(params, fast, mixer, part):
    state = BlockState(mixer, {}, given=given(fast))
    output = model.apply({"params": params}, part, state=state)
    return output.logits, output.state.mixer

  def inner_loss(fast, params, mixer, part, targets):
    logits, _ = read(params, fast, mixer, part)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(jnp.mean(loss, axis=1))

  read_chunk, gradient = jax.jit(read), jax.jit(jax.grad(inner_loss))
  mixer = before = language_model.init_state(config, B).mixer
  outputs = []
  for first in range(0, tokens.shape[1], size):
    if first:
      last = slice(first - size, first)
      targets = tokens[:, first - size + 1 : first + 1]
      found = gradient(fast, params, before, tokens[:, last], targets)
      if config.cms.outer_order == 1:
        found = jax.lax.stop_gradient(found)
      sums = jax.tree.map(jnp.add, sums, found)
      for i, (block, _) in enumerate(blocks):
        if first % CHUNKS[i] == 0:
          fast[i] = stepped(fast[i], sums[i], block, i, config.cms)
          sums[i] = jax.tree.map(jnp.zeros_like, sums[i])
      if config.cms.connection == "nested" and first % CHUNKS[1] == 0:
        fast[0] = list(fast[1])
    before = mixer
    part = tokens[:, first : first + size]
    logits, mixer = read_chunk(params, fast, mixer, part)
    outputs.append(logits)
  return jnp.concatenate(outputs, axis=1)


@pytest.mark.parametrize(
  "fields",
  [
    slow_case({}),
    {"error_clip": 0.0, "half_life": 20.0, "tied_embeddings": False},
    {"connection": "nested"},
    slow_case({"connection": "independent"}),
  ],
  ids=str,
)
def test_equals_loop_of_gradient_steps(fields):
  config = make(**fields)
  model, params, tokens = init(config)
  ours = jitted(model)(params, tokens).logits
  expected = loop(config, model, params, tokens)
  still = fast_jit(model.apply)({"params": params}, tokens).logits
  assert jnp.abs(ours - still)[:, 8:].max() > 1e-2  # it does learn
  np.testing.assert_allclose(ours, expected, atol=2e-5)


# Documents of two sequences: one goes on with that of the state, the other does
# not; they end inside chunks and with them.
LENGTHS = (6, 6, 10), (4, 6, 12)
NUMBERS = np.stack(
  [np.repeat([0, 1, 2], LENGTHS[0]), np.repeat([3, 4, 5], LENGTHS[1])]
)


@pytest.mark.parametrize(
  ("layer", "fields"),
  [
    ("titans", {"learning_share": 0.1}),
    ("titans", {"half_life": 20.0}),
    slow_case("titans", {"connection": "nested"}),
    slow_case("transformer", {"connection": "independent"}),
    slow_case("transformer", {"frozen_levels": ("cms_1",)}),
    slow_case("titans", {"learning_share": 1.0, "chunk_lengths": (2, 8, 0)}),
  ],
  ids=str,
)
def test_training_form_equals_streaming_form(layer, fields):
  """All tokens in one call against one token at a time: logits and state, after
  a first piece that was carried over."""
  config = make(sequence_layer=layer, context_length=2 * T, **fields)
  model, params, tokens = init(config)
  step = fast_jit(
    lambda state, part, documents: language_model.forward(
      model, params, part, state=state, documents=documents
    )
  )
  first = tokens[:, :8]
  before = language_model.init_state(config, B)
  before = step(before, first, jnp.zeros_like(first)).state
  logits, state = step(before, tokens, NUMBERS)
  one, outputs, document = before, [], 0
  for t in range(T):
    number = NUMBERS[:, t : t + 1]
    output = step(one, tokens[:, t : t + 1], number - document)
    one, document = output.state, number
    outputs.append(output.logits)
  np.testing.assert_allclose(jnp.concatenate(outputs, 1), logits, atol=1e-5)
  compare = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
  # Places after the last token of a chunk are of no account.
  pending = int(one.pending)
  for ours in (state, one):
    assert int(ours.pending) == (8 + T - 1) % config.cms.fast_lengths[0] + 1
  kept = lambda x: dataclasses.replace(
    x, tokens=x.tokens[:, :pending], stream=x.stream[:, :, :pending]
  )
  jax.tree.map(compare, kept(state), kept(one))


def test_piece_without_numbers_goes_on_with_the_last_document():
  """Wherever it began: inside of a chunk, or in the one before."""
  config = make(sequence_layer="titans", learning_share=0.1)
  model, params, tokens = init(config)
  step = fast_jit(
    lambda state, part, documents: language_model.forward(
      model, params, part, state=state, documents=documents
    )
  )
  for sizes in ((10, 2, 4, 4), (4, 2, 2, 4)):
    numbers = jnp.broadcast_to(jnp.arange(sizes[0]) // 2, (B, sizes[0]))
    before = language_model.init_state(config, B)
    ours = theirs = step(before, tokens[:, : sizes[0]], numbers).state
    first = sizes[0]
    for size in sizes[1:]:
      part = tokens[:, first : first + size]
      logits, ours = step(ours, part, None)
      expected, theirs = step(theirs, part, jnp.zeros_like(part))
      np.testing.assert_allclose(logits, expected, atol=1e-5)
      first += size
    compare = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    jax.tree.map(compare, ours, theirs)


@pytest.mark.parametrize(
  ("layer", "pieces"),
  [("transformer", (1,) * T), slow_case("titans", (4, 8, 2, 2, 4, 2))],
)
def test_in_pieces_equals_one_pass(layer, pieces):
  config = make(sequence_layer=layer)
  model, params, tokens = init(config)
  whole = jitted(model)(params, tokens).logits
  state, outputs, first, step = (
    language_model.init_state(config, B),
    [],
    0,
    fast_jit(
      lambda params, state, part: language_model.forward(
        model, params, part, state=state
      )
    ),
  )
  for size in pieces:
    output = step(params, state, tokens[:, first : first + size])
    state, first = output.state, first + size
    outputs.append(output.logits)
  np.testing.assert_allclose(jnp.concatenate(outputs, 1), whole, atol=2e-5)


def test_changes_at_its_period_and_where_it_learns():
  config = make(frozen_levels=())
  model, params, tokens = init(config)
  step = fast_jit(
    lambda state, part: language_model.forward(model, params, part, state=state)
  )
  state = language_model.init_state(config, B)
  for t in range(T):
    before = {name: x.weight.up for name, x in state.levels.items()}
    state = step(state, tokens[:, t : t + 1]).state
    for name, length in zip(before, CHUNKS, strict=True):
      changed = bool(jnp.any(before[name] != state.levels[name].weight.up))
      assert changed == (t > 0 and t % length == 0), (name, t)
  assert state.levels["cms_0"].weight.up.shape[:2] == (2, B)


def test_frozen_level_is_not_written():
  config = make(frozen_levels=("cms_0",))
  model, params, tokens = init(config)
  state = language_model.init_state(config, B)
  forward = fast_jit(
    lambda state: language_model.forward(
      model, params, tokens[:, :20], state=state
    )
  )
  state = forward(state).state
  assert not any(jnp.any(x) for x in state.levels["cms_0"].weight)
  assert all(jnp.any(x) for x in state.levels["cms_1"].weight)


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"frozen_levels": ("cms_0", "cms_1")},
    {"inner_rates": "off", "connection": "nested"},
  ],
  ids=str,
)
def test_twin_is_the_plain_model(fields):
  config = make(**(fields or {"inner_rates": "off"}))
  model, params, tokens = init(config)
  ours = jitted(model)(params, tokens).logits
  plain = fast_jit(model.apply)({"params": params}, tokens).logits
  np.testing.assert_array_equal(ours, plain)
  state, parts = language_model.init_state(config, B), []
  step = fast_jit(
    lambda part, state: language_model.forward(model, params, part, state=state)
  )
  for part in jnp.split(tokens, 2, axis=1):
    output = step(part, state)
    parts, state = [*parts, output.logits], output.state
  np.testing.assert_allclose(jnp.concatenate(parts, 1), plain, atol=1e-5)


@pytest.mark.parametrize("order", [2, slow_case(1)])
def test_outer_gradient_goes_through_the_inner_one(order):
  """Second order: the gradient of the loop; first: of one whose steps are
  constants."""
  config = make(outer_order=order)
  model, params, tokens = init(config)
  tokens = tokens[:, :12]
  weights = jax.random.normal(jax.random.key(2), (*tokens.shape, V))

  def gradient(run):
    return jax.grad(lambda params: jnp.sum(weights * run(params)))

  ours = lambda params: language_model.forward(model, params, tokens).logits
  found = fast_jit(gradient(ours))(params)
  plain = lambda params: loop(config, model, params, tokens)
  expected = fast_jit(gradient(plain))(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * jnp.abs(b).max()),
    found,
    expected,
  )


@pytest.mark.parametrize(
  ("layer", "share", "order"),
  [
    ("transformer", 0.1, 1),
    slow_case("titans", 0.1, 2),
    slow_case("titans", 0.67, 2),
  ],
)
def test_outer_gradient_does_not_depend_on_pieces(layer, share, order):
  """That through a scan of chunks is that through updates between pieces."""
  config = make(sequence_layer=layer, learning_share=share, outer_order=order)
  model, params, tokens = init(config)
  tokens = tokens[:, :12]
  weights = jax.random.normal(jax.random.key(2), (*tokens.shape, V))
  forward = functools.partial(language_model.forward, model)

  def whole(params):
    return jnp.sum(weights * forward(params, tokens).logits)

  def in_pieces(params):
    state, outputs = language_model.init_state(config, B, 4), []
    for part in jnp.split(tokens, 3, axis=1):
      logits, state = forward(params, part, state=state)
      outputs.append(logits)
    return jnp.sum(weights * jnp.concatenate(outputs, axis=1))

  found = fast_jit(jax.grad(whole))(params)
  expected = fast_jit(jax.grad(in_pieces))(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * jnp.abs(b).max()),
    found,
    expected,
  )


@pytest.mark.parametrize("order", [1, 2])
def test_first_order_takes_the_inner_gradient_for_a_constant(order):
  config = make(outer_order=order, error_clip=0.0)
  state = language_model.init_state(config, B)
  state = dataclasses.replace(
    state, stream=jnp.ones_like(state.stream), tokens=state.tokens + 1
  )
  # Of both levels, in all layers.
  rates = {"learn_rate": jnp.zeros(LAYERS)}
  params = {"blocks": {"cms": {"level_0": rates, "level_1": rates}}}

  def written(scale):
    def finish(_, stream, levels, *__):
      maps = levels["cms_0"].weight.gate[0]
      return scale * jnp.einsum("BTD,BDF->BTF", stream, maps), None

    parts = next_token.Parts(None, None, params, finish)
    after = next_token._learn(
      parts, state, state.tokens[:, 0], state.document, config
    )
    return jnp.sum(jnp.abs(after.levels["cms_0"].weight.gate))

  value, slope = jax.value_and_grad(written)(1.0)
  assert value > 0.1 and (slope == 0 if order == 1 else slope > 0.1)


def test_levels_start_at_their_half_life_and_rate():
  config = make(error_clip=0.0, half_life=20.0, tied_embeddings=False)
  blocks = blocks_of(config, init(config)[1])
  for block, _ in blocks:
    log_retention = -jax.nn.softplus(block["forget"])
    np.testing.assert_allclose(np.log(0.5) / log_retention, 20, rtol=1e-5)
    rate = jax.nn.softplus(block["learn_rate"])
    np.testing.assert_allclose(rate, 1, rtol=1e-5)


@pytest.mark.parametrize(
  ("share", "layers", "count"),
  [(0.1, 3, 1), (0.6, 3, 2), (0.25, 12, 3), (1, 3, 3)],
)
def test_learning_share_is_rounded_to_layers(share, layers, count):
  config = make(learning_share=share, num_layers=layers)
  assert next_token_levels.learning_layers(config) == count


def test_documents_do_not_leak():
  """A document from a chunk's border on reads as if it stood alone; from
  inside a chunk, it does not depend on what was before."""
  config = make(sequence_layer="titans")
  model, params, tokens = init(config)
  run = fast_jit(
    lambda tokens, documents: (
      language_model.forward(model, params, tokens, documents=documents).logits
    )
  )
  for border in (8, 10):
    number = (jnp.arange(T) >= border).astype(jnp.int32)
    documents = jnp.broadcast_to(number, (B, T))
    packed = run(tokens, documents)
    other = run((tokens + (documents == 0)) % V, documents)
    np.testing.assert_allclose(packed[:, border:], other[:, border:], atol=1e-6)
    if border % CHUNKS[1] == 0:
      # What follows does not count, and so needs no program of its own.
      followed = jnp.roll(tokens, -border, axis=1)
      alone = run(followed, jnp.zeros_like(documents))[:, : T - border]
      np.testing.assert_allclose(packed[:, border:], alone, atol=2e-5)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"chunk_lengths": (3, 6, 0)}, "power of two"),
    ({"chunk_lengths": (4, 6, 0)}, "4 does not divide 6"),
    ({"outer_order": 3}, "all: 1, 2"),
    ({"learning_share": 1.5}, "must not be above 1"),
  ],
)
def test_bad_configs(fields, message):
  with pytest.raises(ConfigError, match=message):
    make(**fields)
