"""Sessions: what a model has read, kept in a folder from one day to the next.

python -m hope_jax.session --workdir=runs/x --session=sessions/a --new \
  --feed=book.txt --feed=notes.txt
python -m hope_jax.session --workdir=runs/x --session=sessions/a \
  --ask="Who is she? " --tokens=100 [--keep]
python -m hope_jax.session --workdir=runs/x --session=sessions/a \
  --reset=memory,cms_0 --fork=sessions/b --info

In this order: levels are reset (D, momentum and what they have of a chunk that
is not over; or all levels), files are read, questions are continued, the
session is saved, copied to `--fork` and described.  Asking leaves the session
as it was, but with `--keep` it has read question and answer.  `--new` begins a
session with the run's newest checkpoint; without it, one that does not exist is
an error.  What can be known to go wrong (a text that is not UTF-8, more than
attention's cache holds, a folder that cannot be written) is found before
anything is read.

The folder holds session.json, which names the run's checkpoint, and the state
as state-<hash>.safetensors (names as in the tree of `streaming.StreamState`),
whole arrays, so that it goes on on any number of devices.
session.json is replaced last, in one go: killed at any moment, the session is
as it was before or as it is after.

Legend: B batch (1), V vocab.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh

from hope_jax import config as config_lib
from hope_jax import files, generate, generation, streaming
from hope_jax.config import Config, ConfigError, MeshConfig
from hope_jax.data import pipeline
from hope_jax.data.tokenizer import Bytes, Tokenizer
from hope_jax.generation import Sampling
from hope_jax.model_config import ModelConfig
from hope_jax.session_folder import (
  CARD,
  STATE,
  VERSION,
  Card,
  check_folder,
  claimed,
  damaged,
  read_card,
  state_file,
)
from hope_jax.streaming import StreamState
from hope_jax.training import checkpoints, command, digest, progress, sharding
from hope_jax.training import step as step_lib
from hope_jax.training import workdir as workdir_lib

BLOCK = 4 * streaming.PIECE  # tokens between two movements of the bar


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_string("session", None, "folder of the session", required=True)
  flags.DEFINE_bool("new", False, "begin the session, which must not exist")
  flags.DEFINE_list("reset", [], "levels that forget: names, or all")
  flags.DEFINE_multi_string("feed", [], "text file to read")
  flags.DEFINE_multi_string("ask", [], "text to continue after what was read")
  flags.DEFINE_bool("keep", False, "questions and answers are read, too")
  generate.define_sampling_flags()
  flags.DEFINE_string("fork", None, "new folder for a copy of the session")
  flags.DEFINE_bool("info", False, "print what the session is, as JSON")
  flags.DEFINE_integer("devices", 1, "over which heads and widths are split")


class Run(NamedTuple):
  """A trained model to hold sessions with; `checksum` is of its parameters."""

  workdir: epath.Path
  config: Config
  tokenizer: Tokenizer
  mesh: Mesh
  step: int
  params: Any
  checksum: str


class Read(NamedTuple):
  """The state after a text; its tokens, and their mean loss in nats."""

  state: StreamState
  tokens: int
  loss: float


class Answer(NamedTuple):
  """The continuation of a question; the session's state afterwards."""

  text: str
  state: StreamState


def open_run(workdir: epath.Path, devices: int = 1) -> Run:
  """The newest checkpoint of a run, on so many devices."""
  if not 0 < devices <= jax.device_count():
    raise ConfigError(
      f"--devices={devices}: there are {jax.device_count()} here"
    )
  config = workdir_lib.read_config(workdir)
  tokenizer = pipeline.load_tokenizer(config)
  if tokenizer is None:
    raise ConfigError(f"{workdir} was trained on {config.data.kind}, not text")
  workdir_lib.check_data(workdir, config, {"tokenizer": tokenizer.sha256})
  split = MeshConfig(data=1, tensor=devices)
  mesh = sharding.make_mesh(split, jax.devices()[:devices])
  with sharding.activate(mesh):
    abstract = step_lib.build(config, mesh).abstract_state.params
    step, params = checkpoints.restore_params(workdir, abstract)
    return Run(workdir, config, tokenizer, mesh, step, params, checksum(params))


def checksum(params: Any) -> str:
  """A hash that tells checkpoints apart, whatever mesh they are on."""
  found = [leaf.digest for leaf in digest.leaves(params).values()]
  return hashlib.sha256("".join(found).encode()).hexdigest()


def start(run: Run) -> StreamState:
  """The state of a session that has read nothing."""
  state = streaming.start(run.config.model)
  return jax.device_put(state, streaming.shardings(state, run.mesh))


