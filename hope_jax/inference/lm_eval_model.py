"""A trained run as a model of lm-eval (extra `eval`), see `lm_eval_tasks.py`.

Models whose state does not grow, among them attention in a window, read
contexts of any length.  The cache of attention without a window is bounded
(`model.context_length`), so that long contexts are truncated on the left; how
many are, and by how much, is printed and counted (`HopeLM.cuts`).

lm-eval makes the requests of all tasks before it asks for any answer.  When it
asks for the first time, all requests are checked, so that one that cannot be
answered is refused before any work is done.

If a checkpoint's tokenizer.json puts a begin token before every text (as Llama
3's does), contexts begin with it, and so does a text that nothing precedes (an
empty context, the text of a perplexity).  Otherwise such a text follows the
token of a line break: in training here an end token is never an input, and
there is no begin token, but a line break is one token of bytes and of the
SentencePiece models made here, and the token that texts most often begin after.
"""

import collections
import contextlib
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from hope_jax.config import ConfigError, Json, ModelConfig
from hope_jax.inference import generation, scoring, texts
from hope_jax.inference.lm_eval_answers import Answers
from hope_jax.inference.sampling import Sampling
from hope_jax.inference.scoring import Request, Score
from hope_jax.inference.trained import Run
from hope_jax.runs import files, progress

NEW_TOKENS = 256  # drawn at most for a task that sets no maximum
# lm-eval's names of the kinds of request.
LIKELIHOOD, ROLLING = "loglikelihood", "loglikelihood_rolling"
TEXT = "generate_until"


def _without_terminal(label: str) -> contextlib.AbstractContextManager[None]:
  """Prints lines about the time taken if there is no terminal for a bar."""
  if sys.stderr.isatty():
    return contextlib.nullcontext()
  return progress.waiting(label, patience=2.0)


class Asked(NamedTuple):
  """How a text is to be continued."""

  count: int
  sampling: Sampling
  until: tuple[str, ...]


class Planned(NamedTuple):
  """A request as it will be read: one part, or the windows of a long text; how
  many tokens of the context are cut off."""

  parts: list[Request]
  cut: int = 0
  asked: Asked | None = None


class Cuts(NamedTuple):
  """The requests of a task, how many of them are truncated, and the most tokens
  that one of them loses."""

  requests: int = 0
  truncated: int = 0
  tokens: int = 0


