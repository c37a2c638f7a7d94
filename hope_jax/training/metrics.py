"""Records of a run: metrics.jsonl, printed lines or a bar, optionally wandb.

A record is one line, a JSON object with `step` and `kind` ("train", "eval",
"dynamics" or "rollback").  Process 0 writes.  Device scalars are fetched one
step late, so that reading them never keeps the device waiting.
"""

import contextlib
import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.typing import ArrayPytree as Tree

from hope_jax import config as config_lib
from hope_jax.config import Config, ConfigError, Json
from hope_jax.runs import files
from hope_jax.runs import workdir as workdir_lib


def read(workdir: epath.Path) -> list[Json]:
  """All records of a run; invalid lines are left out, such as one cut short by
  a crash.  Numbers that are not finite are None."""
  path = workdir / workdir_lib.METRICS
  records = []
  if path.exists():
    for line in path.read_bytes().splitlines():
      with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line)
        if _is_record(record):
          records.append(workdir_lib.finite(record))
  return records


def _is_record(value: Any) -> bool:
  """Whether `value` has the form of a record: step, kind and numbers."""
  if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
    return False
  if type(value.get("step")) is not int:
    return False
  if value["kind"] not in ("train", "eval"):
    return True
  numbers = [v for k, v in value.items() if k not in ("kind", "split")]
  return "loss" in value and all(
    v is None or type(v) in (int, float) for v in numbers
  )


class Writer:
  """Appends records, after dropping those that a resumed run will repeat."""

  def __init__(self, workdir: epath.Path, config: Config, start_step: int):
    self.records = [r for r in read(workdir) if r["step"] <= start_step]
    self._wandb = self._bar = None
    self._is_main = jax.process_index() == 0
    if not self._is_main:
      return
    self._path = workdir / workdir_lib.METRICS
    self._write_all()
    self._grows = not files.is_remote(workdir)
    self._wandb = _start_wandb(workdir, config)
    self._steps, self._start = config.train.steps, start_step

  def write(self, kind: str, step: int, values: Json) -> None:
    """Adds one record and shows it."""
    record = {"step": step, "kind": kind, **workdir_lib.finite(values)}
    self.records.append(record)
    if not self._is_main:
      return
    if self._grows:
      with self._path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    self._to_wandb(lambda run: run.log(_named(kind, values), step=step))
    if kind != "dynamics":
      self._show(kind, step, values)

  def sync(self) -> None:
    """Rewrites metrics.jsonl if it is in a bucket, where it cannot grow."""
    if not self._is_main or self._grows:
      return
    try:
      self._write_all()
    except Exception as error:  # the network: the next call writes all
      print(f"cannot write {self._path}: {error}", file=sys.stderr, flush=True)

  def _write_all(self) -> None:
    lines = [json.dumps(record) + "\n" for record in self.records]
    files.write_text(self._path, "".join(lines))

  def find(self, kind: str, step: int, split: str) -> Json | None:
    """The earlier record of this kind, step and split, if there is one."""
    for record in self.records:
      if (record["kind"], record["step"], record.get("split")) == (
        kind,
        step,
        split,
      ):
        return record
    return None

  def _show(self, kind: str, step: int, values: Json) -> None:
    if "loss" not in values:
      shown = " ".join(f"{name} {value}" for name, value in values.items())
      print(f"step {step} {kind}: {shown}", flush=True)
      return
    shown = f"{kind} loss {values['loss']:.4f}"
    if kind == "eval":
      shown += f" accuracy {values['accuracy']:.4f}"
    elif "tokens_per_second" in values:
      shown += f" {values['tokens_per_second']:,.0f} tokens/s"
    has_bar = sys.stderr.isatty() and importlib.util.find_spec("tqdm")
    if has_bar and self._bar is None:
      import tqdm

      self._bar = tqdm.tqdm(
        total=self._steps, initial=self._start, unit="step", dynamic_ncols=True
      )
    if self._bar is None:
      print(f"step {step}/{self._steps} {shown}", flush=True)
    elif kind == "train":
      self._bar.set_postfix_str(shown, refresh=False)
      self._bar.update(step - self._bar.n)
    else:
      self._bar.write(f"step {step} {shown}")

  def close(self) -> None:
    self.sync()
    if self._bar is not None:
      self._bar.close()
    self._to_wandb(lambda run: run.finish())

  def _to_wandb(self, call: Callable[[Any], Any]) -> None:
    """Calls wandb; if that fails, training continues without it."""
    if self._wandb is None:
      return
    try:
      call(self._wandb)
    except Exception as error:  # the network, the disk, the library
      print(
        f"wandb failed and is left out from here: {error}",
        file=sys.stderr,
        flush=True,
      )
      self._wandb = None


