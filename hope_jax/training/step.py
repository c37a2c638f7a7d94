"""The jitted training and evaluation steps, and the state they act on.

  loss = sum(w * cross entropy) / sum(w)     over the global batch, float32

Legend: B batch, T tokens, A accumulated microbatches.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.typing import ArrayPytree as Tree
from jax.sharding import Mesh

from hope_jax.config import Config
from hope_jax.models import language_model, parameters
from hope_jax.models.language_model import LanguageModel
from hope_jax.optim import registry as optimizers
from hope_jax.training import sharding

Batch = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
  """Everything a run needs to continue.

  Attributes:
    step: steps made so far, skipped ones included.
    fast: the model's fast state for every row; None unless it is carried from
      step to step.
    bad, bad_in_a_row: numbers of steps skipped because the loss or the gradient
      was not finite: in total, and consecutive ones up to now.
    offset: step s reads batch s + offset (rollbacks skip batches).

  Fields are arrays, or their shapes or shardings.
  """

  step: Tree
  params: Tree
  opt_state: Tree
  fast: Tree
  bad: Tree
  bad_in_a_row: Tree
  offset: Tree


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
  bad: jax.Array
  bad_in_a_row: jax.Array


class Compiled(NamedTuple):
  """The functions of one run, and the state's shapes and shardings."""

  init: Callable[[jax.Array], TrainState]
  train_step: Callable[[TrainState, Batch], tuple[TrainState, TrainMetrics]]
  eval_step: Callable[[Any, Batch], Sums]  # by position [T]
  abstract_state: TrainState


def batch_sums(
  model: LanguageModel,
  params: Tree,
  batch: Batch,
  fast: Tree = None,
  axis: int | None = None,
) -> tuple[Sums, Any]:
  """Loss and accuracy sums of one batch, and the fast state after it.

  `axis=0` sums over rows only, which gives the sums of each position, [T].
  """
  output = language_model.forward(
    model, params, batch["tokens"], state=fast, documents=batch.get("segments")
  )
  logits = output.logits.astype(jnp.float32)
  targets, weights = batch["targets"], batch["weights"]
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  correct = jnp.argmax(logits, axis=-1) == targets
  sums = Sums(weights * loss, weights * correct, weights)
  return jax.tree.map(lambda x: jnp.sum(x, axis=axis), sums), output.state


def _gradient(
  model: LanguageModel, params: Tree, batch: Batch, fast: Tree, accumulate: int
) -> tuple[Any, Sums, Any]:
  """Gradient of the mean loss, the sums, and the fast state after the batch,
  which is computed in `accumulate` parts."""
  total = jnp.maximum(jnp.sum(batch["weights"]), 1e-9)

  def mean_loss(params: Tree, part: Batch, fast: Tree) -> tuple[jax.Array, Any]:
    sums, fast = batch_sums(model, params, part, fast)
    return sums.loss / total, (sums, fast)

  grad = jax.grad(mean_loss, has_aux=True)
  if accumulate == 1:
    grads, (sums, fast) = grad(params, batch, fast)
    return grads, sums, fast

  def add(carry: Tree, part: tuple[Batch, Any]) -> tuple[Tree, Tree]:
    grads, (sums, fast) = grad(params, *part)
    return jax.tree.map(jnp.add, carry, (grads, sums)), fast

  zero = Sums(*[jnp.zeros((), jnp.float32)] * 3)
  start = (jax.tree.map(jnp.zeros_like, params), zero)
  parts = (
    jax.tree.map(lambda x: _split(x, 0, accumulate), batch),
    jax.tree.map(lambda x: _split(x, 1, accumulate), fast),
  )
  (grads, sums), fast = jax.lax.scan(add, start, parts)
  return grads, sums, jax.tree.map(lambda x: _merge(x, 1), fast)


def _split(x: jax.Array, rows: int, parts: int) -> jax.Array:
  """Splits axis `rows` into parts [A, ...]: part j takes rows j::A, so that
  every device keeps its own rows.  Arrays without that axis are repeated."""
  if x.ndim <= rows:
    return jnp.broadcast_to(x[None], (parts, *x.shape))
  shape = (*x.shape[:rows], -1, parts, *x.shape[rows + 1 :])
  return jnp.moveaxis(x.reshape(shape), rows + 1, 0)


def _merge(x: jax.Array, rows: int) -> jax.Array:
  """Inverse of `_split`."""
  if x.ndim <= rows + 1:
    return x[0]
  x = jnp.moveaxis(x, 0, rows + 1)
  return x.reshape(*x.shape[:rows], -1, *x.shape[rows + 2 :])


