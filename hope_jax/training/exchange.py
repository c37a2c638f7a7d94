"""Parameters as safetensors with a JSON config: for other programs and runs.

A folder holds model.safetensors (names as in the Flax tree, with dots:
`blocks.mixer.readout.gate.kernel`; the layers of a stack on axis 0),
config.json (the whole `Config`), data.json (the tokenizer's hash) and the
tokenizer's files, if it has any.
"""

from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from hope_jax import config as config_lib
from hope_jax import files
from hope_jax.config import Config, ConfigError
from hope_jax.training import workdir as workdir_lib

MODEL = "model.safetensors"


def save(folder: epath.Path, config: Config, params: Any) -> None:
  """Writes parameters and config; an export that is there is replaced."""
  from safetensors import numpy as safetensors

  folder.mkdir(parents=True, exist_ok=True)
  flat = {
    name: np.ascontiguousarray(value)
    for name, value in traverse_util.flatten_dict(
      jax.device_get(params), sep="."
    ).items()
  }
  with files.writing(folder / MODEL) as path:
    safetensors.save_file(flat, path, {"format": "hope_jax"})
    path.chmod(0o644)
  workdir_lib.write_json(
    folder / workdir_lib.CONFIG, config_lib.to_dict(config)
  )


def load(folder: epath.Path, abstract: Any = None) -> Any:
  """Parameters of an export as a tree of numpy arrays.

  With `abstract`, a tree of shapes and shardings, they are laid out like it;
  anything that does not fit is a `ConfigError` that names the first parameter.
  """
  import safetensors
  from safetensors import numpy as safetensors_numpy

  try:
    flat = safetensors_numpy.load_file(files.local(folder / MODEL))
  except (OSError, safetensors.SafetensorError) as error:
    raise ConfigError(f"cannot read {folder / MODEL}: {error}") from error
  if abstract is not None:
    wanted: dict[str, Any] = traverse_util.flatten_dict(abstract, sep=".")
    for name in sorted(wanted.keys() | flat.keys()):
      ours = wanted[name].shape if name in wanted else "nothing"
      theirs = flat[name].shape if name in flat else "nothing"
      if ours != theirs:
        raise ConfigError(
          f"{folder} does not fit this model: {name} is {theirs} there and"
          f" {ours} here"
        )
  params = traverse_util.unflatten_dict(flat, sep=".")
  if abstract is None:
    return params
  return jax.tree.map(
    lambda x, like: jax.device_put(x.astype(like.dtype), like.sharding),
    params,
    abstract,
  )
