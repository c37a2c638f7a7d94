"""Sessions from one process to the next, as users hold them."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from hope_jax import session
from hope_jax.config import (
  Config,
  ConfigError,
  DataConfig,
  MemoryConfig,
  ModelConfig,
)
from hope_jax.data.tokenizer import Bytes
from hope_jax.inference import session_folder, sessions, streaming, trained
from hope_jax.runs import checkpoints, digest, errors, workdir
from hope_jax.training import sharding, step
from scripts import stream_book

MEMORY = MemoryConfig(
  adaptive=(), target="shared", delta_rule="none", chunk_length=16
)
MODEL = ModelConfig(
  sequence_layer="titans",
  width=16,
  num_layers=1,
  num_heads=2,
  ffn_hidden=16,
  memory=MEMORY,
)
CONFIG = Config(model=MODEL, data=DataConfig(sequence_length=32))
# Pieces of 64, 8 and 1 tokens; both parts end in the middle of a chunk.
FIRST = "The rest is silence, or so he said when it was over; and then no more"
SECOND = "¿What is past is prologue?"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run that has a checkpoint of random parameters, opened."""
  folder = epath.Path(tmp_path_factory.mktemp("run"))
  workdir.claim(folder, CONFIG, {})
  mesh = sharding.make_mesh(CONFIG.mesh, jax.devices()[:1])
  state = step.build(CONFIG, mesh).abstract_state
  rng = np.random.default_rng(0)
  normal = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
  params = jax.tree.map(normal, state.params)
  manager = checkpoints.open_manager(folder, CONFIG.train)
  checkpoints.save(manager, 0, zero.replace(params=params))
  manager.close()
  return trained.open_run(folder)


@pytest.fixture(autouse=True)
def mesh(run):
  with sharding.activate(run.mesh):
    yield


def fed(run, *texts, state=None):
  """The state after `texts`, on from `state`."""
  state = sessions.start(run) if state is None else streaming.copy(state)
  for text in texts:
    tokens = Bytes().encode(text)[None]
    read = streaming.extend(run.params, state, tokens, config=run.config.model)
    state = read.state
  return state


def act(run, folder, **flags):
  """What the command does."""
  defaults = dict(
    new=False,
    reset=[],
    feed=[],
    ask=[],
    stop=[],
    fork=None,
    info=False,
    keep=False,
  )
  sampling = dict(tokens=5, temperature=0.0, top_k=0, top_p=1.0, seed=0)
  args = types.SimpleNamespace(**defaults | sampling | flags)
  found = session._check(args)
  with session_folder.claimed(folder):
    session.act(run, folder, args, found)


def check_equal(ours, theirs, **tolerance):
  def check(x, y):
    if tolerance:
      np.testing.assert_allclose(x, y, **tolerance)
    else:
      np.testing.assert_array_equal(x, y)

  jax.tree.map(check, ours, theirs)


@pytest.fixture
def saved(run, tmp_path):
  """A session that has read FIRST."""
  folder = epath.Path(tmp_path / "session")
  (tmp_path / "first.txt").write_text(FIRST)
  (tmp_path / "second.txt").write_text(SECOND)
  act(run, folder, new=True, feed=[str(tmp_path / "first.txt")])
  return folder


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saved_and_forked_in_a_chunk_goes_on_bit_for_bit(run, saved, tmp_path):
  before, fork = contents(saved), epath.Path(tmp_path / "fork")
  act(run, saved, fork=str(fork))
  assert contents(saved) == before
  second = [str(tmp_path / "second.txt")]
  act(run, fork, feed=second)
  assert contents(saved) == before
  state = sessions.load(fork, run)
  check_equal(state, fed(run, FIRST, SECOND))
  assert int(state.processed) == len((FIRST + SECOND).encode())
  assert session_folder.read_card(fork).tokens == int(state.processed)
  check_equal(state, fed(run, FIRST + SECOND), atol=1e-4, rtol=1e-4)
  assert len(contents(fork)) == 3  # card, state, lock


