"""Whole models against their equations, one token or one
head at a time; the memories are the token loops of `tests.memory.oracle`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.memory.self_modifying import Boxes
from hope_jax.models import linear
from tests.support import baselines, oracle
from tests.support.jit import fast_jit
from tests.support.models import CMS, init, make
from tests.support.tiers import slow_case

MIXER_VALUE = dataclasses.replace(CMS, value="mixer_value")
MIXER_PAIR = dataclasses.replace(CMS, value="mixer_pair", half_life=20.0)
NESTED = dataclasses.replace(CMS, connection="nested")
INDEPENDENT = dataclasses.replace(CMS, connection="independent")


def rms(x, scale=1.0):
  return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def unit(x):
  return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def slow_projection(p, name, n):
  """n W, then y_t = sum_j kernel_j x_{t-j} along axis 0."""
  x = n @ p[name]["kernel"]
  if f"conv_{name}" not in p:
    return x
  kernel = p[f"conv_{name}"]["kernel"]
  shifted = [jnp.pad(x, ((j, 0), (0, 0)))[: len(x)] for j in range(len(kernel))]
  return sum(tap * row for tap, row in zip(kernel, shifted, strict=True))


def rotary(x, base):
  """Turns pair (i, i + K/2) of position t by the angle t base^(-2 i / K)."""
  real, imaginary = jnp.split(x, 2, axis=1)
  half = real.shape[1]
  angle = jnp.outer(jnp.arange(len(x)), base ** (-jnp.arange(half) / half))
  turned = (real + 1j * imaginary) * jnp.exp(1j * angle)
  return jnp.hstack([turned.real, turned.imag])


def attention(p, n, config):
  """Causal softmax attention: y [T, D], keys and values."""
  projected = [slow_projection(p, x, n) for x in ("query", "key", "value")]
  outputs = []
  for q, k, v in zip(
    *(jnp.split(x, config.num_heads, axis=1) for x in projected), strict=True
  ):
    q, k = rotary(q, config.rope_base), rotary(k, config.rope_base)
    weights = jnp.tril(jnp.exp(q @ k.T / q.shape[1] ** 0.5))
    outputs.append(weights @ v / weights.sum(axis=1, keepdims=True))
  return jnp.hstack(outputs) @ p["output"]["kernel"], *projected[1:]


def memory_head(weights, boxes, vectors, logits, cfg):
  """Eq. 83-90 for one head: what the memory answers, k and v."""
  (q, k, v), beta = vectors, logits.get("beta", jnp.zeros(len(vectors[0])))
  at = dict(logits, beta=jax.nn.sigmoid(beta))
  if boxes:
    slow = {"k": k, "v": v, "q": q, **at}
    (k, v, q, eta, alpha), *_ = oracle.run_boxes(boxes, slow, cfg)
  else:
    k, q = unit(k), unit(q)
    eta = jax.nn.softplus(at["eta"])
    alpha = jnp.exp(-jax.nn.softplus(at["alpha"]))
  if cfg.activation == "gelu":  # Memora
    o = baselines.run_memora(weights, k, v, q, (eta, alpha), cfg)
    return o, k, v
  o, *_ = oracle.run_memory(weights, k, v, q, (eta, alpha, at["beta"]), cfg)
  return o, k, v


def memory_layer(p, n, config):
  """Slow projections and gates, the memory of every head, the read-out."""
  cfg, initial, gates = config.memory, p["initial"], p["gates"]
  by_head = lambda x: jnp.stack(jnp.split(x, config.num_heads, axis=1))
  vectors = [
    by_head(jax.nn.silu(slow_projection(p["projections"], name, n)))
    for name in ("query", "key", "value")
  ]
  logits = {}
  for gate in ("eta", "alpha", "beta")[: 2 + (cfg.momentum != "none")]:
    logits[gate] = (gates[f"{gate}_bias"] + n @ gates[gate]["kernel"]).T
  if config.inner_rates == "off":
    logits["eta"] -= 1e9
  boxes = {}
  if cfg.adaptive:
    kinds = ("hidden", "projection", "gate")
    boxes = Boxes(*(initial[f"boxes_{kind}"] for kind in kinds))
    boxes = oracle.box_weights(boxes, cfg)
  weights = {name: initial[f"memory_{name}"] for name in ("hidden", "output")}
  run = jax.vmap(functools.partial(memory_head, cfg=cfg))
  outputs, *made = run(weights, boxes, vectors, logits)
  o = jnp.hstack(list(rms(outputs, p["readout"]["norm_scale"])))
  gate = jax.nn.silu(n @ p["readout"]["gate"]["kernel"])
  y = (o * gate) @ p["readout"]["output"]["kernel"]
  return y, *(jnp.hstack(list(x)) for x in made)


def convolved(p, x):
  """A causal convolution with a bias."""
  identity = {"x": {"kernel": jnp.eye(len(x[0]))}, "conv_x": p}
  return slow_projection(identity, "x", x) + p["bias"]


def ttt_layer(p, n, config, x):
  """TTT: q and k share a projection, rotary inside a mini-batch: y, k, v."""
  first = convolved(p["conv_block"], n)
  n = rms(x + first, p["norm"]["scale"])
  chunk, base = config.memory.chunk_length, config.rope_base
  i, r, shared = p["initial"], p["readout"], n @ p["query_key"]["kernel"]
  split = lambda x: jnp.stack(jnp.split(x, config.num_heads, axis=1))

  def turned(name):
    x = convolved(p[f"conv_{name}"], shared)
    parts = [x[j : j + chunk] for j in range(0, len(x), chunk)]
    heads = [[rotary(h, base) for h in split(part)] for part in parts]
    return jnp.stack([jnp.concatenate(h) for h in zip(*heads, strict=True)])

  value = n @ p["value"]["kernel"]
  rate = jax.nn.sigmoid(n @ p["gates"]["kernel"] + p["gates"]["bias"]).T
  rate *= config.memory.initial_learn_rate / config.head_dim
  weights = {
    name: (i[f"memory_{name}"], i[f"bias_{name}"])
    for name in ("hidden", "output")
    if f"memory_{name}" in i
  }
  run = lambda *a: baselines.run_ttt(*a, i["position"], chunk)
  norm, k = (i["norm_scale"], i["norm_bias"]), turned("key")
  o = jax.vmap(run)(weights, norm, k, split(value), turned("query"), rate)
  o = jax.vmap(baselines.layer_norm)(jnp.hstack(list(o)))
  gate = jax.nn.gelu(n @ r["gate"]["kernel"])
  y = (o * r["norm_scale"] + r["norm_bias"]) * gate
  return first + y @ r["output"]["kernel"], jnp.hstack(list(k)), value


def linear_head(name, q, k, v, at):
  """One head of a linear baseline, one token after the other."""
  size = k.shape[1]

  def token(state, x):
    q, k, v, at = x
    if name == "mamba2":
      decay = jnp.exp(-at["s"] * at["rate"])
      state = decay * state + at["s"] * jnp.outer(v, k)
      return state, state @ q + at["skip"] * v
    if name == "retnet":
      state = at["gamma"] * state + jnp.outer(v, k)
    elif name == "deltanet":
      state = state + at["b"] * jnp.outer(v - state @ k, k)
    elif name == "gated_deltanet":
      state = at["alpha"] * state
      state = state + at["b"] * jnp.outer(v - state @ k, k)
    else:
      feedback = at["c"] * at["b"] * jnp.outer(k, k)
      state = state @ (at["alpha"] * jnp.eye(size) - feedback)
      state = state + at["b"] * jnp.outer(v, k)
      q = unit(q - at["d"] * at["c"] * k)
    return state, state @ q / size**0.5

  return jax.lax.scan(token, jnp.zeros((v.shape[1], size)), (q, k, v, at))[1]


def mamba2_layer(p, n, config):
  """SSD with one B and C for heads of 64, twice the width: y."""
  heads, r = 2 * config.width // 64, p["readout"]
  c, b, x = (
    jax.nn.silu(slow_projection(p, name, n) + p[f"conv_{name}"]["bias"])
    for name in ("query", "key", "value")
  )
  g, tile = p["gates"], lambda x: jnp.tile(x[:, None], (1, len(n)))
  at = {
    "s": jax.nn.softplus(n @ g["step"]["kernel"] + g["step_bias"]).T,
    "rate": tile(jnp.exp(g["log_decay_rate"])),
    "skip": tile(r["norm_skip"]),
  }
  run = jax.vmap(functools.partial(linear_head, "mamba2"), (None, None, 0, 0))
  y = jnp.hstack(list(run(c, b, jnp.stack(jnp.split(x, heads, 1)), at)))
  y = rms(y * jax.nn.silu(n @ r["gate"]["kernel"]), r["norm_scale"])
  return y @ r["output"]["kernel"], None, None


def linear_layer(p, n, config):
  """RetNet, DeltaNet, Gated DeltaNet or Comba: y, and no keys and values."""
  name, tokens = config.sequence_layer, len(n)
  heads = config.num_heads
  if name in ("gated_deltanet", "comba"):
    heads = max(1, 3 * heads // 4)
  slow = [slow_projection(p, x, n) for x in ("query", "key", "value")]
  if config.conv_window:
    slow = map(jax.nn.silu, slow)
  q, k, v = (jnp.stack(jnp.split(x, heads, axis=1)) for x in slow)
  if name == "retnet":
    turn = jax.vmap(functools.partial(rotary, base=config.rope_base))
    q, k = turn(q), turn(k)
    gamma = 1 - 2.0 ** -jnp.arange(5, 5 + heads)
    at = {"gamma": jnp.tile(gamma[:, None], (1, tokens))}
  else:
    q, k, g = unit(q), unit(k), p["gates"]
    at = {"b": jax.nn.sigmoid(n @ g["rate"]["kernel"]).T}
  if name in ("gated_deltanet", "comba"):
    step = jax.nn.softplus(n @ g["step"]["kernel"] + g["step_bias"]).T
    at["alpha"] = jnp.exp(-jnp.exp(g["log_decay_rate"])[:, None] * step)
  if name == "comba":
    per_head = {"c": jax.nn.sigmoid(g["feedback"]), "d": g["correction"]}
    at |= {x: jnp.tile(y[:, None], (1, tokens)) for x, y in per_head.items()}
  run = jax.vmap(functools.partial(linear_head, name))
  outputs = run(q, k, v, at)
  if name == "retnet":
    outputs -= outputs.mean(axis=2, keepdims=True)
  y = jnp.hstack(list(rms(outputs, p["readout"]["norm_scale"])))
  if name != "deltanet":
    gate = jax.nn.sigmoid if name == "comba" else jax.nn.silu
    y = y * gate(n @ p["readout"]["gate"]["kernel"])
  return y @ p["readout"]["output"]["kernel"], None, None


def feed_forward(p, n):
  names = ("gate", "up", "down")
  return oracle.feed_forward([p[name]["kernel"] for name in names], n)


def continuum(p, x, mixed, config):
  """Eq. 71-74: levels in sequence or side by side, each with its own norm."""
  cfg, before = config.cms, x
  y, keys, value = mixed
  if cfg.value == "mixer_linear":
    value = y @ p["value"]["kernel"]
  if cfg.connection == "nested":
    keys = rms(keys) if cfg.value == "mixer_pair" else None
    return nested(p, x, rms(value), config, keys)
  for i, chunk_length in enumerate(cfg.chunk_lengths):
    is_chain = cfg.connection == "sequential"
    n = rms(x if is_chain else before, p[f"norm_{i}"]["scale"])
    level, share = p[f"level_{i}"], 1.0 if is_chain else p[f"share_{i}"]
    if not chunk_length:
      x = x + share * feed_forward(level, n)
      continue
    rate = jax.nn.softplus(level["learn_rate"])
    outputs, *_ = oracle.run_cms_level(
      [level[name] for name in ("gate", "up", "down")],
      n,
      rms(value),
      rate if config.inner_rates == "on" else 0.0,
      chunk_length,
      cfg.error_clip,
      alpha=alpha_of(level["forget"]) if cfg.half_life else 1.0,
      **({"keys": rms(keys)} if cfg.value == "mixer_pair" else {}),
    )
    x = x + share * outputs
  return x


def alpha_of(logit):
  return jnp.exp(-jax.nn.softplus(logit))


def nested(p, x, value, config, keys):
  """Eq. 72: all levels on one block."""
  cfg, level = config.cms, p["levels"]
  slow = [level[name] for name in ("gate", "up", "down")]
  scales = [p[f"norm_{i}"]["scale"] for i in range(len(cfg.hidden))]
  rules = [
    {
      "learn_rate": jax.nn.softplus(level[f"learn_rate_{i}"]),
      "alpha": 1.0,
      "chunk": chunk_length,
      "error_clip": cfg.error_clip,
    }
    for i, chunk_length in enumerate(cfg.fast_lengths)
  ]
  x, _ = oracle.run_cms_nested(slow, x, value, scales, rules, keys=keys)
  return x + oracle.feed_forward(slow, rms(x, scales[-1]))


def plain_model(params, tokens, config):
  """Logits [T, V] of one sequence."""
  mixer = memory_layer
  if config.has_attention:
    mixer = attention
  if config.sequence_layer in linear.VARIANTS:
    mixer = linear_layer
  if config.sequence_layer in ("mamba2", "ttt_linear", "ttt_mlp"):
    mixer = mamba2_layer if config.sequence_layer == "mamba2" else ttt_layer

  def block(x, p):
    beside = (x,) if mixer is ttt_layer else ()
    n = rms(x, p["norm_mixer"]["scale"])
    mixed = mixer(p["mixer"], n, config, *beside)
    x = x + mixed[0]
    if config.cms.hidden:
      return continuum(p["cms"], x, mixed, config), None
    if not config.ffn_hidden:
      return x, None
    return x + feed_forward(p["ffn"], rms(x, p["norm_ffn"]["scale"])), None

  embedding = params["embed"]["embedding"]
  x, _ = jax.lax.scan(block, embedding[tokens], params["blocks"])
  return rms(x, params["norm_out"]["scale"]) @ embedding.T


MOVED = "scale", "skip", "bias", "gates", "share", "forget", "learn_rate"
MOVED += ("position",)


def perturbed(params, seed=0):
  """Norm scales and gates off their start, where their place would not show."""
  rng = np.random.default_rng(seed)
  return jax.tree_util.tree_map_with_path(
    lambda path, x: (
      x + 0.3 * rng.normal(size=x.shape)
      if any(name in jax.tree_util.keystr(path) for name in MOVED)
      else x
    ),
    params,
  )


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    slow_case("transformer", {"conv_window": 0}),
    ("transformer", {"conv_window": 4}),
    ("titans", {}),
    slow_case("titans", {"inner_rates": "off"}),
    ("hope", {}),
    slow_case("hope", {"inner_rates": "off"}),
    slow_case("titans", {"cms": MIXER_PAIR}),
    ("hope_attention", {}),
    slow_case("hope_attention", {"cms": MIXER_VALUE}),
    ("hope_attention", {"cms": MIXER_PAIR}),
    ("hope_attention", {"cms": NESTED}),
    slow_case("hope_attention", {"cms": INDEPENDENT}),
    ("retnet", {"conv_window": 0}),
    ("deltanet", {}),
    ("gated_deltanet", {"num_heads": 4}),
    ("comba", {}),
    ("mamba2", {"ffn_hidden": 0, "width": 64}),
    ("dla", {}),
    ("memora", {}),
    ("ttt_linear", {}),
    ("ttt_mlp", {}),
    slow_case("ttt_mlp", {"cms": MIXER_PAIR}),
  ],
  ids=str,
)
def test_model_equals_its_equations(name, fields):
  config = make(name, **fields)
  with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
    model, params, tokens = init(config)
    params = perturbed(jax.tree.map(lambda x: jnp.asarray(x, float), params))
    logits = fast_jit(model.apply)({"params": params}, tokens).logits
    plain = lambda params, tokens: plain_model(params, tokens, config)
    expected = fast_jit(jax.vmap(plain, (None, 0)))(params, tokens)
  np.testing.assert_allclose(logits, expected, atol=3e-5)
