"""Tasks of lm-eval (extra `eval`): loaded, scored, shown as a table."""

import difflib
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hope_jax.config import ConfigError, Json
from hope_jax.inference.lm_eval_answers import Answers
from hope_jax.inference.trained import Run
from hope_jax.runs import files
from hope_jax.training import sharding

ROUNDS = 1000  # of the bootstrap, for metrics that are not means
CHOSEN = ("acc", "acc_norm", "acc_bytes")  # shares of correct choices


class Line(NamedTuple):
  """A score; `stderr` and `chance` are None if there is none, the counts are
  None for groups of tasks.

  Attributes:
    truncated: requests whose context was cut.
    cut_tokens: the most tokens that one of them lost.
    unfinished: texts that reached their maximal length without an end.
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


def load_tasks(
  names: Sequence[str], include_path: str | None, data: str
) -> list[Any]:
  """Tasks and groups of these names, with their data."""
  from lm_eval.tasks import TaskManager

  metadata: Any = {"data": data}
  manager = TaskManager(
    include_path=include_path,
    include_defaults=False,  # searching them takes seconds
    metadata=metadata,
  )
  if not set(names) <= set(manager.all_tasks):
    manager = TaskManager(include_path=include_path, metadata=metadata)
  for name in names:
    if name not in manager.all_tasks:
      near = difflib.get_close_matches(name, manager.all_tasks, 1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ConfigError(f"--tasks: there is no task {name!r}{hint}")
  groups: Json = {}
  tasks: Json = {}
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
  """What lm-eval loads for a name; a `ConfigError` says why it cannot."""
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
  """All single tasks, including those of groups."""
  found = {}
  for task in tasks:
    is_group = hasattr(task, "get_all_tasks")
    for leaf in task.get_all_tasks() if is_group else [task]:
      found[leaf.task_name] = leaf
  return list(found.values())


def evaluate(
  run: Run,
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

  from hope_jax.inference.lm_eval_model import HopeLM

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
        task_manager=TaskManager(include_defaults=False),  # already loaded
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
  """Refuses in one line what lm-eval would refuse; reports what it ignores."""
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
  """The score of guessing; None if it is not known."""
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
    type_hints=[String] * len(header),  # else numbers are reformatted
  ).dumps()
