"""Whole models against their equations (spec 02, section 3) in plain numpy."""

import jax
import numpy as np

from tests.models.test_models import init, make


def silu(x):
  return x / (1 + np.exp(-x))


def rms(x, scale):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def convolve(x, kernel):
  """y_t = sum_j kernel_j x_{t-j} along axis 0."""
  y = np.zeros_like(x)
  for t in range(len(x)):
    for j in range(min(t + 1, len(kernel))):
      y[t] += kernel[j] * x[t - j]
  return y


def titans_mixer(p, n, heads):
  """The sequence layer with M_0 in place of the memory: [T, D] -> [T, D]."""
  q = silu(
    convolve(
      n @ p["projections"]["query"]["kernel"],
      p["projections"]["conv_query"]["kernel"],
    )
  )
  outputs = []
  for head, q_TK in enumerate(np.split(q, heads, axis=1)):
    q_TK = q_TK / np.sqrt(np.sum(q_TK**2, axis=1, keepdims=True) + 1e-6)
    hidden = silu(q_TK @ p["initial"]["memory_hidden"][head].T)
    o = q_TK + hidden @ p["initial"]["memory_output"][head].T
    outputs.append(rms(o, p["readout"]["norm_scale"]))
  gate = silu(n @ p["readout"]["gate"]["kernel"])
  return (np.hstack(outputs) * gate) @ p["readout"]["output"]["kernel"]


def test_twin_of_titans_equals_its_equations():
  config = make("titans", inner_rates="off")
  model, params, tokens = init(config)
  logits = model.apply({"params": params}, tokens).logits
  to_numpy = lambda x: np.asarray(x, np.float64)
  embedding = to_numpy(params["embed"]["embedding"])
  expected = []
  for sequence in np.asarray(tokens):
    x = embedding[sequence]
    for layer in range(config.num_layers):
      p = jax.tree.map(lambda x, i=layer: to_numpy(x[i]), params["blocks"])
      n = rms(x, p["norm_mixer"]["scale"])
      x = x + titans_mixer(p["mixer"], n, config.num_heads)
      n = rms(x, p["norm_ffn"]["scale"])
      ffn = {name: w["kernel"] for name, w in p["ffn"].items()}
      x = x + (silu(n @ ffn["gate"]) * (n @ ffn["up"])) @ ffn["down"]
    expected.append(rms(x, to_numpy(params["norm_out"]["scale"])) @ embedding.T)
  np.testing.assert_allclose(logits, np.stack(expected), atol=2e-5)
