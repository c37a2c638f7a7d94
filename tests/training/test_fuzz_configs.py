"""Random configs within the declared ranges train, save, resume, generate."""

import random

import jax
import pytest
from etils import epath

from hope_jax.config import ConfigError, from_config_dict
from hope_jax.config.layers import LAYERS
from hope_jax.inference import texts as texts_lib
from hope_jax.inference.generation import Sampling
from hope_jax.training import loop, metrics
from tests.support.tiers import slow_case
from tests.training.test_loop import Killed, kill_at


def draw(rng):
  """A config as nested fields; a few of them do not fit together."""
  pick = rng.choice
  heads, head_dim = pick([1, 2, 4]), pick([4, 6, 8])
  fast = sorted(pick([1, 4, 8]) for _ in range(rng.randrange(3)))
  cms = {
    "hidden": (8,) * (len(fast) + 1),
    "chunk_lengths": (*fast, 0),
    "value": pick(["mixer_linear", "mixer_value"]),
    "error_clip": pick([0.0, 1.0]),
  }
  boxes = ["k", "v", "q", "eta", "alpha"]
  memory = {
    "architecture": pick(["mlp", "matrix"]),
    "hidden": pick([0, 5]),
    "activation": pick(["silu", "gelu"]),
    "adaptive": tuple(box for box in boxes if rng.random() < 0.5),
    "target": pick(["self", "shared"]),
    "setting": pick(["chunk_l2", "token_exact"]),
    "delta_rule": pick(["proximal", "literal", "none"]),
    "momentum": pick(["none", "averaged", "sum"]),
    "retention": pick(["start", "zero", "none"]),
    "step_scale": pick(["mean", "sum"]),
    "proximal": pick([True, False]),
    "read": pick(["chunk", "token_pre", "token_post"]),
    "chunk_length": pick([1, 3, 8]),
    "projection_chunk_length": pick([3, 8, 64]),
    "error_clip": pick([0.0, 1.0]),
    "remat": pick(["none", "chunk", "sqrt"]),
  }
  layers = ["transformer", "titans", "hope", "hope", "hope_attention"]
  layers += [name for name, traits in LAYERS.items() if not traits.pairs]
  layer = pick(layers)
  model = {
    "sequence_layer": layer,
    "width": heads * head_dim,
    "num_layers": pick([1, 2]),
    "num_heads": heads,
    "ffn_hidden": pick([8, 20]),
    "conv_window": pick([0, 2, 4]),
    "attention_window": pick([0, 0, 7]),
    "context_length": 64,
    "memory": memory,
    "cms": cms if rng.random() < 0.5 and layer in layers else {},
    "inner_rates": pick(["on", "on", "on", "off"]),
    "dtype": pick(["float32", "bfloat16"]),
    "remat": pick(["none", "full", "dots"]),
  }
  accumulate = pick([1, 2])
  return {
    "model": model,
    "opt": {"warmup_steps": pick([0, 1, 9]), "clip_norm": pick([0.0, 1.0])},
    "data": {"sequence_length": pick([17, 32]), "batch_size": 2 * accumulate},
    "train": {
      "steps": 2,
      "checkpoint_every": 1,
      "eval_every": pick([0, 1]),
      "log_every": 1,
      "dynamics_every": pick([0, 2]),
      "accumulate": accumulate,
      "carry_state": pick([False, False, True]),
      "max_bad_steps": 1,
    },
    "eval": {"batches": 1, "batch_size": 2},
  }


@pytest.mark.parametrize(
  "seed",
  [0, *(slow_case(n) for n in range(1, 60))],
)
def test_random_config_trains_resumes_and_generates(
  seed, tmp_path, monkeypatch
):
  rng = random.Random(seed)
  for _ in range(20):
    try:
      config = from_config_dict(draw(rng))
      break
    except ConfigError as error:  # fields that exclude each other
      assert len(str(error).splitlines()) == 1
  with monkeypatch.context() as patch:
    kill_at(patch, 1)
    with pytest.raises(Killed):
      loop.run(config, epath.Path(tmp_path))
  result = loop.run(config, epath.Path(tmp_path))
  assert result["bad_steps"] == 0
  records = metrics.read(epath.Path(tmp_path))
  assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2]
  texts = texts_lib.generate(
    epath.Path(tmp_path), ["ToBe"], count=3, sampling=Sampling()
  )
  assert len(texts) == 1
  jax.clear_caches()
