"""The folder of a session: its card (session.json) and its lock.

The state is a file next to the card, see `inference/sessions.py`.
"""

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Iterator

from etils import epath

from hope_jax import config as config_lib
from hope_jax.config import ConfigError, ModelConfig
from hope_jax.runs import files
from hope_jax.runs import workdir as workdir_lib

CARD, STATE = "session.json", "state-"
VERSION = 2  # 1 had another checksum of parameters


@dataclasses.dataclass(frozen=True)
class Card:
  """session.json: which model the session belongs to, and its state.

  Attributes:
    workdir: the run's folder when the session was saved; it may have moved.
    parameters, tokenizer: checksums.
    tokens: how many have been read so far.
    state: SHA-256 of the state's arrays.
  """

  version: int
  workdir: str
  step: int
  parameters: str
  tokenizer: str
  model: ModelConfig
  tokens: int
  state: str


def state_file(folder: epath.Path, card: Card) -> epath.Path:
  """Where the state of a session is."""
  return folder / f"{STATE}{card.state[:16]}.safetensors"


def read_card(folder: epath.Path) -> Card:
  """Reads session.json; `ConfigError` if it is not valid."""
  path = folder / CARD
  try:
    values = json.loads(path.read_text())
    card = config_lib.convert(Card, values, "session")
  except (OSError, ValueError) as error:
    raise damaged(path, files.reason(error)) from error
  if card.version != VERSION:
    raise ConfigError(
      f"{folder} is a session of version {card.version}, but this program"
      f" reads version {VERSION}"
    )
  return card


def damaged(path: epath.Path, reason: str) -> ConfigError:
  """The error for a file of a session that cannot be used."""
  return ConfigError(
    f"cannot read {path} ({reason}): put a copy of the session there, or begin"
    " another --session"
  )


def check_folder(folder: epath.Path, *, new: bool) -> None:
  """`ConfigError` unless `folder` holds a session, or can hold a new one."""
  is_session = (folder / CARD).exists()
  if is_session and new:
    raise ConfigError(
      f"{folder} is a session already: leave --new out to go on with it, or"
      " choose another --session"
    )
  if is_session:
    return
  ours = lambda name: name.startswith((CARD, STATE, workdir_lib.LOCK))
  is_empty = not folder.exists() or (
    folder.is_dir() and all(ours(path.name) for path in folder.iterdir())
  )
  if not is_empty:
    raise ConfigError(f"{folder} exists, but holds no session: choose another")
  if not new:
    raise ConfigError(
      f"there is no session {folder}{_nearest(folder)}; --new begins one"
    )


def _nearest(folder: epath.Path) -> str:
  """A hint at the session beside `folder` whose name is most like its own."""
  if not folder.parent.is_dir():
    return ""
  names = [x.name for x in folder.parent.iterdir() if (x / CARD).exists()]
  near = difflib.get_close_matches(folder.name, names, 1)
  return f"; did you mean {str(folder.parent / near[0])!r}?" if near else ""


@contextlib.contextmanager
def claimed(folder: epath.Path) -> Iterator[None]:
  """Locks the session against other processes; a new session that is not saved
  leaves nothing behind."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f"cannot make {folder}: {files.reason(error)}") from error
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(workdir_lib.locked(folder))
    except ConfigError as error:
      raise ConfigError(
        f"{folder} is in use by another process: wait for it, or choose another"
        " --session"
      ) from error
    except OSError as error:
      raise ConfigError(
        f"cannot write to {folder}: {files.reason(error)}"
      ) from error
    try:
      yield
    finally:
      if not (folder / CARD).exists():
        with contextlib.suppress(OSError):
          (folder / workdir_lib.LOCK).unlink()
          folder.rmdir()
