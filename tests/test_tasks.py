"""Local task files through the real harness, and what the command refuses."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

from hope_jax import harness
from hope_jax.config import ConfigError

pytest.importorskip("lm_eval")

from hope_jax.harness_model import HopeLM
from tests import test_harness
from tests.test_harness import ask

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
TASKS = str(REPOSITORY / "experiments" / "language_modeling" / "tasks")

one_length, transformer = test_harness.one_length, test_harness.transformer

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
  tasks = harness.load_tasks(list(PROMPTS), TASKS, data)
  lines = harness.evaluate(transformer, tasks)
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
  table = harness.table(lines).splitlines()
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
  tasks = harness.load_tasks([name], TASKS, str(tmp_path))
  harness.evaluate(transformer, tasks, num_fewshot=3)
  for request in tasks[0].instances:
    assert [request.args[0].count(f"No{n}?") for n in numbers] == [1] * 4


def test_examples_and_limit(transformer, data):
  tasks = harness.load_tasks(["babi_qa1"], TASKS, data)
  (line,) = harness.evaluate(transformer, tasks, limit=1, num_fewshot=2)
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
    harness.load_tasks(["piqa"], TASKS, str(tmp_path))
  bad = tmp_path / "qa" / "commonsense" / "piqa_val.jsonl"
  bad.parent.mkdir(parents=True)
  bad.write_text("{")
  with pytest.raises(ConfigError, match="piqa_val.jsonl of --data is no JSON"):
    harness.load_tasks(["piqa"], TASKS, str(tmp_path))
  pages = tmp_path / "wikitext2" / "test.txt"
  pages.parent.mkdir()
  pages.write_text(" = = Uses = = \n")
  with pytest.raises(ConfigError, match="wikitext2/test.txt .* has no article"):
    harness.load_tasks(["wikitext"], TASKS, str(tmp_path))
  import lm_eval.tasks

  only_ours = functools.partial(
    lm_eval.tasks.TaskManager, include_path=TASKS, include_defaults=False
  )
  monkeypatch.setattr(  # to look through all tasks takes seconds
    lm_eval.tasks, "TaskManager", lambda **_: only_ours()
  )
  with pytest.raises(ConfigError, match="no task 'pikqa'; did you mean 'piqa'"):
    harness.load_tasks(["pikqa"], TASKS, str(tmp_path))


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
