"""Small models of every sequence layer, with parameters that matter."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.config import CMSConfig, MemoryConfig, ModelConfig
from hope_jax.models import language_model
from tests.support.jit import fast_jit

B, T = 2, 40
TITANS = MemoryConfig(
  adaptive=(),
  target="shared",
  delta_rule="literal",
  chunk_length=4,
  projection_chunk_length=8,
)
HOPE = dataclasses.replace(
  TITANS,
  adaptive=("k", "v", "q", "eta", "alpha"),
  target="self",
  delta_rule="proximal",
)
CMS = CMSConfig(hidden=(8, 8, 16), chunk_lengths=(4, 8, 0))
WITHOUT_MOMENTUM = dataclasses.replace(
  TITANS, delta_rule="none", momentum="none", hidden=12
)
PLAIN = dataclasses.replace(WITHOUT_MOMENTUM, step_scale="sum", proximal=False)
MEMORIES = {
  "titans": TITANS,
  "titans_mac": dataclasses.replace(TITANS, read="token_post"),
  "hope": HOPE,
  "dla": dataclasses.replace(PLAIN, setting="chunk_dot"),
  "memora": dataclasses.replace(PLAIN, activation="gelu", error_clip=0.0),
  "ttt_linear": dataclasses.replace(TITANS, initial_learn_rate=1.0),
  "ttt_mlp": dataclasses.replace(TITANS, hidden=12, initial_learn_rate=0.4),
}
WINDOWS = {"titans_mag": 6, "titans_mal": 6, "samba": 13}


def make(name, **fields):
  defaults = dict(
    sequence_layer=name,
    vocab_size=31,
    width=16,
    num_layers=2,
    num_heads=2,
    ffn_hidden=32,
    context_length=T,
    memory=MEMORIES.get(name, TITANS),
    cms=CMS if name.startswith("hope") else CMSConfig(),
    attention_window=WINDOWS.get(name, 0),
    persistent_tokens=3 if name in ("titans_mac", "titans_mag") else 0,
  )
  return ModelConfig(**defaults | fields)


@functools.cache
def _init(config, seed):
  model = language_model.LanguageModel(config)
  tokens = jax.random.randint(jax.random.key(seed), (B, T), 0, 31)
  params = fast_jit(model.init)(jax.random.key(seed + 1), tokens)["params"]
  return model, nn.unbox(params), tokens


def init(config, seed=0):
  model, params, tokens = _init(config, seed)
  # The 0.02 of the slow weights is small at this width: let them matter.
  return model, with_live_zeros(larger(params, 4)), tokens


def larger(params, factor, part=""):
  """Weights of every layer, or of a part, times a factor; no logarithms."""

  def change(path, x):
    name = jax.tree_util.keystr(path)
    is_weight = x.ndim > 2 and "log_" not in name
    return x * factor if is_weight and part in name else x

  return jax.tree_util.tree_map_with_path(change, params)


def with_live_zeros(params, seed=2):
  """RWKV-7 starts maps at zero, behind which nothing would show."""

  rng = np.random.default_rng(seed)

  def change(x):
    if x.ndim < 3 or np.asarray(x).any():
      return x
    return jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype)

  return jax.tree.map(change, params)