def test_other_process_and_mesh_go_on(run, saved, tmp_path):
  child = subprocess.run(
    [
      *(sys.executable, "-m", "hope_jax.session", "--devices=2", "--info"),
      *(f"--workdir={run.workdir}", f"--session={saved}"),
      f"--feed={tmp_path / 'second.txt'}",
    ],
    env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert child.returncode == 0, child.stderr
  report, info = child.stdout.splitlines()
  tokens = len((FIRST + SECOND).encode())
  assert f"second.txt: {len(SECOND.encode())} tokens, perplexity" in report
  info = json.loads(info)
  assert info["tokens"] == tokens and info["relative_change"]["memory"] > 0
  state = fed(run, FIRST, SECOND)
  assert info["state_bytes"] == sum(x.nbytes for x in jax.tree.leaves(state))
  check_equal(sessions.load(saved, run), state, atol=1e-5, rtol=1e-5)


def test_ask_leaves_the_session_unless_kept(run, saved, capsys):
  before = contents(saved)
  act(run, saved, ask=["Who? ", ""])
  assert contents(saved) == before
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line["prompt"] for line in lines] == ["Who? ", ""]
  act(run, saved, ask=["Who? "], keep=True)
  assert capsys.readouterr().out == "Who? " + lines[0]["text"] + "\n"
  wanted = drawn = fed(run, FIRST, "Who? ")
  tokens = []
  for _ in range(5):
    tokens.append(int(jnp.argmax(drawn.logits[0])))
    part = np.array([tokens[-1:]])
    drawn = streaming.extend(
      run.params, streaming.copy(drawn), part, config=MODEL
    ).state
  assert lines[0]["text"] == Bytes().decode(np.array(tokens))
  part = np.array([tokens])
  wanted = streaming.extend(run.params, wanted, part, config=MODEL).state
  check_equal(sessions.load(saved, run), wanted)


def test_kept_answer_ends_before_the_stop():
  tokens = np.frombuffer("no! €".encode(), np.uint8)
  kept = lambda text: sessions._tokens_of(text, tokens, Bytes()).tobytes()
  assert kept("no") == b"no" and kept("") == b""
  assert kept("no! €") == tokens.tobytes()

  class Ends(Bytes):
    eos = ord("!")

    def decode(self, tokens):
      return super().decode(tokens[tokens != self.eos])

  assert sessions._tokens_of("no", tokens[:3], Ends()).tobytes() == b"no"


def test_question_is_answered_by_its_seed_and_up_to_its_stop(
  run, saved, capsys
):
  def answer(**flags):
    act(run, saved, ask=["Who? "], **flags)
    return capsys.readouterr().out[len("Who? ") : -1]

  drawn = [answer(temperature=1.0, seed=seed) for seed in (1, 1, 2)]
  assert drawn[0] == drawn[1] != drawn[2]
  text = answer()
  stop = next(c for n, c in enumerate(text) if n and c not in text[:n])
  assert answer(stop=["not there", stop]) == text[: text.index(stop)]


def test_levels_are_reset_before_texts_are_read(run, saved, tmp_path):
  state = streaming.reset(sessions.load(saved, run), ["memory"], MODEL)
  act(run, saved, reset=["memory"], feed=[str(tmp_path / "second.txt")])
  check_equal(sessions.load(saved, run), fed(run, SECOND, state=state))