def _flat(state: StreamState) -> dict[str, Any]:
  """Leaves by name, `fast.mixer.memory.now.weight.hidden`."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


def save(folder: epath.Path, run: Run, state: StreamState) -> None:
  """Writes a session: killed on the way, the one before is still there."""
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
    raise checkpoints.SaveFailed(
      f"cannot save {folder}: {files.reason(error)}; the session that is there"
      " is intact"
    ) from error


def load(folder: epath.Path, run: Run) -> StreamState:
  """The state of a saved session on the run's mesh.

  A `ConfigError` for one of another model, or one that is damaged.
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
  """Reads a text file; `state` is used up."""
  import tqdm

  model, begin = run.config.model, int(state.processed)
  total = None
  if isinstance(run.tokenizer, Bytes) and path.exists():
    total = path.stat().length
  loss, scored = 0.0, 0
  with tqdm.tqdm(
    total=total, desc=path.name, unit=" tokens", unit_scale=True, disable=None
  ) as bar:
    first = BLOCK - begin % BLOCK  # then only whole pieces, to the last block
    for tokens in streaming.read_text(path, run.tokenizer, first, BLOCK):
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

  With `keep` the state has read question and answer; else it is as before.
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
      is_over=lambda tokens: generate.cut(tokens, run.tokenizer, stop)[1],
    )
  text, _ = generate.cut(new, run.tokenizer, stop)
  if not keep:
    return Answer(text, state)
  kept = _tokens_of(text, new, run.tokenizer)
  read = streaming.extend(run.params, read.state, kept[None], config=model)
  return Answer(text, read.state)


def _tokens_of(text: str, new: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
  """Those of the drawn tokens that make `text`, which was cut of them."""
  ends = np.flatnonzero(new == tokenizer.eos)
  new = new[: ends[0]] if len(ends) else new
  while len(tokenizer.decode(new)) > len(text):
    new = new[:-1]
  return new


def info(folder: epath.Path, run: Run, state: StreamState) -> dict[str, Any]:
  """What a session is: tokens read, bytes, and what its levels hold."""
  return {
    "session": str(folder),
    "workdir": str(run.workdir),
    "step": run.step,
    "tokens": int(state.processed),
    "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
    "relative_change": streaming.relative_change(
      run.params, state, run.config.model
    ),
  }


def _levels(names: Sequence[str], model: ModelConfig) -> tuple[str, ...]:
  """The levels of --reset."""
  if list(names) == ["all"]:
    return model.fast_levels
  for name in names:
    if name not in model.fast_levels:
      raise ConfigError(
        f"--reset: level {name!r} does not exist in this model; it has"
        f" {', '.join(model.fast_levels) or 'no fast levels'}"
      )
  return tuple(names)


def _check(args: Any) -> Sampling:
  """What can be known before a model is there."""
  sampling = Sampling(args.temperature, args.top_k, args.top_p)
  generate.check_request(args.tokens, sampling, args.stop)
  for name in args.feed:
    path = files.reach(name)
    if not path.exists():
      raise ConfigError(f"--feed={name} does not exist")
    if not _is_read_once(path):
      streaming.check_text(path)
  if args.fork:
    if files.reach(args.fork).exists():
      raise ConfigError(f"--fork={args.fork} exists already: choose another")
    files.check_folder(args.fork, "fork")
  return sampling


def _is_read_once(path: epath.Path) -> bool:
  """Whether `path` is a pipe or a terminal, not a file."""
  if files.is_remote(path):
    return False
  local = pathlib.Path(path)
  return local.is_fifo() or local.is_char_device()


def _check_room(run: Run, position: int, args: Any) -> None:
  """`ConfigError` if attention cannot hold what is going to be read."""
  model = run.config.model
  if not model.has_longest_context:
    return
  for path in map(files.reach, args.feed):
    if _is_read_once(path):
      continue
    parts = streaming.read_text(path, run.tokenizer, BLOCK, BLOCK)
    count = sum(map(len, parts))
    streaming.check_room(model, position, count)
    position += count
  for question in args.ask:
    count = len(run.tokenizer.encode(question))
    streaming.check_room(model, position, count + args.tokens)
    if args.keep:  # and what is answered, at least nothing
      position += count


def act(run: Run, folder: epath.Path, args: Any, sampling: Sampling) -> None:
  """Does what the flags say."""
  check_folder(folder, new=args.new)
  levels = _levels(args.reset, run.config.model)
  state = start(run) if args.new else load(folder, run)
  _check_room(run, int(state.processed), args)
  state = streaming.reset(state, levels, run.config.model)
  for name in args.feed:
    state, tokens, loss = feed(run, state, files.reach(name))
    perplexity = math.exp(min(loss, 700.0))
    print(f"{name}: {tokens:,} tokens, perplexity {perplexity:.4g}", flush=True)
  for question in args.ask:
    text, state = ask(
      run,
      state,
      question,
      count=args.tokens,
      sampling=sampling,
      stop=args.stop,
      seed=args.seed,
      keep=args.keep,
    )
    line = json.dumps({"prompt": question, "text": text}, ensure_ascii=False)
    print(question + text if len(args.ask) == 1 else line, flush=True)
  if args.new or levels or args.feed or (args.ask and args.keep):
    save(folder, run, state)
  if args.fork:
    save(files.reach(args.fork), run, state)
  if args.info:
    print(json.dumps(workdir_lib.finite(info(folder, run, state))))


def main() -> None:
  args = flags.FLAGS
  sampling = _check(args)
  folder = files.reach(args.session)
  check_folder(folder, new=args.new)
  run = open_run(files.reach(args.workdir), args.devices)
  with claimed(folder), sharding.activate(run.mesh):
    act(run, folder, args, sampling)


if __name__ == "__main__":
  define_flags()
  command.run(main)
