"""The LSTM against its equations, one token after the other."""

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.models import lstm
from tests.models.test_equations import perturbed
from tests.support.jit import fast_jit
from tests.support.models import B, T, init, make


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def rms(x, scale):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def feed_forward(p, n):
  gate, up, down = (p[name]["kernel"] for name in ("gate", "up", "down"))
  return (n @ gate * sigmoid(n @ gate) * (n @ up)) @ down


def layer(p, n, documents):
  """n [T, D] of one sequence -> y."""
  width = n.shape[1]
  c = h = np.zeros(width)
  outputs = []
  for t, x in enumerate(n):
    if t and documents[t] != documents[t - 1]:
      c = h = np.zeros(width)
    z = x @ p["projections"]["kernel"] + h @ p["recurrent_kernel"]
    i, f, g, o = np.split(z + p["recurrent_bias"], 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(c)
    outputs.append(h)
  return np.stack(outputs)


def plain_model(params, tokens, documents):
  """Logits [T, V] of one sequence."""
  table = params["embed"]["embedding"]
  x = table[tokens]
  for number in range(params["blocks"]["norm_ffn"]["scale"].shape[0]):
    p = jax.tree.map(lambda w, number=number: w[number], params["blocks"])
    x = x + layer(p["mixer"], rms(x, p["norm_mixer"]["scale"]), documents)
    x = x + feed_forward(p["ffn"], rms(x, p["norm_ffn"]["scale"]))
  return rms(x, params["norm_out"]["scale"]) @ table.T


def test_lstm_equals_its_equations():
  model, params, tokens = init(make("lstm"))
  params = perturbed(params)
  documents = np.repeat([0, 1, 2], [9, 1, T - 10])
  batch = jnp.asarray(documents)[None].repeat(B, 0)
  logits = fast_jit(model.apply)({"params": params}, tokens, None, batch).logits
  exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  for row in range(B):
    expected = plain_model(exact, np.asarray(tokens[row]), documents)
    np.testing.assert_allclose(logits[row], expected, atol=1e-5)


def test_forget_gate_starts_open():
  _, params, _ = init(make("lstm"))
  gates = params["blocks"]["mixer"]["recurrent_bias"].reshape(2, 4, -1)
  np.testing.assert_array_equal(gates[:, 1], 1)
  np.testing.assert_array_equal(gates[:, [0, 2, 3]], 0)


def test_first_document_continues_the_state():
  config = make("lstm", num_layers=1)
  network = lstm.LSTM(config)
  x = jax.random.normal(jax.random.key(0), (B, 12, config.width))
  params = network.init(jax.random.key(1), x)
  documents = jnp.repeat(jnp.arange(3), jnp.array([5, 3, 4]))[None].repeat(B, 0)
  whole = network.apply(params, x, None, documents).y
  state = lstm.init_state(config, B)
  parts = []
  for piece in (slice(0, 4), slice(4, 7), slice(7, 12)):
    here = documents[:, piece] - documents[:, max(piece.start - 1, 0), None]
    out = network.apply(params, x[:, piece], state, here)
    parts.append(out.y)
    state = out.state
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-6)
