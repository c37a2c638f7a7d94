"""Roles and owners of the parameters of every model."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from hope_jax.config.layers import LAYERS
from hope_jax.models import language_model, parameters
from hope_jax.optim import registry
from tests.support.models import CMS, make


def kinds(config):
  """`Kind`s by path, without a pass."""
  model = language_model.LanguageModel(config)
  tokens = jnp.zeros((1, 8), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  found = parameters.kinds(shapes)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): kind
    for path, kind in jax.tree_util.tree_leaves_with_path(found)
  }


def with_cms(**fields):
  return make("hope", cms=dataclasses.replace(CMS, half_life=9.0, **fields))


CONFIGS = {name: make(name) for name in LAYERS} | {
  connection: with_cms(connection=connection)
  for connection in ("sequential", "nested", "independent")
}


def role_by_name(path):
  """What a reader of the names would say."""
  *outer, last = path.split("/")
  if "initial" in outer:
    return "initial"
  if "gates" in outer:
    return "gate"
  if any(name.startswith("conv_") for name in outer):
    return "conv"
  if last.rstrip("_0123456789") in ("learn_rate", "forget", "share"):
    return "rate"
  # Mamba's and Mamba2's D is no scale of a norm, whatever it is called.
  is_norm = last in ("scale", "norm_scale", "norm_bias")
  is_norm |= last == "bias" and outer[-1].startswith("norm")
  return "norm" if is_norm else "weight"


@pytest.mark.parametrize("name", CONFIGS)
def test_roles_are_what_the_names_say(name):
  found = {path: kind.role for path, kind in kinds(CONFIGS[name]).items()}
  if name == "rwkv7":  # a group norm per channel, with other vectors
    found = {p: r for p, r in found.items() if "readout/norm" not in p}
  assert found == {path: role_by_name(path) for path in found}


@pytest.mark.parametrize("connection", ["sequential", "nested", "independent"])
def test_rates_of_cms_levels_are_meta_learned(connection):
  found = kinds(CONFIGS[connection])
  names = ("learn_rate", "forget", "share")
  rates = {p: k for p, k in found.items() if any(n in p for n in names)}
  assert len(rates) == (4 if connection != "independent" else 7)
  for path, kind in rates.items():
    assert registry.group(kind, {}) == "memory" and not kind.is_decayed, path
    assert kind.owner == (f"cms_{path.rstrip('_')[-1]}",) or "level_" in path


@pytest.mark.parametrize("name", CONFIGS)
def test_matrices_of_linear_maps_are_decayed_and_nothing_else(name):
  for path, kind in kinds(CONFIGS[name]).items():
    is_map = path.endswith(("kernel", "embedding", "up", "down", "memory_q"))
    if kind.is_decayed:
      assert kind.role == "weight" and kind.ndim >= 2, path
    elif is_map:
      assert kind.role in ("gate", "conv"), path


def test_slow_levels_own_their_block_norm_and_share():
  found = kinds(CONFIGS["independent"])
  for name in ("level_2/up/kernel", "norm_2/scale", "share_2"):
    assert found[f"blocks/cms/{name}"].owner == ("cms_2",)
  periods = {"cms_2": 4}
  assert registry.group(found["blocks/cms/share_2"], periods) == "every_4"
  assert registry.group(found["blocks/cms/share_1"], periods) == "memory"


def test_boxes_share_their_arrays_and_gates_of_memories_are_theirs():
  found = kinds(make("hope"))
  mixer = {
    path.removeprefix("blocks/mixer/"): kind.owner
    for path, kind in found.items()
    if path.startswith("blocks/mixer/")
  }
  assert mixer["initial/boxes_hidden"] == ("k", "v", "q", "eta", "alpha")
  assert mixer["initial/boxes_projection"] == ("k", "v", "q")
  assert mixer["initial/boxes_gate"] == ("eta", "alpha")
  assert mixer["initial/memory_output"] == ("memory",)
  assert mixer["gates/eta/kernel"] == ("eta",)
  assert mixer["gates/beta_bias"] == ("memory",)
  assert mixer["projections/query/kernel"] == ("projections",)
