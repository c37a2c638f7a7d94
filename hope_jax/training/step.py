"""The jitted training and evaluation steps, and the state they act on.

  loss = sum(w * cross entropy) / sum(w)     over the global batch, float32

Legend: B batch, T tokens, A accumulated microbatches.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from hope_jax.config import Config
from hope_jax.models.language_model import LanguageModel, ModelOutput
from hope_jax.optim import adamw
from hope_jax.training import sharding

Batch = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
  """Everything a run needs to continue; step: updates made so far.

  Fields are arrays, or their shapes or shardings.
  """

  step: Any
  params: Any
  opt_state: Any


class Sums(NamedTuple):
  """Sums over targets: weighted loss, weighted hits, weights (float32)."""

  loss: jax.Array
  correct: jax.Array
  weight: jax.Array


class TrainMetrics(NamedTuple):
  """Scalars of one update; grad_norm is before clipping."""

  loss: jax.Array
  accuracy: jax.Array
  grad_norm: jax.Array
  lr: jax.Array


class Compiled(NamedTuple):
  """The functions of one run, and the state's shapes and shardings."""

  init: Callable[[jax.Array], TrainState]
  train_step: Callable[[TrainState, Batch], tuple[TrainState, TrainMetrics]]
  eval_step: Callable[[Any, Batch], Sums]
  abstract_state: TrainState


def forward(
  model: nn.Module, params: Any, tokens_BT: jax.Array, **kwargs: Any
) -> ModelOutput:
  """The model as a function of its parameters."""
  output = model.apply({"params": params}, tokens_BT, **kwargs)
  return cast(ModelOutput, output)


def batch_sums(model: nn.Module, params: Any, batch: Batch) -> Sums:
  """Loss and accuracy sums of one batch."""
  logits = forward(
    model, params, batch["tokens"], segments=batch.get("segments")
  ).logits.astype(jnp.float32)
  targets, weights = batch["targets"], batch["weights"]
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  correct = jnp.argmax(logits, axis=-1) == targets
  return Sums(
    jnp.sum(weights * loss), jnp.sum(weights * correct), jnp.sum(weights)
  )


def _gradient(
  model: nn.Module, params: Any, batch: Batch, accumulate: int
) -> tuple[Any, Sums]:
  """Gradient of the mean loss, and the sums, over `accumulate` parts."""
  total = jnp.maximum(jnp.sum(batch["weights"]), 1e-9)

  def mean_loss(params: Any, part: Batch) -> tuple[jax.Array, Sums]:
    sums = batch_sums(model, params, part)
    return sums.loss / total, sums

  grad = jax.grad(mean_loss, has_aux=True)
  if accumulate == 1:
    return grad(params, batch)

  def split(x: jax.Array) -> jax.Array:
    # Part j takes rows j::A, so that every device keeps its own rows.
    x = x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:])
    return jnp.swapaxes(x, 0, 1)

  def add(carry: Any, part: Batch) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, carry, grad(params, part)), None

  zero = Sums(*[jnp.zeros((), jnp.float32)] * 3)
  start = (jax.tree.map(jnp.zeros_like, params), zero)
  carry, _ = jax.lax.scan(add, start, jax.tree.map(split, batch))
  return carry


def _train_step(
  state: TrainState,
  batch: Batch,
  *,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  rate: optax.Schedule,
  accumulate: int,
) -> tuple[TrainState, TrainMetrics]:
  grads, sums = _gradient(model, state.params, batch, accumulate)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  total = jnp.maximum(sums.weight, 1e-9)
  metrics = TrainMetrics(
    loss=sums.loss / total,
    accuracy=sums.correct / total,
    grad_norm=optax.tree.norm(grads),
    lr=jnp.asarray(rate(state.step), jnp.float32),
  )
  params = optax.apply_updates(state.params, updates)
  return TrainState(state.step + 1, params, opt_state), metrics


def build(config: Config, mesh: Mesh) -> Compiled:
  """Everything jitted for `config` over `mesh`; nothing is allocated yet.

  The state is laid out abstractly first and then initialised in place, so
  that no device or host ever holds all of it.
  """
  model = LanguageModel(config.model)
  optimizer = adamw.make(config.opt, config.train.steps)
  tokens = jnp.zeros((1, config.data.sequence_length), jnp.int32)

  def init_params(key: jax.Array) -> Any:
    return model.init(key, tokens)["params"]

  def init(key: jax.Array) -> TrainState:
    params = nn.unbox(init_params(key))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

  key = jax.eval_shape(lambda: jax.random.key(0))
  abstract = jax.eval_shape(init, key)
  everywhere = sharding.replicated(mesh)
  of_params = sharding.param_shardings(
    jax.eval_shape(init_params, key), abstract.params, mesh
  )
  shardings = TrainState(
    everywhere,
    of_params,
    adamw.state_shardings(optimizer, abstract.opt_state, of_params, everywhere),
  )
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    abstract,
    shardings,
  )
  train_step = functools.partial(
    _train_step,
    model=model,
    optimizer=optimizer,
    rate=adamw.schedule(config.opt, config.train.steps),
    accumulate=config.train.accumulate,
  )
  rows = sharding.batch_sharding(mesh)
  return Compiled(
    init=jax.jit(init, out_shardings=shardings),
    train_step=jax.jit(
      train_step,
      in_shardings=(shardings, rows),
      out_shardings=(shardings, everywhere),
      donate_argnums=0,
    ),
    eval_step=jax.jit(
      functools.partial(batch_sums, model),
      in_shardings=(of_params, rows),
      out_shardings=everywhere,
    ),
    abstract_state=abstract,
  )


def count_parameters(params: Any) -> int:
  """Number of slow weights."""
  return sum(x.size for x in jax.tree.leaves(params))
