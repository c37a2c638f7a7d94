"""The language model: embedding, scanned blocks, final norm, logits.

Legend: B batch, T tokens, D model, V vocab.
"""

import functools
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from hope_jax.model_config import ModelConfig
from hope_jax.models import block, cms, layers, next_token, rwkv7


class ModelOutput(NamedTuple):
  """logits [B, T, V] in float32; the new state, None if none was given."""

  logits: jax.Array
  state: Any


def init_state(
  config: ModelConfig, batch_size: int, piece_length: int | None = None
) -> Any:
  """Fast state of all layers before the first token, layers on axis 0.

  With a `piece_length` every call must bring so many tokens; memories whose
  chunks divide it then learn as fast as without a state.
  """
  if piece_length and next_token.is_on(config):  # read chunk by chunk
    piece_length = min(piece_length, config.cms.fast_lengths[0])
  one = block.init_state(config, batch_size, piece_length)
  turns = config.num_layers // len(config.pattern)
  state = jax.tree.map(
    lambda x: jnp.broadcast_to(x[None], (turns, *x.shape)), one
  )
  if next_token.is_on(config):
    return next_token.init_state(config, state.mixer, batch_size)
  return state


def forward(
  model: "LanguageModel",
  params: Any,
  tokens_BT: jax.Array,
  *,
  state: Any = None,
  segments: jax.Array | None = None,
) -> ModelOutput:
  """The model as a function of its parameters, all its levels learning."""
  config = model.config

  def apply(tokens: jax.Array, state: Any, segments: Any) -> ModelOutput:
    output = model.apply(
      {"params": params}, tokens, state=state, segments=segments
    )
    return cast(ModelOutput, output)

  if not next_token.is_on(config):
    return apply(tokens_BT, state, segments)
  is_fresh = state is None
  if is_fresh:
    batch_size, length = tokens_BT.shape
    chunk_length = config.cms.fast_lengths[0]
    in_chunks = chunk_length if length % chunk_length == 0 else None
    state = init_state(config, batch_size, in_chunks)
  logits, state = next_token.forward(
    apply,
    functools.partial(finish, config, params),
    params,
    tokens_BT,
    config=config,
    state=state,
    segments=segments,
  )
  return ModelOutput(logits, None if is_fresh else state)


def finish(
  config: ModelConfig,
  params: Any,
  x_BTD: jax.Array,
  levels: Any,
  mixer: Any,
  segments: jax.Array | None,
) -> jax.Array:
  """Logits [B, T, V] from where the first of the last K layers' CMS reads.

  Args:
    x_BTD: the residual stream there.
    levels: `GivenState`s of these layers, K first.
    mixer: fast state of the sequence layers after it, K - 1 first.
  """
  count = jax.tree.leaves(levels)[0].shape[0]
  last = jax.tree.map(lambda x: x[-count:], params["blocks"])
  first = jax.tree.map(lambda x: x[0], (last, levels))
  rest = jax.tree.map(lambda x: x[1:], (last, levels))
  levels_of_first: Any = cms.ContinuumMemory(config)
  x_BTD, _ = levels_of_first.apply(
    {"params": first[0]["cms"]}, x_BTD, None, first[1], segments
  )

  def layer(x_BTD: jax.Array, xs: Any) -> tuple[jax.Array, None]:
    (params, levels), mixer = xs
    state = block.BlockState(mixer, levels)
    block_apply: Any = block.Block(config).apply
    return block_apply({"params": params}, x_BTD, state, segments)[0], None

  if count > 1:
    if config.remat != "none":
      layer = jax.checkpoint(layer)
    x_BTD, _ = jax.lax.scan(layer, x_BTD, (rest, mixer))
  norm: Any = layers.rms_norm(config, "norm_out")
  x_BTD = norm.apply({"params": params["norm_out"]}, x_BTD)
  if not config.tied_embeddings:
    output: Any = _output(config)
    logits = output.apply({"params": params["lm_head"]}, x_BTD)
    return logits.astype(jnp.float32)
  dtype = jnp.dtype(config.dtype)
  table_VD = params["embed"]["embedding"].astype(dtype)
  logits = jnp.dot(x_BTD.astype(dtype), table_VD.T)
  return logits.astype(jnp.float32)


def _output(config: ModelConfig) -> nn.Dense:
  """Logits where the embedding does not read them."""
  return layers.dense(config.vocab_size, config, ("embed", "vocab"), "lm_head")


class LanguageModel(nn.Module):
  """tokens [B, T] -> logits [B, T, V] of the next token.

  `state` (from `init_state` or an earlier call) continues a sequence;
  `segments` [B, T] are document numbers: nothing passes from one to another;
  0 is the document that `state` belongs to.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    state: Any = None,
    segments: jax.Array | None = None,
  ) -> ModelOutput:
    cfg = self.config
    embed = nn.Embed(
      cfg.vocab_size,
      cfg.width,
      dtype=jnp.dtype(cfg.dtype),
      embedding_init=nn.with_logical_partitioning(
        nn.initializers.normal(layers.INIT_STD), ("vocab", "embed")
      ),
      name="embed",
    )
    # The lookup's table is whole along `embed`: a row that lies on several
    # devices would be gathered whole on all of them.
    table_VD = nn.with_logical_constraint(
      embed.embedding.astype(jnp.dtype(cfg.dtype)), ("vocab", None)
    )
    x_BTD = nn.with_logical_constraint(
      jnp.take(table_VD, tokens_BT, axis=0), ("batch", "length", "act")
    )
    blocks = len(cfg.pattern)
    layer: Any = block.Turn if blocks > 1 else block.Block
    if cfg.remat != "none":
      policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
      layer = nn.remat(
        layer,
        prevent_cse=False,
        policy=policy if cfg.remat == "dots" else None,
      )
    scan: Any = nn.scan  # its annotations know no tuple of axes
    layer = scan(
      layer,
      variable_axes={"params": 0, "dynamics": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast),
      length=cfg.num_layers // blocks,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    stream: Any = x_BTD
    if cfg.is_rwkv7:
      x_BTD = layers.norm(cfg, "norm_in")(x_BTD)
      stream = x_BTD, rwkv7.first_depth(x_BTD)
    stream, state = layer(cfg, name="blocks")(stream, state, segments)
    x_BTD = stream[0] if cfg.is_rwkv7 else stream
    x_BTD = layers.norm(cfg, "norm_out")(x_BTD)
    read = embed.attend if cfg.tied_embeddings else _output(cfg)
    return ModelOutput(read(x_BTD).astype(jnp.float32), state)
