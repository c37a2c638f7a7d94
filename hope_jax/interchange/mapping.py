"""Rules that map Hugging Face tensors (`theirs`) to our parameters and back.

A rule splits one Hugging Face tensor of one layer into parameters, or joins it
from them:

  theirs (Hugging Face)             ours (Flax)
  linear weight [out, in]           kernel [in, out]
  several projections, their rows   one kernel each
    one after the other, perhaps
    head by head
  convolution [D, 1, W], oldest     kernel [W, D], newest tap first
    tap first
  norms of 1 + weight               scale = 1 + weight

Our layers are stacked on axis 0.  Every rule is linear (up to that 1), so that
gradients are converted as parameters are.

The rules of every architecture of `hugging_face.py` are at the end.

Legend: D width, W window, L layers.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from hope_jax.config import ModelConfig
from hope_jax.models import linear
from hope_jax.models import mamba2 as mamba2_layer
from hope_jax.models.mamba import KEY_DIM

Arrays = dict[str, np.ndarray]
LAYER = "{}"  # in a name: the layer's number


class Form(NamedTuple):
  """Conversion of one array from Hugging Face's form to ours, and back."""

  ours: Callable[[np.ndarray], np.ndarray]
  theirs: Callable[[np.ndarray], np.ndarray]


SAME = Form(lambda x: x, lambda x: x)
TRANSPOSED = Form(np.transpose, np.transpose)
CENTRED = Form(lambda x: x + 1, lambda x: x - 1)
CONVOLUTION = Form(lambda x: x[:, 0, ::-1].T, lambda x: x.T[:, None, ::-1])


class Rule(NamedTuple):
  """Splits a Hugging Face tensor (`theirs`) by rows into our parameters.

  Attributes:
    parts: name of our parameter -> how many rows of a group it has.
    groups: how often (part, part, ...) repeats along the rows.
  """

  theirs: str
  parts: Mapping[str, int]
  form: Form
  groups: int = 1

  def split(self, x: np.ndarray) -> Arrays:
    """Splits a Hugging Face tensor into our parameters."""
    rest = x.shape[1:]
    x = x.reshape(self.groups, -1, *rest)
    ends = np.cumsum(list(self.parts.values()))[:-1]
    return {
      name: self.form.ours(part.reshape(-1, *rest))
      for name, part in zip(self.parts, np.split(x, ends, axis=1), strict=True)
    }

  def join(self, parts: Iterable[np.ndarray]) -> np.ndarray:
    """Inverse of `split`; parts in the rule's order."""
    rows = [self.form.theirs(part) for part in parts]
    if len(rows) == 1:
      return rows[0]
    grouped = [x.reshape(self.groups, -1, *x.shape[1:]) for x in rows]
    joined = np.concatenate(grouped, axis=1)
    return joined.reshape(-1, *joined.shape[2:])


def one(theirs: str, ours: str, form: Form = TRANSPOSED) -> Rule:
  """The rule of a Hugging Face tensor that is one of our parameters."""
  return Rule(theirs, {ours: 0}, form)


def to_ours(
  rules: Iterable[Rule], num_layers: int, read: Callable[[str], np.ndarray]
) -> Arrays:
  """Our parameters by dotted path; `read(name)` gives a Hugging Face tensor."""
  found: Arrays = {}
  for rule in rules:
    if LAYER not in rule.theirs:
      found |= rule.split(read(rule.theirs))
      continue
    for number in range(num_layers):
      for name, x in rule.split(read(rule.theirs.format(number))).items():
        if number == 0:
          found[name] = np.empty((num_layers, *x.shape), x.dtype)
        found[name][number] = x
  return found


def to_theirs(
  rules: Iterable[Rule], num_layers: int, params: Mapping[str, np.ndarray]
) -> Arrays:
  """Inverse of `to_ours`: all Hugging Face tensors by name."""
  found: Arrays = {}
  for rule in rules:
    parts = [params[name] for name in rule.parts]
    if LAYER not in rule.theirs:
      found[rule.theirs] = rule.join(parts)
      continue
    for number in range(num_layers):
      name = rule.theirs.format(number)
      found[name] = rule.join(part[number] for part in parts)
  return found


