"""What the commands share: flags, one-line errors, exit codes.

Exit code 2: the command line or the config is wrong; 1: the run failed; 130:
Ctrl-C; 75: SIGTERM or preemption, saved, the same command resumes.
"""

import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging

from hope_jax import config as config_lib
from hope_jax.config import Config, ConfigError
from hope_jax.training import checkpoints, faults, interruption


def fail(message: str, code: int) -> NoReturn:
  """Prints one line on stderr and exits."""
  print(f"error: {' '.join(message.split())}", file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  # Not sys.exit: a compilation that was interrupted goes on in a thread of
  # its own, and tearing the interpreter down under it is a crash.
  os._exit(code)


def define_config() -> None:
  """Defines --config=file.py[:mode] with overrides --config.group.field=.

  Fields that the file leaves at their defaults can be overridden too;
  unknown ones are found when `read_config` converts to dataclasses.
  """
  from ml_collections import config_flags

  config_flags.DEFINE_config_file(
    "config",
    help_string="config.py[:mode]",
    lock_config=False,
    accept_new_attributes=True,
  )
  flags.mark_flag_as_required("config")


def read_config() -> Config:
  """The `Config` that the flags ask for."""
  values = flags.FLAGS.config
  try:
    return config_lib.from_config_dict(values)
  except OSError as error:  # raised late, when the file is looked into
    reason = str(error).splitlines()[-1].strip()
    raise ConfigError(f"cannot load --config: {reason}") from error


def explain(error: Exception) -> str:
  """What an error of the flags or of a config file says, in one short line."""
  text = str(error.args[0] if isinstance(error, KeyError) else error).strip()
  if slip := re.search(r'Did you mean "(.+)" instead of "(.+)"', text):
    right, wrong = slip.groups()
    return f"the config has no field {wrong!r}; did you mean {right!r}?"
  if place := re.search(r"Attempting to lookup: (\S+)", text):
    return f"the config has no field {place[1]!r}"
  unknown = re.match(r"""(?:Key )?["']?([\w.]+)["']?(?: does not|$)""", text)
  if unknown and isinstance(error, KeyError | AttributeError):
    return f"the config has no field {unknown[1]!r}"
  if value := re.match(r"(.*): Error while parsing string: .* as tuple", text):
    return f"{value[1]} is not a list of values: write it as (1,2,3)"
  if isinstance(error, OSError) or "Traceback" in text:
    text = text.splitlines()[-1].strip()
  return text.removeprefix("ValueError: ") or type(error).__name__


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except Exception as error:  # a config file may raise anything
    fail(explain(error), 2)


def run(main: Callable[..., None], *, takes_arguments: bool = False) -> None:
  """Runs `main` with parsed flags; user errors become one clear line.

  With `takes_arguments` it is given what is not a flag.
  """

  def guarded(argv: list[str]) -> None:
    if len(argv) > 1 and not takes_arguments:
      fail(f"unexpected argument {argv[1]!r}", 2)
    if not any(a.startswith(("--verbosity", "-v")) for a in sys.argv[1:]):
      logging.set_verbosity(logging.ERROR)  # checkpointing is talkative
    try:
      main(*([argv[1:]] if takes_arguments else []))
    except ConfigError as error:
      fail(str(error), 2)
    except (faults.Diverged, faults.NoData, checkpoints.SaveFailed) as error:
      fail(str(error), 1)
    except interruption.Interrupted as error:
      fail(f"{error}; run the same command again to resume", error.code)
    except KeyboardInterrupt:
      fail("interrupted; run the same command again to resume", 130)

  app.run(guarded, flags_parser=_parse_flags)
