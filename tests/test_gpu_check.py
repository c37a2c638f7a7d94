"""The script for a GPU machine does its parts, and survives what they do."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from scripts.gpu_check import (
  __main__ as command,
)
from scripts.gpu_check import (
  children,
  decoding,
  hlo,
  kernels,
  memories,
  plan,
  profiling,
  report,
  training,
)

ROOT = pathlib.Path(__file__).parents[1]
MACHINE = {"device": "cpu", "platform": "cpu", "sizes": "toy"}


# ------------------------------------------------------------------- parts


@pytest.mark.parametrize(
  ("op", "implementation", "case"),
  [
    ("linear_rule", "pallas_gpu", kernels.TINY[1]),
    ("linear_rule", "xla", kernels.TINY[0]),
    ("generalized_delta_rule", "xla", kernels.TINY[0]),
  ],
)
def test_kernels_pass(monkeypatch, op, implementation, case):
  monkeypatch.setattr(kernels, "TINY", (case,))
  forward, full = kernels.rows(op, implementation, 16, tiny=True)
  assert forward["row"] == full["row"] and "pass" not in forward
  assert full["pass"] and 0 < full["gradients error"] < full["bound"]
  assert {"forward weight", "gradients weight"} < set(full["errors"])
  assert full["C"] == 16 and full["dtype"] == case.dtype


def test_kernels_that_are_wrong_or_do_not_compile_do_not_pass(monkeypatch):
  monkeypatch.setattr(kernels, "TINY", (kernels.TINY[0],) * 2)
  right = kernels.generalized_delta_rule

  def wrong(keys, values, *, erase_write, implementation, **rest):
    scale = 1.1 if implementation == "xla" else 1.0
    rest |= dict(erase_write=scale * erase_write)
    return right(keys, values, implementation=implementation, **rest)

  monkeypatch.setattr(kernels, "generalized_delta_rule", wrong)
  arguments = "generalized_delta_rule", "xla", 16
  row = next(kernels.rows(*arguments, tiny=True))
  assert not row["pass"] and row["forward error"] > row["bound"]

  def fail(*_):
    raise NotImplementedError("no tile\nfor it")

  monkeypatch.setattr(kernels, "_functions", fail)
  found = list(kernels.rows(*arguments, tiny=True))
  assert [row["pass"] for row in found] == [False, False]
  assert found[0]["error"] == "NotImplementedError: no tile"


def test_errors_are_relative_to_the_largest_entry():
  want = {"a": jnp.array([4.0, 1.0]), "b": jnp.array([1.0])}
  got = {"a": jnp.array([4.0, 2.0]), "b": jnp.array([jnp.nan])}
  assert kernels._errors(got, want) == {"a": 0.25, "b": float("inf")}


@pytest.fixture
def small(monkeypatch):
  """One layer."""
  toy = training._toy
  one = lambda *arguments: {**toy(*arguments), "num_layers": 1}
  monkeypatch.setattr(training, "_toy", one)
  return one


def test_training_steps_of_the_largest_batch_that_fits(monkeypatch, small):
  build = training.build

  def fail(config):
    if config.data.batch_size == 8:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nof 8")
    return build(config)

  monkeypatch.setattr(training, "build", fail)
  compiled, timed, full = training.rows("transformer", 64, tiny=True)
  assert compiled["row"] == timed["row"] == full["row"]
  assert "step ms" not in compiled and compiled["compile s"] > 0
  assert full["B"] == 4 and full["attention"].startswith("xla") and full["pass"]
  assert full["tried"] == ["8: JaxRuntimeError: RESOURCE_EXHAUSTED: 9 GiB"]
  speed = 4 * 64 / full["step ms"] * 1e3
  assert full["tokens/s"] == pytest.approx(speed)
  assert full["MFLOP/token"] > 0 and full["MFU %"] is None


def test_batches_that_cannot_fit_are_not_tried(monkeypatch):
  before = {"state GiB": 4.0, "temporary GiB": 10.0, "tokens": 8 * 64}
  assert training.predicted(before, 16 * 64) == 24 * training.GIB
  monkeypatch.setattr(training, "bytes_limit", lambda: 20 * training.GIB)
  tried = []

  def build(config):
    tried.append(config.data.batch_size)
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

  monkeypatch.setattr(training, "build", build)
  *_, last = training.rows("transformer", 256, before, tiny=True)
  assert tried == [2, 1]
  assert last["tried"][0] == "8: would need 44 GiB"
  assert last["note"] == "no batch fits"


def test_training_reports_other_errors_and_leaves_cudnn_to_gpus(monkeypatch):
  def build(_):
    raise jax.errors.JaxRuntimeError("INTERNAL: ptxas")

  monkeypatch.setattr(training, "build", build)
  (row,) = training.rows("transformer", 64, tiny=True)
  assert not row["pass"] and row["error"].endswith("INTERNAL: ptxas")
  (row,) = training.rows("transformer_cudnn", 64, tiny=True)
  assert "cuDNN" in row["note"]


@pytest.mark.parametrize("tiny", [True, False])
def test_every_job_has_a_valid_config_and_is_written_as_json(tiny):
  jobs = plan.jobs(tiny)
  names = [job.name for job in jobs]
  assert len(set(names)) == len(names)
  for job in jobs:
    again = json.loads(json.dumps(job.arguments))
    assert set(again) == set(job.arguments)
    assert not job.after or job.after in names[: names.index(job.name)]
    if job.part == "training":
      config = training.make_config(**job.arguments, batch=8, tiny=tiny)
      assert config.data.sequence_length == job.arguments["length"]
  full = training.make_config("hope", 4096, 8, tiny=False)
  assert full.model.cms.signal == "next_token" and full.model.width == 1024
  assert full.model.memory_chunks == (64, 256)


def test_attention_is_cudnns_only_inside():
  before = jax.nn.dot_product_attention
  with training.attention(training.CUDNN):
    assert jax.nn.dot_product_attention.keywords == {"implementation": "cudnn"}
  assert jax.nn.dot_product_attention is before


def test_memories_are_timed_against_attention(monkeypatch):
  variants = [("attention", "cudnn"), ("attention", "xla")]
  monkeypatch.setattr(memories, "_variants", lambda _: variants)
  skipped, attention, rates = memories.rows(64, tiny=True)
  assert "cuDNN" in skipped["note"] and rates["copy GB/s"] > 0
  assert attention["tokens/s"] > 0 and attention["both, of floor"] > 0


def test_decoding_says_what_was_read(small):
  first, last, far = decoding.rows("titans", (16, 32), tiny=True)
  assert (first["tokens read"], last["tokens read"]) == (16, 32)
  assert first["state MiB"] == last["state MiB"] and first["tokens/s"] > 0
  assert "not measured" in far["note"] and "tokens/s" not in far
  assert far["place"] == 1 << 20 and far["tokens read"] == 32


def test_profile_without_a_gpu(small):
  compiler, step, trace = profiling.rows({"B": 4, "T": 64}, "transformer", True)
  assert compiler["kernels of a step"] > compiler["copies"] >= 0
  assert step["step ms"] > 0 and compiler["B"] == 4
  assert trace["note"] == "no GPU streams in the trace"


def test_kernels_in_a_loop_count_as_often_as_it_runs():
  def loops(x):
    step = lambda x, _: (jnp.sin(x @ x), None)
    return jax.lax.scan(step, x, None, length=7)[0]

  def cost(length):
    jitted = jax.jit(lambda x: loops(x) if length else x + 1)
    return hlo.count(jitted.lower(jnp.ones((64, 64))).compile().as_text())

  assert cost(0).kernels <= 2
  assert cost(7).kernels >= 7 and not cost(7).unknown_loops


HLO = """HloModule jit_f, entry_computation_layout={(f32[2]{0})->f32[2]{0}}

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %n = f32[2]{0} negate(%p)
}

