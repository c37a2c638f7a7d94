"""What a command says while it waits."""

import time

import pytest

from hope_jax.runs import processes, progress


def until(text, capsys):
  """What is said up to and with `text`, within a minute."""
  said = ""
  for _ in range(600):
    said += capsys.readouterr().err
    if text in said:
      return said
    time.sleep(0.1)
  raise AssertionError(said)


def test_waiting_says_what_and_counts(capsys, monkeypatch):
  monkeypatch.setattr(progress, "_FIRST_SECONDS", 0.05)
  with progress.waiting("compiling"):
    assert capsys.readouterr().err == "compiling ...\n"
    said = until("compiling ... 0 s\n", capsys)
  assert said.replace("compiling ... 0 s\n", "") == ""
  assert capsys.readouterr().err.endswith("compiling ... 0 s, done\n")


def test_short_waiting_says_nothing(capsys):
  with progress.waiting("reading", patience=60.0):
    pass
  assert not capsys.readouterr().err
  with progress.waiting("reading", patience=0.01):
    until("reading ... 0 s\n", capsys)
  assert capsys.readouterr().err == "reading ... 0 s, done\n"


def test_error_is_the_last_line(capsys):
  with pytest.raises(ValueError), progress.waiting("reading"):
    raise ValueError
  assert capsys.readouterr().err == "reading ...\n"


def test_terminal_line_is_written_over(capsys, monkeypatch):
  monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
  with progress.waiting("compiling"):
    pass
  assert capsys.readouterr().err == (
    "\rcompiling ...\rcompiling ... 0 s, done\n"
  )


def test_only_the_first_process_speaks(capsys, monkeypatch):
  monkeypatch.setattr(processes, "is_first", lambda: False)
  progress.say("a")
  with progress.waiting("b"):
    pass
  assert not capsys.readouterr().err