class Meter:
  """Times the steps and turns their device scalars into train records.

  `hold` takes the scalars of a step, `flush` (called when the next step is
  under way) fetches and writes them.  Time spent inside `paused` counts as
  seconds of the run but not for tokens_per_second.
  """

  def __init__(
    self,
    writer: Writer,
    *,
    tokens_per_step: int,
    flops_per_token: float,
    peak_flops: float | None,
  ):
    self._writer = writer
    self._tokens, self._flops = tokens_per_step, flops_per_token
    self._peak = peak_flops
    self._held: tuple[int, Tree] | None = None
    self._last: tuple[int, float] | None = None  # step, time of last record
    earlier = [r.get("seconds") or 0.0 for r in writer.records]
    self._start = time.perf_counter() - max(earlier, default=0.0)

  @property
  def seconds(self) -> float:
    """Wall time of the run, earlier sessions included."""
    return time.perf_counter() - self._start

  def hold(self, step: int, metrics: Any) -> None:
    self.flush()
    self._held = (step, metrics)

  def flush(self) -> tuple[int, dict[str, float]] | None:
    """Writes the held step's record; returns the step and its values."""
    if self._held is None:
      return None
    step, metrics = self._held
    self._held = None
    values = {k: float(v) for k, v in metrics._asdict().items()}
    now = time.perf_counter()
    values["tokens"] = step * self._tokens
    values["seconds"] = self.seconds
    if self._last is not None and step > self._last[0]:
      steps, seconds = step - self._last[0], now - self._last[1]
      values |= self._speed(steps * self._tokens / seconds)
    self._last = (step, now)
    self._writer.write("train", step, values)
    return step, values

  def forget(self) -> None:
    """Drops the held step and restarts the clock of tokens_per_second."""
    self._held = self._last = None

  def _speed(self, tokens_per_second: float) -> dict[str, float]:
    flops = tokens_per_second * self._flops
    speed = {
      "tokens_per_second": tokens_per_second,
      "model_flops_per_second": flops,
    }
    if self._peak:
      speed["mfu"] = flops / self._peak
    return speed

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Stops the clock of tokens_per_second; the device must be idle."""
    start = time.perf_counter()
    yield
    if self._last is not None:
      step, then = self._last
      self._last = (step, then + time.perf_counter() - start)

  def median_tokens_per_second(self) -> float:
    """Median over all but the first logging interval, or the first if it is the
    only one; 0 if the records were lost."""
    train = [r for r in self._writer.records if r["kind"] == "train"]
    rates = [r["tokens_per_second"] for r in train if "tokens_per_second" in r]
    if not rates:  # a short run: the time includes compilation
      known = [r for r in train[-1:] if r.get("tokens") and r.get("seconds")]
      rates = [r["tokens"] / r["seconds"] for r in known]
    return float(np.median(rates[1:] or rates or [0.0]))


def _named(kind: str, values: Json) -> Json:
  """{"loss": ...} -> {"train/loss": ...} or {"eval/valid/loss": ...}."""
  if kind == "dynamics":  # has full names
    return values
  values = dict(values)
  prefix = f"{kind}/{values.pop('split')}" if "split" in values else kind
  return {f"{prefix}/{name}": value for name, value in values.items()}


def _start_wandb(workdir: epath.Path, config: Config) -> Any:
  """A wandb run, resumed if this run is; offline mode needs no login."""
  if config.train.wandb == "off":
    return None
  try:
    import wandb
  except ImportError as error:
    raise ConfigError(
      f"train.wandb={config.train.wandb!r} needs the package wandb:"
      " pip install wandb"
    ) from error
  where = str(files.absolute(workdir))
  mode: Any = config.train.wandb
  return wandb.init(
    project=config.train.wandb_project,
    name=workdir.name,
    id=hashlib.sha256(where.encode()).hexdigest()[:16],
    resume="allow",
    mode=mode,
    dir=None if files.is_remote(workdir) else where,
    config=config_lib.to_dict(config),
  )
