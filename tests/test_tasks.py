"""Local task files through the real harness, and what the command refuses."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from absl import flags
from etils import epath

from hope_jax import harness
from hope_jax.config import ConfigError
from hope_jax.inference import generation, lm_eval_tasks, scoring, trained

pytest.importorskip("lm_eval")

from hope_jax.inference.lm_eval_answers import Answers
from hope_jax.inference.lm_eval_model import HopeLM
from tests import test_harness
from tests.test_harness import ask

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
TASKS = str(REPOSITORY / "experiments" / "language_modeling" / "tasks")

one_length, transformer = test_harness.one_length, test_harness.transformer


@pytest.fixture(autouse=True)
def without_environment(monkeypatch):
  """lm-eval's results, without seconds of questions about the machine."""
  monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
  monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: None)


QUESTION = "Question: Why?\nAnswer:"
DATA = {
  "commonsense/piqa_val.jsonl": {
    "goal": "Open a jar",
    "sol1": "turn it",
    "sol2": "burn it",
    "label": 0,
  },
  "commonsense/winogrande_val.jsonl": {
    "sentence": "Tim met Tom and _ left.",
    "option1": "Tim",
    "option2": "Tom",
    "answer": "2",
  },
  "commonsense/siqa_val.jsonl": {
    "context": "Al fell.",
    "question": "Why?",
    "answerA": "a",
    "answerB": "b",
    "answerC": "c",
    "gold": 2,
    "choices": ["a", "b", "c"],
  },
  "lambada/lambada_openai_ctx_cont.jsonl": {
    "context": "The end of the",
    "continuation": "story",
  },
  "squad/squad_v1_val_1000.jsonl": {
    "query": "Title: T\nBackground: B b.\nQuestion: Q?\nAnswer:",
    "answers_text": ["The b", "b"],
  },
}
CHOICES = {"query": QUESTION, "choices": list("abcd"), "gold": 1}
DATA |= {
  f"commonsense/{name}.jsonl": CHOICES
  for name in ("arc_easy_test", "arc_challenge_test", "openbookqa_test")
}
DATA["commonsense/hellaswag_val_1000.jsonl"] = CHOICES
DATA["commonsense/boolq_val.jsonl"] = CHOICES | {"choices": ["yes", "no"]}
DATA["commonsense/csqa_val.jsonl"] = CHOICES | {"choices": list("vwxyz")}
BABI = "1 Al is in Rome.\n2 Bo left.\n3 Where is Al? \tRome\t1\n4 Al ran.\n"
BABI += "5 Where is Al? \tRome\t1\n1 Cy sat.\n2 Who sat? \tCy\t1\n"
WIKITEXT = "".join(
  f" \n = {title} = \n \n {title} is 1 @.@ 5 . \n \n = = Use = = \n \n Few . \n"
  for title in ("Tea", "Du Fu", "Go ( game )")
)
PROMPTS = {  # of the last document, up to the answer
  "piqa": "Question: Open a jar\nAnswer:",
  "winogrande": "Tim met Tom and Tim",
  "social_iqa": "Q: Al fell. Why?\nA:",
  "lambada_openai": "The end of the",
  "squad": "Title: T\n\nBackground: B b.\n\nQuestion: Q?\n\nAnswer:",
  "boolq": QUESTION,
  "hellaswag": QUESTION,
  "arc_easy": QUESTION,
  "arc_challenge": QUESTION,
  "openbookqa": "Why?",
  "commonsense_qa": "Question: Why?\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer:",
  "wikitext": " = Go (game) =\n\nGo (game) is 1.5.\n\n== Use ==\n\nFew.\n",
  "babi_qa1": "Passage: Cy sat.\nQuestion: Who sat?\nAnswer:",
}
CHANCE = {"piqa": 1 / 2, "social_iqa": 1 / 3, "boolq": 1 / 2, "arc_easy": 1 / 4}
CHANCE |= {"commonsense_qa": 1 / 5, "winogrande": 1 / 2, "lambada_openai": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """The folder of `--data`: three lines of everything."""
  folder = tmp_path_factory.mktemp("data")
  for name, row in DATA.items():
    path = folder / "qa" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(3 * (json.dumps(row) + "\n"))
  (folder / "wikitext2").mkdir()
  (folder / "wikitext2" / "test.txt").write_text(WIKITEXT)
  (folder / "qa" / "babi" / "en").mkdir(parents=True)
  for split in ("train", "test"):
    name = f"qa1_single-supporting-fact_{split}.txt"
    (folder / "qa" / "babi" / "en" / name).write_text(BABI)
  return str(folder)


def test_local_tasks_through_the_harness(transformer, data):
  tasks = lm_eval_tasks.load_tasks(list(PROMPTS), TASKS, data)
  lines = lm_eval_tasks.evaluate(transformer, tasks)
  assert {line.task for line in lines} == set(PROMPTS)
  for task in tasks:
    asked = task.instances
    prompts = [request.args[0] for request in asked if request.doc_id == 2]
    assert prompts[0] == PROMPTS[task.task_name]
  by_name = {(line.task, line.metric): line for line in lines}
  for name, chance in CHANCE.items():
    assert by_name[name, "acc"].chance == pytest.approx(chance)
  assert ("piqa", "acc_norm") in by_name and ("squad", "f1") in by_name
  perplexity = by_name["lambada_openai", "perplexity"]
  assert perplexity.chance is None and perplexity.documents == 3
  (log_prob, _) = ask(
    transformer, "loglikelihood", [("The end of the", " story")]
  )[0]
  assert perplexity.score == pytest.approx(np.exp(-log_prob), rel=1e-3)
  pages = [r.args[0] for t in tasks for r in t.instances if "Few" in r.args[0]]
  log_probs = ask(transformer, "loglikelihood_rolling", [(x,) for x in pages])
  words = by_name["wikitext", "word_perplexity"]
  count = len(WIKITEXT.split()) + 2 * 3  # the harness counts the borders, too
  assert words.score == pytest.approx(np.exp(-sum(log_probs) / count), rel=1e-4)
  assert words.documents == 3 and words.chance is None
  scores = ask(
    transformer,
    "loglikelihood",
    [(PROMPTS["piqa"], " turn it"), (PROMPTS["piqa"], " burn it")],
  )
  assert by_name["piqa", "acc"].score == float(scores[0] > scores[1])
  table = lm_eval_tasks.table(lines).splitlines()
  assert len(table) >= len(lines) + 2 and table[0].startswith("|")


@pytest.mark.parametrize(
  ("name", "path", "old"),
  [
    ("arc_easy", "commonsense/arc_easy_test.jsonl", "Why?"),
    ("lambada_openai", "lambada/lambada_openai_ctx_cont.jsonl", "The end"),
    ("squad", "squad/squad_v1_val_1000.jsonl", "Q?"),
  ],
)
def test_examples_are_other_questions(
  transformer, tmp_path, monkeypatch, name, path, old
):
  for method, answer in (
    ("loglikelihood", (0.0, True)),
    ("generate_until", ""),
  ):
    monkeypatch.setattr(
      HopeLM, method, lambda _, asked, answer=answer: [answer] * len(asked)
    )
  file = tmp_path / "qa" / path
  file.parent.mkdir(parents=True)
  row, numbers = json.dumps(DATA[path]), range(4)
  file.write_text("\n".join(row.replace(old, f"No{n}?") for n in numbers))
  tasks = lm_eval_tasks.load_tasks([name], TASKS, str(tmp_path))
  lm_eval_tasks.evaluate(transformer, tasks, num_fewshot=3)
  for request in tasks[0].instances:
    assert [request.args[0].count(f"No{n}?") for n in numbers] == [1] * 4


def test_examples_and_limit(transformer, data):
  tasks = lm_eval_tasks.load_tasks(["babi_qa1"], TASKS, data)
  (line,) = lm_eval_tasks.evaluate(transformer, tasks, limit=1, num_fewshot=2)
  assert (line.documents, line.shots, line.stderr) == (1, 2, None)
  prompt = tasks[0].instances[0].args[0]
  assert prompt.count("Passage: ") == 3 and prompt.count("\n\n") == 2
  assert prompt.endswith(
    "Passage: Al is in Rome.\nBo left.\nQuestion: Where is Al?\nAnswer:"
  )


@pytest.mark.parametrize(
  ("answer", "exact", "f1"),
  [
    (" b.", 1, 1),
    ("the B", 1, 1),
    (" b or c", 0, 0.5),
    (" c", 0, 0),
    ("", 0, 0),
  ],
)
def test_squad_scores(answer, exact, f1):
  from experiments.language_modeling.tasks import utils

  row = DATA["squad/squad_v1_val_1000.jsonl"]
  assert utils.squad_scores(row, [answer]) == {"exact_match": exact, "f1": f1}


ROWS = [
  {"text": f"{'So it was. ' * n}Who is No{n}?", "end": f" He is {n}", "gold": 0}
  for n in range(5)
]
TASKS_OF_OURS = {
  "ll": "output_type: loglikelihood",
  "choice": "output_type: multiple_choice\ndoc_to_choice: [' a', ' b c']",
  "pages": "output_type: loglikelihood_rolling",
  "texts": "output_type: generate_until",
}
TARGETS = {"ll": "{{end}}", "choice": "gold", "pages": "", "texts": "{{end}}"}
METRICS = {  # the bounds of `perplexity` are drawn
  "ll": ("perplexity", "perplexity"),
  "choice": ("acc", "mean"),
  "pages": ("word_perplexity", "weighted_perplexity"),
  "texts": ("exact_match", "mean"),
}
UTILS = f"""
import datasets
def load(**_):
  return {{"test": datasets.Dataset.from_list({ROWS})}}
def pages(doc, results):
  return {{"word_perplexity": (results[0], 9)}}
"""
GROUP = """
group: all_of_ours
task: [ll, choice]
aggregate_metric_list: [{metric: acc, aggregation: mean}]
"""


def write_task(folder, name, kind=None, **more):
  """A task file of ROWS; `more` are further lines."""
  kind = kind or name
  metric, mean = METRICS[kind]
  fields = {
    "task": name,
    "custom_dataset": "!function utils.load",
    "test_split": "test",
    "fewshot_split": "test",
    "doc_to_text": '"' + ("" if kind == "pages" else "{{text}}") + '"',
    "doc_to_target": '"' + (TARGETS[kind] or "{{text}}") + '"',
    "metric_list": f"[{{metric: {metric}, aggregation: {mean}}}]",
    "generation_kwargs": '{max_gen_toks: 16, until: ["\\n"]}',
  }
  if kind == "choice":
    fields["doc_to_target"] = "gold"
  if kind == "pages":
    fields["process_results"] = "!function utils.pages"
  lines = [f"{name}: {value}" for name, value in (fields | more).items()]
  lines.append(TASKS_OF_OURS[kind])
  (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")


@pytest.fixture
def ours(tmp_path):
  """A folder with a task of each kind, and a group of two."""
  folder = tmp_path / "tasks"
  folder.mkdir()
  (folder / "utils.py").write_text(UTILS)
  for name in TASKS_OF_OURS:
    write_task(folder, name)
  (folder / "all_of_ours.yaml").write_text(GROUP)
  return folder


@pytest.fixture
def unasked(monkeypatch):
  """The model must not be asked for anything."""

  def fail(*args, **kwargs):
    raise AssertionError("scored before all was checked")

  monkeypatch.setattr(scoring, "score", fail)
  monkeypatch.setattr(scoring, "read_all", fail)
  monkeypatch.setattr(generation, "go_on", fail)


BAD = {
  "max_gen_toks=512 leaves no room": (
    "texts",
    {"generation_kwargs": "{max_gen_toks: 512}"},
  ),
  "'top_p': 'most'.* cannot be used .*most": (
    "texts",
    {"generation_kwargs": "{do_sample: true, top_p: most}"},
  ),
  "temperature=-1.0 must be": (
    "texts",
    {"generation_kwargs": "{do_sample: true, temperature: -1}"},
  ),
  "continuation of 519 tokens is too long": (
    "ll",
    {"doc_to_target": '"' + 519 * "x" + '"'},
  ),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("is_first", [False, True], ids=["last", "first"])
def test_refused_before_anything_is_scored(
  transformer, ours, unasked, message, is_first
):
  kind, more = BAD[message]
  write_task(ours, "bad", kind, **more)
  names = ["bad", *TASKS_OF_OURS] if is_first else [*TASKS_OF_OURS, "bad"]
  tasks = lm_eval_tasks.load_tasks(names, str(ours), "")
  with pytest.raises(ConfigError, match=f"^--tasks: bad: .*{message}"):
    lm_eval_tasks.evaluate(transformer, tasks)


def test_more_examples_than_there_are(transformer, ours, unasked):
  write_task(ours, "none", "ll", num_fewshot="0")
  tasks = lm_eval_tasks.load_tasks(["none", "ll"], str(ours), "")
  with pytest.raises(
    ConfigError, match="of ll with --num_fewshot=50 .ValueErr"
  ):
    lm_eval_tasks.evaluate(transformer, tasks, num_fewshot=50)


def scores_of(run, ours, output, names=("all_of_ours", "pages", "texts")):
  tasks = lm_eval_tasks.load_tasks(list(names), str(ours), "")
  answers = Answers(output and epath.Path(output), run)
  return lm_eval_tasks.evaluate(run, tasks, answers=answers)


@pytest.fixture
def asked(monkeypatch):
  """How many requests were answered by the model, by task."""
  found, original = [], HopeLM._answer

  def answer(self, kind, label, plan):
    found.append((label, len(plan)))
    return original(self, kind, label, plan)

  monkeypatch.setattr(HopeLM, "_answer", answer)
  return found


@pytest.fixture
def guessed(asked, monkeypatch):
  """As `asked`, but no model is: answers are of the lengths of requests."""

  def guess(self, kind, label, plan):
    asked.append((label, len(plan)))
    sums = [-len(x.parts[0].context) / 99 for x in plan]
    if kind == "loglikelihood_rolling":
      return sums
    if kind == "generate_until":
      return [[str(x), n == 2] for n, x in enumerate(sums)]
    return [[x, False] for x in sums]

  monkeypatch.setattr(HopeLM, "_answer", guess)
  return asked


def test_finished_tasks_are_kept_and_scores_are_those_of_one_run(
  transformer, ours, tmp_path, monkeypatch, asked
):
  whole = scores_of(transformer, ours, None)
  by_name = {(line.task, line.metric): line for line in whole}
  assert ("all_of_ours", "acc") in by_name
  assert by_name["ll", "perplexity"].stderr
  everything = [("ll", 5), ("choice", 10), ("pages", 5), ("texts", 5)]
  assert asked == everything
  output = tmp_path / "scores.json"

  def killed(*args):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(HopeLM, "_generate", killed)
    scores_of(transformer, ours, output)
  asked.clear()
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(HopeLM, "_generate", killed)
    scores_of(transformer, ours, output)
  assert asked == [("texts", 5)]
  asked.clear()
  assert scores_of(transformer, ours, output) == whole
  assert asked == [("texts", 5)]
  asked.clear()
  assert scores_of(transformer, ours, output) == whole
  assert asked == []


def test_answers_of_others_are_not_reused(
  transformer, ours, tmp_path, guessed, capsys
):
  asked = guessed
  output, names = tmp_path / "scores.json", ["ll", "choice"]
  score = lambda run: scores_of(run, ours, output, names)
  whole = score(transformer)
  both = [("ll", 5), ("choice", 10)]
  others = [transformer._replace(checksum="another")]
  model = dataclasses.replace(transformer.config.model, norm_eps=1e-3)
  config = dataclasses.replace(transformer.config, model=model)
  others.append(transformer._replace(config=config))
  for other in others:
    asked.clear()
    capsys.readouterr()
    score(other)
    assert asked == both
    assert capsys.readouterr().err.count("belong to another checkpoint") == 2
  score(transformer)
  asked.clear()
  rows = UTILS.replace("No0", "Nobody")  # the same task on other data
  (ours / "utils.py").write_text(rows)
  sys.modules.pop("utils", None)
  assert score(transformer) != whole and asked == both
  # Damage is found wherever it is.
  for path in (tmp_path / "scores.json.partial").iterdir():
    content = path.read_text()
    path.write_text(content.replace("false", "true", 1))
  asked.clear()
  capsys.readouterr()
  score(transformer)
  assert asked == both and "are damaged: new ones" in capsys.readouterr().err
  for path in (tmp_path / "scores.json.partial").iterdir():
    path.write_text(path.read_text()[:-9])
  asked.clear()
  score(transformer)
  assert asked == both


def test_full_disk_does_not_end_the_scoring(
  transformer, ours, tmp_path, monkeypatch, guessed, capsys
):
  del guessed

  def fail(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("hope_jax.runs.workdir.write_json", fail)
  assert scores_of(transformer, ours, tmp_path / "x.json", ["ll"])
  assert "ll: cannot keep answers: No space left" in capsys.readouterr().err


def run_command(monkeypatch, run, ours, **changed):
  """`harness.main` as the command calls it, on `run`."""
  values = dict(workdir=str(run.workdir), tasks=["ll", "texts"], data="")
  values |= dict(include_path=str(ours), limit=None, num_fewshot=None)
  values |= dict(batch_size=8, output=None) | changed
  with monkeypatch.context() as patch:
    patch.setattr(flags, "FLAGS", types.SimpleNamespace(**values))
    patch.setattr(trained, "open_run", lambda _: run)
    harness.main()


def test_command_goes_on_where_it_was_killed(
  transformer, ours, tmp_path, monkeypatch, asked, capsys
):
  def killed(*args):
    raise SystemExit

  output = tmp_path / "scores.json"
  command = functools.partial(
    run_command, monkeypatch, transformer, ours, output=str(output)
  )
  with monkeypatch.context() as patch, pytest.raises(SystemExit):
    patch.setattr(HopeLM, "_generate", killed)
    command()
  assert not output.exists() and (tmp_path / "scores.json.partial").exists()
  asked.clear()
  command()
  assert asked == [("texts", 5)]
  scores = json.loads(output.read_text())["scores"]
  assert [line["task"] for line in scores] == ["ll", "texts"]
  assert not (tmp_path / "scores.json.partial").exists()
  capsys.readouterr()
  run_command(monkeypatch, transformer, ours, tasks=["ll"])
  assert "no --output: answers are not kept" in capsys.readouterr().err


def test_output_is_checked_before_anything_is_read(
  transformer, ours, tmp_path, monkeypatch, unasked
):
  def fail(*args):
    raise AssertionError("tasks are loaded")

  monkeypatch.setattr(lm_eval_tasks, "load_tasks", fail)
  (tmp_path / "file").touch()
  for output, message in (
    (tmp_path, f"--output={tmp_path} is a folder: name a file"),
    (tmp_path / "file" / "x.json", "cannot write --output=.*/file/x.json"),
    ("/proc/no/x.json", "cannot write --output=/proc/no/x.json"),
  ):
    with pytest.raises(ConfigError, match=message):
      run_command(monkeypatch, transformer, ours, output=str(output))
  with pytest.raises(ConfigError, match="no is not the folder of a run"):
    run_command(monkeypatch, transformer, ours, workdir="no")


def test_examples_that_a_task_does_not_take_are_said(
  transformer, ours, guessed, capsys
):
  del guessed
  write_task(ours, "none", "ll", num_fewshot="0")
  tasks = lm_eval_tasks.load_tasks(["none", "ll"], str(ours), "")
  lines = lm_eval_tasks.evaluate(transformer, tasks, num_fewshot=1)
  assert [line.shots for line in lines] == [0, 1]
  said = capsys.readouterr().err
  assert said.count("so that --num_fewshot=1 is not used") == 1
  assert "none: its task file says num_fewshot: 0" in said


def test_cut_contexts_are_counted(transformer, ours, guessed, capsys):
  del guessed
  names = list(TASKS_OF_OURS)
  for line in lm_eval_tasks.evaluate(
    transformer, lm_eval_tasks.load_tasks(names, str(ours), "")
  ):
    assert (line.truncated, line.cut_tokens) == (0, 0)
    assert line.unfinished == (4 if line.task == "texts" else None)
  said = capsys.readouterr().err
  assert "contexts" not in said and "texts: 4 texts end at max_gen_toks" in said
  rows = [
    row | {"text": row["text"] + n * 200 * "."} for n, row in enumerate(ROWS)
  ]
  long = UTILS.replace(str(ROWS), str(rows))
  (ours / "utils.py").write_text(long)
  sys.modules.pop("utils", None)
  tasks = lm_eval_tasks.load_tasks(names, str(ours), "")
  lines = {x.task: x for x in lm_eval_tasks.evaluate(transformer, tasks)}
  lengths = [len(row["text"]) for row in rows]
  # Nothing is read after the last token: attention holds 512 and one.
  rooms = {"ll": 513 - len(" He is 0"), "pages": 512, "texts": 512 - 16}
  for task, room in rooms.items():
    cut = [length - room for length in lengths if length > room]
    assert (lines[task].truncated, lines[task].cut_tokens) == (
      len(cut),
      max(cut),
    )
  cut = [n - 513 + len(end) for n in lengths for end in (" a", " b c")]
  cut = [n for n in cut if n > 0]
  assert lines["choice"].truncated == len(cut)
  said = capsys.readouterr().err
  assert f"pages: {lines['pages'].truncated} of 5 contexts are too long" in said
  (row,) = (
    row
    for row in lm_eval_tasks.table([lines["ll"]]).splitlines()
    if "ll" in row
  )
  assert f"{lines['ll'].truncated} by {lines['ll'].cut_tokens}" in row


def test_a_model_that_is_not_finite_has_no_scores(transformer, ours):
  bad = jax.tree.map(lambda x: x * np.nan, transformer.params)
  run = transformer._replace(params=bad)
  for name in ("ll", "texts"):
    with pytest.raises(ConfigError, match="not finite"):
      lm_eval_tasks.evaluate(
        run, lm_eval_tasks.load_tasks([name], str(ours), "")
      )


FLAGS = dict(tasks=["piqa"], limit=None, num_fewshot=None, batch_size=8)
FLAGS |= {"include_path": None, "output": None}


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"limit": 0}, "--limit=0 must be 1 or more"),
    ({"num_fewshot": -1}, "--num_fewshot=-1"),
    ({"batch_size": 0}, "--batch_size=0"),
    ({"tasks": []}, "--tasks is empty"),
    ({"tasks": ["piqa", ""]}, "--tasks is empty"),
    ({"include_path": "no/where"}, "--include_path=no/where is no folder"),
  ],
)
def test_wrong_flags(flags, message):
  with pytest.raises(ConfigError, match=message):
    harness.check(types.SimpleNamespace(**FLAGS | flags))


