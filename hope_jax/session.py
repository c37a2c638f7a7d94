"""Sessions: what a model has read, kept in a folder from one day to the next.

python -m hope_jax.session --workdir=runs/x --session=sessions/a \
  --feed=book.txt --feed=notes.txt
python -m hope_jax.session --workdir=runs/x --session=sessions/a \
  --ask="Who is she? " --tokens=100 [--keep]
python -m hope_jax.session --workdir=runs/x --session=sessions/a \
  --reset=memory,cms_0 --fork=sessions/b --info

In this order: levels are reset (D, momentum and what they have of a chunk that
is not over; or all levels), files are read, questions are continued, the
session is saved, copied to `--fork` and described.  Asking leaves the session
as it was, but with `--keep` it has read question and answer.  A folder that
does not exist begins a session with the run's newest checkpoint.

The folder holds session.json, which names the run's checkpoint, and the state
as state-<hash>.safetensors (names as in the tree of `streaming.StreamState`),
whole arrays, so that it goes on on any number of devices.
session.json is replaced last, in one go: killed at any moment, the session is
as it was before or as it is after.

Legend: B batch (1), V vocab.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
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
from hope_jax.streaming import StreamState
from hope_jax.training import checkpoints, command, digest, sharding
from hope_jax.training import step as step_lib
from hope_jax.training import workdir as workdir_lib

CARD, STATE = "session.json", "state-"
VERSION = 2  # 1 had another checksum of parameters
BLOCK = 4 * streaming.PIECE  # tokens between two movements of the bar


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_string("session", None, "folder of the session", required=True)
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


@dataclasses.dataclass(frozen=True)
class Card:
  """session.json: which model the session belongs to, and its state.

  Attributes:
    workdir: of the run, when the session was saved; it may have moved.
    parameters, tokenizer: checksums.
    tokens: read so far.
    state: SHA-256 of the state's arrays.
  """

  version: int
  workdir: str
  step: int
  parameters: str
  tokenizer: str
  model: ModelConfig
  tokens: int
  state: str


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
  target = _state_file(folder, card)
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


def _state_file(folder: epath.Path, card: Card) -> epath.Path:
  return folder / f"{STATE}{card.state[:16]}.safetensors"


def read_card(folder: epath.Path) -> Card:
  """session.json; `ConfigError` if it is none."""
  path = folder / CARD
  try:
    values = json.loads(path.read_text())
    card = config_lib.convert(Card, values, "session")
  except (OSError, ValueError) as error:
    raise _damaged(path, files.reason(error)) from error
  if card.version != VERSION:
    raise ConfigError(
      f"{folder} is a session of version {card.version}, but this program"
      f" reads version {VERSION}"
    )
  return card


def _damaged(path: epath.Path, reason: str) -> ConfigError:
  return ConfigError(
    f"cannot read {path} ({reason}): put a copy of the session there, or begin"
    " another --session"
  )


def load(folder: epath.Path, run: Run) -> StreamState:
  """The state of a saved session on the run's mesh.

  A `ConfigError` for one of another model, or one that is damaged.
  """
  import safetensors
  from safetensors import numpy as safetensors_numpy

  card = read_card(folder)
  _check_origin(folder, card, run)
  path = _state_file(folder, card)
  try:
    arrays = safetensors_numpy.load_file(files.local(path))
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise _damaged(path, files.reason(error)) from error
  if digest.of_arrays(arrays) != card.state:
    raise _damaged(path, "its checksum is another")
  shapes = jax.eval_shape(lambda: streaming.start(run.config.model))
  leaves = []
  for name, like in _flat(shapes).items():
    x = arrays.pop(name, np.zeros(0))
    if (x.shape, x.dtype) != (like.shape, like.dtype):
      raise _damaged(path, f"{name} is not {like.dtype}{list(like.shape)}")
    leaves.append(x)
  if arrays:
    raise _damaged(path, f"nothing here is called {min(arrays)}")
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


def check_folder(folder: epath.Path) -> None:
  """`ConfigError` for a folder, or a file, that holds something else."""
  if not folder.exists() or (folder / CARD).exists():
    return
  ours = lambda name: name.startswith((CARD, STATE, workdir_lib.LOCK))
  if folder.is_dir() and all(ours(path.name) for path in folder.iterdir()):
    return
  raise ConfigError(f"{folder} exists, but holds no session: choose another")


@contextlib.contextmanager
def claimed(folder: epath.Path) -> Iterator[None]:
  """Inside, no other process uses the session; a new one that is not saved
  leaves nothing behind."""
  check_folder(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f"cannot make {folder}: {files.reason(error)}") from error
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(workdir_lib.locked(folder))
    except ConfigError as error:
      raise ConfigError(
        f"{folder} is in use by another process: wait for it, or choose another"
        " --session"
      ) from error
    except OSError as error:
      raise ConfigError(
        f"cannot write to {folder}: {files.reason(error)}"
      ) from error
    try:
      yield
    finally:
      if not (folder / CARD).exists():
        with contextlib.suppress(OSError):
          (folder / workdir_lib.LOCK).unlink()
          folder.rmdir()


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
      read = streaming.extend(run.params, state, tokens[None], config=model)
      known = read.log_probs[0, 0 if begin or scored else 1 :]
      loss -= float(known.sum(dtype=np.float64))
      scored += len(known)
      state = read.state
      bar.update(len(tokens))
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
  """What can be known before anything is read."""
  sampling = Sampling(args.temperature, args.top_k, args.top_p)
  generate.check_request(args.tokens, sampling, args.stop)
  for name in args.feed:
    if not files.reach(name).exists():
      raise ConfigError(f"--feed={name} does not exist")
  if args.fork and files.reach(args.fork).exists():
    raise ConfigError(f"--fork={args.fork} exists already: choose another")
  return sampling


def act(run: Run, folder: epath.Path, args: Any, sampling: Sampling) -> None:
  """Does what the flags say."""
  is_new = not (folder / CARD).exists()
  levels = _levels(args.reset, run.config.model)
  state = start(run) if is_new else load(folder, run)
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
  if is_new or levels or args.feed or (args.ask and args.keep):
    save(folder, run, state)
  if args.fork:
    save(files.reach(args.fork), run, state)
  if args.info:
    print(json.dumps(workdir_lib.finite(info(folder, run, state))))


def main() -> None:
  args = flags.FLAGS
  sampling = _check(args)
  folder = files.reach(args.session)
  check_folder(folder)
  run = open_run(files.reach(args.workdir), args.devices)
  with claimed(folder), sharding.activate(run.mesh):
    act(run, folder, args, sampling)


if __name__ == "__main__":
  define_flags()
  command.run(main)
