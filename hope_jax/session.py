"""Sessions: the state of a model that has read texts, kept in a folder.

python -m hope_jax.session --workdir=runs/x --session=sessions/a --new \
  --feed=book.txt --feed=notes.txt
python -m hope_jax.session --workdir=runs/x --session=sessions/a \
  --ask="Who is she? " --tokens=100 [--keep]
python -m hope_jax.session --workdir=runs/x --session=sessions/a \
  --reset=memory,cms_0 --fork=sessions/b --info

The flags act in this order: levels are reset (D, momentum and what they hold of
an unfinished chunk become zero), files are read, questions are continued, and
the session is saved, copied to `--fork` and described.  A question does not
change the session, unless `--keep` adds the question and its answer.  `--new`
begins a session with the run's newest checkpoint; without it, the session must
exist.  Errors that can be foreseen (a text that is not UTF-8, more tokens than
attention's cache holds, a folder that cannot be written) are reported before
anything is read.

If the command is killed at any moment, the saved session is either the one
before or the one after the command (`inference/sessions.py`).
"""

import json
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath

from hope_jax import cli
from hope_jax.config import ConfigError, ModelConfig
from hope_jax.inference.sampling import Sampling
from hope_jax.inference.session_folder import check_folder, claimed
from hope_jax.runs import files, progress
from hope_jax.runs import workdir as workdir_lib


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_string("session", None, "folder of the session", required=True)
  flags.DEFINE_bool("new", False, "begin the session, which must not exist")
  flags.DEFINE_list("reset", [], "levels that forget: names, or all")
  flags.DEFINE_multi_string("feed", [], "text file to read")
  flags.DEFINE_multi_string("ask", [], "text to continue after what was read")
  flags.DEFINE_bool("keep", False, "questions and answers are read, too")
  cli.define_sampling()
  flags.DEFINE_string("fork", None, "new folder for a copy of the session")
  flags.DEFINE_bool("info", False, "print what the session is, as JSON")
  flags.DEFINE_integer("devices", 1, "over which heads and widths are split")


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
  """Checks the flags as far as possible before the model is loaded."""
  from hope_jax.inference import reading

  sampling = cli.read_sampling(args)
  for name in args.feed:
    path = files.reach(name)
    if not path.exists():
      raise ConfigError(f"--feed={name} does not exist")
    if not files.is_read_once(path):
      reading.check_text(path)
  if args.fork:
    if files.reach(args.fork).exists():
      raise ConfigError(f"--fork={args.fork} exists already: choose another")
    files.check_folder(args.fork, "fork")
  return sampling


def act(run: Any, folder: epath.Path, args: Any, sampling: Sampling) -> None:
  """Resets, reads, asks, saves, forks and describes, as the flags say."""
  from hope_jax.inference import sessions, streaming
  from hope_jax.training import evaluation

  check_folder(folder, new=args.new)
  levels = _levels(args.reset, run.config.model)
  state = sessions.start(run) if args.new else sessions.load(folder, run)
  sessions.check_room(
    run,
    int(state.processed),
    paths=map(files.reach, args.feed),
    questions=args.ask,
    count=args.tokens,
    keep=args.keep,
  )
  state = streaming.reset(state, levels, run.config.model)
  for name in args.feed:
    state, tokens, loss = sessions.feed(run, state, files.reach(name))
    shown = f"{evaluation.perplexity(loss):.4g}"
    print(f"{name}: {tokens:,} tokens, perplexity {shown}", flush=True)
  for question in args.ask:
    text, state = sessions.ask(
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
    sessions.save(folder, run, state)
  if args.fork:
    sessions.save(files.reach(args.fork), run, state)
  if args.info:
    print(json.dumps(workdir_lib.finite(sessions.info(folder, run, state))))


def main() -> None:
  args = flags.FLAGS
  sampling = _check(args)
  folder, workdir = files.reach(args.session), files.reach(args.workdir)
  check_folder(folder, new=args.new)
  model = workdir_lib.read_config(workdir).model
  _levels(args.reset, model)
  progress.say(
    f"session {folder} with {cli.describe(model)}, workdir {workdir}"
  )
  cli.announce_devices(args.devices)
  from hope_jax.inference import trained
  from hope_jax.training import sharding

  run = trained.open_run(workdir, args.devices)
  with claimed(folder), sharding.activate(run.mesh):
    act(run, folder, args, sampling)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
