"""config.json as transformers takes it, of old and new versions."""

import copy
import json

import pytest

from hope_jax.config import ConfigError, ModelConfig
from hope_jax.interchange import hugging_face
from tests.test_convert import CASES, LLAMA, ROPE

NEW = {k: v for k, v in ROPE.items() if k != "rope_theta"}
OLD = {k: v for k, v in NEW.items() if k != "rope_type"} | {"type": "llama3"}
PLAIN = {"rope_type": "default"}


@pytest.mark.parametrize(
  ("fields", "base", "factor"),
  [
    ({}, 10000.0, 1),
    ({"rope_theta": 500.0}, 500.0, 1),
    ({"rope_theta": 500.0, "rope_scaling": None}, 500.0, 1),
    ({"rope_theta": 500.0, "rope_scaling": OLD}, 500.0, 4),
    ({"rope_scaling": NEW}, 10000.0, 4),
    ({"rope_parameters": PLAIN}, 10000.0, 1),
    ({"rope_parameters": PLAIN, "rope_theta": 500.0}, 500.0, 1),
    ({"rope_parameters": {}, "rope_theta": 500.0}, 500.0, 1),
    ({"rope_parameters": None, "rope_theta": 500.0}, 500.0, 1),
    ({"rope_parameters": NEW, "rope_theta": 500.0}, 500.0, 4),
    ({"rope_parameters": ROPE, "rope_scaling": None}, 500.0, 4),
    ({"rope_parameters": ROPE, "rope_theta": 500}, 500.0, 4),
    (
      {"rope_parameters": ROPE, "rope_scaling": OLD, "rope_theta": 500.0},
      500.0,
      4,
    ),
  ],
)
def test_rotary_positions_are_those_of_transformers(fields, base, factor):
  """In the form of transformers 5, in that of 4, or in both."""
  config = LLAMA | copy.deepcopy(fields)
  _, model = hugging_face.read_config({"model_type": "llama", **config})
  assert (model.rope_base, model.rope_scaling.factor) == (base, factor)
  transformers = pytest.importorskip("transformers")
  taken = transformers.LlamaConfig(**config).rope_parameters
  assert taken["rope_theta"] == base and taken.get("factor", 1) == factor


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"rope_parameters": ROPE, "rope_theta": 10000.0},
      "rope_theta=10000.0 but rope_parameters.rope_theta=500.0: remove",
    ),
    (
      {"rope_parameters": ROPE, "rope_scaling": {**NEW, "factor": 8.0}},
      "rope_parameters=.* but rope_scaling=.*: remove",
    ),
    ({"rope_parameters": PLAIN, "rope_scaling": NEW}, "but rope_scaling="),
    ({"rope_parameters": PLAIN, "partial_rotary_factor": 0.5}, "only 1 can"),
    ({"rope_scaling": NEW | {"partial_rotary_factor": 0.5}}, "only 1 can"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic', but"),
  ],
)
def test_rotary_positions_that_do_not_agree_are_refused(fields, message):
  with pytest.raises(ConfigError, match=message):
    hugging_face.read_config({"model_type": "llama", **LLAMA, **fields})


def exported(case):
  kind, fields = CASES[case]
  _, model = hugging_face.read_config({"model_type": kind, **fields})
  return model, hugging_face.write_config(model)[1]


@pytest.mark.parametrize("case", ["llama", "llama_tied", "mistral"])
def test_old_and_new_readers_find_the_same_rotary_positions(case):
  model, values = exported(case)
  # transformers 4 and what follows it; all it has in common with 5 is kept.
  theta = values.get("rope_theta", 10000.0)
  scaling = values.get("rope_scaling") or {"rope_type": "default"}
  assert theta == model.rope_base == values["rope_parameters"]["rope_theta"]
  assert {**scaling, "rope_theta": theta} == values["rope_parameters"]
  assert scaling.get("factor", 1) == model.rope_scaling.factor
  transformers = pytest.importorskip("transformers")
  kind = values.pop("model_type")
  config = transformers.AutoConfig.for_model(kind, **values)
  assert config.rope_parameters == values["rope_parameters"]


# No JSON has the infinity that every reader takes.
LEFT_OUT = {"time_step_limit"}


@pytest.mark.parametrize("case", CASES)
def test_export_leaves_nothing_to_the_defaults_of_a_reader(case):
  transformers = pytest.importorskip("transformers")
  _, values = exported(case)
  kind = values["model_type"]
  theirs = transformers.AutoConfig.for_model(kind).to_dict().keys()
  common = transformers.PreTrainedConfig().to_dict().keys()
  ids = {"bos_token_id", "eos_token_id", "pad_token_id"}  # by the tokenizer
  assert theirs - common - ids - values.keys() <= LEFT_OUT
  assert {"dtype", "torch_dtype", "tie_word_embeddings"} <= values.keys()
  assert json.loads(json.dumps(values, allow_nan=False)) == values


SHAPE = {  # without them a config.json is refused
  *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"),
  *("num_attention_heads", "linear_num_key_heads", "linear_key_head_dim"),
  *("linear_num_value_heads", "linear_value_head_dim"),
}


@pytest.mark.parametrize("case", CASES)
def test_fields_that_are_missing_mean_what_transformers_takes(case):
  transformers = pytest.importorskip("transformers")
  kind, fields = CASES[case]
  config = transformers.AutoConfig.for_model
  written = config(kind, **copy.deepcopy(fields)).to_dict()

  def read(values):
    try:
      return hugging_face.read_config(values)[1]
    except ConfigError as error:
      return str(error)

  assert isinstance(read(written), ModelConfig)
  for name in written.keys() - {"model_type"}:
    short = {k: v for k, v in written.items() if k != name}
    found = read(short)
    if isinstance(found, str) and f"has no {name!r}" in found:
      assert name in SHAPE
      continue
    rest = {k: v for k, v in short.items() if k != "model_type"}
    try:
      whole = config(kind, **copy.deepcopy(rest)).to_dict()
    except Exception:  # transformers refuses it, too
      assert isinstance(found, str), name
      continue
    assert found == read(whole), name
