"""Settings of the whole suite: strict shapes, CPU, reproducible properties."""

import functools
import http.server
import importlib.util
import os
import pathlib
import sys
import threading

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest
from etils import epath

from hope_jax.config import (
  Config,
  DataConfig,
  EvalConfig,
  ModelConfig,
  OptConfig,
  TrainConfig,
)
from tests.support.tiers import CORE

# x[B, T] + y[T] is an error everywhere: write y[None].
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")

TESTS = pathlib.Path(__file__).parent
ORACLES = ("lm_eval", "torch", "transformers")  # torch: on Python 3.11 only

FAST = "JAX_DISABLE_MOST_OPTIMIZATIONS"


@pytest.fixture(scope="module", autouse=True)
def compilation(request):
  """XLA's optimisations take most of the suite's time; they stay in modules
  marked `optimized`: those of whole runs, as users make them."""
  fast = request.node.get_closest_marker("optimized") is None
  jax.clear_caches()  # gigabytes of what another module compiled
  jax.config.update("jax_disable_most_optimizations", fast)
  os.environ[FAST] = str(fast)  # for the processes that tests start


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  """Compiles the same program once a session, in child processes, too."""
  options = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
  }
  for name, value in options.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


@pytest.fixture
def tiny():
  """A run of seconds: 2 layers, width 16, 32 tokens of Shakespeare."""
  return Config(
    model=ModelConfig(width=16, num_layers=2, num_heads=2, ffn_hidden=32),
    opt=OptConfig(peak_lr=1e-2, warmup_steps=2),
    data=DataConfig(sequence_length=32, batch_size=4),
    train=TrainConfig(
      steps=6,
      log_every=2,
      eval_every=3,
      checkpoint_every=2,
      dynamics_every=4,
    ),
    eval=EvalConfig(batches=2, batch_size=4),
  )


BUCKET = {
  "EPATH_USE_TF": "false",
  "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for credentials
  "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
}


@pytest.fixture(scope="module")
def server():
  from gcp_storage_emulator import server, storage
  from gcp_storage_emulator.handlers import buckets

  one_at_a_time = threading.Lock()  # an object's parts are not written at once

  class Handler(server.RequestHandler):
    """The emulator's, made safe for several connections."""

  def serially(method):
    def serve(handler):
      with one_at_a_time:
        method(handler)

    return serve

  for name in ("GET", "POST", "DELETE", "PUT", "PATCH"):
    method = getattr(server.RequestHandler, f"do_{name}", None)
    if method:
      setattr(Handler, f"do_{name}", serially(method))

  data = storage.Storage(use_memory_fs=True)
  buckets.create_bucket("bucket", data)
  handler = functools.partial(Handler, data)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
  """An empty folder of a bucket, on a local server of its protocol."""
  for name, value in BUCKET.items():
    monkeypatch.setenv(name, value)
  for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
    monkeypatch.setenv(name, server)
  monkeypatch.setenv("HOPE_JAX_CACHE", str(tmp_path / "cache"))
  return epath.Path("gs://bucket") / tmp_path.name


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption(
    "--slow", action="store_true", help="also run the longest tests and repeats"
  )
  parser.addoption(
    "--core", action="store_true", help="run one file of each room only"
  )


def pytest_configure(config: pytest.Config) -> None:
  """In CI, tests that compare with other libraries must not be skipped."""
  if not os.environ.get("CI") or config.getoption("--core"):
    return
  for name in ORACLES if sys.version_info < (3, 12) else ():
    if importlib.util.find_spec(name) is None:
      raise pytest.UsageError(f"CI needs {name}, which requirements.txt pins")


def pytest_ignore_collect(
  collection_path: pathlib.Path, config: pytest.Config
) -> bool | None:
  """With --core no other file is even imported: it may need more packages."""
  is_test = collection_path.match("test_*.py")
  if config.getoption("--core") and is_test:
    name = collection_path.relative_to(TESTS).as_posix()
    return name not in CORE or None
  return None


def pytest_collection_modifyitems(
  config: pytest.Config, items: list[pytest.Item]
) -> None:
  # From the last folder on: the first have the short files, which can fill what
  # one of the processes has left to do.
  items.sort(key=lambda item: item.path, reverse=True)
  if config.getoption("--slow"):
    return
  skip = pytest.mark.skip(reason="left to --slow")
  for item in items:
    if "slow" in item.keywords:
      item.add_marker(skip)