def _embeddings(
  model: ModelConfig, inner: str, names: str, form: Form
) -> list[Rule]:
  """Rules outside of the layers; `names` of the embedding and last norm."""
  embed, norm = names.split()
  rules = [
    one(f"{inner}.{embed}.weight", "embed.embedding", SAME),
    one(f"{inner}.{norm}.weight", "norm_out.scale", form),
  ]
  if not model.tied_embeddings:
    rules.append(one("lm_head.weight", "lm_head.kernel"))
  return rules


def _llama_block(model: ModelConfig, norm: Form) -> list[Rule]:
  """The rules of Llama except its attention; Qwen shares them."""
  layer = "model.layers.{}."
  return [
    *_embeddings(model, "model", "embed_tokens norm", norm),
    one(f"{layer}input_layernorm.weight", "blocks.norm_mixer.scale", norm),
    one(
      f"{layer}post_attention_layernorm.weight", "blocks.norm_ffn.scale", norm
    ),
    *(
      one(f"{layer}mlp.{name}_proj.weight", f"blocks.ffn.{name}.kernel")
      for name in ("gate", "up", "down")
    ),
  ]


def llama(model: ModelConfig) -> list[Rule]:
  """LlamaForCausalLM; rotary positions use the same layout (halves)."""
  names = {"q": "query", "k": "key", "v": "value", "o": "output"}
  return _llama_block(model, SAME) + [
    one(
      f"model.layers.{{}}.self_attn.{theirs}_proj.weight",
      f"blocks.mixer.{ours}.kernel",
    )
    for theirs, ours in names.items()
  ]


def mamba2(model: ModelConfig) -> list[Rule]:
  """Mamba2ForCausalLM: x, B, C, dt, z are value, key, query, step, gate."""
  shape = mamba2_layer.layout(model)
  inner, layer = shape.heads * shape.value_dim, "backbone.layers.{}."
  mixed = {"value": inner, "key": shape.key_dim, "query": shape.key_dim}

  def named(pattern: str) -> dict[str, int]:
    return {pattern.format(name): size for name, size in mixed.items()}

  projected = {
    "blocks.mixer.readout.gate.kernel": inner,
    **named("blocks.mixer.{}.kernel"),
    "blocks.mixer.gates.step.kernel": shape.heads,
  }
  vectors = {
    "norm.weight": "norm_mixer.scale",
    "mixer.dt_bias": "mixer.gates.step_bias",
    "mixer.A_log": "mixer.gates.log_decay_rate",
    "mixer.D": "mixer.readout.norm_skip",
    "mixer.norm.weight": "mixer.readout.norm_scale",
  }
  return [
    *_embeddings(model, "backbone", "embeddings norm_f", SAME),
    Rule(f"{layer}mixer.in_proj.weight", projected, TRANSPOSED),
    Rule(
      f"{layer}mixer.conv1d.weight",
      named("blocks.mixer.conv_{}.kernel"),
      CONVOLUTION,
    ),
    Rule(f"{layer}mixer.conv1d.bias", named("blocks.mixer.conv_{}.bias"), SAME),
    one(f"{layer}mixer.out_proj.weight", "blocks.mixer.readout.output.kernel"),
    *(one(layer + k, f"blocks.{v}", SAME) for k, v in vectors.items()),
  ]