%body (t: (s32[], f32[2])) -> (s32[], f32[2]) {
  %t = (s32[], f32[2]{0}) parameter(0)
  %f = f32[2]{0} fusion(%t), kind=kLoop, calls=%fused
  %c = f32[2]{0} custom-call(%f), custom_call_target="__triton"
  ROOT %r = (s32[], f32[2]{0}) tuple(%c, %c)
}

%condition (t.1: (s32[], f32[2])) -> pred[] {
  %t.1 = (s32[], f32[2]{0}) parameter(0)
  ROOT %less = pred[] fusion(%t.1), kind=kLoop, calls=%fused
}

%branch (p.2: f32[2]) -> f32[2] {
  %p.2 = f32[2]{0} parameter(0)
  ROOT %g = f32[2]{0} copy(%p.2)
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %w = (s32[], /*index=1*/f32[2]{0}) while(%a), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %u = (s32[], f32[2]{0}) while(%a), condition=%condition, body=%body
  ROOT %k = f32[2]{0} conditional(%a, %a), branch_computations={%branch, %fused}
}
"""


def test_kernels_of_a_text():
  found = hlo.count(HLO)
  assert found.run == {"fusion": 7, "custom-call": 6, "copy": 1}
  assert found.unknown_loops == 1
  assert hlo.instructions(HLO)["while"] == 2


TRACE = """
planes { name: "/host:CPU" lines { name: "Stream #9" events { } } }
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "fusion" } }
  event_metadata { key: 2 value { id: 2 name: "MemcpyD2D" } }
  lines { name: "Stream #1(compute)"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000 }
    events { metadata_id: 1 offset_ps: 8000000 duration_ps: 2000000 } }
  lines { name: "Stream #2"
    events { metadata_id: 2 offset_ps: 3000000 duration_ps: 2000000 } }
  lines { name: "XLA Modules"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 20000000 } }
}
"""


def test_launches_and_idle_time_of_a_trace():
  data = ProfileData.from_serialized_xspace(
    ProfileData.text_proto_to_serialized_xspace(TRACE)
  )
  events = profiling.gpu_events(data)
  row = profiling.streams(events)
  assert (row["kernel launches"], row["copies and fills"]) == (2, 1)
  assert row["first to last ms"] == pytest.approx(0.010)
  assert row["busy ms"] == pytest.approx(0.007)
  assert row["idle %"] == pytest.approx(30)
  first, second = profiling.heaviest(events)
  assert (first["kernel"], first["launches"]) == ("fusion", 2)
  assert second["us each"] == pytest.approx(2)


# --------------------------------------------------------------- processes

FAKE = """
import os, signal, time

