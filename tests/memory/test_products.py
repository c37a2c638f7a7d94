"""Products with slow weights: values, gradients, and how they are written."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.config import from_config_dict
from hope_jax.memory import products
from hope_jax.models import layers


def inputs(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  x, weight, probe = (
    jnp.asarray(rng.normal(size=shape), dtype)
    for shape in ((2, 3, 5), (5, 7), (2, 3, 7))
  )
  return x, weight, probe


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_the_plain_product(dtype):
  x, weight, probe = inputs(dtype)
  y, pull = jax.vjp(products.matmul, x, weight)
  plain, plain_pull = jax.vjp(jnp.matmul, x, weight)
  found, wanted = (y, *pull(probe)), (plain, *plain_pull(probe))
  for a, b in zip(found, wanted, strict=True):
    assert a.dtype == dtype
    np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6, atol=1e-6
    )


def test_gradient_of_a_gradient():
  x, weight, probe = inputs()

  def learned(product, x, weight):
    """The loss after a step of gradient descent, as in a fast level."""
    loss = lambda w: jnp.sum(jnp.tanh(product(x, w)) * probe)
    return loss(weight - 0.1 * jax.grad(loss)(weight))

  found, wanted = (
    jax.grad(lambda *at, p=product: learned(p, *at), (0, 1))(x, weight)
    for product in (products.matmul, jnp.matmul)
  )
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_dense_layers_do_not_transpose_what_comes_back():
  model = from_config_dict({}).model
  layer = layers.dense(7, model, ("embed", "heads"), None)
  x, _, probe = inputs()
  params = nn.unbox(layer.init(jax.random.key(0), x))

  def back(params, probe):
    return jax.vjp(lambda p: layer.apply(p, x), params)[1](probe)

  jaxpr = str(jax.make_jaxpr(back)(params, probe))
  assert "dot_general" in jaxpr
  assert "transpose[" not in jaxpr
