"""Configs of Hugging Face `transformers`, and the models that they are here.

ARCHITECTURES has one entry per `model_type`: how fields of config.json map to
fields of `ModelConfig`, which of them must have a fixed value, and the rules
that map tensors (`mapping.py`).  To add an architecture, write its rules there
and an entry here; tests/test_convert.py runs over all of them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hope_jax.config import ConfigError, Json, ModelConfig, convert
from hope_jax.interchange import mapping
from hope_jax.interchange.mapping import Rule
from hope_jax.models import linear, mamba2


class Architecture(NamedTuple):
  """One `model_type` of transformers.

  Attributes:
    name: of the class with a language-model head.
    layer: `model.sequence_layer`.
    fields: field of config.json -> field of `ModelConfig` with the same value.
    fixed: fields of config.json that must have this value.
    defaults: values of fields that a config.json leaves out.
    read, write: convert the other fields, from config.json and to it.
    rules: map the tensors.
    constants: fields without effect on our model, written so that no reader
      falls back on its own defaults.
    unused: fields of `ModelConfig` that the sequence layer does not use.
  """

  name: str
  layer: str
  fields: Mapping[str, str]
  fixed: Mapping[str, Any]
  defaults: Mapping[str, Any]
  read: Callable[[Json], Json]
  write: Callable[[ModelConfig], Json]
  rules: Callable[[ModelConfig], list[Rule]]
  constants: Mapping[str, Any]
  unused: tuple[str, ...] = ()


def _read_llama(values: Json) -> Json:
  heads, dim = values["num_attention_heads"], values.get("head_dim")
  if dim and dim * heads != values["hidden_size"]:
    raise Unsupported("head_dim", dim, values["hidden_size"] // heads)
  groups = values.get("num_key_value_heads") or heads
  base, scaling = _read_rope(values)
  return {
    "num_kv_heads": 0 if groups == heads else groups,
    "rope_base": base,
    "rope_scaling": scaling,
    "conv_window": 0,
  }


def _read_rope(values: Json) -> tuple[float, Json]:
  """Base and scaling of rotary positions.

  transformers 5 keeps both in `rope_parameters`, transformers 4 in `rope_theta`
  and `rope_scaling`.  A config.json may have all of them; then they must agree,
  because readers differ in which they use.
  """
  bases: Json = {"rope_theta": values.get("rope_theta")}
  scalings: Json = {}
  for name in ("rope_parameters", "rope_scaling"):
    rope = values.get(name) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
      raise Unsupported("rope_type", kind, "default", "llama3")
    for field in (rope, values):
      if (part := field.get("partial_rotary_factor") or 1) != 1:
        raise Unsupported("partial_rotary_factor", part, 1)
    bases[f"{name}.rope_theta"] = rope.get("rope_theta")
    names = SCALING if kind == "llama3" else {}
    scalings[name] = (
      {ours: rope[k] for k, ours in names.items()} if rope else None
    )
  return _the_one(bases, ROPE_THETA), _the_one(scalings, {})


def _the_one(found: Json, default: Any) -> Any:
  """The value that all names with a value agree on."""
  found = {name: value for name, value in found.items() if value is not None}
  values = list(found.values()) or [default]
  if any(value != values[0] for value in values):
    said = " but ".join(f"{name}={value}" for name, value in found.items())
    raise ConfigError(
      f"config.json has {said}: remove what the checkpoint was not trained with"
    )
  return values[0]


def _write_llama(model: ModelConfig) -> Json:
  """Rotary positions in both forms of `_read_rope`."""
  scaling: Json | None = None
  if model.rope_scaling.factor != 1:
    scaling = {k: getattr(model.rope_scaling, v) for k, v in SCALING.items()}
    scaling = {"rope_type": "llama3"} | scaling
  base = {"rope_theta": model.rope_base}
  return {
    "head_dim": model.head_dim,
    "num_key_value_heads": model.kv_heads,
    "rope_parameters": (scaling or {"rope_type": "default"}) | base,
    **base,
    "rope_scaling": scaling,
  }


def _read_mamba2(values: Json) -> Json:
  width, heads = values["hidden_size"], values["num_heads"]
  if heads * 32 != width:  # heads of 64, in all twice the width
    raise Unsupported("num_heads", heads, width // 32)
  low, high = values["time_step_limit"]
  if isinstance(high, dict):  # how transformers writes infinity
    high = high["__float__"]
  if low != 0 or float(high) != math.inf:
    raise Unsupported("time_step_limit", (low, high), (0, math.inf))
  return {"num_heads": 1, "ffn_hidden": 0}


def _write_mamba2(model: ModelConfig) -> Json:
  return {"num_heads": mamba2.layout(model).heads} | _write_mamba(model)


def _read_mamba(values: Json) -> Json:
  rank, ours = values["time_step_rank"], -(-values["hidden_size"] // 16)
  if rank not in ("auto", ours):
    raise Unsupported("time_step_rank", rank, ours)
  return {"num_heads": 1, "ffn_hidden": 0}


def _write_mamba(model: ModelConfig) -> Json:
  return {
    "time_step_rank": -(-model.width // 16),
    "intermediate_size": 2 * model.width,
  }


def _read_mistral(values: Json) -> Json:
  window = values["sliding_window"] or 0
  return _read_llama(values) | {"attention_window": window}


def _write_mistral(model: ModelConfig) -> Json:
  window = model.attention_window or None
  return _write_llama(model) | {"sliding_window": window}


def _read_qwen(values: Json) -> Json:
  layers, width = values["num_hidden_layers"], values["hidden_size"]
  every = values.get("full_attention_interval", 4)
  usual = ["full_attention"] if layers >= every else ["linear_attention"]
  kinds = set(values.get("layer_types") or usual)
  if kinds != {"linear_attention"}:
    raise Unsupported("layer_types", sorted(kinds), ["linear_attention"])
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
  heads, keys, values = linear.layout(model)
  return {
    "linear_num_key_heads": heads,
    "linear_num_value_heads": heads,
    "linear_key_head_dim": keys,
    "linear_value_head_dim": values,
  }


def _write_qwen(model: ModelConfig) -> Json:
  return {
    **_linear_heads(model),
    "layer_types": ["linear_attention"] * model.num_layers,
    "mlp_only_layers": list(range(model.num_layers)),
    "num_attention_heads": model.num_heads,
    "num_key_value_heads": model.num_heads,
  }


SIZES = {
  "vocab_size": "vocab_size",
  "hidden_size": "width",
  "num_hidden_layers": "num_layers",
  "tie_word_embeddings": "tied_embeddings",
}
BLOCK_FIELDS = SIZES | {
  "intermediate_size": "ffn_hidden",
  "rms_norm_eps": "norm_eps",
}
SCALING = {
  "factor": "factor",
  "low_freq_factor": "low_frequency_factor",
  "high_freq_factor": "high_frequency_factor",
  "original_max_position_embeddings": "original_context_length",
}
ROPE_THETA = 10000.0  # if a config.json has none
ALWAYS = {"hidden_act": "silu", "quantization_config": None}
# Fields of `ModelConfig` that a checkpoint does not determine: initialisation,
# compute, and what these models do not have.
FREE = (
  "memory",
  "initializer",
  "dtype",
  "remat",
  "inner_rates",
  "context_length",
)

ATTENTION = {
  "attention_dropout": 0.0,
  "initializer_range": 0.02,
  "use_cache": True,
}
LLAMA = Architecture(
  name="LlamaForCausalLM",
  layer="transformer",
  fields=BLOCK_FIELDS
  | {
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "context_length",
  },
  fixed=ALWAYS | {"attention_bias": False, "mlp_bias": False},
  defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
  read=_read_llama,
  write=_write_llama,
  rules=mapping.llama,
  constants=ATTENTION | {"pretraining_tp": 1},
)
MAMBA = {
  "initializer_range": 0.1,
  "rescale_prenorm_residual": False,
  "residual_in_fp32": True,
  "time_step_min": 0.001,
  "time_step_max": 0.1,
  "time_step_floor": 1e-4,
  "use_cache": True,
}
# Fields of attention layers, of which there are none; caches would need one.
QWEN = ATTENTION | {
  "use_cache": False,
  "attention_bias": False,
  "head_dim": 256,
  "max_position_embeddings": 32768,
  "partial_rotary_factor": 0.25,
  "rope_theta": ROPE_THETA,
  "rope_scaling": None,
  "rope_parameters": {
    "rope_type": "default",
    "rope_theta": ROPE_THETA,
    "partial_rotary_factor": 0.25,
  },
}
QWEN3_NEXT = Architecture(
  name="Qwen3NextForCausalLM",
  layer="gated_deltanet",
  fields=BLOCK_FIELDS | {"linear_conv_kernel_dim": "conv_window"},
  fixed=ALWAYS,
  defaults={
    "rms_norm_eps": 1e-6,
    "linear_conv_kernel_dim": 4,
    "num_experts": 512,
  },
  read=_read_qwen,
  write=_write_qwen,
  rules=mapping.qwen3_next,
  constants=QWEN
  | {  # of experts, which no layer has
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
  },
  unused=("rope_base",),
)
# The first entry of a sequence layer is the one that is written; with an
# attention window, Mistral is.
ARCHITECTURES = {
  "llama": LLAMA,
  "mistral": LLAMA._replace(
    name="MistralForCausalLM",
    fixed=ALWAYS,
    defaults={
      "rms_norm_eps": 1e-6,
      "max_position_embeddings": 131072,
      "sliding_window": 4096,
      "num_key_value_heads": 8,
    },
    read=_read_mistral,
    write=_write_mistral,
    constants=ATTENTION,
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
    rules=mapping.mamba2,
    constants=MAMBA | {"chunk_size": 256},
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
    rules=mapping.mamba,
    constants=MAMBA
    | {
      "time_step_init_scheme": "random",
      "time_step_scale": 1.0,
      "use_associative_scan": True,
      "use_mambapy": False,
    },
    unused=("rope_base", "num_heads"),
  ),
  "qwen3_next": QWEN3_NEXT,
  "qwen3_5_text": QWEN3_NEXT._replace(
    name="Qwen3_5ForCausalLM",
    defaults={"rms_norm_eps": 1e-6, "linear_conv_kernel_dim": 4},
    rules=mapping.qwen3_5,
    constants=QWEN,
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


def read_config(values: Json) -> tuple[Architecture, ModelConfig]:
  """The model of a config.json; `ConfigError` if it cannot be converted."""
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
  """Whether a Hugging Face tensor only repeats others or config.json."""
  is_head = name == "lm_head.weight" and model.tied_embeddings
  return is_head or name.endswith("rotary_emb.inv_freq")


def write_config(model: ModelConfig) -> tuple[Architecture, Json]:
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
    "torch_dtype": "float32",  # transformers 4
    **found.constants,
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
