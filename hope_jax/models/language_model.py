"""The language model: embedding, scanned blocks, final norm, logits.

Legend: B batch, T tokens, D model, V vocab.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import ArrayPytree as Tree

from hope_jax.config import ModelConfig
from hope_jax.memory import products
from hope_jax.models import (
  cms,
  layers,
  next_token,
  next_token_levels,
  registry,
)
from hope_jax.models.fast_state import BlockState
from hope_jax.models.parameters import boxed


class ModelOutput(NamedTuple):
  """logits [B, T, V] in float32; the new state (None if none was given)."""

  logits: jax.Array
  state: Tree


def init_state(
  config: ModelConfig, batch_size: int, read_size: int | None = None
) -> Tree:
  """Fast state of all layers before the first token, layers on axis 0.

  With a `read_size` every call must bring that many tokens; memories whose
  chunk length divides it then run as fast as without a state.
  """
  learns = next_token_levels.is_on(config)
  if read_size and learns and next_token_levels.learning_layers(config) > 1:
    # Sequence layers above the first learning layer read chunk by chunk.
    read_size = min(read_size, config.cms.fast_lengths[0])
  one = registry.init_state(config, batch_size, read_size)
  turns = config.num_layers // len(config.blocks)
  state = jax.tree.map(
    lambda x: jnp.broadcast_to(x[None], (turns, *x.shape)), one
  )
  if learns:
    return next_token_levels.init_state(config, state.mixer, batch_size)
  return state


def forward(
  model: "LanguageModel",
  params: Tree,
  tokens_BT: jax.Array,
  *,
  state: Tree = None,
  documents: jax.Array | None = None,
) -> ModelOutput:
  """The model as a function of its parameters, with all levels learning."""
  config = model.config

  def apply(tokens: jax.Array, state: Tree, documents: Tree) -> ModelOutput:
    output = model.apply(
      {"params": params}, tokens, state=state, documents=documents
    )
    return cast(ModelOutput, output)

  if not next_token_levels.is_on(config):
    return apply(tokens_BT, state, documents)
  is_whole = state is None
  if is_whole:
    batch_size, length = tokens_BT.shape
    chunk_length = config.cms.fast_lengths[0]
    in_chunks = chunk_length if length % chunk_length == 0 else None
    state = init_state(config, batch_size, in_chunks)
  parts = next_token.Parts(
    apply,
    functools.partial(_begin, config, params),
    _top(config, params),
    functools.partial(_finish, config=config),
  )
  return ModelOutput(
    *next_token.forward(
      parts,
      tokens_BT,
      config=config,
      state=state,
      documents=documents,
      is_whole=is_whole,
    )
  )


def _begin(
  config: ModelConfig,
  params: Tree,
  tokens_BT: jax.Array,
  mixer: Tree,
  documents: jax.Array | None,
) -> tuple[jax.Array, Tree]:
  """The model below the first level that learns from the next token.

  Args:
    mixer: fast state of the first L - K + 1 sequence layers, or None.

  Returns:
    The residual stream [B, T, D] after these layers, and their new state.
  """
  count = config.num_layers - next_token_levels.learning_layers(config)
  x_BTD = _embed(config, params["embed"]["embedding"], tokens_BT)
  below, mixer_below, after = None, None, None
  if count:
    below = jax.tree.map(lambda x: x[:count], params["blocks"])
    if mixer is not None:
      mixer_below = jax.tree.map(lambda x: x[:count], mixer)
    x_BTD, after = _read_layers(
      config, below, x_BTD, mixer_below, levels={}, documents=documents
    )
  of_first = lambda x: x[count]
  one: Any = registry.make_block(config, half=True)
  state = None
  if mixer is not None:
    state = BlockState(jax.tree.map(of_first, mixer), {})
  x_BTD, state = one.apply(
    {"params": jax.tree.map(of_first, params["blocks"])},
    x_BTD,
    state,
    documents,
  )
  if state is None:
    return x_BTD, None
  last = jax.tree.map(lambda x: x[None], state.mixer)
  if after is None:
    return x_BTD, last
  return x_BTD, jax.tree.map(lambda *x: jnp.concatenate(x), after, last)


def _read_layers(
  config: ModelConfig,
  params: Tree,
  x_BTD: jax.Array,
  mixer: Tree,
  *,
  levels: Tree,
  documents: jax.Array | None,
) -> tuple[jax.Array, Tree]:
  """(stream, fast state after) of consecutive layers; `params`, `mixer` and
  `levels` have the layers' axis first."""

  def layer(x_BTD: jax.Array, xs: Tree) -> tuple[jax.Array, Tree]:
    params, mixer, levels = xs
    state = None
    if mixer is not None:
      state = BlockState(mixer, {}, given=levels)
    apply: Any = registry.make_block(config).apply
    x_BTD, state = apply({"params": params}, x_BTD, state, documents)
    return x_BTD, state and state.mixer

  return jax.lax.scan(_remat(config, layer), x_BTD, (params, mixer, levels))


