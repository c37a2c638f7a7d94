"""Orbax checkpoints: asynchronous, atomic, restored onto any mesh.

A checkpoint is the whole `TrainState`; the config lies beside it in the run's
folder.  The input pipeline needs nothing: batches follow from the step.  Kept
are the newest ones and those with the best validation loss.
"""

import errno
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from hope_jax import files
from hope_jax.config import ConfigError, TrainConfig
from hope_jax.training.faults import SaveFailed

FOLDER, BROKEN = "checkpoints", "broken_checkpoints"
LOSS = "valid_loss"


def _folder(workdir: epath.Path) -> epath.Path:
  return files.absolute(workdir) / FOLDER


def open_manager(
  workdir: epath.Path, config: TrainConfig
) -> ocp.CheckpointManager:
  """A manager of the checkpoints below `workdir`."""

  def quality(metrics: dict[str, float]) -> float:
    return -metrics[LOSS]

  newest = checkpoint_managers.LatestN(config.keep_checkpoints)
  best = checkpoint_managers.BestN(
    get_metric_fn=quality,
    n=config.keep_best,
    keep_checkpoints_without_metrics=False,
  )
  policies = [newest, best] if config.keep_best else [newest]
  options = ocp.CheckpointManagerOptions(
    preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
    best_fn=quality,
    enable_async_checkpointing=True,
    cleanup_tmp_directories=True,
  )
  return ocp.CheckpointManager(_folder(workdir), options=options)


def save(
  manager: ocp.CheckpointManager,
  step: int,
  state: Any,
  valid_loss: float | None = None,
) -> None:
  """Starts saving `state` as step `step`; no-op if that step is saved."""
  if step == manager.latest_step():
    return
  args = ocp.args.Composite(state=ocp.args.StandardSave(state))
  metrics = None if valid_loss is None else {LOSS: valid_loss}
  try:
    manager.save(step, args=args, metrics=metrics, force=True)
  except Exception as error:  # of this or of the last, asynchronous one
    raise _explained(error) from error


def close(manager: ocp.CheckpointManager) -> None:
  """Waits for the checkpoint that is being written."""
  try:
    manager.close()
  except Exception as error:
    raise _explained(error) from error


def _explained(error: Exception) -> SaveFailed:
  text = str(error)
  reason = (text.strip().splitlines() or [type(error).__name__])[-1]
  full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
  if getattr(error, "errno", None) in full or any(
    mark in text for mark in ("No space left", "ENOSPC", "File too large")
  ):
    reason = "the disk is full"
  return SaveFailed(
    f"cannot save a checkpoint: {reason}; the older checkpoints are intact:"
    " make room and run the same command again"
  )


def restore(manager: ocp.CheckpointManager, abstract: Any) -> Any:
  """The newest readable state, laid out like `abstract`; None if there is none.

  A checkpoint that cannot be read is moved to `broken_checkpoints`, with one
  line on stderr, and the one before is taken.
  """
  args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
  found = sorted(manager.all_steps(), reverse=True)
  for step in found:
    try:
      state = manager.restore(step, args=args)["state"]
      return jax.block_until_ready(state)
    except Exception as error:
      reason = files.reason(error)
      if step == found[-1]:
        raise ConfigError(
          f"no checkpoint in {manager.directory} can be read ({reason}):"
          " restore them from a copy, or start anew in another --workdir"
        ) from error
      _set_aside(manager, step)
      print(
        f"checkpoint {step} cannot be read and was moved to {BROKEN}"
        f" ({reason}); trying the one before",
        file=sys.stderr,
        flush=True,
      )
  return None


def _set_aside(manager: ocp.CheckpointManager, step: int) -> None:
  if jax.process_index() == 0:
    aside = manager.directory.parent / BROKEN
    aside.mkdir(exist_ok=True)
    (manager.directory / str(step)).rename(aside / str(step))
  multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
  manager.reload()


def restore_params(workdir: epath.Path, abstract: Any) -> tuple[int, Any]:
  """(step, parameters) of a run's newest checkpoint, without the rest."""
  folder = _folder(workdir)
  if not folder.is_dir():
    raise ConfigError(f"{workdir} has no checkpoint yet")
  options = ocp.CheckpointManagerOptions(
    read_only=True, create=False, save_interval_steps=0
  )
  with ocp.CheckpointManager(folder, options=options) as manager:
    step = manager.latest_step()
    if step is None:
      raise ConfigError(f"{workdir} has no checkpoint yet")
    item = {"params": abstract}
    args = ocp.args.PyTreeRestore(
      item=item,
      restore_args=ocp.checkpoint_utils.construct_restore_args(item),
      partial_restore=True,
    )
    try:
      restored = manager.restore(step, args=ocp.args.Composite(state=args))
      params = jax.block_until_ready(restored["state"]["params"])
    except Exception as error:
      reason = files.reason(error)
      raise ConfigError(
        f"checkpoint {step} of {workdir} cannot be read ({reason}): run the"
        " training command again, which takes the one before"
      ) from error
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if isinstance(leaf, jax.ShapeDtypeStruct):  # a partial restore's gap
      raise ConfigError(
        f"checkpoint {step} of {workdir} has no parameter"
        f" {jax.tree_util.keystr(path)}: another version of the code wrote it;"
        " use that version, or train anew in another --workdir"
      )
  return step, params
