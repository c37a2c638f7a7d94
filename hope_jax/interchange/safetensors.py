"""Parameters as safetensors with a JSON config: for other programs and runs.

A folder holds model.safetensors (names as in the Flax tree, with dots:
`blocks.mixer.readout.gate.kernel`; the layers of a stack on axis 0),
config.json (the whole `Config`), data.json (the tokenizer's hash) and the
tokenizer's files, if it has any.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from hope_jax import config as config_lib
from hope_jax.config import Config, ConfigError, Json
from hope_jax.runs import digest, files
from hope_jax.runs import workdir as workdir_lib

MODEL = "model.safetensors"
INDEX = f"{MODEL}.index.json"  # of a model in several files
DTYPES = "F32", "BF16", "F16"
SHA256 = "sha256"  # of the arrays, in the file's metadata; older files lack it


def save(folder: epath.Path, config: Config, params: Any) -> None:
  """Writes parameters and config; an existing export is replaced."""
  flat: Json = traverse_util.flatten_dict(jax.device_get(params), sep=".")
  write_tensors(folder, flat, "hope_jax")
  workdir_lib.write_json(
    folder / workdir_lib.CONFIG, config_lib.to_dict(config)
  )


def write_tensors(
  folder: epath.Path, tensors: Mapping[str, np.ndarray], kind: str
) -> None:
  """Writes model.safetensors: tensors by name, with their hash; `kind` is the
  name of the format."""
  from safetensors import numpy as safetensors

  folder.mkdir(parents=True, exist_ok=True)
  flat = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  about = {"format": kind, SHA256: digest.of_arrays(flat)}
  with files.writing(folder / MODEL) as path:
    safetensors.save_file(flat, path, about)
    path.chmod(0o644)


def load(folder: epath.Path, abstract: Any = None) -> Any:
  """Parameters of an export as a tree of numpy arrays.

  With `abstract`, a tree of shapes and shardings, they are laid out like it;
  anything that does not fit is a `ConfigError` that names the first parameter.
  """
  import safetensors
  from safetensors import numpy as safetensors_numpy

  try:
    path = files.local(folder / MODEL)
    flat = safetensors_numpy.load_file(path)
    with safetensors.safe_open(path, framework="np") as file:
      about = file.metadata() or {}
  except (OSError, safetensors.SafetensorError) as error:
    raise ConfigError(f"cannot read {folder / MODEL}: {error}") from error
  if SHA256 in about and about[SHA256] != digest.of_arrays(flat):
    raise ConfigError(
      f"{folder / MODEL} is damaged: its arrays are not those that were saved;"
      " export it again"
    )
  if abstract is not None:
    wanted: Json = traverse_util.flatten_dict(abstract, sep=".")
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


class Tensor(NamedTuple):
  """One tensor of a file, not read yet."""

  path: epath.Path
  name: str
  shape: tuple[int, ...]

  def read(self) -> np.ndarray:
    """Its values in float32."""
    import safetensors

    cpu = jax.local_devices(backend="cpu")[0]  # numpy has no bfloat16
    with (
      jax.default_device(cpu),
      safetensors.safe_open(files.local(self.path), framework="flax") as file,
    ):
      return np.asarray(file.get_tensor(self.name)).astype(np.float32)


def open_tensors(folder: epath.Path) -> dict[str, Tensor]:
  """All tensors of a folder by name, of one file or of several."""
  import safetensors

  found = {}
  for path in _parts(folder):
    try:
      with safetensors.safe_open(files.local(path), framework="flax") as file:
        names = file.keys()
        for name in names:
          piece = file.get_slice(name)
          if piece.get_dtype() not in DTYPES:
            raise ConfigError(
              f"{path}: {name} is of type {piece.get_dtype()}, not one of"
              f" {', '.join(DTYPES)}: take a checkpoint that is not quantised"
            )
          found[name] = Tensor(path, name, tuple(piece.get_shape()))
    except (OSError, safetensors.SafetensorError) as error:
      raise ConfigError(
        f"cannot read {path} ({files.reason(error)}): copy it again"
      ) from error
  return found


def _parts(folder: epath.Path) -> list[epath.Path]:
  """The files that hold a model."""
  index = folder / INDEX
  if not index.exists():
    if not (folder / MODEL).exists():
      raise ConfigError(
        f"{folder} has neither {MODEL} nor {INDEX}: other formats are not read;"
        " save it with safetensors"
      )
    return [folder / MODEL]
  try:
    names = json.loads(index.read_text())["weight_map"].values()
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise ConfigError(f"{index} has no weight_map: copy it again") from error
  return [folder / name for name in sorted(set(names))]
