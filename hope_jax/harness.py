"""Scores a run on the tasks of lm-eval (extra `eval`): a table, and JSON.

python -m hope_jax.harness --workdir=runs/x --tasks=piqa,arc_easy --limit=100
python -m hope_jax.harness --workdir=runs/x --tasks=table2 --data=data \
  --include_path=experiments/language_modeling/tasks --output=runs/x/tasks.json

Tasks are lm-eval's own, which download their data, or those of the task files
in `--include_path`, which come first; those may read from `--data` (a
`custom_dataset` function gets it as its argument `data`).  Bounds are 95 %
(1.96 standard errors), `chance` is one over the number of choices, `truncated`
how many of a task's requests had a context that attention's cache does not hold
and by how many tokens it was cut at the most.

All requests of all tasks are looked at before the first is answered.  With
`--output` the answers of finished tasks are kept beside it until all are
scored (`harness_answers.py`): the same command continues one that was killed.
"""

import datetime
import difflib
import logging
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from hope_jax import files, session
from hope_jax.config import ConfigError
from hope_jax.harness_answers import Answers
from hope_jax.training import checkpoints, command, sharding
from hope_jax.training import workdir as workdir_lib

ROUNDS = 1000  # of the bootstrap, for metrics that are no means
CHOSEN = ("acc", "acc_norm", "acc_bytes")  # the share of right choices


class Line(NamedTuple):
  """A score; `stderr` and `chance` are None where there is none, the counts
  for groups of tasks.

  Attributes:
    truncated: requests whose context was cut.
    cut_tokens: by how many tokens at the most.
    unfinished: texts that were drawn to their longest length without an end.
  """

  task: str
  metric: str
  score: float
  stderr: float | None
  chance: float | None
  documents: int | None
  shots: int | None
  truncated: int | None = None
  cut_tokens: int | None = None
  unfinished: int | None = None

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
  if args.output:
    files.check_output(args.output, "output")


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
  groups: dict[str, Any] = {}
  tasks: dict[str, Any] = {}
  for name in dict.fromkeys(names):
    loaded: Any = _load(manager, name)
    found = loaded.get("groups", {})
    groups |= {key: group for key, group in found.items() if key in names}
    tasks |= loaded["tasks"]
  inside = {
    task.task_name
    for group in groups.values()
    for task in group.get_all_tasks()
  }
  rest = [task for name, task in tasks.items() if name not in inside]
  return [*groups.values(), *rest]


def _load(manager: Any, name: str) -> Any:
  """What lm-eval loads of one name; `ConfigError` that says why it cannot."""
  try:
    return manager.load([name])
  except ConfigError:
    raise
  except ConnectionError as error:
    raise ConfigError(
      f"--tasks: the data of {name!r} is not on this machine, and it could not"
      f" be downloaded ({files.reason(error)}): copy the folder $HF_HOME of a"
      " machine that has it, or name a task file in --include_path that reads"
      " local data"
    ) from error
  except Exception as error:  # no such data, another format, its own code ...
    file = manager.task_index[name].yaml_path or "lm-eval"
    raise ConfigError(
      f"--tasks: cannot load {name!r} ({_reason(error)}): see {file}"
    ) from error


def _reason(error: Exception) -> str:
  return f"{type(error).__name__}: {files.reason(error)}"


def _leaves(tasks: Sequence[Any]) -> list[Any]:
  """The tasks themselves, those of groups too."""
  found = {}
  for task in tasks:
    is_group = hasattr(task, "get_all_tasks")
    for leaf in task.get_all_tasks() if is_group else [task]:
      found[leaf.task_name] = leaf
  return list(found.values())


def evaluate(
  run: session.Run,
  tasks: Sequence[Any],
  *,
  limit: int | None = None,
  num_fewshot: int | None = None,
  batch_size: int = 8,
  answers: Answers | None = None,
) -> list[Line]:
  """The scores of `run` on tasks that `load_tasks` loaded.

  Raises:
    ConfigError: a request of any of the tasks cannot be made or answered;
      nothing has been scored then.
  """
  from lm_eval.evaluator import simple_evaluate
  from lm_eval.tasks import TaskManager

  from hope_jax.harness_model import HopeLM

  # A process that is forked from one with JAX's threads may hang.
  os.environ.setdefault("DISABLE_MULTIPROC", "1")
  leaves = _leaves(tasks)
  for task in leaves:
    _check_task(task, num_fewshot)
  model = HopeLM(run, batch_size=batch_size, tasks=leaves, answers=answers)
  try:
    with sharding.activate(run.mesh):
      results: Any = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=TaskManager(include_defaults=False),  # they are loaded
        limit=limit,
        num_fewshot=num_fewshot,
        bootstrap_iters=0 if limit == 1 else ROUNDS,
      )
  except ConfigError:
    raise
  except Exception as error:
    if model.was_asked:
      raise
    missing = next(
      (t.task_name for t in leaves if not getattr(t, "instances", None)), "all"
    )
    shots = "" if num_fewshot is None else f" with --num_fewshot={num_fewshot}"
    raise ConfigError(
      f"--tasks: cannot make the requests of {missing}{shots}"
      f" ({_reason(error)})"
    ) from error
  return [_with_counts(line, model) for line in lines(results)]


def _check_task(task: Any, num_fewshot: int | None) -> None:
  """Refuses what lm-eval would, in one line; says what it would not."""
  for field, why in (
    ("UNSAFE_CODE", "runs code that the model writes"),
    ("MULTIMODAL", "is not of texts alone"),
  ):
    if getattr(task, field, False):
      raise ConfigError(f"--tasks: {task.task_name} {why}: leave it out")
  fixed = task.get_config("num_fewshot") == 0
  if num_fewshot and fixed:
    print(
      f"{task.task_name}: its task file says num_fewshot: 0, so that"
      f" --num_fewshot={num_fewshot} is not used",
      file=sys.stderr,
    )


def _with_counts(line: Line, model: Any) -> Line:
  cuts = model.cuts.get(line.task)
  if cuts is None:  # a group
    return line
  return line._replace(
    truncated=cuts.truncated,
    cut_tokens=cuts.tokens,
    unfinished=model.unfinished.get(line.task),
  )


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
      f"{line.truncated:,} by {line.cut_tokens:,}" if line.truncated else "",
    ]
    for line in found
  ]
  header = ["task", "metric", "score", "95 %", "chance", "documents", "shots"]
  header.append("truncated")
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
  workdir = files.reach(args.workdir)
  workdir_lib.read_config(workdir)  # before data are loaded from far away
  tasks = load_tasks(args.tasks, args.include_path, args.data)
  run = session.open_run(workdir)
  output = files.reach(args.output) if args.output else None
  if output is None:
    print(
      "no --output: answers are not kept if this is interrupted",
      file=sys.stderr,
    )
  answers = Answers(output, run)
  begin = time.monotonic()
  found = evaluate(
    run,
    tasks,
    limit=args.limit,
    num_fewshot=args.num_fewshot,
    batch_size=args.batch_size,
    answers=answers,
  )
  print(table(found))
  if output is None:
    return
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
  try:
    workdir_lib.write_json(output, workdir_lib.finite(scores))
  except OSError as error:
    raise checkpoints.SaveFailed(
      f"cannot write {output}: {files.reason(error)}; the answers are kept: run"
      " the same command again"
    ) from error
  answers.remove()


if __name__ == "__main__":
  define_flags()
  command.run(main)
