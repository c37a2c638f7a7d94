import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from hope_jax.config import ConfigError
from hope_jax.export import export_run
from hope_jax.interchange import safetensors as safetensors_lib
from hope_jax.runs import checkpoints, workdir
from hope_jax.training import loop
from tests.training.test_loop import final_state


@pytest.fixture(scope="module")
def params():
  return {
    "embed": {"embedding": np.arange(6.0, dtype=np.float32).reshape(3, 2)},
    "blocks": {"mixer": {"query": {"kernel": np.ones((2, 2, 2), np.float32)}}},
  }


def test_saved_parameters_come_back_under_their_names(tiny, params, tmp_path):
  from safetensors import numpy as safetensors

  safetensors_lib.save(tmp_path, tiny, params)
  jax.tree.map(
    np.testing.assert_array_equal, safetensors_lib.load(tmp_path), params
  )
  assert workdir.read_config(tmp_path) == tiny
  names = safetensors.load_file(tmp_path / "model.safetensors").keys()
  assert set(names) == {"embed.embedding", "blocks.mixer.query.kernel"}


def test_run_exported_and_imported_goes_on_from_its_parameters(tiny, tmp_path):
  loop.run(tiny, tmp_path / "run")
  assert export_run(tmp_path / "run", tmp_path / "model") == 6
  trained = final_state(tiny, tmp_path / "run").params
  jax.tree.map(
    np.testing.assert_array_equal,
    safetensors_lib.load(tmp_path / "model"),
    trained,
  )
  train = dataclasses.replace(
    tiny.train, steps=1, init_from=str(tmp_path / "model")
  )
  opt = dataclasses.replace(tiny.opt, peak_lr=1e-30)
  config = dataclasses.replace(tiny, train=train, opt=opt)
  loop.run(config, tmp_path / "next")
  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(config, tmp_path / "next").params,
    trained,
  )


def test_checkpoint_without_a_parameter_is_explained(tiny, tmp_path):
  loop.run(tiny, tmp_path)
  params = final_state(tiny, tmp_path).params
  grown = {**params, "later": {"kernel": jnp.zeros(3)}}
  abstract = jax.eval_shape(lambda: grown)
  with pytest.raises(ConfigError, match=r"no parameter \['later'\]"):
    checkpoints.restore_params(epath.Path(tmp_path), abstract)


def test_export_of_another_tokenizer_is_refused(tiny, params, tmp_path):
  safetensors_lib.save(tmp_path / "model", tiny, params)
  data = {"tokenizer": "of other words"}
  workdir.write_json(tmp_path / "model" / "data.json", data)
  train = dataclasses.replace(tiny.train, init_from=str(tmp_path / "model"))
  with pytest.raises(ConfigError, match="data of another tokenizer"):
    loop.run(dataclasses.replace(tiny, train=train), tmp_path / "run")


@pytest.mark.parametrize("place", [-1, -5, -30])
def test_export_with_a_changed_byte_is_refused(tiny, params, tmp_path, place):
  safetensors_lib.save(tmp_path, tiny, params)
  path = tmp_path / "model.safetensors"
  content = bytearray(path.read_bytes())
  content[place] ^= 1
  path.write_bytes(content)
  with pytest.raises(ConfigError, match="is damaged: .* export it again"):
    safetensors_lib.load(tmp_path)


def test_export_of_an_older_version_has_no_hash_and_is_taken(params, tmp_path):
  from safetensors import numpy as safetensors

  flat = {"embed.embedding": params["embed"]["embedding"]}
  safetensors.save_file(flat, tmp_path / "model.safetensors", {"format": "x"})
  found = safetensors_lib.load(tmp_path)
  np.testing.assert_array_equal(
    found["embed"]["embedding"], params["embed"]["embedding"]
  )


def test_unusable_exports_are_one_clear_line(tiny, params, tmp_path):
  with pytest.raises(ConfigError, match="cannot read .*model.safetensors"):
    safetensors_lib.load(tmp_path)
  with pytest.raises(ConfigError, match="not the folder of a run"):
    workdir.read_config(tmp_path)
  safetensors_lib.save(tmp_path, tiny, params)
  wrong = jax.eval_shape(lambda: {**params, "embed": {"embedding": np.ones(3)}})
  with pytest.raises(ConfigError, match=r"embed.embedding is \(3, 2\) there"):
    safetensors_lib.load(tmp_path, wrong)
  missing = jax.eval_shape(lambda: {"embed": params["embed"]})
  with pytest.raises(ConfigError, match="query.kernel is .* there and nothing"):
    safetensors_lib.load(tmp_path, missing)
  (tmp_path / "model.safetensors").write_bytes(b"broken")
  with pytest.raises(ConfigError, match="cannot read"):
    safetensors_lib.load(tmp_path)
  assert json.loads((tmp_path / "config.json").read_text())
