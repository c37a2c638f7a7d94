"""Trains one model.

python -m hope_jax.train --config=configs/shakespeare.py:hope \\
    --workdir=runs/x --config.opt.peak_lr=1e-3

The same command resumes an interrupted run.  If a run has several processes
(the hosts of a pod), each is started with `--multihost`.
"""

from absl import flags

from hope_jax import cli
from hope_jax.runs import files, processes, progress, supervisor


def define_flags() -> None:
  cli.define_config()
  flags.DEFINE_string("workdir", None, "folder of the run", required=True)
  flags.DEFINE_bool(
    "multihost", False, "one process of many: jax.distributed.initialize()"
  )
  flags.DEFINE_float(
    "peer_seconds",
    60.0,
    "with --multihost: a process that is silent for so long counts as lost",
    lower_bound=5.0,
  )


def main() -> None:
  args = flags.FLAGS
  if args.multihost:
    supervisor.supervise(processes.silence)
    with progress.waiting("waiting for the other processes", patience=3.0):
      processes.initialize(args.peer_seconds, cli.fail)
  config = processes.agree(cli.read_config)
  workdir = files.reach(args.workdir)
  cli.announce(config, workdir)
  cli.announce_devices()
  from hope_jax.training import loop

  result = loop.run(config, workdir)
  if processes.is_first():
    print(
      f"{result['model']}: {result['parameters']:,} parameters,"
      f" {result['tokens']:,} tokens, valid loss {result['valid_loss']:.4f},"
      f" test loss {result['test_loss']:.4f}, accuracy"
      f" {result['accuracy']:.4f}, {result['tokens_per_second']:,.0f} tokens/s"
    )


if __name__ == "__main__":
  define_flags()
  cli.run(main)