def test_perplexity_is_of_all_tokens_but_a_sessions_first(
  run, saved, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(sessions, "BAR_STEP", 16)
  parts, real = [], streaming.extend

  def spy(params, state, tokens, **options):
    parts.append(tokens.shape[1])
    return real(params, state, tokens, **options)

  monkeypatch.setattr(streaming, "extend", spy)
  state = sessions.load(saved, run)
  read = sessions.feed(run, state, epath.Path(tmp_path / "first.txt"))
  assert parts == [11, 16, 16, 16, 10] and read.tokens == 69  # after 69 others
  monkeypatch.undo()
  extend = lambda state, text: streaming.extend(
    run.params, state, Bytes().encode(text)[None], config=MODEL
  )
  later = extend(fed(run, FIRST), FIRST).log_probs
  np.testing.assert_allclose(read.loss, -later.mean(), rtol=1e-5)
  whole = extend(sessions.start(run), FIRST).log_probs[0, 1:]
  read = sessions.feed(
    run, sessions.start(run), epath.Path(tmp_path / "first.txt")
  )
  np.testing.assert_allclose(read.loss, -whole.mean(), rtol=1e-5)


def test_digest_knows_names_shapes_and_types():
  zeros = np.zeros((2, 3), np.float32)
  arrays = [{"a": zeros}, {"b": zeros}, {"a": zeros.T.copy()}]
  arrays += [{"a": zeros.astype(np.int32)}, {"a": zeros, "b": zeros[:0]}]
  assert len({digest.of_arrays(x) for x in arrays}) == len(arrays)


@pytest.mark.parametrize(
  ("where", "name", "error"),
  [
    (workdir, "write_json", OSError(28, "No space left on device")),
    (safetensors.numpy, "save_file", safetensors.SafetensorError("No space")),
  ],
)
def test_cut_short_while_saving_the_session_is_as_before(
  run, saved, tmp_path, monkeypatch, where, name, error
):
  old = contents(saved)

  def fail(*args):
    raise error

  with monkeypatch.context() as patch:
    patch.setattr(where, name, fail)
    with pytest.raises(errors.SaveFailed, match="No space.*is intact"):
      act(run, saved, feed=[str(tmp_path / "second.txt")])
  assert contents(saved).items() >= old.items()
  assert (len(contents(saved)) > 3) == (where is workdir)  # no card names it
  check_equal(sessions.load(saved, run), fed(run, FIRST))
  act(run, saved, feed=[str(tmp_path / "second.txt")])
  assert len(contents(saved)) == 3
  check_equal(sessions.load(saved, run), fed(run, FIRST, SECOND))


def damage(folder, kind):
  (state,) = folder.glob("state-*")
  card = folder / session_folder.CARD
  values = json.loads(card.read_text())
  if kind == "truncated":
    state.write_bytes(state.read_bytes()[:-9])
  elif kind == "flipped":
    content = bytearray(state.read_bytes())
    content[-5] ^= 1
    state.write_bytes(bytes(content))
  elif kind == "missing":
    state.unlink()
  elif kind == "no json":
    card.write_text(card.read_text()[:50])
  elif kind == "incomplete":
    del values["tokens"]
    card.write_text(json.dumps(values))
  else:
    card.write_text(json.dumps(values | kind))


@pytest.mark.parametrize(
  ("kind", "message"),
  [
    ("truncated", "cannot read .*state-.*file not fully covered"),
    ("flipped", "cannot read .*state-.*its checksum is another"),
    ("missing", "cannot read .*state-.*No such file"),
    ("no json", "cannot read .*session.json"),
    ("incomplete", "cannot read .*session.json .session.tokens is missing"),
    ({"state": "../x\0"}, "cannot read .*state-"),
    ({"tokens": "many"}, "session.tokens='many' must be of type int"),
    ({"version": 1}, "of version 1, but this program reads version 2"),
    ({"step": 9}, "belongs to step 9 of .*step differs"),
    ({"parameters": "x"}, "checksum of parameters differs"),
    ({"tokenizer": "x"}, "tokenizer differs"),
    ({"model": {"sequence_layer": "titans"}}, "model.width differs"),
  ],
  ids=str,
)
def test_unusable_sessions_are_one_line_and_stay(run, saved, kind, message):
  damage(saved, kind)
  before = contents(saved)
  with pytest.raises(ConfigError, match=message) as caught:
    act(run, saved, ask=["Who?"], keep=True)
  assert "\n" not in str(caught.value)
  assert contents(saved) == before


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"reset": ["cms_0"]}, "'cms_0' does not exist in this model; it has mem"),
    ({"feed": ["none.txt"]}, "--feed=none.txt does not exist"),
    ({"fork": "."}, "--fork=. exists already"),
    ({"tokens": 0}, "--tokens=0 must be positive"),
    ({"stop": [""]}, "--stop is empty"),
    ({"top_p": 2.0}, "--top_p=2.0"),
    ({"ask": [""]}, "--ask is empty, and the session has read nothing"),
  ],
  ids=str,
)
def test_wrong_commands_are_one_line_and_leave_nothing(
  run, tmp_path, flags, message
):
  with pytest.raises(ConfigError, match=message):
    act(run, epath.Path(tmp_path / "new"), new=True, **flags)
  assert not (tmp_path / "new").exists()


