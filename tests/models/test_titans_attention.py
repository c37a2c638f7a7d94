"""MAC, MAG and MAL against loops over tokens (Titans, section 4)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.config import ConfigError
from hope_jax.models import registry
from tests.models.test_equations import (
  memory_layer,
  perturbed,
  rms,
  rotary,
  slow_projection,
  unit,
)
from tests.support import oracle
from tests.support.jit import fast_jit
from tests.support.models import make

TOKENS, SEGMENT = 9, 4


def softmax(scores):
  weights = jnp.exp(scores)
  return weights / weights.sum()


def by_head(x, config):
  return jnp.split(x, config.num_heads, axis=1)


def persistent_of(p, head):
  return (p["persistent"][x][:, head] for x in ("key", "value"))


def attention(p, n, config):
  """A window of keys, and learned ones that are read without positions."""
  projected = [slow_projection(p, x, n) for x in ("query", "key", "value")]
  heads = zip(*(by_head(x, config) for x in projected), strict=True)
  outputs = []
  for head, (q, k, v) in enumerate(heads):
    turned = [rotary(x, config.rope_base) for x in (q, k)]
    rows = []
    for t in range(len(n)):
      near = slice(max(0, t + 1 - config.attention_window), t + 1)
      scores, values = turned[1][near] @ turned[0][t], v[near]
      if config.persistent_tokens:
        learned, answers = persistent_of(p, head)
        scores = jnp.concatenate([learned @ q[t], scores])
        values = jnp.concatenate([answers, values])
      rows.append(softmax(scores / q.shape[1] ** 0.5) @ values)
    outputs.append(jnp.stack(rows))
  return jnp.hstack(outputs) @ p["output"]["kernel"]


def gate_or_layer(p, n, config):
  """MAG and MAL."""
  read = rms(memory_layer(p, n, config)[0], p["norm_memory"]["scale"])
  if config.sequence_layer == "titans_mal":
    return attention(p["attention"], read, config)
  return attention(p["attention"], n, config) * jax.nn.sigmoid(read)


def turned_to(x, place, base):
  return rotary(jnp.pad(x[None], ((place, 0), (0, 0))), base)[-1]


def context(p, n, config):
  """MAC, one token after the other."""
  cfg, base = config.memory, config.rope_base
  projected = [slow_projection(p, x, n) for x in ("query", "key", "value")]
  vectors = lambda x, name: by_head(jax.nn.silu(x @ p[name]), config)
  logits = {
    name: n @ p["gates"][name]["kernel"] + p["gates"][f"{name}_bias"]
    for name in ("eta", "alpha", "beta")
  }
  initial = [
    {x: p["initial"][f"memory_{x}"][h] for x in ("hidden", "output")}
    for h in range(config.num_heads)
  ]
  states = [oracle.fresh(weights) for weights in initial]
  outputs = []
  for t in range(len(n)):
    place = t % SEGMENT
    if not place:
      starts = [state["weight"] for state in states]
      seen = [[] for _ in initial]
    queries = vectors(n[t : t + 1], "memory_q")
    h = jnp.hstack(
      [
        rms(oracle.mlp(start, unit(q[0])))
        for start, q in zip(starts, queries, strict=True)
      ]
    )
    of_h = [
      by_head((h @ p[x]["kernel"])[None], config) for x in ("key", "value")
    ]
    y = []
    for head in range(config.num_heads):
      q, k, v = (by_head(x[t : t + 1], config)[head][0] for x in projected)
      h_key, h_value = (x[head][0] for x in of_h)
      seen[head] += [
        (turned_to(h_key, place, base), h_value),
        (turned_to(k, SEGMENT + place, base), v),
      ]
      learned, answers = persistent_of(p, head)
      q_turned = turned_to(q, SEGMENT + place, base)
      scores = jnp.stack([q_turned @ key for key, _ in seen[head]])
      scores = jnp.concatenate([learned @ q, scores]) / len(q) ** 0.5
      values = jnp.vstack([answers, *(value[None] for _, value in seen[head])])
      y.append(softmax(scores) @ values)
    whole, read = jnp.hstack(y)[None], []
    made = [vectors(whole, f"memory_{x}") for x in ("q", "k", "v")]
    for head, (q, k, v) in enumerate(zip(*made, strict=True)):
      eta, alpha, beta = (logits[x][t, head] for x in ("eta", "alpha", "beta"))
      gates = (
        jax.nn.softplus(eta),
        jnp.exp(-jax.nn.softplus(alpha)),
        jax.nn.sigmoid(beta),
      )
      start, first = starts[head], initial[head]
      states[head] = oracle.write(
        states[head], start, first, unit(k[0]), v[0], gates, cfg, SEGMENT
      )
      weight = states[head]["weight"]
      read.append(rms(oracle.mlp(weight, unit(q[0]))))
    outputs.append(whole[0] * jnp.hstack(read))
  return jnp.stack(outputs) @ p["output"]["kernel"]


@pytest.mark.parametrize("name", ["titans_mac", "titans_mag", "titans_mal"])
def test_layer_equals_its_equations(name):
  config = make(name)
  layer = registry.LAYERS[name].module
  oracle_of = context if name == "titans_mac" else gate_or_layer
  with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
    x = jax.random.normal(jax.random.key(0), (2, TOKENS, config.width), float)
    params = nn.unbox(
      fast_jit(layer(config).init)(jax.random.key(1), x)["params"]
    )
    params = jax.tree.map(lambda x: 4 * jnp.asarray(x, float), params)
    params = perturbed(params)
    y = fast_jit(lambda x: layer(config).apply({"params": params}, x).y)(x)
    plain = lambda n: oracle_of(params, n, config)
    expected = fast_jit(jax.vmap(plain))(x)
  np.testing.assert_allclose(y, expected, atol=1e-6 * np.abs(expected).max())


def test_variants_refuse_what_they_do_not_have():
  config = make("titans_mag")
  with pytest.raises(ConfigError, match="needs a window"):
    dataclasses.replace(config, attention_window=0)
  with pytest.raises(ConfigError, match="leave it at 0"):
    dataclasses.replace(make("titans_mal"), persistent_tokens=2)
  memory = dataclasses.replace(config.memory, adaptive=("k",))
  with pytest.raises(ConfigError, match="titans_mac takes"):
    dataclasses.replace(make("titans_mac"), memory=memory)
