"""Scores a run on the tasks of lm-eval (extra `eval`): a table, and JSON.

python -m hope_jax.harness --workdir=runs/x --tasks=piqa,arc_easy --limit=100
python -m hope_jax.harness --workdir=runs/x --tasks=table2 --data=data \
  --include_path=experiments/language_modeling/tasks --output=runs/x/tasks.json

Tasks are lm-eval's own, which download their data, or those of the task files
in `--include_path`, which come first; those may read from `--data` (a
`custom_dataset` function gets it as its argument `data`).  Bounds are 95 %
(1.96 standard errors), `chance` is one over the number of choices.
"""

import datetime
import difflib
import logging
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from hope_jax import files, session
from hope_jax.config import ConfigError
from hope_jax.training import command, sharding
from hope_jax.training import workdir as workdir_lib

ROUNDS = 1000  # of the bootstrap, for metrics that are no means
CHOSEN = ("acc", "acc_norm", "acc_bytes")  # the share of right choices


class Line(NamedTuple):
  """A score; `stderr` and `chance` are None where there is none, `documents`
  and `shots` for groups of tasks."""

  task: str
  metric: str
  score: float
  stderr: float | None
  chance: float | None
  documents: int | None
  shots: int | None

  @property
  def bound(self) -> float | None:
    """Half the 95 % interval."""
    return None if self.stderr is None else 1.96 * self.stderr


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
  """What can be known of the flags before anything is read."""
  for name, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
    value = getattr(args, name)
    if value is not None and value < least:
      raise ConfigError(f"--{name}={value} must be {least} or more")
  if not args.tasks or not all(args.tasks):
    raise ConfigError("--tasks is empty: name at least one")
  if args.include_path is not None and not os.path.isdir(args.include_path):
    raise ConfigError(f"--include_path={args.include_path} is no folder")


def load_tasks(
  names: Sequence[str], include_path: str | None, data: str
) -> list[Any]:
  """Tasks and groups of these names, with their data."""
  from lm_eval.tasks import TaskManager

  metadata: Any = {"data": data}
  manager = TaskManager(
    include_path=include_path,
    include_defaults=False,  # to look through them takes seconds
    metadata=metadata,
  )
  if not set(names) <= set(manager.all_tasks):
    manager = TaskManager(include_path=include_path, metadata=metadata)
  for name in names:
    if name not in manager.all_tasks:
      near = difflib.get_close_matches(name, manager.all_tasks, 1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ConfigError(f"--tasks: there is no task {name!r}{hint}")
  try:
    loaded = manager.load(list(names))
  except ConfigError:
    raise
  except Exception as error:  # no network, no such data, another format ...
    raise ConfigError(
      f"cannot load the data of --tasks={','.join(names)}"
      f" ({files.reason(error)}): lm-eval downloads them; task files of"
      " --include_path may read local ones"
    ) from error
  groups = [g for name, g in loaded.get("groups", {}).items() if name in names]
  inside = {
    task.task_name for group in groups for task in group.get_all_tasks()
  }
  rest = [t for name, t in loaded["tasks"].items() if name not in inside]
  return [*groups, *rest]


def evaluate(
  run: session.Run,
  tasks: Sequence[Any],
  *,
  limit: int | None = None,
  num_fewshot: int | None = None,
  batch_size: int = 8,
) -> list[Line]:
  """The scores of `run` on tasks that `load_tasks` loaded."""
  from lm_eval.evaluator import simple_evaluate
  from lm_eval.tasks import TaskManager

  from hope_jax.harness_model import HopeLM

  # A process that is forked from one with JAX's threads may hang.
  os.environ.setdefault("DISABLE_MULTIPROC", "1")
  with sharding.activate(run.mesh):
    results: Any = simple_evaluate(
      model=HopeLM(run, batch_size=batch_size),
      tasks=list(tasks),
      task_manager=TaskManager(include_defaults=False),  # they are loaded
      limit=limit,
      num_fewshot=num_fewshot,
      bootstrap_iters=0 if limit == 1 else ROUNDS,
    )
  return lines(results)


def lines(results: Mapping[str, Any]) -> list[Line]:
  """A line for each metric of each task or group in lm-eval's results."""
  found = []
  for task, values in results["results"].items():
    samples = results["samples"].get(task, ())
    kind = results["configs"].get(task, {}).get("output_type")
    for key, score in values.items():
      metric, comma, filter_ = key.partition(",")
      if not comma or metric.endswith("_stderr"):
        continue
      stderr = values.get(f"{metric}_stderr,{filter_}")
      found.append(
        Line(
          task=task,
          metric=metric if filter_ == "none" else f"{metric} ({filter_})",
          score=float(score),
          stderr=float(stderr) if isinstance(stderr, float) else None,
          chance=_chance(metric, kind, samples),
          documents=results["n-samples"].get(task, {}).get("effective"),
          shots=results["n-shot"].get(task) if samples else None,
        )
      )
  return found


def _chance(
  metric: str, kind: str | None, samples: Sequence[Any]
) -> float | None:
  """What guessing scores, None if that is not known."""
  if kind == "multiple_choice" and metric in CHOSEN:
    return statistics.fmean(1 / len(sample["arguments"]) for sample in samples)
  is_text = kind in ("generate_until", "loglikelihood")
  return 0.0 if is_text and "perplexity" not in metric else None


def table(found: Sequence[Line]) -> str:
  """The lines as a markdown table."""
  from pytablewriter import MarkdownTableWriter, String

  def cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)

  rows = [
    [
      line.task,
      line.metric,
      f"{line.score:.4g}",
      cell(line.bound, "± {:.2g}"),
      cell(line.chance, "{:.4g}"),
      cell(line.documents, "{:,}"),
      cell(line.shots, "{}"),
    ]
    for line in found
  ]
  header = ["task", "metric", "score", "95 %", "chance", "documents", "shots"]
  return MarkdownTableWriter(
    headers=header,
    value_matrix=rows,
    type_hints=[String] * len(header),  # or numbers would be written anew
  ).dumps()


def main() -> None:
  args = flags.FLAGS
  check(args)
  try:
    import lm_eval
  except ImportError as error:
    reason = files.reason(error)
    command.fail(f"no lm-eval ({reason}): install hope-jax[eval]", 1)
  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  tasks = load_tasks(args.tasks, args.include_path, args.data)
  run = session.open_run(files.reach(args.workdir))
  begin = time.monotonic()
  found = evaluate(
    run,
    tasks,
    limit=args.limit,
    num_fewshot=args.num_fewshot,
    batch_size=args.batch_size,
  )
  print(table(found))
  if args.output:
    scores = {
      "workdir": args.workdir,
      "model": run.config.model.sequence_layer,
      "step": run.step,
      "date": datetime.date.today().isoformat(),
      "seconds": time.monotonic() - begin,
      "lm_eval": lm_eval.__version__,
      "limit": args.limit,
      "scores": [line._asdict() for line in found],
    }
    workdir_lib.write_json(files.reach(args.output), workdir_lib.finite(scores))


if __name__ == "__main__":
  define_flags()
  command.run(main)
