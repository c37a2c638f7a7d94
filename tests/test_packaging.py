"""What an installation holds, and what it can do without some packages."""

import ast
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
BASH = shutil.which("bash") or "bash"
# Packages of pyproject.toml that a machine with JAX, Flax, optax and Orbax may
# lack, and those of the extras.
OPTIONAL = (
  "array_record",
  "gcsfs",
  "grain",
  "lm_eval",
  "matplotlib",
  "ml_collections",
  "pyarrow",
  "sentencepiece",
  "tensorflow_datasets",
  "tokenizers",
  "torch",
  "tqdm",
  "transformers",
  "wandb",
)


def python(script, *arguments, cwd=REPOSITORY, path=REPOSITORY):
  """Runs `script` where none of OPTIONAL can be imported."""
  blocked = f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL}))\n"
  return subprocess.run(
    [sys.executable, "-c", blocked + script, *map(str, arguments)],
    cwd=cwd,
    env=os.environ | {"PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )


def test_library_and_benchmarks_are_imported_without_optional_packages():
  child = python("""
import importlib, pkgutil
import hope_jax, pallas_kernels, scripts

for package in (hope_jax, pallas_kernels, scripts):
  prefix = package.__name__ + "."
  for module in pkgutil.walk_packages(package.__path__, prefix):
    if module.name != "hope_jax.inference.lm_eval_model":  # lm-eval's class
      importlib.import_module(module.name)
      print(module.name)
""")
  assert child.returncode == 0, child.stderr
  known = ("training.loop", "data.records", "models.block", "harness")
  for name in (*(f"hope_jax.{name}" for name in known), "scripts.benchmark"):
    assert name in child.stdout.split()


# What is slow to import: commands say before it what they are going to do.
HEAVY = ("jax", "flax", "optax", "orbax", "numpy", "lm_eval", "ml_collections")


@pytest.mark.parametrize(
  "module",
  [
    "hope_jax.convert",
    "hope_jax.evaluate",
    "hope_jax.export",
    "hope_jax.generate",
    "hope_jax.harness",
    "hope_jax.levels",
    "hope_jax.session",
    "hope_jax.train",
    "scripts.stream_book",
  ],
)
def test_command_imports_nothing_heavy_before_its_first_line(module):
  child = python(
    f"import {module}\n"
    f"print(*(name for name in {HEAVY} if sys.modules.get(name)))"
  )
  assert child.returncode == 0, child.stderr
  assert child.stdout.split() == []


def test_model_is_imported_without_kernels_and_checkpoints():
  """Nothing here runs a kernel, and the number of parameters is said first."""
  child = python("""
import hope_jax.training.loop, hope_jax.inference.evaluation
import hope_jax.inference.sessions, hope_jax.inference.texts
import hope_jax.interchange.formats
heavy = "jax.experimental.pallas", "pallas_kernels.common.fused_scan", "orbax"
print(*(name for name in heavy if name in sys.modules))
print("pallas_kernels.linear_rule.api" in sys.modules)
""")
  assert child.returncode == 0, child.stderr
  assert child.stdout.split() == ["True"]


def test_runs_and_benchmarks_need_no_optional_package(tmp_path):
  child = python(
    """
from hope_jax.runs import files
from hope_jax.config import Config, DataConfig, EvalConfig, TrainConfig
from hope_jax.config import ModelConfig
from hope_jax.training import loop
from scripts import benchmark

model = ModelConfig(width=16, num_layers=1, num_heads=1, ffn_hidden=16)
for kind in ("text", "mqar"):
  data = DataConfig(kind=kind, sequence_length=32, batch_size=2)
  config = Config(
    model=model, data=data, train=TrainConfig(steps=2), eval=EvalConfig(1, 2)
  )
  result = loop.run(config, files.reach(f"{sys.argv[1]}/{kind}"))
  print(kind, result["steps"])
tiny = ["--models=transformer", "--rounds=1", "--batch=1", "--length=32"]
benchmark.main(["--configs=3p9m", *tiny])
""",
    tmp_path,
  )
  assert child.returncode == 0, child.stderr
  for line in ("text 2", "mqar 2", "| transformer"):
    assert line in child.stdout


@pytest.mark.parametrize(
  ("script", "message"),
  [
    (
      "from hope_jax import train\ntrain.define_flags()",
      "error: --config needs the package ml_collections: pip install",
    ),
    (
      "from hope_jax import cli\ncli.run(lambda: __import__('grain'))",
      "error: import of grain halted; None in sys.modules: pip install grain",
    ),
  ],
)
def test_missing_package_is_one_line(script, message):
  child = python(script)
  assert child.returncode == 2 and child.stderr.startswith(message)
  assert child.stderr.count("\n") == 1


def fake_python(path: pathlib.Path, version: str) -> pathlib.Path:
  """A program that answers what the scripts ask an interpreter."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(
    f"#!{BASH}\n"
    f'case "$*" in *print*sys.executable*) [ "$3" = {version} ] && echo "$0" ;;'
    f" *version_info*) echo {version} ;; esac\n"
  )
  path.chmod(0o755)
  return path


@pytest.mark.parametrize(
  ("in_path", "of_pyenv", "asked", "found"),
  [
    ("3.11", ["3.12.1"], [], "3.12.1"),
    ("3.12", ["3.11.7"], [], "bin"),
    ("3.13", ["3.15.0", "3.14.2"], [], "3.14.2"),  # no wheels for 3.15
    ("3.13", ["3.11.7"], ["3.11"], "3.11.7"),
    ("3.10", ["3.15.0"], [], None),
  ],
)
def test_newest_python_with_wheels_is_found(
  tmp_path, in_path, of_pyenv, asked, found
):
  fake_python(tmp_path / "bin" / "python3", in_path)
  for version in of_pyenv:
    path = tmp_path / "versions" / version / "bin" / "python"
    fake_python(path, version.rpartition(".")[0])
  child = subprocess.run(
    [BASH, REPOSITORY / "scripts" / "find_python.sh", *asked],
    env={"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert child.returncode == (found is None)
  if found is None:
    assert child.stderr.startswith("error: no interpreter with venv of Python")
  else:
    assert found in pathlib.Path(child.stdout).parts


def test_environment_of_another_python_is_not_overwritten(tmp_path):
  fake_python(tmp_path / "venv" / "bin" / "python", "3.13")
  wanted = fake_python(tmp_path / "python3.11", "3.11")
  child = subprocess.run(
    [BASH, REPOSITORY / "scripts" / "setup.sh"],
    env=os.environ
    | {"HOPE_PYTHON": str(wanted), "HOPE_VENV": str(tmp_path / "venv")},
    capture_output=True,
    text=True,
    check=False,
  )
  assert child.returncode == 1 and "is of Python 3.13, not of" in child.stderr


# Importer -> the top packages that it must not import.
ABOVE = {
  "pallas_kernels": {"hope_jax", "configs", "experiments", "scripts", "tests"},
  "hope_jax": {"configs", "experiments", "scripts", "tests"},
  "configs": {"pallas_kernels", "experiments", "scripts", "tests"},
  "experiments": {"scripts", "tests"},
  "scripts": {"tests"},
}


def imported(source: str) -> set[str]:
  """The top packages that a module imports, anywhere in it."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names |= {alias.name.partition(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      assert not node.level, "imports are absolute"
      names.add(node.module.partition(".")[0])
  return names


@pytest.mark.parametrize("package", ABOVE)
def test_imports_go_one_way(package):
  found = sorted((REPOSITORY / package).rglob("*.py"))
  assert found
  for path in found:
    wrong = imported(path.read_text()) & ABOVE[package]
    assert not wrong, f"{path.relative_to(REPOSITORY)} imports {wrong}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
  """Built from the files of the repository, with what is installed."""
  pytest.importorskip("setuptools", minversion="77")
  folder = tmp_path_factory.mktemp("wheel")
  listed = ["git", "ls-files", "-z", "--", "*.py", "*.toml", "hope_jax"]
  names = subprocess.run(
    [*listed, "README.md", "LICENSE"],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  for name in filter(None, names.split("\0")):
    copy = folder / "source" / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes((REPOSITORY / name).read_bytes())
  build = "from setuptools import build_meta as b; print(b.build_wheel('..'))"
  subprocess.run(
    [sys.executable, "-c", build],
    cwd=folder / "source",
    capture_output=True,
    check=True,
  )
  (built,) = folder.glob("*.whl")
  return built


def test_wheel_holds_the_two_packages_whole_and_nothing_else(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  tops = {name.partition("/")[0] for name in names}
  assert {top for top in tops if not top.endswith(".dist-info")} == {
    "hope_jax",
    "pallas_kernels",
  }
  for package in ("hope_jax", "pallas_kernels"):
    for path in (REPOSITORY / package).rglob("*.py"):
      assert path.relative_to(REPOSITORY).as_posix() in names
  assert "hope_jax/data/tiny_shakespeare.txt" in names


CONFIG = """
import ml_collections

def get_config():
  return ml_collections.ConfigDict({
    "model": {"width": 16, "num_layers": 1, "num_heads": 1, "ffn_hidden": 16,
              "conv_window": 0},
    "data": {"sequence_length": 32, "batch_size": 2},
    "train": {"steps": 2},
    "eval": {"batches": 1, "batch_size": 2},
  })
"""


@pytest.mark.slow
def test_commands_of_the_wheel_work_anywhere(wheel, tmp_path):
  site, home = tmp_path / "site", tmp_path / "home"
  zipfile.ZipFile(wheel).extractall(site)
  home.mkdir()
  (home / "mine.py").write_text(CONFIG)
  (home / "book.txt").write_text("To be, or not to be.\n" * 20)
  for name, *flags in (
    ("train", "--config=mine.py", "--workdir=run"),
    ("evaluate", "--workdir=run", "--split=test"),
    ("generate", "--workdir=run", "--prompt=a", "--tokens=4"),
    ("export", "--workdir=run", "--output=model"),
    ("session", "--workdir=run", "--session=s", "--new", "--feed=book.txt"),
    ("levels", "--config=mine.py"),
    ("convert", "--workdir=run", "--to_hf=hf"),
  ):
    child = subprocess.run(
      [sys.executable, "-m", f"hope_jax.{name}", *flags],
      cwd=home,
      env=os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      timeout=600,
      check=False,
    )
    assert child.returncode == 0, (name, child.stderr)