def rows(what, before=None, tiny=False):
  assert tiny
  yield {"row": "first", "what": what, "n": 1}
  yield {"row": "first", "what": what, "n": 2, "before": before}
  if what == "hangs":
    time.sleep(60)
  if what == "raises":
    raise RuntimeError("no such kernel")
  if what == "dies":
    os.kill(os.getpid(), signal.SIGSEGV)
  yield {"row": "second", "what": what, "pass": what != "wrong"}
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """Two parts whose jobs do what they are named."""
  folder = tmp_path / "modules"
  folder.mkdir()
  (folder / "fake_part.py").write_text(FAKE)
  monkeypatch.setenv("PYTHONPATH", str(folder))
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(command, "_LEAST", 0.1)
  monkeypatch.setattr(command, "_machine", lambda *_: MACHINE)
  part = plan.Part(1, "fake_part", ("absl",))
  monkeypatch.setattr(plan, "PARTS", {"one": part, "two": part})

  def set_jobs(one, two=()):
    jobs = [
      plan.Job(part, f"{part}-{what}", 4, {"what": what}, after)
      for part, names, after in (("one", one, ""), ("two", two, "one-good"))
      for what in names
    ]
    monkeypatch.setattr(plan, "jobs", lambda tiny: jobs)

  return set_jobs


def call(output, *flags):
  return command.main(["--tiny", f"--output={output}", *flags])


