"""Speed of the input pipeline on prepared data, in tokens/s per core.

python -m scripts.benchmark_data --path=data/novels --batch=8 [--workers=2]

Reads shuffled batches the way training does.  Per core: tokens over the CPU
seconds of this process (one thread makes the batches); with --workers, over
the wall seconds and the number of workers.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

from etils import epath

from hope_jax.config import Config, DataConfig, ModelConfig
from hope_jax.data import pipeline, records


def measure(path: str, batch: int, tokens: int, workers: int) -> float:
  """Tokens per second and core of one pass over about `tokens` tokens."""
  manifest = records.read_manifest(epath.Path(path) / "train")
  vocab_size = manifest.tokenizer.vocab_size
  data = DataConfig(
    kind="records",
    path=path,
    sequence_length=manifest.length,
    batch_size=batch,
  )
  config = Config(model=ModelConfig(vocab_size=vocab_size), data=data)
  source = pipeline.load(config)["train"]
  steps = max(2, tokens // (batch * manifest.length))
  batches = pipeline.TrainBatches(source, batch, (0, batch), steps + 8)
  ahead = pipeline.prefetch(batches, 0, workers)
  for _ in range(8):  # opens the files, starts the workers
    next(ahead)
  wall, cpu = time.perf_counter(), time.process_time()
  for _ in range(steps):
    next(ahead)
  seconds = time.process_time() - cpu
  if workers:
    seconds = (time.perf_counter() - wall) * workers
  return steps * batch * manifest.length / seconds


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser("python -m scripts.benchmark_data")
  parser.add_argument("--path", required=True, help="folder of prepared data")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--tokens", type=int, default=5_000_000)
  parser.add_argument("--workers", type=int, default=0)
  parser.add_argument("--rounds", type=int, default=5)
  flags = parser.parse_args(argv)
  rates = [
    measure(flags.path, flags.batch, flags.tokens, flags.workers)
    for _ in range(flags.rounds)
  ]
  print(
    f"{statistics.median(rates):,.0f} tokens/s per core (median of"
    f" {flags.rounds}; {min(rates):,.0f} to {max(rates):,.0f})"
  )


if __name__ == "__main__":
  main()
