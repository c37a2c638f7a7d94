"""Random malformed files: a result or one clear line, never a traceback."""

import gzip
import json

import hypothesis
import jax
import numpy as np
import pyarrow
import pytest
from etils import epath
from hypothesis import strategies as st
from pyarrow import parquet

from hope_jax.config import (
  Config,
  ConfigError,
  DataConfig,
  ModelConfig,
  to_dict,
)
from hope_jax.data import documents, pipeline, prepare, text, tokenizer
from hope_jax.interchange import safetensors as safetensors_lib
from hope_jax.runs import workdir
from hope_jax.training import metrics

TEXTS = ["To be, or not to be.", "That is the question.", "Whether 'tis nobler"]
SETTINGS = hypothesis.settings(
  max_examples=50,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
  st.none()
  | st.booleans()
  | st.integers(-3, 3)
  | st.sampled_from(
    [1 << 70, -1.5, 1e300, float("nan"), "", "titans", "\udcff"]
  ),
  lambda inner: (
    st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["kind", "x"]), inner, max_size=2)
  ),
  max_leaves=4,
)


@st.composite
def damaged(draw, content):
  """Bytes: cut, overwritten, lengthened, or others altogether."""
  ends = st.integers(0, min(len(content), 999)), st.integers(0, len(content))
  start = draw(st.one_of(*ends))
  stop = draw(st.integers(start, min(len(content), start + 9)))
  other = draw(st.binary(max_size=9))
  kind = draw(st.sampled_from(["cut", "flip", "overwrite", "insert", "other"]))
  flipped = bytes(byte ^ 1 for byte in content[start:stop])
  return {
    "flip": content[:start] + flipped + content[stop:],
    "cut": content[:start],
    "overwrite": content[:start] + other + content[stop:],
    "insert": content[:start] + other + content[start:],
    "other": other,
  }[kind]


@st.composite
def damaged_json(draw, value):
  """JSON text with one value replaced, left out or added, at any depth."""
  value = json.loads(json.dumps(value))
  node = value
  while True:
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
      return json.dumps(draw(JSON))
    key = draw(st.sampled_from(keys))
    if isinstance(node[key], dict | list) and draw(st.booleans()):
      node = node[key]
      continue
    if draw(st.integers(0, 3)):
      node[key] = draw(JSON)
    else:
      del node[key]
    return json.dumps(value)


def assert_explained(call):
  """Runs `call`; any error but a `ConfigError` of one short line fails."""
  try:
    call()
  except ConfigError as error:
    assert str(error).strip() and len(str(error).splitlines()) <= 2


def jsonl():
  return "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()


def as_parquet():
  sink = pyarrow.BufferOutputStream()
  parquet.write_table(pyarrow.table({"text": TEXTS}), sink)
  return sink.getvalue().to_pybytes()


DOCUMENTS = {
  "a.txt": "\n".join(TEXTS).encode(),
  "a.jsonl": jsonl(),
  "a.txt.gz": gzip.compress("\n".join(TEXTS).encode()),
  "a.jsonl.gz": gzip.compress(jsonl()),
  "a.parquet": as_parquet(),
}


@pytest.mark.parametrize("name", DOCUMENTS)
@SETTINGS
@hypothesis.given(data=st.data())
def test_documents(name, tmp_path, data):
  path = tmp_path / name
  path.write_bytes(data.draw(damaged(DOCUMENTS[name])))

  def read():
    for part in documents.parts(documents.find([str(path)])):
      list(documents.read(part, documents.Fields()))

  assert_explained(read)


@SETTINGS
@hypothesis.given(data=st.data())
def test_text_files(tmp_path, data):
  path = tmp_path / "a.txt"
  path.write_bytes(data.draw(damaged(DOCUMENTS["a.txt"])))
  config = DataConfig(path=str(path), sequence_length=8)
  assert_explained(lambda: text.load(config, 256))


