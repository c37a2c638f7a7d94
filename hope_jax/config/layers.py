"""The sequence layers by name, with the traits that other code depends on.

Pure data, without JAX, so that a configuration can be checked quickly.
`models/registry.py` maps the same names to the modules.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
  """What other modules need to know of a sequence layer.

  Attributes:
    title: its name in tables.
    blocks: if it is a pattern, the layers that alternate from block to block.
    attention: softmax attention over a cache of keys and values: `alone`,
      `beside` a memory, or `none`.
    needs_window: whether `model.attention_window` must be set.
    persistent: whether `model.persistent_tokens` may be set.
    rotary: whether it uses rotary position embeddings.
    head_dim: a fixed width of its heads; 0: given by `model.num_heads`.
    pairs: whether it gives a CMS keys and values of the model's width.
    chunks: whether its memory is written in chunks of `memory.chunk_length`.
    adaptive: whether `memory.adaptive` may name projections.
    learns: whether it has a fast level `memory`, with its own learning rate.
    kernels: values of `memory.implementation` that it supports besides `auto`
      and `xla`.
    memory: field of `MemoryConfig` -> the values that the layer supports.
  """

  title: str = ""
  blocks: tuple[str, ...] = ()
  attention: Literal["none", "alone", "beside"] = "none"
  needs_window: bool = False
  persistent: bool = False
  rotary: bool = False
  head_dim: int = 0
  pairs: bool = True
  chunks: bool = False
  adaptive: bool = False
  learns: bool = False
  kernels: tuple[str, ...] = ()
  memory: Mapping[str, tuple[Any, ...]] = dataclasses.field(
    default_factory=dict
  )


_ON_TPU = ("pallas_tpu", "pallas_interpret")
_NONE = ((),)  # supported values of a field of names: only the empty tuple
_ATTENTION = Traits(attention="alone", rotary=True)
_DEEP = Traits(chunks=True, learns=True, adaptive=True, kernels=_ON_TPU)
_TTT = Traits(chunks=True, learns=True, rotary=True)
_LINEAR = Traits(pairs=False, kernels=(*_ON_TPU, "pallas_gpu"))
_RECURRENT = Traits(pairs=False)
_BESIDE = dataclasses.replace(
  _DEEP, attention="beside", rotary=True, needs_window=True
)


def _named(title: str, traits: Traits, **changes: Any) -> Traits:
  return dataclasses.replace(traits, title=title, **changes)


# In the order in which tables list them.
LAYERS: dict[str, Traits] = {
  "transformer": _named("Transformer++", _ATTENTION),
  "retnet": _named("RetNet", _LINEAR, rotary=True),
  "deltanet": _named("DeltaNet", _LINEAR),
  "gated_deltanet": _named("Gated DeltaNet", _LINEAR),
  "comba": _named("Comba", _LINEAR),
  "mamba": _named("Mamba", _RECURRENT),
  "mamba2": _named("Mamba2", _LINEAR),
  "samba": _named(
    "Samba",
    _RECURRENT,
    blocks=("mamba", "transformer"),
    attention="alone",
    rotary=True,
  ),
  "rwkv7": _named("RWKV-7", _RECURRENT, head_dim=64),
  "lstm": _named("LSTM", _RECURRENT),
  "srwm": _named("SRWM", _RECURRENT, learns=True),
  "ttt_linear": _named("TTT-Linear", _TTT),
  "ttt_mlp": _named("TTT-MLP", _TTT),
  "dla": _named("DLA", _DEEP),
  "memora": _named(
    "Memora",
    _DEEP,
    adaptive=False,
    kernels=(),
    memory={
      "adaptive": _NONE,
      "architecture": ("mlp",),
      "target": ("shared",),
      "delta_rule": ("none",),
      "momentum": ("none",),
      "setting": ("chunk_l2", "chunk_dot"),
    },
  ),
  "titans": _named("Titans", _DEEP),
  "titans_mac": _named(
    "Titans MAC",
    _BESIDE,
    needs_window=False,
    persistent=True,
    adaptive=False,
    kernels=(),
    memory={"adaptive": _NONE},
  ),
  "titans_mag": _named("Titans MAG", _BESIDE, persistent=True),
  "titans_mal": _named("Titans MAL", _BESIDE),
  "hope": _named("Hope", _DEEP),
  "hope_attention": _named("Hope-Attention", _ATTENTION),
}
