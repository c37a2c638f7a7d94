"""Local data for the tasks of this folder, and what YAML cannot say.

Prompts and measures are those of lm-eval's tasks of the same names.  `data` is
the command's `--data`, with wikitext2 and qa/commonsense, lambada, squad, babi.
"""

import collections
import json
import pathlib
import re
import string
from typing import Any

import datasets
from lm_eval.tasks.wikitext import preprocess_wikitext

from hope_jax.config import ConfigError

Document = dict[str, Any]
LETTERS = "ABCDE"
TITLE = re.compile(r"^ = (?=[^=\n]*[^=] = $)", re.MULTILINE)
page_text = preprocess_wikitext.wikitext_detokenizer
page_scores = preprocess_wikitext.process_results


def _read(data: str, file: str) -> str:
  path = pathlib.Path(data) / file
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(
      f"cannot read {path}: --data must name the folder that holds {file}"
    ) from error


def load(*, data: str, file: str, **_: Any) -> dict[str, datasets.Dataset]:
  """The lines of a .jsonl file as the split `test`."""
  # Not splitlines: texts may contain other line breaks.
  lines = _read(data, f"qa/{file}").strip("\n").split("\n")
  try:
    rows = [json.loads(line) for line in lines]
  except ValueError as error:
    raise ConfigError(f"qa/{file} of --data is no JSON: {error}") from error
  return {"test": datasets.Dataset.from_list(rows)}


def load_pages(
  *, data: str, file: str, **_: Any
) -> dict[str, datasets.Dataset]:
  """The articles of a WikiText file; ` = Title = ` begins one."""
  text = _read(data, file)
  starts = [title.start() for title in TITLE.finditer(text)]
  if not starts:
    raise ConfigError(f"{file} of --data has no article: no line ` = Title = `")
  ends = [*starts[1:], len(text)]
  pages = [text[i:j] for i, j in zip(starts, ends, strict=True)]
  return {"test": datasets.Dataset.from_dict({"page": pages})}


def load_babi(*, data: str, name: str, **_: Any) -> dict[str, datasets.Dataset]:
  """The splits of a bAbI task, a document for each question."""
  return {
    split: datasets.Dataset.from_list(
      babi_documents(_read(data, f"qa/babi/en/{name}_{split}.txt"))
    )
    for split in ("train", "test")
  }


def babi_documents(text: str) -> list[Document]:
  """Questions with the facts told before them; line 1 begins a story."""
  documents, facts = [], []
  for line in text.splitlines():
    number, _, rest = line.partition(" ")
    if number == "1":
      facts = []
    if "\t" not in rest:
      facts.append(rest.strip() + "\n")
      continue
    question, answer, _ = rest.split("\t")
    documents.append(
      {
        "passage": "".join(facts),
        "question": question.strip(),
        "answer": answer,
      }
    )
  return documents


def question(doc: Document) -> str:
  """The bare question of `Question: ...\\nAnswer:`."""
  return doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")


def lettered(doc: Document) -> str:
  """A question with its choices, to be answered by a letter."""
  choices = zip(LETTERS, doc["choices"], strict=True)
  lines = [f"{letter}. {choice}" for letter, choice in choices]
  return "\n".join([f"Question: {question(doc).strip()}", *lines, "Answer:"])


def winogrande_answer(doc: Document) -> int:
  """Which context is right, from 0."""
  return int(doc["answer"]) - 1


def winogrande_contexts(doc: Document) -> list[str]:
  """The sentence up to its gap, filled in either way."""
  before = doc["sentence"].partition("_")[0]
  return [before + doc["option1"], before + doc["option2"]]


def winogrande_rest(doc: Document) -> str:
  """The sentence after its gap."""
  return doc["sentence"].partition("_")[2].strip()


def squad_prompt(doc: Document) -> str:
  """Title, background and question, with empty lines between them."""
  return re.sub(r"\n(?=(Background|Question|Answer):)", "\n\n", doc["query"])


def _words(answer: str) -> list[str]:
  """Lower case, without punctuation and articles: SQuAD's normal form."""
  bare = answer.lower().translate(str.maketrans("", "", string.punctuation))
  return [word for word in bare.split() if word not in ("a", "an", "the")]


def f1(answer: str, reference: str) -> float:
  """Harmonic mean of precision and recall of the words of an answer."""
  ours, theirs = _words(answer), _words(reference)
  common = (collections.Counter(ours) & collections.Counter(theirs)).total()
  if not common:
    return float(ours == theirs)
  return 2 * common / (len(ours) + len(theirs))


def squad_scores(doc: Document, results: list[str]) -> dict[str, float]:
  """Exact match and F1 against the best of the references."""
  (answer,), references = results, doc["answers_text"]
  return {
    "exact_match": float(
      any(_words(answer) == _words(reference) for reference in references)
    ),
    "f1": max(f1(answer, reference) for reference in references),
  }
