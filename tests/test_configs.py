"""Every config in every mode: builds, eval_shapes, has the size it says."""

import dataclasses
import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from configs import _base, _models, shakespeare
from hope_jax import config as config_lib
from hope_jax.config import ModelConfig
from hope_jax.models import language_model

MODES = {
  "shakespeare": ("", "long", "smoke"),
  "wikitext2": ("", "smoke"),
  "mqar": ("", "smoke"),
  "subwords": ("gpu",),  # the others differ from wikitext2's in vocabulary
  "hope_340m": ("", "smoke"),
  "hope_760m": ("", "smoke"),
  "hope_1p3b": ("", "smoke"),
}
# Config and its mode's end -> parameters that the name promises.
PROMISED = {
  ("shakespeare", ""): 1.0e6,
  ("wikitext2", ""): 1.0e6,
  ("subwords", "gpu"): 60e6,
  ("hope_340m", ""): 340e6,
  ("hope_760m", ""): 760e6,
  ("hope_1p3b", ""): 1.3e9,
}


def _all_modes():
  for name, switches in MODES.items():
    ends = ("", "_32") if name == "mqar" else ("",)
    for model, end, switch in itertools.product(_models.NAMES, ends, switches):
      yield name, model + end + ("," + switch if switch else "")


def _load(name: str, mode: str | None) -> config_lib.Config:
  module = importlib.import_module(f"configs.{name}")
  return config_lib.from_config_dict(module.get_config(mode))


@functools.cache
def _shapes(config: ModelConfig, length: int) -> tuple[tuple[int, ...], int]:
  """Shape of the logits of a sequence, and the number of parameters."""
  model = language_model.LanguageModel(config)
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  output, variables = jax.eval_shape(
    model.init_with_output, jax.random.key(0), tokens
  )
  count = sum(x.size for x in jax.tree.leaves(variables["params"]))
  return output.logits.shape, count


def _parameters(config: ModelConfig) -> int:
  return _shapes(config, 256)[1]


@pytest.mark.parametrize(("name", "mode"), list(_all_modes()))
def test_config_has_its_shape_and_the_size_of_its_name(name, mode):
  """The size within 3 %."""
  config = _load(name, mode)
  length = config.data.sequence_length
  shape, count = _shapes(config.model, length)
  assert shape == (1, length, config.model.vocab_size)
  model, _, end = mode.partition(",")
  promised = PROMISED.get((name, end))
  if promised and model in _models.NAMES:
    assert abs(count / promised - 1) <= 0.03, f"{count:,}"


@pytest.mark.parametrize(
  "field",
  [
    {"memory": {"delta_rule": "none"}},
    {"memory": {"momentum": "none"}},
    {"memory": {"retention": "none"}},
    {"cms": {"connection": "none"}},
    {"memory": {"adaptive": ("v", "eta", "alpha")}},
    {"memory": {"adaptive": ("k", "eta", "alpha")}},
    {"memory": {"adaptive": ("k", "v", "q", "eta", "alpha")}},
  ],
  ids=str,
)
def test_rows_of_table_6_are_one_field_of_hope(field):
  config = shakespeare.get_config("hope")
  config.model.update(field)
  changed = config_lib.from_config_dict(config).model
  hope = _load("shakespeare", "hope").model
  assert changed != hope
  ratio = _parameters(changed) / _parameters(hope)
  assert abs(ratio - 1) < 0.08  # a box is 6 %
  if "cms" in field:
    assert "cms_0" not in changed.fast_levels


@pytest.mark.parametrize("model", _models.NAMES)
def test_benchmark_size_within_3_percent_of_name(model):
  group = _models.model(
    model, "3p9m", memory_chunks=(64, 256), cms_chunks=(64, 256, 0)
  )
  config = _base.make(model=group, data={"sequence_length": 512})
  count = _parameters(config_lib.from_config_dict(config).model)
  assert abs(count / 3.9e6 - 1) <= 0.03, f"{count:,}"


@pytest.mark.parametrize("name", MODES)
def test_config_default_mode_is_documented_and_finds_slips(name):
  module = importlib.import_module(f"configs.{name}")
  config = module.get_config()
  assert isinstance(config, ml_collections.ConfigDict)
  assert "Modes:" in module.__doc__ and "Command:" in module.__doc__
  config.opt.peak_rl = 1.0
  with pytest.raises(config_lib.ConfigError, match="did you mean 'peak_lr'"):
    config_lib.from_config_dict(config)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("mode", ["hop", "hope,smoky", "hope,titans"])
def test_config_unknown_mode_raises(name, mode):
  module = importlib.import_module(f"configs.{name}")
  with pytest.raises(ValueError, match="mode"):
    module.get_config(mode)


def test_make_has_every_group_and_no_field_of_its_own():
  """A command line can override every field whose group is there."""
  config = _base.make()
  assert set(config.data) == {"text", "records", "mqar"}
  assert set(config.model) == {"memory", "cms", "rope_scaling"}
  assert config_lib.from_config_dict(config) == config_lib.Config()