def mamba(model: ModelConfig) -> list[Rule]:
  """MambaForCausalLM: x, z, B, C are value, gate, key, query; dt has a low
  rank."""
  inner, layer, mixer = 2 * model.width, "backbone.layers.{}.", "blocks.mixer."
  rank = -(-model.width // 16)
  both = {f"{mixer}value.kernel": inner, f"{mixer}readout.gate.kernel": inner}
  selected = {
    f"{mixer}gates.step_low.kernel": rank,
    f"{mixer}key.kernel": KEY_DIM,
    f"{mixer}query.kernel": KEY_DIM,
  }
  same = {
    "norm.weight": "blocks.norm_mixer.scale",
    "mixer.conv1d.bias": f"{mixer}conv_value.bias",
    "mixer.dt_proj.bias": f"{mixer}gates.step_bias",
    "mixer.A_log": f"{mixer}gates.log_decay_rate",
    "mixer.D": f"{mixer}readout.norm_skip",
  }
  return [
    *_embeddings(model, "backbone", "embeddings norm_f", SAME),
    Rule(f"{layer}mixer.in_proj.weight", both, TRANSPOSED),
    Rule(f"{layer}mixer.x_proj.weight", selected, TRANSPOSED),
    one(f"{layer}mixer.dt_proj.weight", f"{mixer}gates.step.kernel"),
    one(
      f"{layer}mixer.conv1d.weight", f"{mixer}conv_value.kernel", CONVOLUTION
    ),
    one(f"{layer}mixer.out_proj.weight", f"{mixer}readout.output.kernel"),
    *(one(layer + theirs, ours, SAME) for theirs, ours in same.items()),
  ]


def qwen3_next(model: ModelConfig) -> list[Rule]:
  """Qwen3-Next: one matrix holds all projections, head by head."""
  heads, keys, values = linear.layout(model)
  mixer, layer = "blocks.mixer.", "model.layers.{}.linear_attn."
  projected = {
    f"{mixer}query.kernel": keys,
    f"{mixer}key.kernel": keys,
    f"{mixer}value.kernel": values,
    f"{mixer}readout.gate.kernel": values,
  }
  rates = {f"{mixer}gates.rate.kernel": 1, f"{mixer}gates.step.kernel": 1}
  return [
    *_qwen_rules(model),
    Rule(f"{layer}in_proj_qkvz.weight", projected, TRANSPOSED, heads),
    Rule(f"{layer}in_proj_ba.weight", rates, TRANSPOSED, heads),
  ]


def qwen3_5(model: ModelConfig) -> list[Rule]:
  """Qwen3.5: the same layer with separate projections."""
  mixer, layer = "blocks.mixer.", "model.layers.{}.linear_attn."
  projected = {
    f"{mixer}{name}.kernel": size for name, size in _qwen_widths(model).items()
  }
  return [
    *_qwen_rules(model),
    Rule(f"{layer}in_proj_qkv.weight", projected, TRANSPOSED),
    one(f"{layer}in_proj_z.weight", f"{mixer}readout.gate.kernel"),
    one(f"{layer}in_proj_b.weight", f"{mixer}gates.rate.kernel"),
    one(f"{layer}in_proj_a.weight", f"{mixer}gates.step.kernel"),
  ]


def _qwen_widths(model: ModelConfig) -> dict[str, int]:
  heads, keys, values = linear.layout(model)
  return {"query": heads * keys, "key": heads * keys, "value": heads * values}


def _qwen_rules(model: ModelConfig) -> list[Rule]:
  """All rules but the projections'; the block's norms scale by 1 + weight."""
  mixer, layer = "blocks.mixer.", "model.layers.{}.linear_attn."
  taps = {
    f"{mixer}conv_{name}.kernel": size
    for name, size in _qwen_widths(model).items()
  }
  return [
    *_llama_block(model, CENTRED),
    Rule(f"{layer}conv1d.weight", taps, CONVOLUTION),
    one(f"{layer}dt_bias", f"{mixer}gates.step_bias", SAME),
    one(f"{layer}A_log", f"{mixer}gates.log_decay_rate", SAME),
    one(f"{layer}norm.weight", f"{mixer}readout.norm_scale", SAME),
    one(f"{layer}out_proj.weight", f"{mixer}readout.output.kernel"),
  ]
