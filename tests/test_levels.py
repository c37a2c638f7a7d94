import dataclasses
import functools
import json
import math
import os
import pathlib
import subprocess
import sys
import types
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from hope_jax import levels as levels_command
from hope_jax.analysis import flops, levels
from hope_jax.config import (
  CMSConfig,
  Config,
  ConfigError,
  DataConfig,
  MemoryConfig,
  ModelConfig,
)
from hope_jax.models import language_model, linear, mamba2, problems
from hope_jax.training import step
from pallas_kernels.generalized_delta_rule import generalized_delta_rule
from pallas_kernels.linear_rule import linear_rule

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
LENGTH = 64
CMS = CMSConfig(hidden=(8, 8, 8), chunk_lengths=(16, 32, 0))


MEMORY = MemoryConfig(chunk_length=8, projection_chunk_length=16, remat="none")


def make(sequence_layer, memory=MEMORY, **fields):
  model = ModelConfig(
    sequence_layer=sequence_layer,
    width=16,
    num_layers=2,
    ffn_hidden=24,
    context_length=LENGTH,
    memory=memory,
    **fields,
  )
  data = DataConfig(sequence_length=LENGTH, batch_size=2)
  return Config(model=model, data=data)


CONFIGS = {
  "hope": make("hope", cms=CMS),
  "frozen": make("hope", cms=CMS, frozen_levels=("k", "cms_1")),
  "periods": make(
    "hope",
    cms=CMSConfig(
      hidden=(8,) * 5,
      chunk_lengths=(16, 2 * LENGTH, 4 * LENGTH, 64 * LENGTH, 0),
      step_tokens=2 * LENGTH,
    ),
  ),
  "nested": make(
    "hope_attention", cms=dataclasses.replace(CMS, connection="nested")
  ),
  "next_token": make(
    "hope_attention", cms=dataclasses.replace(CMS, signal="next_token")
  ),
  "transformer": make("transformer", num_kv_heads=1, tied_embeddings=False),
  "comba": make("comba"),
  "retnet": make("retnet"),
  "samba": make("samba", attention_window=16),
  "titans_mag": make(
    "titans_mag",
    attention_window=16,
    memory=MemoryConfig(chunk_length=8, adaptive=("k",), remat="none"),
  ),
  "ttt_mlp": make("ttt_mlp"),
  "rwkv7": make("rwkv7"),
  "lstm": make("lstm"),
  "srwm": make("srwm"),
}


@pytest.fixture(scope="module", params=[*CONFIGS][1:])
def case(request):
  """(config, its components)."""
  config = CONFIGS[request.param]
  return config, levels.components(config)


@pytest.fixture(scope="module")
def found():
  """Name -> component of a config, not counted."""
  one = types.SimpleNamespace(get=lambda name, default: 1)
  counted = dict.fromkeys(levels.COUNTED, one)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(levels.costs, "count", lambda config: counted)
    return {
      name: {c.name: c for c in levels.components(config)}
      for name, config in CONFIGS.items()
    }


def shapes(model):
  tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
  init = language_model.LanguageModel(model).init
  params = jax.eval_shape(init, jax.random.key(0), tokens)["params"]
  return nn.unbox(params), tokens