@pytest.fixture(scope="module")
def words():
  return tokenizer.train(TEXTS * 40, 280)


@SETTINGS
@hypothesis.given(data=st.data())
def test_tokenizers(words, tmp_path, data):
  path = tmp_path / "tokenizer.model"
  path.write_bytes(data.draw(damaged(words)))
  assert_explained(lambda: tokenizer.load(path).encode("To be"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp("prepared")
  (folder / "a.jsonl").write_bytes(
    "".join(
      json.dumps({"text": f"{t} {n}"}) + "\n" for t in TEXTS for n in range(9)
    ).encode()
  )
  options = prepare.Options(length=16, align=16, holdout=(0.2, 0.2))
  source, output = str(folder / "a.jsonl"), folder / "data"
  prepare.prepare([source], str(output), "bytes", options, workers=1)
  read_all(output)
  return output


def read_all(folder):
  config = Config(
    model=ModelConfig(sequence_layer="transformer"),
    data=DataConfig(kind="records", path=str(folder), sequence_length=16),
  )
  pipeline.fingerprint(config)
  pipeline.load_tokenizer(config)
  sources = pipeline.load(config)
  for i in range(len(sources["in_order"])):
    sources["in_order"][i]


def assert_explained_with(path, content, prepared):
  """`assert_explained` of the whole data with one file's content changed."""
  good = path.read_bytes()
  try:
    path.write_bytes(content)
    assert_explained(lambda: read_all(prepared))
  finally:
    path.write_bytes(good)


@SETTINGS
@hypothesis.given(data=st.data())
def test_manifests(prepared, data):
  path = prepared / "train" / "manifest.json"
  good = path.read_bytes()
  either = damaged_json(json.loads(good)).map(str.encode) | damaged(good)
  assert_explained_with(path, data.draw(either), prepared)


@SETTINGS
@hypothesis.given(data=st.data())
def test_shards(prepared, data):
  path = next((prepared / "train").glob("*.arrayrecord"))
  content = data.draw(damaged(path.read_bytes()))
  assert_explained_with(path, content, prepared)


@SETTINGS
@hypothesis.given(data=st.data())
def test_workdirs(tmp_path, data):
  run = epath.Path(tmp_path / "run")
  good = Config()
  run.mkdir(exist_ok=True)
  values = to_dict(good)
  file = data.draw(st.sampled_from(["config.json", "data.json", "result.json"]))
  for name in ("config.json", "data.json", "result.json"):
    content = values if name == "config.json" else {"tokenizer": "1"}
    (run / name).write_text(json.dumps(content))
  changed = (
    damaged_json(values) if file == "config.json" else JSON.map(json.dumps)
  )
  (run / file).write_text(data.draw(changed))
  assert_explained(lambda: workdir.claim(run, good, {"tokenizer": "1"}))
  assert_explained(lambda: workdir.read_result(run))


@SETTINGS
@hypothesis.given(
  content=damaged(b'{"step": 1, "kind": "train"}\n' * 3)
  | st.lists(JSON).map(lambda v: "\n".join(map(json.dumps, v)).encode())
)
def test_metrics(tmp_path, content):
  (tmp_path / "metrics.jsonl").write_bytes(content)
  for record in metrics.read(epath.Path(tmp_path)):
    assert {"step", "kind"} <= record.keys()


PARAMS = {
  "a": {"b": np.arange(6.0, dtype=np.float32)},
  "c": np.ones((2, 3), np.float32),
}


@SETTINGS
@hypothesis.given(data=st.data())
def test_exports(tmp_path, data):
  from safetensors import numpy as safetensors

  good = safetensors.save({"a.b": PARAMS["a"]["b"], "c": PARAMS["c"]})
  (tmp_path / "model.safetensors").write_bytes(data.draw(damaged(good)))
  folder = epath.Path(tmp_path)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), PARAMS
  )
  assert_explained(lambda: safetensors_lib.load(folder, abstract))
