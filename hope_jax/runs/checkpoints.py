"""Orbax checkpoints: asynchronous, atomic, restored onto any mesh.

A checkpoint holds the whole `TrainState` and digests of its arrays
(`digest.py`), which are computed on saving and compared on restoring; the
config is a file in the run's folder.  The input pipeline has no state to save:
batches follow from the step.  The newest checkpoints and those with the best
validation loss are kept.  Checkpoints of older versions, without digests, are
restored without that comparison.
"""

import errno
import functools
import logging
import math
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.typing import ArrayPytree as Tree
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from hope_jax.config import ConfigError, TrainConfig
from hope_jax.runs import digest, errors, files, progress
from hope_jax.runs import workdir as workdir_lib
from hope_jax.runs.errors import SaveFailed

FOLDER, BROKEN = "checkpoints", "broken_checkpoints"
LOSS = "valid_loss"
# Names in the folder of a step.
STATE, DIGEST, QUALITY = "state", "digest", "metrics"
METADATA = "_CHECKPOINT_METADATA"

_DETAILS = re.compile(r" \[tensorstore_spec|\. See full TensorStore")


def _folder(workdir: epath.Path) -> epath.Path:
  return files.absolute(workdir) / FOLDER


def open_manager(
  workdir: epath.Path, config: TrainConfig
) -> ocp.CheckpointManager:
  """A manager of the checkpoints below `workdir`.

  Existing checkpoints are only read in `restore`.
  """

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
    lightweight_initialize=True,  # else a damaged file is an error here
  )
  return ocp.CheckpointManager(_folder(workdir), options=options)


def save(
  manager: ocp.CheckpointManager,
  step: int,
  state: Tree,
  valid_loss: float | None = None,
) -> None:
  """Starts saving `state` as step `step`; no-op if that step is saved.

  `errors.Diverged` if the parameters, or their moments, are not finite: such a
  state is never saved.
  """
  if step == manager.latest_step():
    return
  leaves = digest.leaves(state)
  wrong = _not_finite(leaves)
  if wrong:
    raise errors.Diverged(
      f"{wrong} is not finite after step {step}, which was not saved; the"
      " checkpoints are intact: lower opt.peak_lr, or look at the data"
    )
  args = ocp.args.Composite(
    **{
      STATE: ocp.args.StandardSave(state),
      DIGEST: ocp.args.JsonSave({k: v.digest for k, v in leaves.items()}),
    }
  )
  is_known = valid_loss is not None and math.isfinite(valid_loss)
  metrics = {LOSS: valid_loss} if is_known else None
  try:
    manager.save(step, args=args, metrics=metrics, force=True)
  except Exception as error:  # of this save or the last, asynchronous one
    raise _explained(error) from error


def _not_finite(leaves: dict[str, digest.Leaf]) -> str:
  """The first parameter or moment with a NaN or an infinity."""
  for name, leaf in leaves.items():
    if name.startswith(("params/", "opt_state/")) and not leaf.is_finite:
      return name
  return ""


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


def restore(manager: ocp.CheckpointManager, abstract: Tree) -> Any:
  """The newest readable state, laid out like `abstract`; None if there is none.

  Checkpoints with a file that cannot be read, or with arrays that differ from
  what was saved, are moved to `broken_checkpoints`, with a line each on stderr.
  """
  try:
    manager.wait_until_finished()
  except Exception as error:
    raise _explained(error) from error
  state, taken, broken = None, None, {}
  for step in sorted(manager.all_steps(), reverse=True):
    path = manager.directory / str(step)
    reason = _of_all_processes(_unreadable(path))
    if not reason and taken is None:
      state, reason = _read_state(path, abstract)
      taken = None if reason else step
    if reason:
      broken[step] = reason
  if broken and taken is None:
    raise ConfigError(
      f"no checkpoint in {manager.directory} can be read"
      f" ({broken[max(broken)]}): restore them from a copy, or start anew in"
      " another --workdir"
    )
  for step, reason in broken.items():
    _set_aside(manager.directory, step, reason, taken)
  manager.reload()
  return state


def _unreadable(path: epath.Path) -> str:
  """Why a small file of a checkpoint cannot be read; empty if all can be."""
  try:
    items = workdir_lib.read_object(path / METADATA)["item_handlers"]
    # Raises where the manager would, when it reads the same file.
    _ = ocp.path.step.Metadata(0, path).commit_timestamp
    for name in {STATE, *items}:
      if not (path / name).is_dir():
        return f"it has no {name}"
    if (path / QUALITY).exists():
      loss = workdir_lib.read_object(path / QUALITY / QUALITY)[LOSS]
      if not isinstance(loss, float) or not math.isfinite(loss):
        return f"its {LOSS} is {loss!r}"
    _digests(path)
  except Exception as error:
    return _reason(error)
  return ""


def _reason(error: Exception) -> str:
  """Why a file cannot be read, in a line of limited length."""
  if isinstance(error, KeyError):
    return f"a file lacks {error}"
  text = _DETAILS.split(files.reason(error))[0]
  return text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}"


def _read(call: Callable[[], Any]) -> tuple[Any, str]:
  """(what `call` reads, ""), or (None, why it cannot be read)."""
  _hush()
  try:
    return jax.block_until_ready(call()), ""
  except Exception as error:
    return None, _reason(error)


