import dataclasses
import math
import types

import jax
import jax.numpy as jnp

from hope_jax.analysis import dynamics
from hope_jax.config import CMSConfig, MemoryConfig, MeshConfig
from hope_jax.training import sharding, step


def test_flatten_names_layer_level_and_quantity():
  sown = {
    "blocks": {
      "mixer": {"memory": {"learn_rate": (jnp.array([0.5, 0.25]),)}},
      "cms": {"level_0": {"half_life": (jnp.array([8.0, 16.0]),)}},
    }
  }
  assert dynamics.flatten(sown) == {
    "dynamics/layer_0/memory/learn_rate": 0.5,
    "dynamics/layer_1/memory/learn_rate": 0.25,
    "dynamics/layer_0/cms/level_0/half_life": 8.0,
    "dynamics/layer_1/cms/level_0/half_life": 16.0,
  }


def test_median_over_layers_names_levels_by_their_last_part():
  flat = {
    f"dynamics/layer_{i}/cms/level_0/cms_0/relative_change": x
    for i, x in enumerate((1.0, 5.0, 2.0))
  }
  flat["dynamics/layer_0/memory/learn_rate"] = 0.5
  median = dynamics.median_over_layers(flat, "relative_change")
  assert median == {"cms_0": 2.0}


def test_dynamics_are_means_within_a_layer(tiny, monkeypatch):
  """Whatever axes a model sows them with, the layers are the first one."""
  sown = {"a": jnp.array([[[1.0, 2.0], [3.0, 10.0]], [[0.0] * 2] * 2])}
  fake = types.SimpleNamespace(
    apply=lambda *_, **__: (None, {"dynamics": sown})
  )
  monkeypatch.setattr(dynamics, "LanguageModel", lambda _: fake)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with sharding.activate(mesh):
    found = dynamics.build(tiny, mesh)({}, {"tokens": jnp.zeros((2, 4))})
  assert found["a"].tolist() == [4.0, 0.0]


def test_dynamics_of_a_model_reach_every_layer_and_level(tiny):
  model = dataclasses.replace(
    tiny.model,
    sequence_layer="titans",
    memory=MemoryConfig(
      adaptive=(), target="shared", delta_rule="none", chunk_length=8
    ),
    cms=CMSConfig(hidden=(8, 8), chunk_lengths=(8, 0)),
  )
  config = dataclasses.replace(tiny, model=model)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  compiled = step.build(config, mesh)
  batch = {"tokens": jnp.arange(64).reshape(2, 32)}
  with sharding.activate(mesh):
    params = compiled.init(jax.random.key(0)).params
    flat = dynamics.flatten(dynamics.build(config, mesh)(params, batch))
  assert all(math.isfinite(value) for value in flat.values())
  for layer in ("layer_0", "layer_1"):
    assert flat[f"dynamics/{layer}/memory/learn_rate"] > 0
    assert any(f"{layer}/cms/" in name for name in flat)