def _top(config: ModelConfig, params: Tree) -> Tree:
  """The parameters of `_finish`."""
  count = next_token_levels.learning_layers(config)
  top = {"blocks": jax.tree.map(lambda x: x[-count:], params["blocks"])}
  names = "norm_out", "embed" if config.tied_embeddings else "lm_head"
  return top | {name: params[name] for name in names}


def _finish(
  top: Tree,
  x_BTD: jax.Array,
  levels: Tree,
  mixer: Tree,
  documents: jax.Array | None,
  *,
  config: ModelConfig,
) -> tuple[jax.Array, Tree]:
  """The rest of the model, from the CMS of the first of the last K layers on:
  logits [B, T, V], and the fast state of the K - 1 sequence layers after it.

  Args:
    top: parameters, from `_top`.
    x_BTD: the residual stream that this CMS reads.
    levels: `GivenLevel`s of these K layers, whose axis comes first.
    mixer: fast state of the K - 1 sequence layers, whose axis comes first; or
      None.
  """
  first = jax.tree.map(lambda x: x[0], (top["blocks"], levels))
  rest = jax.tree.map(lambda x: x[1:], (top["blocks"], levels))
  levels_of_first: Any = cms.ContinuumMemory(config)
  x_BTD, _ = levels_of_first.apply(
    {"params": first[0]["cms"]},
    x_BTD,
    None,
    BlockState(None, {}, given=first[1]),
    documents,
  )
  if mixer is not None:
    params, levels = rest
    x_BTD, mixer = _read_layers(
      config, params, x_BTD, mixer, levels=levels, documents=documents
    )
  norm: Any = layers.rms_norm(config, "norm_out")
  x_BTD = norm.apply({"params": top["norm_out"]}, x_BTD)
  if config.tied_embeddings:
    return _tied_logits(config, top["embed"]["embedding"], x_BTD), mixer
  output: Any = _output(config)
  logits = output.apply({"params": top["lm_head"]}, x_BTD)
  return logits.astype(jnp.float32), mixer


def _embed(
  config: ModelConfig, table_VD: jax.Array, tokens_BT: jax.Array
) -> jax.Array:
  """The residual stream [B, T, D] that the first layer reads.

  The table is not split along `embed` here: rows split over several devices
  would be gathered in full on each device.
  """
  table_VD = nn.with_logical_constraint(
    table_VD.astype(jnp.dtype(config.dtype)), ("vocab", None)
  )
  return layers.residual(jnp.take(table_VD, tokens_BT, axis=0))


def _remat(
  config: ModelConfig, layer: Any, transform: Callable = jax.checkpoint
) -> Tree:
  """`layer`, for a scan, with the configured rematerialisation."""
  if config.remat == "none":
    return layer
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return transform(
    layer, prevent_cse=False, policy=policy if config.remat == "dots" else None
  )


@jax.named_scope("embed")
def _tied_logits(
  config: ModelConfig, table_VD: jax.Array, x_BTD: jax.Array
) -> jax.Array:
  """Logits x E^T in float32, from the embedding E."""
  dtype = jnp.dtype(config.dtype)
  logits = products.matmul(x_BTD.astype(dtype), table_VD.astype(dtype).T)
  return logits.astype(jnp.float32)


def _output(config: ModelConfig) -> nn.Dense:
  """The map to the logits where the embedding is not tied to it."""
  return layers.dense(config.vocab_size, config, ("embed", "vocab"), "lm_head")


class LanguageModel(nn.Module):
  """tokens [B, T] -> logits [B, T, V] of the next token.

  `state` (from `init_state` or an earlier call) continues a sequence;
  `documents` [B, T] are document numbers; nothing passes from one document to
  another, and 0 is the document that `state` belongs to.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    state: Tree = None,
    documents: jax.Array | None = None,
  ) -> ModelOutput:
    cfg = self.config
    embed = nn.Embed(
      cfg.vocab_size,
      cfg.width,
      dtype=jnp.dtype(cfg.dtype),
      embedding_init=boxed(
        nn.initializers.normal(layers.INIT_STD), ("vocab", "embed")
      ),
      name="embed",
    )
    x_BTD = _embed(cfg, embed.embedding, tokens_BT)
    block, arguments = registry.stack(cfg)
    layer = _remat(cfg, block, nn.remat)
    scan: Any = nn.scan  # its annotations do not allow a tuple of axes
    layer = scan(
      layer,
      variable_axes={"params": 0, "dynamics": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast),
      length=cfg.num_layers // len(cfg.blocks),
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    ends = registry.layer_of(cfg)
    blocks = layer(*arguments, name="blocks")
    stream, state = blocks(ends.begin(cfg, x_BTD), state, documents)
    x_BTD = ends.end(cfg, stream)
    if cfg.tied_embeddings:
      logits = _tied_logits(cfg, embed.embedding, x_BTD)
    else:
      logits = _output(cfg)(x_BTD).astype(jnp.float32)
    return ModelOutput(logits, state)
