"""Orbax checkpoints: asynchronous, atomic, restored onto any mesh.

A checkpoint is the whole `TrainState`; the config lies beside it in the run's
folder.  The input pipeline needs nothing: batches follow from the step.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from hope_jax.config import ConfigError

FOLDER = "checkpoints"


def open_manager(workdir: pathlib.Path, keep: int) -> ocp.CheckpointManager:
  """A manager of the newest `keep` checkpoints below `workdir`."""
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep,
    enable_async_checkpointing=True,
    cleanup_tmp_directories=True,
  )
  return ocp.CheckpointManager((workdir / FOLDER).absolute(), options=options)


def save(manager: ocp.CheckpointManager, step: int, state: Any) -> None:
  """Starts saving `state` as step `step`; no-op if that step is saved."""
  if step != manager.latest_step():
    args = ocp.args.Composite(state=ocp.args.StandardSave(state))
    manager.save(step, args=args, force=True)


def restore(manager: ocp.CheckpointManager, abstract: Any) -> Any:
  """The newest state, laid out like `abstract`; None if there is none."""
  step = manager.latest_step()
  if step is None:
    return None
  args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
  return manager.restore(step, args=args)["state"]


def restore_params(workdir: pathlib.Path, abstract: Any) -> tuple[int, Any]:
  """(step, parameters) of a run's newest checkpoint, without the rest."""
  folder = (workdir / FOLDER).absolute()
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
    restored = manager.restore(step, args=ocp.args.Composite(state=args))
  return step, jax.block_until_ready(restored["state"]["params"])
