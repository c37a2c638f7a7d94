"""Every bound of the groups in `hope_jax/config`, on both of its sides."""

import pytest

from hope_jax.config import ConfigError, from_config_dict, nearest


def cms(*lengths, **fields):
  hidden = (8,) * len(lengths)
  return {"cms": {"hidden": hidden, "chunk_lengths": lengths, **fields}}


def layer(name, **memory):
  return {"sequence_layer": name, "memory": memory}


MEMORA = {
  "adaptive": (),
  "target": "shared",
  "delta_rule": "none",
  "momentum": "none",
}
FIXED = {"adaptive": ()}
HOPE = {"sequence_layer": "hope"}


# What is refused, how the message begins to differ from others', and what of
# the same kind is just allowed.
@pytest.mark.parametrize(
  ("refused", "message", "allowed"),
  [
    (
      {"train": {"rollback_factor": 1.0}},
      "rollback_factor=1.0 must be above 1",
      {"train": {"rollback_factor": 1.001}},
    ),
    (
      {"train": {"rollback_factor": 0.5}},
      "rollback_factor=0.5 must be above 1",
      {"train": {"rollback_factor": 0.0}},
    ),
    (
      {"train": {"accumulate": 3}},
      "accumulate=3 does not divide data.batch_size=8",
      {"train": {"accumulate": 4}},
    ),
    (
      {"train": {"carry_state": True}},
      "transformer on text has nothing to carry",
      {"train": {"carry_state": True}, "model": {"attention_window": 8}},
    ),
    (
      {"train": {"carry_state": True}, "model": HOPE, "data": {"kind": "mqar"}},
      "hope on mqar has nothing to carry",
      {"train": {"carry_state": True}, "model": HOPE},
    ),
    (
      {"model": {"context_length": 255, **cms(32, 0, signal="next_token")}},
      "data.sequence_length=256 is longer than attention's cache",
      {"model": {"context_length": 256, **cms(32, 0, signal="next_token")}},
    ),
    (
      {"model": cms(64, 129, 0)},
      "chunk_lengths has 129, more than half of data.sequence_length=256",
      {"model": cms(64, 128, 0)},
    ),
    (
      {"model": {**HOPE, **cms(64, 129, 0)}},
      "such a level hardly uses what it learns",
      {"model": {**HOPE, **cms(64, 129)}, "train": {"carry_state": True}},
    ),
    (
      {"model": cms(64, 4096, 0, step_tokens=1024)},
      "step_tokens=1024 must be data.batch_size=8 times"
      " data.sequence_length=256, 2048, or 0",
      {"model": cms(64, 4096, 0, step_tokens=2048), "train": {"accumulate": 2}},
    ),
    (
      {"model": cms(64, 129, 2048, 0, step_tokens=2048)},
      "chunk_lengths has 129, more than half of .* train.carry_state$",
      {"model": cms(64, 128, 2048, 0, step_tokens=2048)},
    ),
    (
      {"model": cms(64, 2048, 0)},
      "has 2048, .*; or model.cms.step_tokens=2048: the optimizer changes it$",
      {"model": cms(64, 2048, 0, step_tokens=2048)},
    ),
    (
      {"model": cms(64, 6144, 0, step_tokens=2048), "train": {"steps": 2}},
      "has 6144, which is 3 training steps: such a level never changes in"
      " train.steps=2",
      {"model": cms(64, 6144, 0, step_tokens=2048), "train": {"steps": 3}},
    ),
    (
      {"model": cms(64, 2047, 0)},
      "has 2047, .* train.carry_state$",
      {"model": {**HOPE, **cms(64, 2047, 0)}, "train": {"carry_state": True}},
    ),
    (
      {"model": cms(64, 3072, 0, step_tokens=2048)},
      "3072 is not a multiple of cms.step_tokens=2048",
      {"model": cms(64, 6144, 0, step_tokens=2048)},
    ),
    (
      {"model": cms(64, 2048, 0, step_tokens=2048, connection="nested")},
      "2048 is not below cms.step_tokens=2048: cms.connection=nested",
      {"model": cms(64, 128, 0, step_tokens=2048, connection="nested")},
    ),
    (
      {"model": cms(2048, 0, step_tokens=2048, signal="next_token")},
      "shortest of cms.chunk_lengths must be a power of two",
      {"model": cms(128, 2048, 0, step_tokens=2048, signal="next_token")},
    ),
    (
      {"model": {"cms": {"hidden": (8, 8), "chunk_lengths": (4, 8, 0)}}},
      "cms.hidden has 2 levels and cms.chunk_lengths 3",
      {"model": cms(4, 8, 0)},
    ),
    ({"model": cms(8, 4, 0)}, "must grow from level", {"model": cms(4, 4, 0)}),
    ({"model": cms(0, 8)}, "must grow from level", {"model": cms(8, 0)}),
    (
      {"model": cms(8, 0, outer_order=3)},
      "outer_order=3 .all: 1, 2",
      {"model": cms(8, 0, outer_order=1)},
    ),
    (
      {"model": cms(8, 0, learning_share=1.01)},
      "learning_share=1.01 must not be above 1",
      {"model": cms(8, 0, learning_share=1.0)},
    ),
    (
      {"model": cms(4, 6, 0, connection="nested")},
      "4 does not divide 6, which cms.connection=nested",
      {"model": cms(4, 6, 0)},
    ),
    (
      {"model": cms(4, 6, 0, signal="next_token")},
      "4 does not divide 6, .* signal=next_token",
      {"model": cms(4, 8, 0, signal="next_token")},
    ),
    (
      {"model": cms(6, 12, 0, signal="next_token")},
      "shortest of cms.chunk_lengths must be a power of two",
      {"model": cms(1, 12, 0, signal="next_token")},
    ),
    (
      {"model": cms(0, signal="next_token")},
      "shortest of cms.chunk_lengths must be a power of two",
      {"model": cms(0)},
    ),
    (
      {"model": {"memory": {"half_life_min": 9.0, "half_life_max": 8.0}}},
      "half_life_min=9.0 must not be above memory.half_life_max=8.0",
      {"model": {"memory": {"half_life_min": 8.0, "half_life_max": 8.0}}},
    ),
    (
      {"model": {"num_heads": 3}},
      "num_heads=3 does not divide model.width=128",
      {"model": {"num_heads": 4}},
    ),
    (
      {"model": {"sequence_layer": "rwkv7", "width": 96}},
      "width=96: rwkv7's heads of 64",
      {"model": {"sequence_layer": "rwkv7", "width": 32}},
    ),
    (
      {"model": {"sequence_layer": "titans", "frozen_levels": ("cms_0",)}},
      "level 'cms_0' does not exist in this model; it has memory, k, v, eta,",
      {"model": {"sequence_layer": "titans", "frozen_levels": ("memory",)}},
    ),
    (
      {"model": {"frozen_levels": ("memory",)}},
      "it has no fast levels",
      {"model": {"frozen_levels": ()}},
    ),
    (
      {"model": layer("titans_mal", **FIXED)},
      "attention_window=0: titans_mal's attention needs a window",
      {"model": {**layer("titans_mal", **FIXED), "attention_window": 1}},
    ),
    (
      {"model": {**HOPE, "persistent_tokens": 1}},
      "persistent_tokens=1 are for titans_mac and titans_mag",
      {"model": {**layer("titans_mac", **FIXED), "persistent_tokens": 1}},
    ),
    (
      {"model": layer("titans_mac", adaptive=("k",))},
      r"adaptive=.*sequence_layer=titans_mac takes \(\)",
      {"model": layer("titans_mac", **FIXED)},
    ),
    (
      {"model": layer("ttt_mlp", implementation="pallas_tpu")},
      "implementation=pallas_tpu: ttt_mlp has no such kernel, take xla",
      {"model": layer("titans", implementation="pallas_tpu")},
    ),
    (
      {"model": layer("transformer", implementation="pallas_interpret")},
      "transformer has no such kernel, take xla",
      {"model": layer("hope", implementation="pallas_interpret")},
    ),
    (
      {"model": layer("hope", implementation="pallas_gpu")},
      "implementation=pallas_gpu: hope has no such kernel, take xla",
      {"model": layer("comba", implementation="pallas_gpu")},
    ),
    *(
      (
        {"model": layer("memora", **{**MEMORA, name: value})},
        f"memory.{name}=.*sequence_layer=memora takes ",
        {"model": layer("memora", **MEMORA)},
      )
      for name, value in {
        "architecture": "matrix",
        "adaptive": ("k",),
        "target": "self",
        "delta_rule": "proximal",
        "momentum": "sum",
      }.items()
    ),
    (
      {"model": layer("memora", **MEMORA, setting="token_exact")},
      "setting='token_exact': model.sequence_layer=memora takes 'chunk_l2' or",
      {"model": layer("memora", **MEMORA, setting="chunk_dot")},
    ),
  ],
)
def test_bounds_refuse_what_is_beyond_and_nothing_before(
  refused, message, allowed
):
  from_config_dict(allowed)
  with pytest.raises(ConfigError, match=message):
    from_config_dict(refused)


