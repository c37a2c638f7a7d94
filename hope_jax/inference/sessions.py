"""Sessions: the saved state of a model that has read a text, to be continued.

The folder holds session.json, which names the run's checkpoint, and the state
as state-<hash>.safetensors (names as in the tree of `streaming.StreamState`).
Arrays are saved whole, so a session can continue on any number of devices.
session.json is replaced last and atomically: if saving is killed at any moment,
the session is either the old or the new one.

Legend: B batch (1), V vocab.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from hope_jax import config as config_lib
from hope_jax.config import ConfigError, Json, ModelConfig
from hope_jax.data.tokenizer import Bytes, Tokenizer
from hope_jax.inference import generation, reading, streaming, texts
from hope_jax.inference.sampling import Sampling
from hope_jax.inference.session_folder import (
  CARD,
  STATE,
  VERSION,
  Card,
  damaged,
  read_card,
  state_file,
)
from hope_jax.inference.streaming import StreamState
from hope_jax.inference.trained import Run
from hope_jax.models import fast_state
from hope_jax.runs import digest, errors, files, progress
from hope_jax.runs import workdir as workdir_lib

BAR_STEP = 4 * streaming.READ_SIZE  # tokens between two updates of the bar


class Read(NamedTuple):
  """The state after a text; its tokens, and their mean loss in nats."""

  state: StreamState
  tokens: int
  loss: float


class Answer(NamedTuple):
  """The continuation of a question; the session's state afterwards."""

  text: str
  state: StreamState


def start(run: Run) -> StreamState:
  """The state of a session that has read nothing."""
  state = streaming.start(run.config.model)
  return jax.device_put(state, streaming.shardings(state, run.mesh))