@pytest.fixture
def unread(saved, monkeypatch):
  """No token must be read any more."""
  del saved

  def fail(*args, **kwargs):
    raise AssertionError("read before all was checked")

  monkeypatch.setattr(streaming, "extend", fail)


@pytest.mark.parametrize(
  "flags",
  [{"ask": ["Who?"]}, {"info": True}, {"reset": ["all"]}, {"feed": [""]}],
)
@pytest.mark.usefixtures("unread")
def test_session_that_does_not_exist_is_not_begun(run, saved, flags):
  if "feed" in flags:
    flags = {"feed": [str(saved.parent / "first.txt")]}
  wanted = saved.parent / "sesion"
  with pytest.raises(
    ConfigError, match="did you mean '.*/session'.; --new beg"
  ):
    act(run, wanted, **flags)
  assert not wanted.exists()
  elsewhere = saved.parent / "no" / "such"
  with pytest.raises(ConfigError, match="no session .*/no/such; --new begins"):
    session_folder.check_folder(elsewhere, new=False)
  with pytest.raises(ConfigError, match="is a session already: leave --new"):
    act(run, saved, new=True, **flags)


def test_what_cannot_be_read_is_found_before_the_rest_is(
  run, saved, tmp_path, monkeypatch, unread
):
  good, before = str(tmp_path / "first.txt"), contents(saved)
  (tmp_path / "bad.txt").write_bytes(b"x" * 9 + b"\xff" + b"y" * 9)
  (tmp_path / "file").touch()
  for flags, message in (
    (
      {"feed": [good, str(tmp_path / "bad.txt")]},
      "bad.txt is not UTF-8.*byte 9",
    ),
    ({"feed": [good, str(tmp_path)]}, "cannot read .*Is a directory"),
    ({"feed": [good, str(tmp_path / "file")]}, "file is empty"),
    (
      {"feed": [good], "fork": str(tmp_path / "file" / "x")},
      "cannot write --fork=.*file/x",
    ),
  ):
    with pytest.raises(ConfigError, match=message):
      act(run, saved, **flags)
  assert contents(saved) == before
  model = dataclasses.replace(MODEL, sequence_layer="transformer")
  config = dataclasses.replace(
    CONFIG, model=dataclasses.replace(model, context_length=160)
  )
  run = run._replace(config=config)
  monkeypatch.setattr(sessions, "load", lambda *_: fed_count(69))
  for flags, message in (
    ({"feed": [good, good]}, "138 tokens and 69 more .*=160"),
    ({"feed": [good], "ask": ["Who?" * 5]}, "138 tokens and 25 more"),
    ({"ask": ["W" * 40, "W" * 47], "keep": True}, "109 tokens and 52 more"),
    ({"feed": [good], "ask": [""] * 2, "tokens": 23}, "138 tokens and 23 more"),
  ):
    with pytest.raises(ConfigError, match=message):
      act(run, saved, **flags)
  monkeypatch.undo()
  sessions.check_room(
    run, 69, paths=[epath.Path(good)], questions=["W" * 17] * 2, count=5
  )
  sessions.check_room(
    run, 69, questions=["W" * 40, "W" * 46], count=5, keep=True
  )