def test_make_with_an_unknown_field_is_found_at_the_conversion():
  config = _base.make(opt={"peak_rl": 1.0})
  with pytest.raises(
    config_lib.ConfigError, match="'opt.peak_rl'; did you mean 'peak_lr"
  ):
    config_lib.from_config_dict(config)


def test_data_fields_may_have_their_names_of_2026():
  """Of older runs and command lines; they go before the config file's."""
  values = {"num_pairs": 3, "split": (0.5, 0.2), "mqar": {"num_pairs": 9}}
  found = config_lib.from_config_dict({"data": values})
  mqar = config_lib.MQARConfig(num_pairs=3)
  text = config_lib.TextConfig(split=(0.5, 0.2))
  assert found.data == config_lib.DataConfig(mqar=mqar, text=text)
  assert values["num_pairs"] == 3  # not changed itself


@pytest.mark.parametrize("size", ["340m", "760m", "1p3b"])
def test_paper_recipe_sees_the_promised_tokens(size):
  config = _load(f"hope_{size}", "hope")
  tokens = {"340m": 15e9, "760m": 30e9, "1p3b": 100e9}[size]
  per_step = config.data.sequence_length * config.data.batch_size
  assert config.train.steps * per_step == pytest.approx(tokens, rel=1e-3)
  assert config.opt.warmup_steps * per_step == pytest.approx(1e9, rel=1e-3)


@pytest.mark.parametrize("end", ["", "_32"])
def test_mqar_trains_on_1p6m_tokens(end):
  config = _load("mqar", "titans" + end)
  per_step = config.data.sequence_length * config.data.batch_size
  assert config.train.steps * per_step == pytest.approx(1.6e6, rel=0.03)


def numbers(config, prefix=""):
  """(group, field) of every number in a config."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from numbers(value, f"{prefix}{field.name}.")
    elif isinstance(value, int | float) and not isinstance(value, bool):
      yield prefix, field.name, type(value)


@pytest.mark.parametrize(
  ("group", "name", "kind"),
  [n for n in numbers(config_lib.Config()) if n[0] != "mesh."],
)
def test_numbers_out_of_range_are_named(group, name, kind):
  bad = [-1, float("nan"), float("inf")] if kind is float else [-1]
  for value in bad:
    fields = {name: value}
    for part in reversed(group.rstrip(".").split(".")):
      fields = {part: fields}
    with pytest.raises(
      config_lib.ConfigError, match=f"{name}=.*(must be|all:)"
    ):
      config_lib.from_config_dict(fields)


@pytest.mark.parametrize("value", ["k,v", ("k,v",), ["k", "v"], ("k", "v")])
def test_names_may_be_separated_by_commas(value):
  fields = {"model": {"memory": {"adaptive": value}}}
  config = config_lib.from_config_dict(fields)
  assert config.model.memory.adaptive == ("k", "v")


NEGATIVE = {"setting": "negative_eigenvalues"}


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model": {"conv_window": 1}}, "mixes nothing"),
    (
      {
        "model": {
          "sequence_layer": "mamba2",
          "cms": {"hidden": (8, 8), "chunk_lengths": (16, 0)},
        }
      },
      "mamba2 has no keys and values of the model's width for a CMS",
    ),
    (
      {"model": {"sequence_layer": "retnet", "width": 18, "num_heads": 2}},
      "rotary positions need an even width",
    ),
    (
      {"model": {"sequence_layer": "samba", "num_layers": 3}},
      "num_layers=3 is not a multiple of 2: samba has mamba and transformer",
    ),
    ({"model": {"width": 15, "num_heads": 3}}, "need an even width"),
    ({"model": {"num_heads": 4, "num_kv_heads": 3}}, "=3 does not divide"),
    (
      {"model": {"sequence_layer": "titans", "num_kv_heads": 2}},
      "num_kv_heads is for attention, which model.sequence_layer=titans",
    ),
    (
      {"model": {"sequence_layer": "retnet", "rope_scaling": {"factor": 8.0}}},
      "rope_scaling.factor is for attention",
    ),
    (
      {"model": {"rope_scaling": {"low_frequency_factor": 4.0}}},
      "low_frequency_factor=4.0 must be below high_frequency_factor=4.0",
    ),
    ({"opt": {"b2": 1.0}}, "opt.b2=1.0 must be below 1"),
    ({"memory": {}}, "unknown field 'memory'"),
    ({"model": {"cms": {"hidden": (8, 0), "chunk_lengths": (4, 0)}}}, "hidden"),
    ({"model": {"memory": {"half_life_min": 1e6}}}, "must not be above"),
    ({"model": {"memory": {**NEGATIVE, "read": "chunk"}}}, "got chunk and"),
    ({"model": {"memory": {**NEGATIVE, "delta_rule": "none"}}}, "and none"),
    (
      {"model": {"memory": {**NEGATIVE, "initial_learn_rate": 2.0}}},
      "must be below 2",
    ),
  ],
)
def test_fields_that_cannot_be_used_are_named(fields, message):
  with pytest.raises(config_lib.ConfigError, match=message):
    config_lib.from_config_dict(fields)
