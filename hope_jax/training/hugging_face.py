"""Checkpoints of Hugging Face `transformers`: what they mean here.

ARCHITECTURES has one entry per `model_type`: which fields of config.json are
which of ours, which must have one value, and the rules between the tensors
(`renaming.py`).  To add an architecture, write its rules there and an entry
here; tests/test_convert.py runs over all of them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hope_jax.fields import ConfigError, convert
from hope_jax.model_config import ModelConfig
from hope_jax.models import linear
from hope_jax.training import renaming
from hope_jax.training.renaming import Rule


class Architecture(NamedTuple):
  """One `model_type` of transformers.

  Attributes:
    name: of the class that has the logits.
    layer: `model.sequence_layer`.
    fields: of config.json -> of `ModelConfig`, the same in value.
    fixed: fields of config.json that must have this value.
    defaults: what fields mean that a config.json leaves out.
    read, write: what else there is, theirs -> ours and ours -> theirs.
    unused: fields of `ModelConfig` that the sequence layer does not look at.
  """

  name: str
  layer: str
  fields: Mapping[str, str]
  fixed: Mapping[str, Any]
  defaults: Mapping[str, Any]
  read: Callable[[dict[str, Any]], dict[str, Any]]
  write: Callable[[ModelConfig], dict[str, Any]]
  rules: Callable[[ModelConfig], list[Rule]]
  unused: tuple[str, ...] = ()


def _read_llama(values: dict[str, Any]) -> dict[str, Any]:
  heads, dim = values["num_attention_heads"], values.get("head_dim")
  if dim and dim * heads != values["hidden_size"]:
    raise Unsupported("head_dim", dim, values["hidden_size"] // heads)
  groups = values.get("num_key_value_heads") or heads
  rope = values.get("rope_parameters") or {
    "rope_theta": values.get("rope_theta", 10000.0),
    **(values.get("rope_scaling") or {}),
  }
  kind = rope.get("rope_type", rope.get("type", "default"))
  scaling = {}
  if kind == "llama3":
    scaling = {ours: rope[k] for k, ours in SCALING.items()}
  elif kind != "default":
    raise Unsupported("rope_type", kind, "default", "llama3")
  return {
    "num_kv_heads": 0 if groups == heads else groups,
    "rope_base": rope["rope_theta"],
    "rope_scaling": scaling,
    "conv_window": 0,
  }


def _write_llama(model: ModelConfig) -> dict[str, Any]:
  rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_base}
  if model.rope_scaling.factor != 1:
    rope["rope_type"] = "llama3"
    rope |= {k: getattr(model.rope_scaling, v) for k, v in SCALING.items()}
  return {
    "head_dim": model.head_dim,
    "num_key_value_heads": model.kv_heads,
    "rope_parameters": rope,
  }


def _read_mamba2(values: dict[str, Any]) -> dict[str, Any]:
  width, heads = values["hidden_size"], values["num_heads"]
  if heads * 32 != width:  # heads of 64, twice the width
    raise Unsupported("num_heads", heads, width // 32)
  low, high = values["time_step_limit"]
  if isinstance(high, dict):  # how transformers writes infinity
    high = high["__float__"]
  if low != 0 or float(high) != math.inf:
    raise Unsupported("time_step_limit", (low, high), (0, math.inf))
  return {"num_heads": 1, "ffn_hidden": 0}


def _write_mamba2(model: ModelConfig) -> dict[str, Any]:
  return {"num_heads": linear.layout(model).heads}


def _read_mamba(values: dict[str, Any]) -> dict[str, Any]:
  rank, ours = values["time_step_rank"], -(-values["hidden_size"] // 16)
  if rank not in ("auto", ours):
    raise Unsupported("time_step_rank", rank, ours)
  return {"num_heads": 1, "ffn_hidden": 0}


def _write_mamba(model: ModelConfig) -> dict[str, Any]:
  return {"time_step_rank": -(-model.width // 16)}


def _read_mistral(values: dict[str, Any]) -> dict[str, Any]:
  window = values["sliding_window"] or 0
  return _read_llama(values) | {"attention_window": window}


def _write_mistral(model: ModelConfig) -> dict[str, Any]:
  window = model.attention_window or None
  return _write_llama(model) | {"sliding_window": window}


def _read_qwen(values: dict[str, Any]) -> dict[str, Any]:
  layers, width = values["num_hidden_layers"], values["hidden_size"]
  kinds = values.get("layer_types") or ["full_attention"]
  if set(kinds) != {"linear_attention"}:
    raise Unsupported("layer_types", sorted(set(kinds)), ["linear_attention"])
  dense = values.get("mlp_only_layers") or []
  if values.get("num_experts") and set(dense) != set(range(layers)):
    raise Unsupported("mlp_only_layers", dense, "all layers")
  fields = {"num_heads": width // values["linear_key_head_dim"]}
  model = ModelConfig("gated_deltanet", width=width, **fields)
  for name, ours in _linear_heads(model).items():
    if values[name] != ours:
      raise Unsupported(name, values[name], ours)
  return fields


def _linear_heads(model: ModelConfig) -> dict[str, int]:
  heads, keys, values, *_ = linear.layout(model)
  return {
    "linear_num_key_heads": heads,
    "linear_num_value_heads": heads,
    "linear_key_head_dim": keys,
    "linear_value_head_dim": values,
  }


def _write_qwen(model: ModelConfig) -> dict[str, Any]:
  return {
    **_linear_heads(model),
    "layer_types": ["linear_attention"] * model.num_layers,
    "mlp_only_layers": list(range(model.num_layers)),
    "num_attention_heads": model.num_heads,
    "num_key_value_heads": model.num_heads,
    "use_cache": False,  # transformers' caches need a layer with attention
  }


SIZES = {
  "vocab_size": "vocab_size",
  "hidden_size": "width",
  "num_hidden_layers": "num_layers",
  "tie_word_embeddings": "tied_embeddings",
}
BLOCK = SIZES | {"intermediate_size": "ffn_hidden", "rms_norm_eps": "norm_eps"}
SCALING = {
  "factor": "factor",
  "low_freq_factor": "low_frequency_factor",
  "high_freq_factor": "high_frequency_factor",
  "original_max_position_embeddings": "original_context_length",
}
ALWAYS = {"hidden_act": "silu", "quantization_config": None}
# Of `ModelConfig`: they say how to begin or compute, or concern what is not
# there.
FREE = (
  "memory",
  "initializer",
  "dtype",
  "remat",
  "inner_rates",
  "context_length",
)

LLAMA = Architecture(
  name="LlamaForCausalLM",
  layer="transformer",
  fields=BLOCK
  | {
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "context_length",
  },
  fixed=ALWAYS | {"attention_bias": False, "mlp_bias": False},
  defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
  read=_read_llama,
  write=_write_llama,
  rules=renaming.llama,
)
QWEN3_NEXT = Architecture(
  name="Qwen3NextForCausalLM",
  layer="gated_deltanet",
  fields=BLOCK | {"linear_conv_kernel_dim": "conv_window"},
  fixed=ALWAYS,
  defaults={"rms_norm_eps": 1e-6, "linear_conv_kernel_dim": 4},
  read=_read_qwen,
  write=_write_qwen,
  rules=renaming.qwen3_next,
  unused=("rope_base",),
)
# The first of a sequence layer is the one that is written; with a window
# Mistral.
ARCHITECTURES = {
  "llama": LLAMA,
  "mistral": LLAMA._replace(
    name="MistralForCausalLM",
    fixed=ALWAYS,
    defaults=dict(LLAMA.defaults)
    | {"sliding_window": 4096, "num_key_value_heads": 8},
    read=_read_mistral,
    write=_write_mistral,
  ),
  "mamba2": Architecture(
    name="Mamba2ForCausalLM",
    layer="mamba2",
    fields=SIZES
    | {"conv_kernel": "conv_window", "layer_norm_epsilon": "norm_eps"},
    fixed=ALWAYS
    | {
      "head_dim": 64,
      "state_size": 128,
      "expand": 2,
      "n_groups": 1,
      "use_bias": False,
      "use_conv_bias": True,
    },
    defaults={
      "conv_kernel": 4,
      "layer_norm_epsilon": 1e-5,
      "n_groups": 8,
      "num_heads": 128,
      "time_step_limit": (0, math.inf),
    },
    read=_read_mamba2,
    write=_write_mamba2,
    rules=renaming.mamba2,
    unused=("rope_base", "num_heads"),
  ),
  "mamba": Architecture(
    name="MambaForCausalLM",
    layer="mamba",
    fields=SIZES
    | {"conv_kernel": "conv_window", "layer_norm_epsilon": "norm_eps"},
    fixed=ALWAYS
    | {
      "state_size": 16,
      "expand": 2,
      "use_bias": False,
      "use_conv_bias": True,
    },
    defaults={
      "conv_kernel": 4,
      "layer_norm_epsilon": 1e-5,
      "time_step_rank": "auto",
      "tie_word_embeddings": True,
    },
    read=_read_mamba,
    write=_write_mamba,
    rules=renaming.mamba,
    unused=("rope_base", "num_heads"),
  ),
  "qwen3_next": QWEN3_NEXT,
  "qwen3_5_text": QWEN3_NEXT._replace(
    name="Qwen3_5ForCausalLM", rules=renaming.qwen3_5
  ),
}


class Unsupported(ConfigError):
  """A field of config.json with a value that no model of ours has."""

  def __init__(self, name: str, value: Any, *wanted: Any):
    super().__init__(
      f"config.json has {name}={value!r}, but only"
      f" {' or '.join(map(repr, wanted))} can be converted: take another"
      " checkpoint"
    )


def read_config(values: dict[str, Any]) -> tuple[Architecture, ModelConfig]:
  """What a config.json describes; `ConfigError` if it is no model of ours."""
  kind = values.get("model_type")
  if kind not in ARCHITECTURES:
    raise Unsupported("model_type", kind, *ARCHITECTURES)
  found = ARCHITECTURES[kind]
  values = {"tie_word_embeddings": False, **found.defaults, **values}
  for name, wanted in found.fixed.items():
    if values.get(name, wanted) != wanted:
      raise Unsupported(name, values[name], wanted)
  try:
    fields = {ours: values[name] for name, ours in found.fields.items()}
    fields |= found.read(values)
  except KeyError as error:
    raise ConfigError(
      f"config.json has no {error}, which {found.name} needs: copy the"
      " checkpoint again"
    ) from error
  kind = values.get("dtype") or values.get("torch_dtype")
  fields["dtype"] = "bfloat16" if kind == "bfloat16" else "float32"
  values = {"sequence_layer": found.layer, **fields}
  return found, convert(ModelConfig, values, "model")


def is_ignored(name: str, model: ModelConfig) -> bool:
  """Whether a tensor of theirs repeats what others or config.json say."""
  is_head = name == "lm_head.weight" and model.tied_embeddings
  return is_head or name.endswith("rotary_emb.inv_freq")


def write_config(model: ModelConfig) -> tuple[Architecture, dict[str, Any]]:
  """The config.json of `model`; `ConfigError` if transformers has none."""
  kinds: dict[str, str] = {}
  for kind, found in ARCHITECTURES.items():
    kinds.setdefault(found.layer, kind)
  if model.sequence_layer not in kinds:
    raise ConfigError(
      f"transformers has no model like model.sequence_layer="
      f"{model.sequence_layer}: only {', '.join(kinds)} can be converted"
    )
  kind = kinds[model.sequence_layer]
  if kind == "llama" and model.attention_window:
    kind = "mistral"
  found = ARCHITECTURES[kind]
  fixed = {k: v for k, v in found.fixed.items() if v is not None}
  same = {name: getattr(model, ours) for name, ours in found.fields.items()}
  values = {
    "architectures": [found.name],
    "model_type": kind,
    "dtype": "float32",
    **fixed,
    **same,
    **found.write(model),
  }
  _, again = read_config(values)
  for field in dataclasses.fields(ModelConfig):
    ours, theirs = getattr(model, field.name), getattr(again, field.name)
    if ours != theirs and field.name not in FREE + found.unused:
      raise ConfigError(
        f"model.{field.name}={ours!r} cannot be expressed in a {found.name},"
        f" which has {theirs!r} there"
      )
  return found, values