def test_parts_that_hang_or_crash_do_not_lose_other_rows(
  fake, tmp_path, capsys
):
  fake(("good", "hangs", "raises", "dies"), ("good",))
  output = tmp_path / "out"
  assert call(output) == 1
  jobs = json.loads((output / "results.json").read_text())["jobs"]
  found = {job["job"]: job for job in jobs}
  assert [job["status"] for job in jobs] == [
    *("done", "cut", "failed", "failed"),
    "done",
  ]
  assert found["one-hangs"]["message"] == "after 4 s"
  assert "RuntimeError: no such kernel" in found["one-raises"]["message"]
  assert "SIGSEGV" in found["one-dies"]["message"]
  for name in ("hangs", "raises", "dies"):  # the later of two rows counts
    (row,) = found[f"one-{name}"]["rows"]
    assert (row["what"], row["n"]) == (name, 2)
  rows = found["two-good"]["rows"]
  assert len(rows) == 2 and rows[0]["before"]["row"] == "second"
  text = (output / "report.md").read_text()
  assert "* one-hangs: cut: after 4 s\n" in text
  assert "| good | 2 |" in text and "| hangs | 2 |" in text
  assert "one-dies" in capsys.readouterr().out.splitlines()[-1]


def test_a_second_call_does_what_is_left(fake, tmp_path, monkeypatch, capsys):
  output = tmp_path / "out"
  fake(("good", "raises"))
  assert call(output) == 1
  (tmp_path / "modules" / "fake_part.py").write_text(
    FAKE.replace('"raises"', '"never"')
  )
  capsys.readouterr()
  fake(("good", "raises", "wrong"))
  assert call(output) == 1
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(":")[0] for line in lines[:2]] == [
    "one-wrong",
    "one-raises",
  ]
  assert lines[-1].endswith("second (not within its bound)")
  assert "| second" not in (output / "report.md").read_text()
  found = report.read(output)
  assert found and {o.status for o in found[1]} == {children.DONE}
  other = {**MACHINE, "device": "another"}
  monkeypatch.setattr(command, "_machine", lambda *_: other)
  assert call(output) == 2
  assert "has results of cpu" in capsys.readouterr().err


def test_time_that_is_over_is_named(fake, tmp_path):
  fake(("good", "hangs"), ("good",))
  assert call(tmp_path / "out", "--seconds=1.5") == 1
  status = [o.status for o in report.read(tmp_path / "out")[1]]
  assert children.NOT_REACHED in status or children.CUT in status
  assert len(status) == 3


def test_a_part_without_its_packages_is_left_out(fake, tmp_path, capsys):
  fake(("good",), ("good",))
  plan.PARTS["two"] = plan.PARTS["two"]._replace(needs=("absl", "no_such"))
  assert call(tmp_path / "out") == 1
  assert "two: left out: no_such is not installed" in capsys.readouterr().out
  _, (good, left) = report.read(tmp_path / "out")
  assert (good.status, left.status) == (children.DONE, children.LEFT_OUT)


def test_parts_end_one_after_another():
  ends = plan.deadlines(["kernels", "memories"], 19.0)
  assert ends["kernels"] == pytest.approx(14)
  assert ends["memories"] == pytest.approx(19)


# ---------------------------------------------------------------- commands


def script(*flags, **environment):
  environment = {"HOPE_PYTHON": sys.executable, **environment}
  return subprocess.run(
    ["bash", str(ROOT / "scripts" / "gpu_check.sh"), *flags],
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    cwd="/",
  )


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--parts=kernel"], "--parts=kernel is not one of kernels, training"),
    (["--seconds=0"], "--seconds=0 must be positive"),
    (["--tinny"], "unrecognized arguments: --tinny"),
    (["--tiny", "--output=/dev/null/x"], "cannot write --output=/dev/null/x"),
    ([], "jax sees no GPU (cpu)"),
  ],
)
def test_bad_input_is_one_line(flags, message):
  done = script(*flags)
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.count("\n") == 1
  assert done.stderr.startswith("error: ") and message in done.stderr


def test_a_python_without_jax_is_one_line():
  done = script(HOPE_PYTHON="/bin/false")
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1 and "HOPE_PYTHON" in done.stderr


def test_what_a_gpu_machine_does_not_have_is_not_imported():
  """Nor is jax by the process that starts the others."""
  absent = "ml_collections", "grain", "orbax", "matplotlib", "tensorstore"
  parts = [part.module for part in plan.PARTS.values()]
  code = f"""
import importlib, sys
import scripts.gpu_check.__main__
assert not {{"jax", "numpy"}} & set(sys.modules)
sys.modules.update(dict.fromkeys({absent}))
for name in {parts}:
  importlib.import_module(name)
"""
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
