"""What the tests of the kernels share."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_rule import linear_rule
from pallas_kernels.linear_rule.reference import Rates, State, Tokens


def random_inputs(
  shape=(1, 2, 70, 5, 3),
  *,
  momentum=True,
  erase=True,
  zeros=False,
  resets=False,
  dtype=np.float64,
):
  """Random arguments of `linear_rule` as a dict; options drop or spice them."""
  b, h, t, k, e = shape
  rng = np.random.default_rng(0)
  keys = rng.normal(size=(b, h, t, k))
  inputs = dict(
    x=keys / np.linalg.norm(keys, axis=-1, keepdims=True),
    u=rng.normal(size=(b, h, t, e)),
    queries=rng.normal(size=(b, h, t, k)) / k**0.5,
    weight=rng.normal(size=(b, h, e, k)),
    momentum=rng.normal(size=(b, h, e, k)),
    retention=rng.uniform(0.8, 1, size=(b, h, t)),
    momentum_decay=rng.uniform(0.3, 1, size=(b, h, t)),
    step_size=rng.uniform(size=(b, h, t)),
    erase=rng.uniform(size=(b, h, t)),
  )
  if zeros:  # alone, side by side, in the first and in the last token
    for token in (0, 5, 6, 18, t - 1):
      inputs["retention"][:, 0, token] = 0
    for token in (0, 3, 4, 18, 50):
      inputs["momentum_decay"][:, 0, token] = 0
    for name in ("retention", "momentum_decay"):  # and what is nearly zero
      inputs[name][:, 0, 7:13] = 10.0 ** -np.array([30, 0, 20, 12, 5, 8])
      inputs[name][:, 1, t // 2] = 1e-7
  inputs = {name: jnp.asarray(v, dtype) for name, v in inputs.items()}
  if not momentum:
    inputs |= dict(momentum=None, momentum_decay=None)
  if not erase:
    inputs["erase"] = None
  inputs["reset"] = None
  if resets:  # also next to zeros, and in the first token of a head
    reset = rng.uniform(size=(b, h, t)) < 0.1
    reset[:, 1, 0] = True
    inputs["reset"] = jnp.asarray(reset)
  return inputs


def call(inputs, **options):
  inputs = dict(inputs)
  return linear_rule(inputs.pop("x"), inputs.pop("u"), **inputs, **options)


def arguments(inputs):
  """What the implementations take."""
  parts = Tokens, Rates, State
  return tuple(
    part(**{name: inputs[name] for name in part._fields}) for part in parts
  )
