"""Answers of a model to the tasks of lm-eval, kept until all are scored.

A model answers all requests of a task (log-probabilities, texts) together; the
answers are then written next to `--output`, and the same command, run again
after an error or a kill, reads them instead of asking the model.  lm-eval
computes all scores of all tasks from the answers at the end, so that scores,
bounds and groups' means are those of an uninterrupted run.

A file is valid for one model and one list of requests: its key is a hash of the
model (parameters, config, tokenizer) and of every request's text and options,
so that another checkpoint, `--limit`, `--num_fewshot`, task file or data makes
another key, and the task is asked again.  The batch size, which changes only
the last bits, is not part of the key.
"""

import contextlib
import hashlib
import json
import sys
import urllib.parse
from collections.abc import Sequence
from typing import Any

from etils import epath

from hope_jax import config as config_lib
from hope_jax.inference.trained import Run
from hope_jax.runs import files
from hope_jax.runs import workdir as workdir_lib

SUFFIX = ".partial"  # of the folder beside the output
KEY, DIGEST, ANSWERS = "key", "digest", "answers"


def _hash(value: Any) -> str:
  text = json.dumps(value, sort_keys=True, default=str)
  return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Answers:
  """Answers kept in a folder next to `output`; without it nothing is kept."""

  def __init__(
    self, output: epath.Path | None, run: Run, seed: int = 0
  ) -> None:
    self._folder = output and output.parent / f"{output.name}{SUFFIX}"
    self._model = {
      "parameters": run.checksum,
      "model": config_lib.to_dict(run.config)["model"],
      "tokenizer": run.tokenizer.sha256,
      "seed": seed,
    }

  def _path(self, task: str, kind: str) -> epath.Path | None:
    name = urllib.parse.quote(f"{task}.{kind}.json", safe="")
    return self._folder and self._folder / name

  def _key(self, task: str, kind: str, requests: Sequence[Any]) -> str:
    return _hash([self._model, task, kind, [x.args for x in requests]])

  def read(
    self, task: str, kind: str, requests: Sequence[Any]
  ) -> list[Any] | None:
    """The answers to these requests; None if there are no valid ones."""
    path = self._path(task, kind)
    if path is None or not path.exists():
      return None
    try:
      content = json.loads(path.read_text())
      is_whole = content[DIGEST] == _hash(content[ANSWERS])
      key, answers = content[KEY], content[ANSWERS]
    except (OSError, ValueError, KeyError, TypeError):
      is_whole, key, answers = False, "", []
    reason = "are damaged"
    if is_whole and key == self._key(task, kind, requests):
      print(
        f"{task}: {len(answers):,} answers of before, from {path}",
        file=sys.stderr,
      )
      return answers
    if is_whole:
      reason = "belong to another checkpoint, or to other requests"
    print(f"{task}: the answers in {path} {reason}: new ones", file=sys.stderr)
    return None

  def write(
    self, task: str, kind: str, requests: Sequence[Any], answers: list[Any]
  ) -> None:
    """Keeps the answers; if killed, it leaves no partial file."""
    path = self._path(task, kind)
    if path is None:
      return
    content = {
      KEY: self._key(task, kind, requests),
      DIGEST: _hash(answers),
      ANSWERS: answers,
    }
    try:
      workdir_lib.write_json(path, content)
    except OSError as error:  # the scores may still be written
      reason = files.reason(error)
      print(f"{task}: cannot keep answers: {reason}", file=sys.stderr)

  def remove(self) -> None:
    """Removes the answers, once the scores are written."""
    if self._folder is None or not self._folder.is_dir():
      return
    with contextlib.suppress(OSError):  # anything else in there stays
      for path in self._folder.iterdir():
        if ".json" in path.name:
          path.unlink()
      self._folder.rmdir()
