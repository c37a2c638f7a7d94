"""The sequence layers by name, and what the rest of the code has to know.

Pure data, without JAX, so that a configuration is checked at once.  The same
names are the keys of `models/registry.py`, which has the modules.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
  """What distinguishes a sequence layer outside of its own module.

  Attributes:
    blocks: the layers that take turns, block by block, if it is a pattern.
    attention: softmax attention over a cache of keys and values: `alone`,
      `beside` a memory, or `none`.
    needs_window: whether `model.attention_window` must be set.
    persistent: whether `model.persistent_tokens` may be set.
    rotary: whether positions turn pairs of channels of a head.
    head_dim: the width of its heads, whatever `model.num_heads`; 0: by that.
    pairs: whether it has keys and values of the model's width for a CMS.
    chunks: whether its memory is written by chunks of `memory.chunk_length`.
    adaptive: whether `memory.adaptive` may name projections.
    learns: whether it has a fast level `memory`, written at a rate of its own.
    kernels: values of `memory.implementation` beside `auto` and `xla`.
    memory: fields of `MemoryConfig` -> the values that it can take.
  """

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
_SLOW_PROJECTIONS = {"adaptive": ((),)}
_ATTENTION = Traits(attention="alone", rotary=True)
_DEEP = Traits(chunks=True, learns=True, adaptive=True, kernels=_ON_TPU)
_TTT = Traits(chunks=True, learns=True, rotary=True)
_LINEAR = Traits(pairs=False, kernels=(*_ON_TPU, "pallas_gpu"))
_BESIDE = dataclasses.replace(
  _DEEP, attention="beside", rotary=True, needs_window=True
)

LAYERS: dict[str, Traits] = {
  "transformer": _ATTENTION,
  "hope_attention": _ATTENTION,
  "titans": _DEEP,
  "titans_mac": dataclasses.replace(
    _BESIDE,
    needs_window=False,
    persistent=True,
    adaptive=False,
    kernels=(),
    memory=_SLOW_PROJECTIONS,
  ),
  "titans_mag": dataclasses.replace(_BESIDE, persistent=True),
  "titans_mal": _BESIDE,
  "hope": _DEEP,
  "dla": _DEEP,
  "memora": dataclasses.replace(
    _DEEP,
    adaptive=False,
    kernels=(),
    memory={
      **_SLOW_PROJECTIONS,
      "architecture": ("mlp",),
      "target": ("shared",),
      "delta_rule": ("none",),
      "momentum": ("none",),
      "setting": ("chunk_l2", "chunk_dot"),
    },
  ),
  "ttt_linear": _TTT,
  "ttt_mlp": _TTT,
  "retnet": dataclasses.replace(_LINEAR, rotary=True),
  "deltanet": _LINEAR,
  "gated_deltanet": _LINEAR,
  "comba": _LINEAR,
  "mamba2": _LINEAR,
  "mamba": Traits(pairs=False),
  "rwkv7": Traits(pairs=False, head_dim=64),
  "lstm": Traits(pairs=False),
  "srwm": Traits(pairs=False, learns=True),
  "samba": Traits(
    blocks=("mamba", "transformer"), attention="alone", rotary=True, pairs=False
  ),
}
