"""Initial values of slow weights: the baselines' published ones, our own."""

import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import shakespeare
from hope_jax import config as config_lib
from hope_jax.models import language_model
from tests.support.jit import fast_jit

D = 128  # the width of `tiny`


@functools.cache
def weights(name: str) -> dict[str, np.ndarray]:
  """Path -> start of all blocks' weights, as the configs set a model up."""
  config = config_lib.from_config_dict(shakespeare.get_config(name)).model
  model = language_model.LanguageModel(config)
  tokens = jnp.zeros((1, 4), jnp.int32)
  variables = nn.unbox(fast_jit(model.init)(jax.random.key(0), tokens))
  assert [*variables] == ["params"]  # no dynamics, which cost compilation
  params = variables["params"]
  flat = flax.traverse_util.flatten_dict(params["blocks"], sep="/")
  return {path: np.asarray(x) for path, x in flat.items()}


def xavier(inputs: int, outputs: int, gain: float) -> float:
  return gain * (2 / (inputs + outputs)) ** 0.5


TORCH = 3**-0.5  # of U(-1, 1)
SPREADS = [
  ("transformer", "mixer/query/kernel", 0.02),
  ("transformer", "ffn/down/kernel", 0.02 / 8**0.5),
  ("comba", "mixer/value/kernel", 0.02),
  ("gated_deltanet", "mixer/query/kernel", (0.4 / D) ** 0.5),
  ("gated_deltanet", "mixer/gates/rate/kernel", (0.4 / D) ** 0.5),
  ("gated_deltanet", "ffn/up/kernel", (0.4 / D) ** 0.5),
  ("gated_deltanet", "mixer/readout/output/kernel", D**-0.5 / 4),
  ("gated_deltanet", "ffn/down/kernel", D**-0.5 / 4),
  ("retnet", "mixer/query/kernel", xavier(D, D, 2**-2.5)),
  ("retnet", "mixer/readout/gate/kernel", xavier(D, 2 * D, 2**-2.5)),
  ("retnet", "mixer/readout/output/kernel", xavier(D, 2 * D, 1.0)),
  ("retnet", "ffn/up/kernel", 0.02),
  ("deltanet", "mixer/key/kernel", xavier(D, D, 2**-2.5)),
  ("deltanet", "mixer/gates/rate/kernel", xavier(D, 2, 2**-2.5)),
  ("deltanet", "mixer/readout/output/kernel", xavier(D, D, 2**-2.5) / 8**0.5),
  ("mamba2", "mixer/value/kernel", TORCH * D**-0.5),
  ("mamba2", "mixer/conv_value/bias", TORCH / 2),
  ("ttt_mlp", "mixer/initial/memory_hidden", 0.02),
  ("ttt_mlp", "mixer/initial/memory_output", 0.02 / 8**0.5),
  ("ttt_linear", "mixer/initial/memory_output", 0.02),
  ("ttt_linear", "mixer/conv_key/kernel", 0.5),
  # Seven blocks without FFN; Samba has two of Mamba among four, with FFNs.
  ("mamba2", "mixer/readout/output/kernel", TORCH * (7 * 2 * D) ** -0.5),
  ("samba", "block_0/mixer/readout/output/kernel", TORCH * (8 * 2 * D) ** -0.5),
  ("samba", "block_0/mixer/gates/step/kernel", TORCH * 8**-0.5),
  ("samba", "block_1/mixer/query/kernel", TORCH * D**-0.5),
  ("samba", "block_1/mixer/output/kernel", TORCH * (8 * D) ** -0.5),
  ("samba", "block_1/ffn/down/kernel", TORCH * (8 * 384) ** -0.5),
  ("memora", "mixer/initial/memory_hidden", 1.0),
  ("memora", "mixer/initial/memory_output", 1.0),
  ("hope", "cms/level_0/up", 0.02),
  ("hope", "cms/level_0/down", 0.02 / 8**0.5),
]


@pytest.mark.parametrize(
  ("name", "path", "std"), SPREADS, ids=[f"{n}-{p}" for n, p, _ in SPREADS]
)
def test_spread_of_a_map(name, path, std):
  found = weights(name)[path]
  assert abs(found.std() / std - 1) < 3 / found.size**0.5
  assert abs(found.mean()) < 4 * std / found.size**0.5


def test_range_of_uniform_maps():
  found = np.abs(weights("mamba2")["mixer/key/kernel"]).max()
  assert 0.99 * D**-0.5 < found <= D**-0.5


def test_ttt_convolves_without_bias_at_first():
  for name in ("block", "query", "key"):
    assert not weights("ttt_linear")[f"mixer/conv_{name}/bias"].any()


def test_decays_and_steps():
  gates = lambda name: {
    path.removeprefix("mixer/gates/"): x for path, x in weights(name).items()
  }
  for name in ("mamba2", "gated_deltanet", "comba"):
    step = np.logaddexp(0, gates(name)["step_bias"])
    assert np.all((step > 0.99e-3) & (step < 0.101)), name
    rate = np.exp(gates(name)["log_decay_rate"])
    assert np.all((rate > (name == "mamba2")) & (rate < 16)), name
  np.testing.assert_array_equal(gates("comba")["feedback"], 1)
  np.testing.assert_allclose(gates("comba")["correction"], 0.02)


@pytest.mark.parametrize("name", ["titans", "hope"])
def test_gates_of_a_memory_start_as_configured(name):
  cfg = config_lib.from_config_dict(shakespeare.get_config(name)).model.memory
  gates = {
    path.removeprefix("mixer/gates/"): x for path, x in weights(name).items()
  }
  heads = gates["eta_bias"].shape[-1]
  rate = np.logaddexp(0, gates["eta_bias"])
  np.testing.assert_allclose(rate, cfg.initial_learn_rate, rtol=1e-5)
  momentum = 1 / (1 + np.exp(-gates["beta_bias"]))
  np.testing.assert_allclose(momentum, cfg.initial_momentum, rtol=1e-5)
  # alpha = sigmoid(-bias): half is left after the half-life.
  half_life = np.log(0.5) / -np.logaddexp(0, gates["alpha_bias"])
  spread = np.geomspace(cfg.half_life_min, cfg.half_life_max, heads)
  np.testing.assert_allclose(half_life, [spread] * len(half_life), rtol=1e-3)


def test_memories_of_hope_start_small_and_not_at_zero():
  found = weights("hope")
  config = config_lib.from_config_dict(shakespeare.get_config("hope")).model
  spreads = {
    "memory_hidden": config.head_dim**-0.5,
    "memory_output": 0.1,
    "boxes_hidden": config.head_dim**-0.5,
    "boxes_projection": 0.02,
    "boxes_gate": 0.02,
  }
  for name, std in spreads.items():
    x = found[f"mixer/initial/{name}"]
    assert abs(x.std() / std - 1) < 3 / x.size**0.5, name