def test_levels_of_training_steps_are_not_fast():
  lengths = 64, 2048, 65536, 0
  config = from_config_dict(
    {"model": {**HOPE, **cms(*lengths, step_tokens=2048)}}
  ).model
  assert config.cms.fast_lengths == (64,)
  assert config.cms.periods == {"cms_1": 1, "cms_2": 32}
  assert config.fast_levels[-1] == "cms_0"
  untrained = config.cms.without_periods()
  assert untrained.chunk_lengths == (64, 0, 0, 0)
  assert untrained.fast_lengths == (64,) and not untrained.periods
  no_cms = {**cms(*lengths, step_tokens=2048, connection="none")}
  assert not from_config_dict({"model": no_cms}).model.cms.periods


CHOICES = {
  "data": ["kind"],
  "train": ["wandb"],
  "model": ["sequence_layer", "inner_rates", "initializer", "dtype", "remat"],
  "model.memory": [
    "implementation",
    "architecture",
    "activation",
    "target",
    "setting",
    "delta_rule",
    "momentum",
    "retention",
    "step_scale",
    "read",
    "remat",
  ],
  "model.cms": ["connection", "value", "signal"],
}


@pytest.mark.parametrize(
  ("group", "name"),
  [(group, name) for group, names in CHOICES.items() for name in names],
)
def test_choices_are_checked(group, name):
  fields = {name: "nothing"}
  for part in reversed(group.split(".")):
    fields = {part: fields}
  with pytest.raises(ConfigError, match=f"unknown .*{name}='nothing'"):
    from_config_dict(fields)


def test_unknown_boxes_are_refused():
  with pytest.raises(
    ConfigError, match="unknown model.memory.adaptive='w' .all: k"
  ):
    from_config_dict({"model": {"memory": {"adaptive": ("k", "w")}}})


def test_nearest_names_what_was_meant_or_nothing():
  assert nearest("hoppe", ("mamba", "hope")) == "; did you mean 'hope'?"
  assert nearest("xyz", ("mamba", "hope")) == ""