def size(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_parameters_and_bytes_add_up_to_the_real_ones(case):
  config, components = case
  total = {f: sum(getattr(c, f) for c in components) for f in levels.COUNTED}
  params, _ = shapes(config.model)
  assert total["parameters"] == step.count_parameters(params)
  periods = config.model.cms.periods
  seldom = [n.removeprefix("cms") for n, steps in periods.items() if steps > 1]
  sums = {
    name: part
    for name, part in params["blocks"].get("cms", {}).items()
    if name.endswith(tuple(seldom))
  }
  assert bool(sums) == bool(seldom)
  # In float32: parameters, two moments, sums of gradients.
  assert total["shared_bytes"] == 3 * size(params) + size(sums)
  state = jax.eval_shape(lambda: language_model.init_state(config.model, 1))
  assert total["state_bytes"] == size(state)
  bytes_of = {c.name: c.state_bytes for c in components}
  for name, of_level in getattr(state, "cms", {}).items():
    assert bytes_of[name] == size(of_level)
  if not config.model.has_attention:
    assert bytes_of["memory"] == size(state.mixer.memory)
  if isinstance(state, tuple):  # one per block of a turn
    memories = size(state[0].mixer.memory)
    assert bytes_of["memory"] == memories
    assert bytes_of["attention"] == size(state[1].mixer)
  if "hope" in config.model.sequence_layer and config.model.memory_chunks:
    boxes = sum(bytes_of[b] for b in config.model.memory.adaptive)
    assert boxes == size(state.mixer.boxes)
  assert "rest" not in bytes_of


def recurrence_flops(model):
  """Those of what all layers remember with."""
  if "mamba" in model.blocks:  # reads only: what it writes are no products
    read = 2 * 16 * 2 * model.width  # multiply and add, K, E
    return read * LENGTH * model.blocks.count("mamba")
  width, heads = model.width, 1
  if model.sequence_layer == "lstm":  # h U, four gates
    return model.num_layers * LENGTH * 2 * width * 4 * width
  if model.sequence_layer != "rwkv7":
    return linear_rule_flops(model)
  tokens = jax.ShapeDtypeStruct((1, heads, LENGTH, width), float)
  matrix = jax.ShapeDtypeStruct((1, heads, width, width), float)

  def run(k, matrix):
    names = ("queries", "log_decay", "erase_read", "erase_write")
    return generalized_delta_rule(
      k,
      k,
      **dict.fromkeys(names, k),
      weight=matrix,
      chunk_length=model.memory.chunk_length,
      checkpoint="none",
    )

  return model.num_layers * flops.count(run, tokens, matrix)


def linear_rule_flops(model):
  """Those of both layers' matrix memories."""
  module = mamba2 if model.sequence_layer == "mamba2" else linear
  shape = module.layout(model)
  array = lambda *sizes: jax.ShapeDtypeStruct((1, shape.heads, *sizes), float)
  k, v = array(LENGTH, shape.key_dim), array(LENGTH, shape.value_dim)
  gate, matrix = array(LENGTH), array(shape.value_dim, shape.key_dim)

  def run(k, v, gate, matrix):
    return linear_rule(
      k,
      v,
      weight=matrix,
      momentum=None,
      retention=gate,
      momentum_decay=None,
      step_size=gate,
      erase=None if model.sequence_layer == "retnet" else gate,
      queries=k,
      read="post",
      chunk_length=model.memory.chunk_length,
    ).outputs

  return model.num_layers * flops.count(run, k, v, gate, matrix)


def test_flops_add_up_to_the_counted_ones(case):
  config, components = case
  params, tokens = shapes(config.model)

  def per_token(model):
    module = language_model.LanguageModel(model)
    forward = functools.partial(language_model.forward, module)
    return flops.count(lambda *args: forward(*args).logits, params, tokens)

  live = per_token(config.model)
  twin = per_token(dataclasses.replace(config.model, inner_rates="off"))
  total = LENGTH * sum(c.flops for c in components)
  np.testing.assert_allclose(total, live)
  learning = {c.name: LENGTH * c.learn_flops for c in components}
  traits = config.model.traits
  if not traits.pairs and not traits.learns:  # all of its recurrence
    twin = live - recurrence_flops(config.model)
  np.testing.assert_allclose(sum(learning.values()), live - twin)
  if "memory" in config.model.fast_levels:
    for name in {"memory", "cms_0"} & {*config.model.fast_levels}:
      frozen = (*config.model.frozen_levels, name)
      without = dataclasses.replace(config.model, frozen_levels=frozen)
      np.testing.assert_allclose(learning[name], live - per_token(without))
  for c in components:
    writes = 0 < c.frequency < math.inf
    assert (learning[c.name] > 0) == writes, c.name
    reads = c.parameters and not c.name.startswith(("adamw", "cms_sh"))
    assert c.flops > c.learn_flops or not reads


def test_levels_of_hope_are_in_the_order_of_their_frequency(found):
  order = [(c.level, c.name, c.frequency) for c in found["hope"].values()]
  boxes = [(2, name, Fraction(1, 16)) for name in ("k", "v", "eta", "alpha")]
  assert order[:7] == [
    (1, "memory", Fraction(1, 8)),
    *boxes,
    (2, "cms_0", Fraction(1, 16)),
    (3, "cms_1", Fraction(1, 32)),
  ]
  # The moments are updated as often as the weights, whose step needs them.
  assert order[7:9] == [(4, "adamw_mu", 0), (4, "adamw_nu", 0)]
  assert {(level, f) for level, _, f in order[9:]} == {(5, 0)}


def test_words_follow_the_config(found):
  memory = found["hope"]["memory"]
  assert memory.objective == "1/2 ‖M(k) - M(v)‖²"
  assert "DGD proximal; proximal step / 8; momentum: averaged" in memory.rule
  literal = MemoryConfig(
    adaptive=(),
    target="shared",
    delta_rule="none",
    momentum="sum",
    retention="zero",
    step_scale="sum",
    loss_factor=1.0,
  )
  model = dataclasses.replace(CONFIGS["hope"].model, memory=literal)
  (memory,) = problems.deep_memories(model)
  assert memory.objective == "1 ‖M(k) - v‖²"
  words = "GD; proximal step; momentum: sum; retention: zero"
  assert memory.rule.startswith(words)
  turning = dataclasses.replace(
    literal, setting="negative_eigenvalues", delta_rule="literal"
  )
  rate = "step eta/max(1, ‖x‖²), eta < 2 (hidden layer: proximal step)"
  rule = problems.memory_rule(turning, False)
  assert f"DGD literal; {rate};" in rule
  assert "error clip: 1, of the target: 4;" in rule
  assert "restarts from cms_1" in found["nested"]["cms_0"].transfer
  level = found["next_token"]["cms_0"]
  assert level.objective == "cross entropy of the next token"
  assert level.rule.startswith("GD; step, mean of 16 tokens")


def test_frozen_levels_are_not_written(found):
  components = found["frozen"]
  slow = components["embedding"].level
  for name in ("k", "cms_1"):
    assert components[name].rule.startswith("not written")
    assert (components[name].frequency, components[name].level) == (0, slow)
  assert components["v"].level == components["cms_0"].level == 2


def test_levels_of_a_period_are_the_slowest(found, tmp_path):
  components = found["periods"]
  order = [(c.level, name) for name, c in components.items()]
  slow = components["embedding"].level
  assert order[-2:] == [(slow + 1, "cms_2"), (slow + 2, "cms_3")]
  for name in ("cms_1", "cms_4"):
    assert components[name].level == slow
    assert components[name].rule == "AdamW, once per step of 128 tokens"
  for name, steps in {"cms_2": 2, "cms_3": 32}.items():
    words = f"changes every {steps} steps of 128 tokens"
    assert words in components[name].rule
    assert components[name].frequency == 0
  assert "(cms_2: 2, cms_3: 32)" in components["adamw_sum"].rule
  assert "adamw_sum" not in found["hope"]
  path = epath.Path(tmp_path) / "levels.png"
  levels.draw(CONFIGS["periods"], [*components.values()], path)
  assert path.read_bytes().startswith(b"\x89PNG")


def test_transformer_is_attention_and_slow_weights(found):
  components = found["transformer"]
  attention = components.pop("attention")
  assert (attention.level, attention.frequency) == (1, math.inf)
  assert "non-parametric" in attention.rule
  assert {c.frequency for c in components.values()} == {0}
  assert {c.level for c in components.values()} == {2, 3}


def test_command_writes_table_json_and_figure(tmp_path):
  child = subprocess.run(
    [
      sys.executable,
      "-m",
      "hope_jax.levels",
      f"--config={REPOSITORY}/configs/shakespeare.py:titans",
      "--config.model.memory.chunk_length=32",
      "--json=new/levels.json",
      "--figure=levels.png",
    ],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert child.returncode == 0, child.stderr
  content = json.loads((tmp_path / "new" / "levels.json").read_text())
  memory = content["components"][0]
  assert (memory["name"], memory["frequency"]) == ("memory", "1/32")
  table = [line for line in child.stdout.splitlines() if line[:1] == "|"]
  assert len(table) == len(content["components"]) + 3
  assert len({line.count("|") for line in table}) == 1
  assert f"{content['total']['parameters']:,}" in table[-1]
  assert (tmp_path / "levels.png").read_bytes().startswith(b"\x89PNG")


def test_figure_must_be_a_png(monkeypatch):
  given = types.SimpleNamespace(figure="a.jpg", json=None)
  monkeypatch.setattr(levels_command.flags, "FLAGS", given)
  with pytest.raises(ConfigError, match="must end with .png"):
    levels_command.main()