def _flat(state: StreamState) -> Json:
  """Leaves by name, `fast.mixer.memory.now.weight.hidden`."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


def save(folder: epath.Path, run: Run, state: StreamState) -> None:
  """Writes a session; if killed on the way, the previous one is still there."""
  import safetensors
  from safetensors import numpy as safetensors_numpy

  arrays = _flat(jax.device_get(state))
  card = Card(
    version=VERSION,
    workdir=str(files.absolute(run.workdir)),
    step=run.step,
    parameters=run.checksum,
    tokenizer=run.tokenizer.sha256,
    model=run.config.model,
    tokens=int(state.processed),
    state=digest.of_arrays(arrays),
  )
  target = state_file(folder, card)
  try:
    with files.writing(target) as path:
      safetensors_numpy.save_file(arrays, path, {"format": "hope_jax session"})
      path.chmod(0o644)
    workdir_lib.write_json(folder / CARD, config_lib.to_dict(card))
    for path in folder.iterdir():
      is_ours = path.name.startswith((CARD, STATE))
      if is_ours and path.name not in (CARD, target.name):
        path.unlink()
  except (OSError, safetensors.SafetensorError) as error:
    raise errors.SaveFailed(
      f"cannot save {folder}: {files.reason(error)}; the session that is there"
      " is intact"
    ) from error


def load(folder: epath.Path, run: Run) -> StreamState:
  """The state of a saved session on the run's mesh.

  `ConfigError` for a session of another model, or a damaged one.
  """
  import safetensors
  from safetensors import numpy as safetensors_numpy

  card = read_card(folder)
  _check_origin(folder, card, run)
  path = state_file(folder, card)
  try:
    arrays = safetensors_numpy.load_file(files.local(path))
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise damaged(path, files.reason(error)) from error
  if digest.of_arrays(arrays) != card.state:
    raise damaged(path, "its checksum is another")
  shapes = jax.eval_shape(lambda: streaming.start(run.config.model))
  leaves = []
  for name, like in _flat(shapes).items():
    x = arrays.pop(name, np.zeros(0))
    if (x.shape, x.dtype) != (like.shape, like.dtype):
      raise damaged(path, f"{name} is not {like.dtype}{list(like.shape)}")
    leaves.append(x)
  if arrays:
    raise damaged(path, f"nothing here is called {min(arrays)}")
  state = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
  return jax.device_put(state, streaming.shardings(shapes, run.mesh))


def _check_origin(folder: epath.Path, card: Card, run: Run) -> None:
  """`ConfigError` unless the session was made with this model."""
  ours, theirs = run.config.model, card.model
  different = [
    f"model.{field.name}"
    for field in dataclasses.fields(ModelConfig)
    if getattr(ours, field.name) != getattr(theirs, field.name)
  ]
  for name, is_same in (
    ("tokenizer", card.tokenizer == run.tokenizer.sha256),
    ("step", card.step == run.step),
    ("checksum of parameters", card.parameters == run.checksum),
  ):
    if not is_same:
      different.append(name)
  if different:
    raise ConfigError(
      f"{folder} belongs to step {card.step} of {card.workdir}, not to step"
      f" {run.step} of {run.workdir} ({different[0]} differs): give its own"
      " --workdir, or begin another --session"
    )


def feed(run: Run, state: StreamState, path: epath.Path) -> Read:
  """Reads a text file; the buffers of `state` are donated."""
  import tqdm

  model, begin = run.config.model, int(state.processed)
  total = None
  if isinstance(run.tokenizer, Bytes) and path.exists():
    total = path.stat().length
  loss, scored = 0.0, 0
  with tqdm.tqdm(
    total=total, desc=path.name, unit=" tokens", unit_scale=True, disable=None
  ) as bar:
    first = BAR_STEP - begin % BAR_STEP  # then whole steps, but for the last
    for tokens in reading.read_text(path, run.tokenizer, first, BAR_STEP):
      with progress.waiting(f"reading {path.name}", patience=5.0):
        read = streaming.extend(run.params, state, tokens[None], config=model)
      known = read.log_probs[0, 0 if begin or scored else 1 :]
      loss -= float(known.sum(dtype=np.float64))
      scored += len(known)
      state = read.state
      bar.update(len(tokens))
  generation.check_finite(state.logits)  # or the session would be spoilt
  mean = loss / scored if scored else math.nan
  return Read(state, int(state.processed) - begin, mean)


def ask(
  run: Run,
  state: StreamState,
  question: str,
  *,
  count: int,
  sampling: Sampling,
  stop: Sequence[str] = (),
  seed: int = 0,
  keep: bool = False,
) -> Answer:
  """Continues `question` after what the session has read.

  With `keep` the state has read question and answer; else it is unchanged.
  """
  model = run.config.model
  tokens = run.tokenizer.encode(question)
  begin = int(state.processed)
  if not begin + len(tokens):
    raise ConfigError("--ask is empty, and the session has read nothing")
  streaming.check_room(model, begin, len(tokens) + count)
  read = streaming.extend(
    run.params, streaming.copy(state), tokens[None], config=model
  )
  with progress.waiting("compiling and drawing", patience=2.0):
    (new,) = generation.go_on(
      run.params,
      jax.tree.map(lambda x: x[None], read.state.fast),
      read.logits,
      config=model,
      count=count,
      sampling=sampling,
      vocab_size=run.tokenizer.vocab_size,
      seed=seed,
      is_over=lambda tokens: texts.cut(tokens, run.tokenizer, stop)[1],
    )
  text, _ = texts.cut(new, run.tokenizer, stop)
  if not keep:
    return Answer(text, state)
  kept = _tokens_of(text, new, run.tokenizer)
  read = streaming.extend(run.params, read.state, kept[None], config=model)
  return Answer(text, read.state)


def _tokens_of(text: str, new: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  """The leading drawn tokens, those that decode to `text`."""
  ends = np.flatnonzero(new == tokenizer.eos)
  new = new[: ends[0]] if len(ends) else new
  while len(tokenizer.decode(new)) > len(text):
    new = new[:-1]
  return new


def info(folder: epath.Path, run: Run, state: StreamState) -> Json:
  """What a session is: tokens read, bytes, and what its levels hold."""
  return {
    "session": str(folder),
    "workdir": str(run.workdir),
    "step": run.step,
    "tokens": int(state.processed),
    "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
    "relative_change": fast_state.relative_change(
      run.params, state.fast, run.config.model
    ),
  }


def check_room(
  run: Run,
  position: int,
  *,
  paths: Iterable[epath.Path] = (),
  questions: Sequence[str] = (),
  count: int = 0,
  keep: bool = False,
) -> None:
  """`ConfigError` if attention cannot hold what is going to be read.

  That is the files of `paths`, except pipes, and each question with an answer
  of `count` tokens; with `keep`, questions add up.
  """
  model = run.config.model
  if not model.has_longest_context:
    return
  for path in paths:
    if files.is_read_once(path):
      continue
    parts = reading.read_text(path, run.tokenizer, BAR_STEP, BAR_STEP)
    tokens = sum(map(len, parts))
    streaming.check_room(model, position, tokens)
    position += tokens
  for question in questions:
    tokens = len(run.tokenizer.encode(question))
    streaming.check_room(model, position, tokens + count)
    if keep:  # plus an answer of unknown length
      position += tokens
