"""Trains one model.

python -m hope_jax.train --config=configs/shakespeare.py:hope \\
    --workdir=runs/x --config.opt.peak_lr=1e-3

The same command again resumes an interrupted run.  JAX_COMPILATION_CACHE_DIR
names a folder in which compiled steps are kept between runs.
"""

import jax
from absl import flags

from hope_jax import files
from hope_jax.training import command, loop


def define_flags() -> None:
  command.define_config()
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_bool(
    "multihost", False, "one process of many: jax.distributed.initialize()"
  )


def main() -> None:
  if flags.FLAGS.multihost:
    jax.distributed.initialize()
  config = command.read_config()
  result = loop.run(config, files.reach(flags.FLAGS.workdir))
  if jax.process_index() == 0:
    print(
      f"{result['model']}: {result['parameters']:,} parameters,"
      f" {result['tokens']:,} tokens, valid loss {result['valid_loss']:.4f},"
      f" test loss {result['test_loss']:.4f}, accuracy"
      f" {result['accuracy']:.4f}, {result['tokens_per_second']:,.0f} tokens/s"
    )


if __name__ == "__main__":
  define_flags()
  command.run(main)
