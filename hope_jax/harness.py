"""Scores a run on tasks of lm-eval (extra `eval`), as a table and as JSON.

python -m hope_jax.harness --workdir=runs/x --tasks=piqa,arc_easy --limit=100
python -m hope_jax.harness --workdir=runs/x --tasks=table2 --data=data \
  --include_path=experiments/language_modeling/tasks --output=runs/x/tasks.json

Tasks are lm-eval's own, which download their data, or those of the task files
in `--include_path`, which take precedence and may read from `--data` (a
`custom_dataset` function gets it as its argument `data`).  In the table, `95 %`
is 1.96 standard errors and `chance` is one over the number of choices;
`truncated` says how many of a task's requests had a context too long for
attention's cache, and how many tokens were cut from one at most.

All requests of all tasks are checked before the first is answered.  With
`--output`, the answers to finished tasks are kept beside it until all tasks are
scored (`inference/lm_eval_answers.py`), so that the same command continues one
that was killed.
"""

import datetime
import logging
import os
import sys
import time
from typing import Any

from absl import flags

from hope_jax import cli
from hope_jax.config import ConfigError
from hope_jax.runs import files, progress
from hope_jax.runs import workdir as workdir_lib


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_list("tasks", None, "names of tasks or groups", required=True)
  flags.DEFINE_string("include_path", None, "folder of more task files")
  flags.DEFINE_string("data", "data", "folder that these may read from")
  flags.DEFINE_integer("limit", None, "documents of each task; default: all")
  flags.DEFINE_integer("num_fewshot", None, "examples before each question")
  flags.DEFINE_integer("batch_size", 8, "texts that are read together")
  flags.DEFINE_string("output", None, "also write the scores there, as JSON")


def check(args: Any) -> None:
  """Checks the flags as far as possible before anything is read."""
  for name, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
    value = getattr(args, name)
    if value is not None and value < least:
      raise ConfigError(f"--{name}={value} must be {least} or more")
  if not args.tasks or not all(args.tasks):
    raise ConfigError("--tasks is empty: name at least one")
  if args.include_path is not None and not os.path.isdir(args.include_path):
    raise ConfigError(f"--include_path={args.include_path} is no folder")
  if args.output:
    files.check_output(args.output, "output")


def main() -> None:
  args = flags.FLAGS
  check(args)
  try:
    import lm_eval
  except ImportError as error:
    reason = files.reason(error)
    cli.fail(f"no lm-eval ({reason}): install hope-jax[eval]", 1)
  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  workdir = files.reach(args.workdir)
  model = workdir_lib.read_config(workdir).model
  progress.say(
    f"scoring {cli.describe(model)}, tasks {', '.join(args.tasks)},"
    f" workdir {workdir}"
  )
  cli.announce_devices(1)
  from hope_jax.inference import lm_eval_tasks, trained
  from hope_jax.inference.lm_eval_answers import Answers

  tasks = lm_eval_tasks.load_tasks(args.tasks, args.include_path, args.data)
  run = trained.open_run(workdir)
  output = files.reach(args.output) if args.output else None
  if output is None:
    print(
      "no --output: answers are not kept if this is interrupted",
      file=sys.stderr,
    )
  answers = Answers(output, run)
  begin = time.monotonic()
  found = lm_eval_tasks.evaluate(
    run,
    tasks,
    limit=args.limit,
    num_fewshot=args.num_fewshot,
    batch_size=args.batch_size,
    answers=answers,
  )
  print(lm_eval_tasks.table(found))
  if output is None:
    return
  scores = {
    "workdir": args.workdir,
    "model": model.sequence_layer,
    "step": run.step,
    "date": datetime.date.today().isoformat(),
    "seconds": time.monotonic() - begin,
    "lm_eval": lm_eval.__version__,
    "limit": args.limit,
    "scores": [line._asdict() for line in found],
  }
  kept = "; the answers are kept: run the same command again"
  cli.write_output(output, scores, kept)
  answers.remove()


if __name__ == "__main__":
  define_flags()
  cli.run(main)
