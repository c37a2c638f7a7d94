"""Reads a long text with a trained model: memory, time, perplexity on the way.

python -m scripts.stream_book --workdir=runs/x --text=book.txt \
  --tokens=1000000 --out=results/stream [--writes=off [--level=cms_0]]

One pass over the text, with the fast state carried from its first token to its
last.  Every 64K tokens: wall time, the process's peak memory, the state's size
and the perplexity of these tokens, all of which go to --out/stream-on.json.
--out/perplexity.png shows all the streams of the folder: the same command with
--writes=off is the control, the same weights with nothing learned on the way.
"""

import dataclasses
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

from absl import flags
from etils import epath

from hope_jax import cli
from hope_jax.config import ConfigError
from hope_jax.inference import variants
from hope_jax.runs import files, progress
from hope_jax.runs import workdir as workdir_lib

WINDOW = 1 << 16  # tokens between two lines
Window = dict[str, Any]


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_string("text", None, "file to read", required=True)
  flags.DEFINE_string("out", None, "folder of the result", required=True)
  flags.DEFINE_integer("tokens", 1_000_000, "how many to read at the most")
  flags.DEFINE_enum("writes", "on", ["on", "off"], "inner learning")
  flags.DEFINE_list("level", [], "with --writes=off: these levels only")
  flags.DEFINE_integer("devices", 1, "over which heads and widths are split")


def peak_bytes() -> int:
  """The most memory that this process has held."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def stream(
  run: Any, text: str, count: int, window: int = WINDOW
) -> Iterator[Window]:
  """Reads up to `count` tokens of `text` with `run`, from `trained.open_run`;
  yields measurements every `window` tokens."""
  import jax
  import numpy as np

  from hope_jax.inference import reading, sessions, streaming
  from hope_jax.training import evaluation

  config, begin = run.config.model, time.perf_counter()
  state = sessions.start(run)
  path, end = files.reach(text), 0
  for tokens in reading.read_text(path, run.tokenizer, window, window):
    tokens = tokens[: count - end]
    read = streaming.extend(run.params, state, tokens[None], config=config)
    state, known = read.state, read.log_probs[0, 0 if end else 1 :]
    end += len(tokens)
    loss = -float(np.mean(known, dtype=np.float64)) if len(known) else math.nan
    yield {
      "end": end,
      "tokens": len(known),
      "loss": loss,
      "perplexity": evaluation.perplexity(loss),
      "seconds": time.perf_counter() - begin,
      "peak_bytes": peak_bytes(),
      "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
      "processed": int(state.processed),
    }
    if end == count:
      return


def line(window: Window, before: Window | None) -> str:
  """A line of text about a window."""
  seconds, end = window["seconds"], window["end"]
  if before is not None:
    seconds, end = seconds - before["seconds"], end - before["end"]
  return (
    f"{window['end']:>11,} tokens  perplexity {window['perplexity']:8.4f}"
    f"  {end / seconds:>9,.0f} tokens/s  {window['seconds']:>9,.1f} s"
    f"  peak {window['peak_bytes'] / 2**20:,.0f} MiB"
    f"  state {window['state_bytes'] / 2**20:,.2f} MiB"
  )


def plot(folder: epath.Path) -> None:
  """perplexity.png: every stream of the folder by position."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4))
  axes = figure.subplots()
  for path in sorted(folder.glob("stream-*.json")):
    found = json.loads(path.read_text())
    ends = [window["end"] / 1e3 for window in found["windows"]]
    values = [window["perplexity"] for window in found["windows"]]
    label = f"{found['model']}, writes {found['writes']}"
    label += f" ({', '.join(found['levels'])})" if found["levels"] else ""
    axes.plot(ends, values, "o-", markersize=3, label=label)
  axes.set_xlabel("position (thousands of tokens)")
  axes.set_ylabel(f"perplexity of the last {WINDOW >> 10}K tokens")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  figure.tight_layout()
  with files.writing(folder / "perplexity.png") as path:
    figure.savefig(path, format="png", dpi=150)


def main() -> None:
  args = flags.FLAGS
  if args.tokens < 1:
    raise ConfigError(f"--tokens={args.tokens} must be positive")
  levels = tuple(args.level)
  if levels and args.writes == "on":
    raise ConfigError("--level needs --writes=off")
  folder = files.check_folder(args.out, "out")
  workdir = files.reach(args.workdir)
  model = workdir_lib.read_config(workdir).model
  if args.writes == "off":
    model = variants.switch_off(model, levels)
  progress.say(
    f"reading up to {args.tokens:,} tokens of {args.text} with"
    f" {cli.describe(model)}, workdir {workdir}"
  )
  cli.announce_devices(args.devices)
  import jax

  from hope_jax.inference import trained
  from hope_jax.training import sharding

  run = trained.open_run(workdir, args.devices)
  run = run._replace(config=dataclasses.replace(run.config, model=model))
  name = "-".join(("stream", args.writes, *levels))
  windows: list[Window] = []
  with sharding.activate(run.mesh):
    for window in stream(run, args.text, args.tokens):
      print(line(window, windows[-1] if windows else None), flush=True)
      windows.append(window)
      found = {
        "workdir": args.workdir,
        "step": run.step,
        "model": run.config.model.sequence_layer,
        "text": args.text,
        "writes": args.writes,
        "levels": levels,
        "device": jax.devices()[0].device_kind,
        "windows": windows,
      }
      workdir_lib.write_json(folder / f"{name}.json", workdir_lib.finite(found))
  plot(folder)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