def fed_count(count):
  return types.SimpleNamespace(processed=count)


def test_pipes_are_read_once(run, saved, tmp_path):
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  writer = threading.Thread(target=pipe.write_text, args=(SECOND,), daemon=True)
  writer.start()
  act(run, saved, feed=[str(pipe)])
  check_equal(sessions.load(saved, run), fed(run, FIRST, SECOND))


def test_text_that_leaves_no_finite_state_is_not_kept(run, saved, tmp_path):
  before = contents(saved)
  bad = run._replace(params=jax.tree.map(lambda x: x * np.nan, run.params))
  for flags in ({"feed": [str(tmp_path / "second.txt")]}, {"ask": ["Who?"]}):
    with pytest.raises(ConfigError, match="logits are not finite"):
      act(bad, saved, keep=True, **flags)
  assert contents(saved) == before


def test_session_is_not_another_folder_nor_used_twice(run, saved):
  with pytest.raises(ConfigError, match="exists, but holds no session"):
    session_folder.check_folder(run.workdir, new=True)
  with (
    session_folder.claimed(saved),
    pytest.raises(ConfigError, match="in use by another process"),
    session_folder.claimed(saved),
  ):
    pass


def test_levels_are_reset_on_disk(run, saved):
  act(run, saved, reset=["all"])
  state = sessions.load(saved, run)
  assert not any(x.any() for x in jax.tree.leaves(state.fast.mixer.memory.now))
  assert int(state.processed) == len(FIRST)


def test_bfloat16_comes_back(run, tmp_path):
  model = dataclasses.replace(MODEL, dtype="bfloat16")
  half = run._replace(config=dataclasses.replace(CONFIG, model=model))
  state = jax.tree.map(lambda x: x + 1, sessions.start(half))
  assert "bfloat16" in {x.dtype.name for x in jax.tree.leaves(state)}
  sessions.save(epath.Path(tmp_path), half, state)
  check_equal(sessions.load(epath.Path(tmp_path), half), state)


def test_session_in_a_bucket(run, bucket):
  state = fed(run, "a")
  sessions.save(bucket / "s", run, state)
  check_equal(sessions.load(bucket / "s", run), state)
  sessions.save(bucket / "s", run, fed(run, "a", state=state))
  assert len(list((bucket / "s").iterdir())) == 2
  assert session_folder.read_card(bucket / "s").tokens == 2


def test_stream_book_windows_add_up_to_the_whole(run, saved, tmp_path):
  del saved
  text = str(tmp_path / "first.txt")
  windows = list(stream_book.stream(run, text, 66, 24))
  assert [w["end"] for w in windows] == [24, 48, 66]
  assert [w["tokens"] for w in windows] == [23, 24, 18]
  assert [w["processed"] for w in windows] == [24, 48, 66]
  assert len({w["state_bytes"] for w in windows}) == 1
  whole = streaming.extend(
    run.params,
    sessions.start(run),
    Bytes().encode(FIRST)[None, :66],
    config=MODEL,
  )
  total = sum(w["loss"] * w["tokens"] for w in windows)
  np.testing.assert_allclose(total, -whole.log_probs[0, 1:].sum(), rtol=1e-5)
  found = {"model": "titans", "writes": "on", "levels": [], "windows": windows}
  workdir.write_json(epath.Path(tmp_path / "stream-on.json"), found)
  stream_book.plot(epath.Path(tmp_path))
  assert (tmp_path / "perplexity.png").stat().st_size > 1000
  assert "66 tokens  perplexity" in stream_book.line(windows[2], windows[1])