@functools.cache
def _hush() -> None:
  """Suppresses the tracebacks of reads that were still under way when another
  one failed."""
  hook = sys.unraisablehook

  def is_read(error: Any, trace: Any) -> bool:
    names = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace)]
    is_late = str(error) == "Event loop is closed"
    return is_late or any("orbax" in name for name in names)

  def handle(found: Any) -> None:
    if not is_read(found.exc_value, found.exc_traceback):
      hook(found)

  def is_other(record: logging.LogRecord) -> bool:
    return not record.exc_info or not is_read(*record.exc_info[1:])

  sys.unraisablehook = handle
  logging.getLogger("asyncio").addFilter(is_other)


def _digests(path: epath.Path) -> dict[str, Any] | None:
  """The stored digests; None for a checkpoint of an older version."""
  if not (path / DIGEST).exists():
    return None
  return workdir_lib.read_object(path / DIGEST / "metadata")


def _read_state(path: epath.Path, abstract: Tree) -> tuple[Any, str]:
  """(the state of a checkpoint, ""), or (None, why it cannot be used).

  `ConfigError` if it is intact, but its version had another tree of states.  It
  is read with a handler of its own, which does not wait for other processes:
  each process reads the part that it holds, so only one of them may fail.
  """
  args: Any = ocp.args.StandardRestore(abstract)
  handler = ocp.StandardCheckpointHandler()
  state, reason = _read(lambda: handler.restore(path / STATE, args=args))
  reason = _of_all_processes(reason)
  if not reason and jax.tree.structure(state) != jax.tree.structure(abstract):
    raise ConfigError(
      f"{path} was saved by a version that sorted the parameters for the"
      " optimizer in another way: the run cannot go on from there; export it"
      " and begin another one with train.init_from"
    )
  reason = reason or _differs(path, state, whole=True)
  return (None, reason) if reason else (state, "")


def _differs(path: epath.Path, tree: Tree, *, whole: bool) -> str:
  """What in `tree` differs from what was saved or is not finite, or "".

  `whole`: `tree` is the whole checkpoint, not a part of it.
  """
  leaves, stored = digest.leaves(tree), _digests(path)
  if stored is not None:
    for name, leaf in leaves.items():
      if stored.get(name) != leaf.digest:
        return f"{name} is not as it was saved"
    if whole and len(stored) != len(leaves):
      return "it was saved with other arrays"
  wrong = _not_finite(leaves)
  return f"{wrong} is not finite" if wrong else ""


def _of_all_processes(reason: str) -> str:
  """The reason of the first process that has one, so that all act alike."""
  if jax.process_count() == 1:
    return reason
  text = np.zeros(200, np.uint8)
  encoded = reason.encode()[: len(text)]
  text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  every = np.asarray(multihost_utils.process_allgather(text))
  said = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in every]
  return next(filter(None, said), "")


def _set_aside(
  folder: epath.Path, step: int, reason: str, taken: int | None
) -> None:
  """Moves a checkpoint to `broken_checkpoints`, under an unused name."""
  if jax.process_index() == 0:
    aside = folder.parent / BROKEN
    try:
      aside.mkdir(exist_ok=True)
      used = {path.name for path in aside.iterdir()}
      names = [str(step), *(f"{step}-{n}" for n in range(2, len(used) + 3))]
      target = next(name for name in names if name not in used)
      (folder / str(step)).rename(aside / target)
    except OSError as error:
      raise ConfigError(
        f"checkpoint {step} of {folder} cannot be read and cannot be moved to"
        f" {aside} ({files.reason(error)}): move it away"
      ) from error
    print(
      f"checkpoint {step} cannot be read and was moved to {BROKEN} ({reason});"
      f" the run goes on from checkpoint {taken}",
      file=sys.stderr,
      flush=True,
    )
  multihost_utils.sync_global_devices(f"checkpoint {step} set aside")


def restore_params(workdir: epath.Path, abstract: Tree) -> tuple[int, Tree]:
  """(step, parameters) of a run's newest checkpoint, without the rest.

  Nothing is moved or written.  `ConfigError` if it cannot be read or was
  changed: an older checkpoint is not used instead, as it is another model.
  """
  folder = _folder(workdir)
  found = ocp.path.step.standard_name_format().find_all(folder)
  step = max((each.step for each in found), default=None)
  if step is None:
    raise ConfigError(f"{workdir} has no checkpoint yet")
  path = folder / str(step)
  item = {"params": abstract}
  args: Any = ocp.args.PyTreeRestore(
    item=item,
    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
    partial_restore=True,
  )
  handler = ocp.PyTreeCheckpointHandler()
  progress.say(f"step {step} of {workdir}")
  with progress.waiting("reading the checkpoint", patience=2.0):
    params, reason = _read(
      lambda: handler.restore(path / STATE, args=args)["params"]
    )
  if reason:
    raise _broken(workdir, step, reason)
  for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
    if isinstance(leaf, jax.ShapeDtypeStruct):  # a partial restore's gap
      raise ConfigError(
        f"checkpoint {step} of {workdir} has no parameter"
        f" {jax.tree_util.keystr(keys)}: another version of the code wrote it;"
        " use that version, or train anew in another --workdir"
      )
  try:
    reason = _differs(path, {"params": params}, whole=False)
  except Exception as error:  # in reading the stored digests
    reason = _reason(error)
  if reason:
    raise _broken(workdir, step, reason)
  return step, params


def _broken(workdir: epath.Path, step: int, reason: str) -> ConfigError:
  finished = (workdir / workdir_lib.RESULT).exists()
  first = f"remove its {workdir_lib.RESULT}, then " if finished else ""
  return ConfigError(
    f"checkpoint {step} of {workdir} cannot be read ({reason}): {first}run the"
    " training command again, which takes the one before"
  )
