import dataclasses
import json
import math

import pytest

from hope_jax.config import Config, ConfigError, MeshConfig, TrainConfig
from hope_jax.runs import workdir


def test_claim_stores_the_config_and_recognises_it(tmp_path):
  folder = tmp_path / "a" / "b"
  config = Config(train=TrainConfig(steps=7))
  workdir.claim(folder, config, {})
  assert workdir.read_config(folder) == config
  workdir.claim(folder, config, {})


def test_claim_lets_the_mesh_change_and_nothing_else(tmp_path):
  workdir.claim(tmp_path, Config(), {})
  workdir.claim(tmp_path, Config(mesh=MeshConfig(fsdp=4)), {})
  with pytest.raises(ConfigError, match="train.steps=500, not 7"):
    workdir.claim(tmp_path, Config(train=TrainConfig(steps=7)), {})


def test_claim_accepts_a_config_from_before_a_new_field(tmp_path):
  workdir.claim(tmp_path, Config(), {})
  path = tmp_path / "config.json"
  values = json.loads(path.read_text())
  del values["opt"]["memory_lr_ratio"]
  path.write_text(json.dumps(values))
  workdir.claim(tmp_path, Config(), {})
  assert workdir.read_config(tmp_path) == Config()


def test_read_config_names_what_is_missing(tmp_path):
  with pytest.raises(ConfigError, match="not the folder of a run"):
    workdir.read_config(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ConfigError, match="not JSON"):
    workdir.read_config(tmp_path)


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path):
  path = tmp_path / "result.json"
  workdir.write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    workdir.write_json(path, {"a": dataclasses})
  assert json.loads(path.read_text()) == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan_unless_it_is_replaced(tmp_path, number):
  path, value = tmp_path / "x.json", {"a": [1.5, (number, 2)], "b": "NaN"}
  with pytest.raises(ValueError, match="not JSON compliant"):
    workdir.write_json(path, value)
  assert not path.exists()
  workdir.write_json(path, workdir.finite(value))
  assert workdir.read_object(path) == {"a": [1.5, [None, 2]], "b": "NaN"}


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "is not JSON"),
    (b'{"valid_loss": NaN}', "is not JSON: it has NaN"),
    (b'{"valid_loss": -Infinity}', "is not JSON: it has -Infinity"),
    (b"[" * 100_000, "is not JSON"),
    (b"\xff\xfe", "is not JSON"),
    (b"[1]", "holds no JSON object"),
    (None, "cannot read .*Is a directory"),
  ],
)
def test_damaged_result_is_one_line_that_says_what_to_do(
  tmp_path, content, message
):
  assert workdir.read_result(tmp_path) is None
  path = tmp_path / "result.json"
  path.mkdir() if content is None else path.write_bytes(content)
  with pytest.raises(ConfigError, match=f"{message}.*: remove it, and run"):
    workdir.read_result(tmp_path)


def test_other_data_are_refused_and_named(tmp_path):
  data = {"content": "1", "tokenizer": "2"}
  workdir.claim(tmp_path, Config(), data)
  workdir.claim(tmp_path, Config(), data)
  for name in data:
    with pytest.raises(
      ConfigError, match=f"another {name} than data.path=hope"
    ):
      workdir.claim(tmp_path, Config(), {**data, name: "3"})
  workdir.check_data(tmp_path, Config(), {"tokenizer": "2"})