def _train_step(
  state: TrainState,
  batch: Batch,
  *,
  model: LanguageModel,
  optimizer: optax.GradientTransformation,
  rate: optax.Schedule,
  accumulate: int,
) -> tuple[TrainState, TrainMetrics]:
  grads, sums, fast = _gradient(
    model, state.params, batch, state.fast, accumulate
  )
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  grad_norm = optax.tree.norm(grads)
  is_good = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
  keep = functools.partial(jnp.where, is_good)
  old = state.params, state.opt_state, state.fast
  params, opt_state, fast = jax.tree.map(keep, (params, opt_state, fast), old)
  state = TrainState(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    fast=fast,
    bad=state.bad + ~is_good,
    bad_in_a_row=jnp.where(is_good, 0, state.bad_in_a_row + 1),
    offset=state.offset,
  )
  total = jnp.maximum(sums.weight, 1e-9)
  metrics = TrainMetrics(
    loss=sums.loss / total,
    accuracy=sums.correct / total,
    grad_norm=grad_norm,
    lr=jnp.asarray(rate(state.step - 1), jnp.float32),
    bad=state.bad,
    bad_in_a_row=state.bad_in_a_row,
  )
  return state, metrics


def _init_params(config: Config) -> Callable[[jax.Array], Any]:
  """The function key -> initial parameters, boxed."""
  model = LanguageModel(config.model)
  # The parameters do not depend on the number of tokens; tracing time does.
  tokens = jnp.zeros((1, min(2, config.data.sequence_length)), jnp.int32)
  return lambda key: model.init(key, tokens)["params"]


def _boxed_shapes(config: Config) -> Any:
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(_init_params(config), key)


def _laid_out(shapes: Tree, shardings: Tree) -> Any:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def abstract_params(config: Config, mesh: Mesh) -> Any:
  """Shapes and shardings of the parameters, without a training state."""
  boxed = _boxed_shapes(config)
  shapes = jax.eval_shape(nn.unbox, boxed)
  return _laid_out(shapes, sharding.param_shardings(boxed, shapes, mesh))


def make_eval_step(config: Config, params: Tree, mesh: Mesh) -> Callable:
  """Jitted (params, batch) -> `Sums` by position; `params`: `abstract_params`
  or arrays."""
  model = LanguageModel(config.model)
  of_params = jax.tree.map(lambda x: x.sharding, params)
  return jax.jit(
    lambda params, batch: batch_sums(model, params, batch, axis=0)[0],
    in_shardings=(of_params, sharding.batch_sharding(mesh)),
    out_shardings=sharding.replicated(mesh),
  )


def build(config: Config, mesh: Mesh) -> Compiled:
  """The jitted functions for `config` on `mesh`; nothing is allocated yet.

  The state is laid out abstractly first and then initialised in place, so
  that no device or host ever holds all of it.
  """
  boxed, steps = _boxed_shapes(config), config.train.steps
  optimizer = optimizers.make(
    config.opt, steps, parameters.kinds(boxed), config.model.cms.periods
  )

  def first_state(boxed: Tree) -> TrainState:
    params = nn.unbox(boxed)
    fast = None
    if config.train.carry_state:
      fast = language_model.init_state(
        config.model, config.data.batch_size, config.data.sequence_length
      )
    zero = jnp.zeros((), jnp.int32)
    opt_state = optimizer.init(params)
    return TrainState(zero, params, opt_state, fast, zero, zero, zero)

  def init(key: jax.Array) -> TrainState:
    return first_state(_init_params(config)(key))

  shapes = jax.eval_shape(first_state, boxed)
  everywhere = sharding.replicated(mesh)
  of_params = sharding.param_shardings(boxed, shapes.params, mesh)
  shardings = TrainState(
    step=everywhere,
    params=of_params,
    opt_state=optimizers.state_shardings(
      optimizer, shapes.opt_state, of_params, everywhere
    ),
    fast=jax.tree.map(lambda x: sharding.fast_sharding(x, mesh), shapes.fast),
    bad=everywhere,
    bad_in_a_row=everywhere,
    offset=everywhere,
  )
  abstract = _laid_out(shapes, shardings)
  train_step = functools.partial(
    _train_step,
    model=LanguageModel(config.model),
    optimizer=optimizer,
    rate=optimizers.schedule(config.opt, steps),
    accumulate=config.train.accumulate,
  )
  return Compiled(
    init=jax.jit(init, out_shardings=shardings),
    train_step=jax.jit(
      train_step,
      in_shardings=(shardings, sharding.batch_sharding(mesh)),
      out_shardings=(shardings, everywhere),
      donate_argnums=0,
    ),
    eval_step=make_eval_step(config, abstract.params, mesh),
    abstract_state=abstract,
  )


def count_parameters(params: Tree) -> int:
  """Number of slow weights."""
  return sum(x.size for x in jax.tree.leaves(params))
