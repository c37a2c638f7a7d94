"""Shared by the commands: flags, one-line errors, exit codes.

Exit code 2: the command line or the config is wrong; 1: the run failed; 130:
Ctrl-C; 75: SIGTERM, preemption or the loss of another process, after which the
same command resumes.
"""

import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging
from etils import epath

from hope_jax import config as config_lib
from hope_jax.config import Config, ConfigError, ModelConfig
from hope_jax.inference import sampling as sampling_lib
from hope_jax.runs import (
  compilation,
  errors,
  files,
  interruption,
  processes,
  progress,
)
from hope_jax.runs import workdir as workdir_lib

_ending = threading.Lock()


def fail(message: str, code: int) -> NoReturn:
  """Prints one line on stderr and exits.

  If several threads call it, only the first one's message is printed.
  """
  with _ending:
    message = " ".join(message.split())
    print(f"error: {message}", file=sys.stderr, flush=True)
    processes.leave(message)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: an interrupted compilation continues in its own thread, and
    # would crash when the interpreter is torn down.
    os._exit(code)


def define_config() -> None:
  """Defines --config=file.py[:mode] with overrides --config.group.field=.

  Fields that the file leaves at their defaults can be overridden too;
  unknown ones are found when `read_config` converts to dataclasses.
  """
  try:
    from ml_collections import config_flags
  except ModuleNotFoundError:
    fail(
      "--config needs the package ml_collections: pip install ml_collections,"
      " or begin the run from Python, with hope_jax.training.loop.run",
      2,
    )

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
  except OSError as error:  # raised late, when the file is accessed
    reason = str(error).splitlines()[-1].strip()
    raise ConfigError(f"cannot load --config: {reason}") from error


def define_sampling() -> None:
  """Defines the flags of sampling, for `read_sampling`."""
  flags.DEFINE_integer("tokens", 200, "how many tokens to add at the most")
  flags.DEFINE_float("temperature", 1.0, "0: always the likeliest token")
  flags.DEFINE_integer("top_k", 0, "draw from the k likeliest; 0: from all")
  flags.DEFINE_float("top_p", 1.0, "draw from the likeliest with sum top_p")
  flags.DEFINE_multi_string("stop", [], "end before this text")
  flags.DEFINE_integer("seed", 0, "of the draws")


def read_sampling(args: Any) -> sampling_lib.Sampling:
  """The `Sampling` of the flags `args`; checks --tokens and --stop, too."""
  sampling = sampling_lib.Sampling(args.temperature, args.top_k, args.top_p)
  sampling_lib.check_request(args.tokens, sampling, args.stop)
  return sampling


def describe(model: ModelConfig) -> str:
  """A description of the model, for the first line of every command."""
  layers = "1 layer" if model.num_layers == 1 else f"{model.num_layers} layers"
  return f"{model.sequence_layer}: {layers} of width {model.width}"


def announce(config: Config, workdir: Any) -> None:
  """Prints what a training run will do, before anything slow begins."""
  data, steps = config.data, config.train.steps
  tokens = steps * data.batch_size * data.sequence_length
  source = "generated data" if data.is_generated else data.path
  progress.say(
    f"{describe(config.model)}, {steps:,} steps of {data.batch_size} x"
    f" {data.sequence_length} = {tokens:,} tokens of {source},"
    f" workdir {workdir}"
  )


def announce_devices(count: int | None = None) -> None:
  """Prints the devices that are used: the first `count`, or all.

  `ConfigError` if there are fewer than `count`.
  """
  import jax  # takes 1.5 s, so after the first line

  there = jax.device_count()
  count = there if count is None else count
  if not 0 < count <= there:
    raise ConfigError(f"--devices={count}: there are {there} here")
  progress.say(f"on {count} x {jax.devices()[0].device_kind}")


def write_output(path: epath.Path, value: Any, hint: str = "") -> None:
  """Writes `value` as JSON to --output, with null for NaN and infinity.

  `SaveFailed` if that fails; `hint` ends its message.
  """
  try:
    workdir_lib.write_json(path, workdir_lib.finite(value))
  except OSError as error:
    raise errors.SaveFailed(
      f"cannot write {path}: {files.reason(error)}{hint}"
    ) from error


def explain(error: Exception) -> str:
  """An error in the flags or in a config file, as one short line."""
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

  With `takes_arguments`, `main` is given the arguments that are not flags.
  """

  def guarded(argv: list[str]) -> None:
    if len(argv) > 1 and not takes_arguments:
      fail(f"unexpected argument {argv[1]!r}", 2)
    if not any(a.startswith(("--verbosity", "-v")) for a in sys.argv[1:]):
      logging.set_verbosity(logging.ERROR)  # checkpointing is talkative
    if flags.FLAGS.compilation_cache:
      compilation.keep_programs()
    try:
      main(*([argv[1:]] if takes_arguments else []))
      processes.finish()
    except ConfigError as error:
      fail(str(error), 2)
    except errors.Fault as error:
      fail(str(error), 1)
    except interruption.Interrupted as error:
      processes.finish()
      fail(f"{error}; {processes.AGAIN}", error.code)
    except ModuleNotFoundError as error:  # some are imported where needed
      package = str(error.name).partition(".")[0]
      fail(f"{error}: pip install {package}", 2)
    except KeyboardInterrupt:
      fail(f"interrupted; {processes.AGAIN}", 130)
    except Exception as error:
      if processes.is_alone():
        raise
      processes.explain()
      traceback.print_exc()
      fail(f"{type(error).__name__}: {files.reason(error)}", 1)

  if "compilation_cache" not in flags.FLAGS:
    flags.DEFINE_bool(
      "compilation_cache",
      True,
      "keep compiled programs in $HOPE_JAX_CACHE (~/.cache/hope_jax)",
    )
  app.run(guarded, flags_parser=_parse_flags)
