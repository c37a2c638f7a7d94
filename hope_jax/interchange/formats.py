"""Conversion of runs from and to checkpoints of Hugging Face `transformers`;
export of runs as safetensors (`interchange/safetensors.py`)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from hope_jax.config import (
  Config,
  ConfigError,
  DataConfig,
  Json,
  ModelConfig,
  TextConfig,
)
from hope_jax.data import pipeline, tokenizer
from hope_jax.interchange import hugging_face, mapping
from hope_jax.interchange import safetensors as safetensors_lib
from hope_jax.models.language_model import LanguageModel
from hope_jax.runs import files
from hope_jax.runs import workdir as workdir_lib

LENGTH = 1024  # tokens per sequence of evaluations, at the most


def export(folder: epath.Path, config: Config, params: Any) -> None:
  """Writes a run's parameters, config and tokenizer as safetensors."""
  safetensors_lib.save(folder, config, params)
  words = pipeline.load_tokenizer(config)
  data = {"tokenizer": words.sha256} if words else {}
  workdir_lib.write_json(folder / workdir_lib.DATA, data)
  if words:
    tokenizer.save(words, folder)


def read_checkpoint(folder: epath.Path) -> tuple[ModelConfig, mapping.Arrays]:
  """A checkpoint's model config, and its parameters by dotted path."""
  if not (folder / workdir_lib.CONFIG).exists():
    raise ConfigError(
      f"{folder} is no checkpoint of transformers: it has no"
      f" {workdir_lib.CONFIG}"
    )
  values = workdir_lib.read_object(folder / workdir_lib.CONFIG)
  architecture, model = hugging_face.read_config(values)
  rules = architecture.rules(model)
  tensors = safetensors_lib.open_tensors(folder)
  wanted = _shapes(rules, model)
  for name in sorted(wanted.keys() | tensors.keys()):
    theirs = tensors[name].shape if name in tensors else "nothing"
    ours = wanted.get(name, "nothing")
    if ours != theirs and not hugging_face.is_ignored(name, model):
      raise ConfigError(
        f"{folder} is not a whole {architecture.name}: {name} is {theirs} there"
        f" and {ours} by its config.json; copy it again, or take another"
      )
  read = lambda name: tensors[name].read()
  return model, mapping.to_ours(rules, model.num_layers, read)


def _shapes(
  rules: list[mapping.Rule], model: ModelConfig
) -> dict[str, tuple[int, ...]]:
  """Shape of every Hugging Face tensor by name."""
  init = LanguageModel(model).init
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  variables: Any = jax.eval_shape(init, jax.random.key(0), tokens)
  params: Json = traverse_util.flatten_dict(
    nn.unbox(variables["params"]), sep="."
  )
  zero = np.zeros((), np.float32)  # takes any shape without the memory
  ours = {k: np.broadcast_to(zero, x.shape) for k, x in params.items()}
  theirs = mapping.to_theirs(rules, model.num_layers, ours)
  return {name: x.shape for name, x in theirs.items()}


def from_hf(
  folder: epath.Path,
  workdir: epath.Path,
  *,
  text: str | None = None,
  context_length: int | None = None,
) -> Config:
  """Makes `workdir` a run of the checkpoint in `folder`; returns its config."""
  from hope_jax.runs import checkpoints  # takes half a second

  files.check_empty(workdir)
  words = _tokenizer(folder)
  model, params = read_checkpoint(folder)
  if context_length is not None:
    model = dataclasses.replace(model, context_length=context_length)
  name = next((str(workdir / file) for file in words.files), tokenizer.BYTES)
  length = min(model.context_length, LENGTH)
  config = Config(
    model=model,
    data=DataConfig(
      path=text or DataConfig.path,
      text=TextConfig(tokenizer=name),
      sequence_length=length,
    ),
  )
  for parameter, x in params.items():
    if not np.isfinite(x).all():
      raise ConfigError(
        f"{folder}: {parameter} is made of numbers that are not finite:"
        " copy it again"
      )
  state = {"params": traverse_util.unflatten_dict(params, sep=".")}
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(words, workdir)
  except OSError as error:
    raise _cannot_write(workdir, error) from error
  manager = checkpoints.open_manager(workdir, config.train)
  checkpoints.save(manager, 0, state)
  checkpoints.close(manager)
  workdir_lib.claim(workdir, config, {"tokenizer": words.sha256})
  return config


def write_checkpoint(
  folder: epath.Path,
  model: ModelConfig,
  params: mapping.Arrays,
  words: tokenizer.Tokenizer | None = None,
) -> None:
  """Inverse of `read_checkpoint`, with a tokenizer."""
  files.check_empty(folder)
  architecture, values = hugging_face.write_config(model)
  rules = architecture.rules(model)
  tensors = mapping.to_theirs(rules, model.num_layers, params)
  bos, eos = (words.bos, words.eos) if words else (None, None)
  ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": None}
  try:
    safetensors_lib.write_tensors(folder, tensors, "pt")
    if words:
      tokenizer.save(words, folder)
    workdir_lib.write_json(folder / workdir_lib.CONFIG, values | ids)
  except OSError as error:
    raise _cannot_write(folder, error) from error


def _tokenizer(folder: epath.Path) -> tokenizer.Tokenizer:
  """A SentencePiece model, else a tokenizer.json, else bytes."""
  for name in (tokenizer.MODEL, tokenizer.JSON):
    if (folder / name).exists():
      return tokenizer.load(folder / name)
  return tokenizer.Bytes()


def to_hf(folder: epath.Path, config: Config, params: Any) -> None:
  """Writes a run's parameters, config and tokenizer for transformers."""
  words = pipeline.load_tokenizer(config)
  flat: Json = traverse_util.flatten_dict(jax.device_get(params), sep=".")
  write_checkpoint(folder, config.model, flat, words)


def _cannot_write(folder: epath.Path, error: OSError) -> ConfigError:
  return ConfigError(f"cannot write to {folder}: {files.reason(error)}")