class HopeLM(TemplateLM):
  """Scores and continues texts with a run that `trained.open_run` opened.

  Attributes:
    cuts: how the requests are truncated, by task.
    unfinished: how many texts of a task reached their maximal length without
      any of the strings that would end them.
    was_asked: whether the requests of all `tasks` have been made and checked.
  """

  def __init__(
    self,
    run: Run,
    *,
    batch_size: int = 8,
    seed: int = 0,
    tasks: Iterable[Any] = (),
    answers: Answers | None = None,
  ) -> None:
    super().__init__()
    self._run, self.batch_size, self._seed = run, batch_size, seed
    self._tasks, self._kept = tasks, answers
    self._plans: dict[tuple[str, str], list[Planned]] = {}
    self.cuts: dict[str, Cuts] = {}
    self.unfinished: collections.Counter[str] = collections.Counter()
    self.was_asked = False
    begin = run.tokenizer.encode("\n").tolist()
    if run.tokenizer.bos is not None:
      begin = [run.tokenizer.bos]
    if not begin and run.tokenizer.eos is not None:
      begin = [run.tokenizer.eos]  # imported tokenizers may drop newlines
    if not begin:
      raise ConfigError(
        f"{run.tokenizer.name} has no token for a line break, and none for the"
        " end of a text: nothing is there that a text could begin after"
      )
    self._begin = begin[-1]

  @property
  def max_length(self) -> int | None:
    """How many tokens can be read; None: any number."""
    model = self._run.config.model
    return model.context_length if model.has_longest_context else None

  @property
  def eot_token_id(self) -> int:
    """The token that texts begin after, under lm-eval's name for it."""
    return self._begin

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Tokens of `string`, preceded by the tokenizer's begin token if it has one
    that is not there yet."""
    del kwargs
    bos = self._run.tokenizer.bos
    tokens = self._run.tokenizer.encode(string).tolist()
    if bos is None or add_special_tokens is False or tokens[:1] == [bos]:
      return tokens
    return [bos, *tokens]

  def _pair(self, context: str, continuation: str) -> Planned:
    """Plans a context and its continuation."""
    if context:
      begin, end = self._encode_pair(context, continuation)
    else:
      begin, end = [], self.tok_encode(continuation, add_special_tokens=False)
      if end[:1] == [self.prefix_token_id]:
        begin, end = end[:1], end[1:]
    return self._bounded(begin, end)

  def _bounded(self, begin: list[int], end: list[int]) -> Planned:
    """Plans `end` after as much of `begin` as can be read."""
    begin = begin or [self.prefix_token_id]
    if self.max_length is None:
      return Planned([Request(begin, end)])
    # The cache's entry for the last token is never read.
    room = self.max_length + 1 - len(end)
    if room < 1:
      raise ConfigError(
        f"a continuation of {len(end)} tokens is too long for attention: its"
        f" cache holds model.context_length={self.max_length}"
      )
    return Planned([Request(begin[-room:], end)], max(0, len(begin) - room))

  def _windows(self, text: str) -> Planned:
    """Plans a whole text, in windows if attention is bounded: from the second
    window on, tokens do not have everything before them as their context."""
    tokens = self.tok_encode(text, add_special_tokens=False)
    length = self.max_length or max(1, len(tokens))
    pairs = utils.get_rolling_token_windows(
      tokens, self.prefix_token_id, length, 1
    )
    parts = [Request(*pair) for pair in map(utils.make_disjoint_window, pairs)]
    return Planned(parts, max(0, len(tokens) - length))

  def _text(self, context: str, options: Json) -> Planned:
    """Plans as much of a context as leaves room for the text after it."""
    asked = self._asked(options)
    begin = self.tok_encode(context) or [self.prefix_token_id]
    if self.max_length is None:
      return Planned([Request(begin, [])], 0, asked)
    room = self.max_length - asked.count
    cut = max(0, len(begin) - room)
    return Planned([Request(begin[-room:], [])], cut, asked)

  def plan(self, kind: str, requests: Sequence[Instance]) -> list[Planned]:
    """How requests of one task will be read.

    Raises:
      ConfigError: one of them cannot be answered.
    """
    one = {LIKELIHOOD: self._pair, ROLLING: self._windows, TEXT: self._text}
    if kind not in one:
      raise ConfigError(f"a model of text cannot answer {kind!r} requests")
    return [one[kind](*request.args) for request in requests]

  def check(self, tasks: Iterable[Any]) -> None:
    """Plans all requests of tasks; reports how much of their contexts is cut.

    Raises:
      ConfigError: one of them cannot be answered.
    """
    for task in tasks:
      by_kind = collections.defaultdict(list)
      for request in task.instances:
        by_kind[request.request_type] += [request] * (request.repeats or 1)
      for kind, requests in by_kind.items():
        try:
          plan = self.plan(kind, requests)
        except ConfigError as error:
          raise ConfigError(f"--tasks: {task.task_name}: {error}") from error
        self._plans[task.task_name, kind] = plan
        self._count(task.task_name, plan)

  def _count(self, task: str, plan: Sequence[Planned]) -> None:
    old = self.cuts.get(task, Cuts())
    cut = [planned.cut for planned in plan]
    self.cuts[task] = Cuts(
      old.requests + len(plan),
      old.truncated + int(np.count_nonzero(cut)),
      max([old.tokens, *cut]),
    )
    if any(cut):
      print(
        f"{task}: {np.count_nonzero(cut):,} of {len(plan):,} contexts are too"
        f" long for attention (model.context_length={self.max_length}): they"
        f" lose up to {max(cut):,} tokens of their beginning",
        file=sys.stderr,
      )

  def _answers(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
    """Answers to requests of one kind, task by task."""
    if not self.was_asked:
      self.check(self._tasks)  # by now all have their requests
      self.was_asked = True
    by_task = collections.defaultdict(list)
    for number, request in enumerate(requests):
      by_task[request.task_name].append(number)
    found: list[Any] = [None] * len(requests)
    for task, numbers in by_task.items():
      asked = [requests[number] for number in numbers]
      answers = self._kept and self._kept.read(task, kind, asked)
      if answers is None:
        plan = self._plans.get((task, kind)) or self.plan(kind, asked)
        answers = self._answer(kind, task or kind, plan)
        if self._kept:
          self._kept.write(task, kind, asked, answers)
      for number, answer in zip(numbers, answers, strict=True):
        found[number] = answer
    return found

  def _answer(self, kind: str, label: str, plan: list[Planned]) -> list[Any]:
    """[log-probability, is greedy] for a pair, a log-probability for a whole
    text, [text, has an end] for a context."""
    if kind == TEXT:
      return self._generate(plan, label)
    scores = self._score([part for x in plan for part in x.parts], label)
    if not all(math.isfinite(score.log_prob) for score in scores):
      raise ConfigError(
        f"--tasks: {label}: a log-probability is not finite: step"
        f" {self._run.step} of {self._run.workdir} is damaged or diverged"
      )
    if kind == LIKELIHOOD:
      return [list(score) for score in scores]
    rest = iter(scores)
    return [sum(next(rest).log_prob for _ in x.parts) for x in plan]

  def _score(self, requests: list[Request], label: str) -> list[Score]:
    scores = [Score(0.0, True)] * len(requests)  # of an empty continuation
    numbers = [n for n, request in enumerate(requests) if request.continuation]
    found = scoring.score(
      self._run.params,
      [requests[n] for n in numbers],
      config=self._run.config.model,
      batch_size=self.batch_size,
    )
    with _without_terminal(label):
      for n, score in tqdm.tqdm(found, label, len(numbers), disable=None):
        scores[numbers[n]] = score
    return scores

  def _loglikelihood_tokens(
    self, requests: list[Any], **kwargs: Any
  ) -> list[tuple[float, bool]]:
    del kwargs
    plan = [self._bounded(*tokens) for _, *tokens in requests]
    found = self._answer(LIKELIHOOD, LIKELIHOOD, plan)
    return [(log_prob, is_greedy) for log_prob, is_greedy in found]

  def loglikelihood(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    """(log-probability, is greedy) of continuations of contexts."""
    del disable_tqdm
    found = self._answers(LIKELIHOOD, requests)
    return [(log_prob, is_greedy) for log_prob, is_greedy in found]

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Log-probability of whole texts, in windows where attention is bounded."""
    del disable_tqdm
    return self._answers(ROLLING, requests)

  def generate_until(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """Continuations up to the first of a request's `until`, or to the end of
    the text; greedy unless the task samples."""
    del disable_tqdm
    found = self._answers(TEXT, requests)
    for request, (_, has_end) in zip(requests, found, strict=True):
      self.unfinished[str(request.task_name)] += not has_end
    for task, count in self.unfinished.items():
      if count:
        print(
          f"{task}: {count:,} texts end at max_gen_toks, without an end",
          file=sys.stderr,
        )
    return [text for text, _ in found]

  def _asked(self, options: Json) -> Asked:
    """What a task's generation_kwargs say."""
    default, length = NEW_TOKENS, self.max_length
    if length is not None:
      default = min(default, length // 2)
    try:
      known: Json = dict(normalize_gen_kwargs(options, default))
      count = known["max_gen_toks"]
      sampling = Sampling(
        float(known.get("temperature", 1.0)) if known["do_sample"] else 0.0,
        int(known.get("top_k", 0)),
        float(known.get("top_p", 1.0)),
      )
      until = tuple(str(mark) for mark in known["until"] if mark)
    except (AttributeError, TypeError, ValueError) as error:
      raise ConfigError(
        f"generation_kwargs={options} cannot be used ({files.reason(error)})"
      ) from error
    if count < 1:
      raise ConfigError(f"max_gen_toks={count} must be positive")
    if length is not None and count >= length:
      raise ConfigError(
        f"max_gen_toks={count} leaves no room for a context: attention's cache"
        f" holds model.context_length={length}"
      )
    sampling.check()
    return Asked(count, sampling, until)

  def _generate(self, plan: list[Planned], label: str) -> list[Any]:
    groups: dict[tuple[Asked, ModelConfig], list[int]] = {}
    for number, planned in enumerate(plan):
      assert planned.asked is not None
      (part,) = planned.parts
      config = scoring.with_cache(
        self._run.config.model, len(part.context) + planned.asked.count
      )
      groups.setdefault((planned.asked, config), []).append(number)
    texts: list[Any] = [None] * len(plan)
    bar = tqdm.tqdm(desc=label, total=len(plan), disable=None)
    with _without_terminal(label), bar:
      for (asked, config), numbers in groups.items():
        contexts = [plan[number].parts[0].context for number in numbers]
        for place, *text in self._continue(contexts, numbers, asked, config):
          texts[numbers[place]] = text
          bar.update()
    return texts

  def _continue(
    self,
    contexts: list[Sequence[int]],
    numbers: list[int],
    asked: Asked,
    config: ModelConfig,
  ) -> Iterator[tuple[int, str, bool]]:
    """(place in `contexts`, text after it, whether it has an end) of all; draws
    depend on `numbers`."""
    run = self._run
    ends = scoring.read_all(
      run.params, contexts, config=config, batch_size=self.batch_size
    )
    cut = lambda new: texts.cut(new, run.tokenizer, asked.until)
    for batch in scoring.batched(ends, self.batch_size):
      places = [place for place, _ in batch]
      rows = scoring.stack([read.state for _, read in batch], self.batch_size)
      missing = self.batch_size - len(places)
      drawn = [numbers[place] for place in places + places[-1:] * missing]
      found = generation.go_on(
        run.params,
        rows.fast,
        rows.logits[:, 0],
        config=config,
        count=asked.count,
        sampling=asked.sampling,
        vocab_size=run.tokenizer.vocab_size,
        seed=self._seed,
        numbers=drawn,
        is_over=lambda new: cut(new)[1],
      )
      for place, new in zip(places, found, strict=False):
        yield place, *cut(new)
