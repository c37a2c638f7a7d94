"""A trained run as a model of lm-eval (extra `eval`), for `harness.py`.

Models whose state does not grow read any context whole, attention in a window
as much of it as it sees.  The cache of attention without a window is bounded
(`model.context_length`), so that for its models long contexts lose their
beginning.

Where a checkpoint's tokenizer.json puts a token before every text (Llama 3's),
contexts begin with it, and it stands before texts that nothing precedes (an
empty context, a perplexity's text).  Elsewhere the token of a line break does:
training here never shows an end token as an input, and no begin token exists; a
line break is one token of bytes and of the SentencePiece models made here, and
what texts in training most often begin after.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import tqdm
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from hope_jax import generate, generation, scoring, session
from hope_jax.config import ConfigError
from hope_jax.generation import Sampling
from hope_jax.model_config import ModelConfig
from hope_jax.scoring import Request, Score

NEW_TOKENS = 256  # that a task may draw if it does not say how many


class Asked(NamedTuple):
  """How a text is to be continued."""

  count: int
  sampling: Sampling
  until: tuple[str, ...]


class HopeLM(TemplateLM):
  """Scores and continues texts with a run that `session.open_run` opened."""

  def __init__(
    self, run: session.Run, *, batch_size: int = 8, seed: int = 0
  ) -> None:
    super().__init__()
    self._run, self.batch_size, self._seed = run, batch_size, seed
    begin = run.tokenizer.encode("\n").tolist()
    if run.tokenizer.bos is not None:
      begin = [run.tokenizer.bos]
    if not begin and run.tokenizer.eos is not None:
      begin = [run.tokenizer.eos]  # a model of others that drops line breaks
    if not begin:
      raise ConfigError(
        f"{run.tokenizer.name} has no token for a line break, and none for the"
        " end of a text: nothing is there that a text could begin after"
      )
    self._begin = begin[-1]

  @property
  def max_length(self) -> int | None:
    """How many tokens can be read, None: any number."""
    model = self._run.config.model
    return model.context_length if model.has_longest_context else None

  @property
  def eot_token_id(self) -> int:
    """What texts begin after; lm-eval's name for it."""
    return self._begin

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Token numbers, after the begin token if texts have one and it is not
    there."""
    del kwargs
    bos = self._run.tokenizer.bos
    tokens = self._run.tokenizer.encode(string).tolist()
    if bos is None or add_special_tokens is False or tokens[:1] == [bos]:
      return tokens
    return [bos, *tokens]

  def _bounded(self, context: list[int], continuation: list[int]) -> Request:
    """The request with as much of its context as can be read."""
    context = context or [self.prefix_token_id]
    if self.max_length is None:
      return Request(context, continuation)
    # Nothing reads what the cache keeps of the last token.
    room = self.max_length + 1 - len(continuation)
    if room < 1:
      raise ConfigError(
        f"a continuation of {len(continuation)} tokens is too long for"
        f" attention: its cache holds model.context_length={self.max_length}"
      )
    return Request(context[-room:], continuation)

  def _score(self, requests: list[Request], label: str) -> list[Score]:
    scores = [Score(0.0, True)] * len(requests)  # of an empty continuation
    numbers = [n for n, request in enumerate(requests) if request.continuation]
    found = scoring.score(
      self._run.params,
      [requests[n] for n in numbers],
      config=self._run.config.model,
      batch_size=self.batch_size,
    )
    for n, score in tqdm.tqdm(found, label, len(numbers), disable=None):
      scores[numbers[n]] = score
    return scores

  def _loglikelihood_tokens(
    self, requests: list[Any], **kwargs: Any
  ) -> list[tuple[float, bool]]:
    del kwargs
    bounded = [self._bounded(*tokens) for _, *tokens in requests]
    scores = self._score(bounded, "loglikelihood")
    return [(score.log_prob, score.is_greedy) for score in scores]

  def loglikelihood_rolling(
    self, requests: list[Any], disable_tqdm: bool = False
  ) -> list[float]:
    """Log-probability of whole texts, in windows where attention is bounded."""
    del disable_tqdm
    windows, owners = [], []
    for number, request in enumerate(requests):
      tokens = self.tok_encode(request.args[0], add_special_tokens=False)
      pairs = utils.get_rolling_token_windows(
        tokens, self.prefix_token_id, self.max_length or max(1, len(tokens)), 1
      )
      for pair in map(utils.make_disjoint_window, pairs):
        windows.append(Request(*pair))
        owners.append(number)
    sums = [0.0] * len(requests)
    scores = self._score(windows, "loglikelihood_rolling")
    for number, score in zip(owners, scores, strict=True):
      sums[number] += score.log_prob
    return sums

  def _asked(self, request: Any) -> Asked:
    """What a task's generation_kwargs say."""
    default, length = NEW_TOKENS, self.max_length
    if length is not None:
      default = min(default, length // 2)
    _, options = request.args
    known: dict[str, Any] = dict(normalize_gen_kwargs(options, default))
    count = known["max_gen_toks"]
    if count < 1:
      raise ConfigError(f"max_gen_toks={count} must be positive")
    if length is not None and count >= length:
      raise ConfigError(
        f"max_gen_toks={count} leaves no room for a context: attention's cache"
        f" holds model.context_length={length}"
      )
    sampling = Sampling(
      known.get("temperature", 1.0) if known["do_sample"] else 0.0,
      known.get("top_k", 0),
      known.get("top_p", 1.0),
    )
    sampling.check()
    return Asked(count, sampling, tuple(filter(None, known["until"])))

  def generate_until(
    self, requests: list[Any], disable_tqdm: bool = False
  ) -> list[str]:
    """Continuations up to the first of a request's `until`, or to the end of
    the text; greedy unless the task samples."""
    del disable_tqdm
    groups: dict[tuple[Asked, ModelConfig], list[int]] = {}
    contexts = []
    for number, request in enumerate(requests):
      context, asked = self.tok_encode(request.args[0]), self._asked(request)
      context = context or [self.prefix_token_id]
      if self.max_length is not None:
        context = context[asked.count - self.max_length :]
      contexts.append(context)
      config = scoring.with_cache(
        self._run.config.model, len(context) + asked.count
      )
      groups.setdefault((asked, config), []).append(number)
    texts = [""] * len(requests)
    with tqdm.tqdm(
      desc="generate_until", total=len(requests), disable=None
    ) as bar:
      for (asked, config), numbers in groups.items():
        read = [contexts[number] for number in numbers]
        for place, text in self._continue(read, numbers, asked, config):
          texts[numbers[place]] = text
          bar.update()
    return texts

  def _continue(
    self,
    contexts: list[list[int]],
    numbers: list[int],
    asked: Asked,
    config: ModelConfig,
  ) -> Iterator[tuple[int, str]]:
    """(place in `contexts`, text after it) of all; draws go by `numbers`."""
    run = self._run
    ends = scoring.read_all(
      run.params, contexts, config=config, batch_size=self.batch_size
    )
    cut = lambda new: generate.cut(new, run.tokenizer, asked.until)
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
        yield place, cut(new)[0]