def test_wrong_tasks_and_data(tmp_path, monkeypatch):
  with pytest.raises(ConfigError, match="^cannot read .*--data must name the"):
    lm_eval_tasks.load_tasks(["piqa"], TASKS, str(tmp_path))
  bad = tmp_path / "qa" / "commonsense" / "piqa_val.jsonl"
  bad.parent.mkdir(parents=True)
  bad.write_text("{")
  with pytest.raises(ConfigError, match="piqa_val.jsonl of --data is no JSON"):
    lm_eval_tasks.load_tasks(["piqa"], TASKS, str(tmp_path))
  pages = tmp_path / "wikitext2" / "test.txt"
  pages.parent.mkdir()
  pages.write_text(" = = Uses = = \n")
  with pytest.raises(ConfigError, match="wikitext2/test.txt .* has no article"):
    lm_eval_tasks.load_tasks(["wikitext"], TASKS, str(tmp_path))
  import lm_eval.tasks

  only_ours = functools.partial(
    lm_eval.tasks.TaskManager, include_path=TASKS, include_defaults=False
  )
  monkeypatch.setattr(  # to look through all tasks takes seconds
    lm_eval.tasks, "TaskManager", lambda **_: only_ours()
  )
  with pytest.raises(ConfigError, match="no task 'pikqa'; did you mean 'piqa'"):
    lm_eval_tasks.load_tasks(["pikqa"], TASKS, str(tmp_path))


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (
      "ConnectionError('no Hub')",
      "not on this machine, .* downloaded .no Hub.",
    ),
    ("FileNotFoundError('no x')", "cannot load 'll' .FileNotFoundError: no x."),
    ("KeyError('rows')", "cannot load 'll' .KeyError: 'rows'.: see .*ll.yaml"),
  ],
)
def test_data_that_cannot_be_loaded_says_why(ours, error, message):
  (ours / "utils.py").write_text(f"def load(**_):\n  raise {error}\n")
  with pytest.raises(ConfigError, match=message) as caught:
    lm_eval_tasks.load_tasks(["ll"], str(ours), "")
  assert ("download" in str(caught.value)) == ("Connection" in error)


@pytest.mark.usefixtures("unasked")
def test_tasks_that_run_code_are_refused(transformer, ours):
  tasks = lm_eval_tasks.load_tasks(["ll", "texts"], str(ours), "")
  tasks[1].UNSAFE_CODE = True
  with pytest.raises(ConfigError, match="texts runs code that the model wri"):
    lm_eval_tasks.evaluate(transformer, tasks)


WITHOUT = """import runpy, sys
sys.modules["lm_eval"] = None
sys.argv = ["harness", "--workdir=x", "--tasks=piqa"]
runpy.run_module("hope_jax.harness", run_name="__main__")
"""


def test_without_the_extra():
  child = subprocess.run(
    [sys.executable, "-c", WITHOUT],
    env=os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert child.returncode == 1 and "install hope-jax[eval]" in child.stderr
  assert len(child.stderr.splitlines()) == 1
