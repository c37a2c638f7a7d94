"""The commands in the headers of the paper's recipes run as they stand."""

import importlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from configs import _models
from hope_jax.config import DataConfig, from_config_dict
from hope_jax.data import records, text
from tests.support.tiers import slow_case

SPEECHES = (text.REPOSITORY / DataConfig().path).read_text().split("\n\n")


def commands(size: str) -> list[list[str]]:
  """Prepare, train, prepare `smoke` and train it."""
  module = importlib.import_module(f"configs.hope_{size}")
  header = module.__doc__.replace("\\\n", " ")
  return [shlex.split(line) for line in re.findall(r"python -m .*", header)]


def flags_of(command: list[str]) -> dict[str, str]:
  return dict(word[2:].split("=", 1) for word in command if word[:2] == "--")


@pytest.mark.parametrize("size", ["340m", "760m", "1p3b"])
@pytest.mark.parametrize("mode", ["", "smoke"])
def test_header_prepares_what_the_config_reads(size, mode):
  prepare, train = commands(size)[2:] if mode else commands(size)[:2]
  module = importlib.import_module(f"configs.hope_{size}")
  file, _, wanted = flags_of(train)["config"].partition(":")
  assert file == f"configs/hope_{size}.py"
  assert wanted == ("hope,smoke" if mode else "hope")
  flags = flags_of(prepare)
  for name in _models.NAMES:
    config = from_config_dict(
      module.get_config(name + ("," + mode if mode else ""))
    )
    assert config.data.kind == "records"
    assert config.data.path == flags["output"]
    assert config.data.sequence_length == int(flags["length"])
    assert 0 < config.data.records.long_share < 0.5 and int(flags["long"]) > 0
    assert not [
      c for c in config.model.memory_chunks if int(flags["align"]) % c
    ]
    pieces = int(flags["tokenizer"].removeprefix("sentencepiece:"))
    assert pieces == config.model.vocab_size == (512 if mode else 32000)
    if config.model.cms.levels:
      assert config.model.cms.signal == "next_token"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
  """A folder like the repository, and a file with FineWeb-Edu's columns."""
  import pyarrow
  from pyarrow import parquet

  folder = tmp_path_factory.mktemp("clone")
  for name in ("configs", "scripts", "hope_jax", "pallas_kernels"):
    (folder / name).symlink_to(text.REPOSITORY / name)
  rows = [
    {
      "text": "\n\n".join(SPEECHES[start : start + count]),
      "id": f"<urn:uuid:{start}-{count}>",
      "dump": "CC-MAIN-2013-20",
      "url": f"https://example.org/{start}",
      "file_path": "s3://example/documents/0.warc.gz",
      "language": "en",
      "language_score": 0.97,
      "token_count": 40 * count,
      "score": 3.4,
      "int_score": 3,
    }
    for count in (1, 2, 30)
    for start in range(0, 1800, 30)
  ]
  path = folder / commands("340m")[2][-1]
  path.parent.mkdir(parents=True)
  table = pyarrow.Table.from_pylist(rows)
  parquet.write_table(table, path, row_group_size=50)
  return folder


def run(command: list[str], folder: pathlib.Path) -> None:
  done = subprocess.run(
    [sys.executable, *command[1:]],
    cwd=folder,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=900,
    check=False,
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("size", ["340m", slow_case("760m"), slow_case("1p3b")])
def test_smoke_of_the_header_trains_on_prepared_parquet(size, clone):
  prepare, train = commands(size)[2:]
  if not (clone / flags_of(prepare)["output"]).exists():
    run(prepare, clone)
  run(train, clone)
  workdir = clone / flags_of(train)["workdir"]
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  losses = [r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"]
  assert len(losses) == 4 and max(losses) < 6.5  # log 512 = 6.24
  used = json.loads((workdir / "config.json").read_text())
  folder = records.epath.Path(clone / used["data"]["path"])
  manifest = records.read_manifest(folder / "train")
  assert {shard.group for shard in manifest.shards} == {"long", "short"}
  assert manifest.tokenizer.vocab_size == 512
