"""Errors of the command line and of config files, as a user sees them."""

import sys
import threading
import time

import pytest
from absl import flags
from ml_collections import config_flags

from hope_jax import cli
from hope_jax.config import ConfigError, from_config_dict
from hope_jax.data.text import REPOSITORY


def message(monkeypatch, config: str, *overrides: str) -> str:
  """Of the error that --config=`config` and `overrides` end in."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config",
    lock_config=False,
    accept_new_attributes=True,
    flag_values=values,
  )
  arguments = ["command", f"--config={REPOSITORY / config}", *overrides]
  monkeypatch.setattr(sys, "argv", arguments)
  try:
    values(arguments)
    from_config_dict(values.config)
  except ConfigError as error:
    return str(error)
  except Exception as error:
    return cli.explain(error)
  raise AssertionError("no error")


@pytest.mark.parametrize(
  ("mode", "flag", "expected"),
  [
    (":hoppe", "", "unknown mode 'hoppe'; did you mean 'hope'? (all: transf"),
    (":hope,smok", "", "unknown mode 'smok'; did you mean 'smoke'? (all: tr"),
    (":qqq", "", "unknown mode 'qqq' (all: transformer, "),
    (":hope,titans", "", "mode 'hope,titans' names more than one model"),
    (
      "",
      "opt.peak_rl=1",
      "unknown field 'opt.peak_rl'; did you mean 'peak_lr'?",
    ),
    ("", "optt.peak_lr=1", "the config has no field 'optt'; did you mean 'opt"),
    ("", "qqqqqq.peak_lr=1", "the config has no field 'qqqqqq'"),
    ("", "opt.qqqqqq=1", "unknown field 'opt.qqqqqq'"),
    ("", "opt.eps.x=1", "the config has no field 'eps'"),
    (
      "",
      "data.split=(1,2",
      "data.text.split=(1,2 is not a list of values: write it as (1,2,3)",
    ),
    ("", "opt.peak_lr", "Missing value for flag --config.opt.peak_lr"),
    ("", "opt.peak_lr=x", "flag --config.opt.peak_lr=x: could not convert st"),
    (
      "",
      "model.sequence_layer=hop",
      "unknown model.sequence_layer='hop'; did you mean 'hope'? (all: transf",
    ),
  ],
)
def test_config_error_is_one_short_line_with_the_nearest_name(
  monkeypatch, mode, flag, expected
):
  overrides = [f"--config.{flag}"] if flag else []
  text = message(monkeypatch, "configs/shakespeare.py" + mode, *overrides)
  assert text.startswith(expected)
  assert "\n" not in text and len(text) < 320


def test_missing_config_file_is_named(monkeypatch):
  text = message(monkeypatch, "configs/none.py", "--config.opt.b1=0")
  assert "No such file" in text and text.endswith("configs/none.py'")


def test_of_two_threads_that_fail_one_gives_the_reason(monkeypatch, capfd):
  ended = threading.Event()

  def end(code):
    ended.set()
    time.sleep(0.3)  # in life, the process is gone

  monkeypatch.setattr(cli.processes, "leave", lambda _: time.sleep(0.2))
  monkeypatch.setattr(cli.os, "_exit", end)
  for reason in ("first", "second"):
    arguments = (reason, 75)
    threading.Thread(target=cli.fail, args=arguments, daemon=True).start()
    time.sleep(0.05)
  assert ended.wait(10)
  assert capfd.readouterr().err == "error: first\n"
  time.sleep(1.0)  # the second one ends as well
