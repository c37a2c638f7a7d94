import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.config import OptConfig
from hope_jax.optim import registry
from hope_jax.optim.roles import Kind

PARAMS = {
  "embed": {"embedding": jnp.ones((6, 4))},
  "blocks": {
    "norm_mixer": {"scale": jnp.ones((2, 4))},
    "mixer": {
      "query": {"kernel": jnp.ones((2, 4, 4))},
      "conv_query": {"kernel": jnp.ones((2, 3, 4))},
      "initial": {"memory_output": jnp.ones((2, 3, 4, 4))},
      "gates": {"eta": {"kernel": jnp.ones((2, 4, 3))}},
      "rate": jnp.ones((2, 3)),
    },
    "cms": {"level_0": {"learn_rate": jnp.ones((2,))}},
  },
  "norm_out": {"scale": jnp.ones((4,))},
}
ROLES = {
  "norm_mixer": "norm",
  "norm": "norm",
  "norm_out": "norm",
  "conv_query": "conv",
  "initial": "initial",
  "gates": "gate",
  "learn_rate": "rate",
  "share": "rate",
}


def kinds(params):
  """`Kind`s as the model's parameters of these names have them."""

  def kind(path, value):
    names = path_names(path)
    words = [name.rstrip("_0123456789") for name in names]
    role = next((ROLES[word] for word in words if word in ROLES), "weight")
    levels = [name.rpartition("_")[2] for name in names[1:]]
    owner = next((f"cms_{i}" for i in levels if i.isdigit()), "projections")
    return Kind(role, (owner,), value.ndim - ("blocks" in names))

  return jax.tree_util.tree_map_with_path(kind, params)


def path_names(path):
  return tuple(str(getattr(key, "key", key)) for key in path)


def make(config, steps, params=PARAMS, periods=None):
  return registry.make(config, steps, kinds(params), periods or {})


def flat(tree):
  return {
    "/".join(path_names(path)): value
    for path, value in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_decay_mask_spares_memories_norms_convolutions_vectors():
  mask = flat(registry.decay_mask(kinds(PARAMS)))
  assert {name for name, decayed in mask.items() if decayed} == {
    "embed/embedding",
    "blocks/mixer/query/kernel",
  }


def test_groups_put_initial_states_and_gates_apart():
  groups = flat(registry.groups(kinds(PARAMS), {}))
  assert {name for name, group in groups.items() if group == "memory"} == {
    "blocks/mixer/initial/memory_output",
    "blocks/mixer/gates/eta/kernel",
    "blocks/cms/level_0/learn_rate",
  }


def test_optimizer_scales_the_memory_group_and_decays_by_mask():
  config = OptConfig(
    peak_lr=0.1, warmup_steps=0, weight_decay=0.5, memory_lr_ratio=0.25
  )
  optimizer = make(config, 1000)
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
  rate = registry.schedule(config, 1000)(0)
  mask, groups = (
    flat(registry.decay_mask(kinds(PARAMS))),
    flat(registry.groups(kinds(PARAMS), {})),
  )
  for name, update in flat(updates).items():
    # Adam's first step is the sign of the gradient.
    want = 1.0 + 0.5 * mask[name]
    want *= 0.25 if groups[name] == "memory" else 1.0
    np.testing.assert_allclose(update, -rate * want, rtol=1e-5)


def test_optimizer_clips_all_groups_by_one_norm():
  config = OptConfig(clip_norm=1.0, warmup_steps=0, weight_decay=0.0)
  grads = jax.tree.map(lambda x: 100.0 * jnp.ones_like(x), PARAMS)
  optimizer = make(config, 1000)
  _, state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
  moments = [
    value / (1 - config.b1)
    for name, value in flat(state).items()
    if "mu" in name.split("/") or ".mu" in name
  ]
  assert len(moments) == len(jax.tree.leaves(PARAMS))
  np.testing.assert_allclose(optax.tree.norm(moments), 1.0, rtol=1e-5)


CLIP = 1.5
LEVELS = {
  "cms": {
    **{f"level_{i}": {"up": {"kernel": jnp.ones((2, 3, 4))}} for i in range(4)},
    **{f"norm_{i}": {"scale": jnp.ones((2, 3))} for i in range(4)},
    **{f"share_{i}": jnp.ones((2,)) for i in range(4)},
    "value": {"kernel": jnp.ones((2, 3, 3))},
  }
}
SLOW = {"embed": {"embedding": jnp.ones((6, 4))}, "blocks": LEVELS}
PERIODS = {"cms_1": 1, "cms_2": 2, "cms_3": 3}


def adamw_by_hand(config, params, gradients, every):
  """One array through all steps: an update ends every `every` of them."""
  rate = registry.schedule(config, 20)
  mu = nu = total = np.zeros_like(params)
  found, updates = [], 0
  for step, gradient in enumerate(gradients):
    total = total + gradient
    if (step + 1) % every == 0:
      updates += 1
      mu = config.b1 * mu + (1 - config.b1) * total
      nu = config.b2 * nu + (1 - config.b2) * total**2
      mean = mu / (1 - config.b1**updates)
      size = np.sqrt(nu / (1 - config.b2**updates))
      decay = config.weight_decay if params.ndim == 3 else 0.0
      params = params - float(rate(step)) * (mean / size + decay * params)
      total = np.zeros_like(params)
    found.append(params)
  return found


def random_gradients(params, count):
  """Of unlike sizes, so that some of them are clipped."""
  draw = np.random.default_rng(0)
  normal = lambda x: draw.normal(size=x.shape)
  return [
    optax.tree.scale(scale, jax.tree.map(normal, params))
    for scale in draw.uniform(0.05, 0.4, size=count)
  ]


def train(optimizer, params, gradients):
  """Parameters after every step, by name."""
  state, update, found = optimizer.init(params), jax.jit(optimizer.update), []
  for gradient in gradients:
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    found.append(flat(params))
  return found


def test_levels_of_a_period_equal_the_loop_over_summed_gradients():
  """Weight decay, the schedule and the clipping of a step included."""
  config = OptConfig(
    peak_lr=0.1, warmup_steps=4, weight_decay=0.5, eps=1e-30, clip_norm=CLIP
  )
  params = {"blocks": LEVELS}
  gradients = random_gradients(params, 7)
  norms = [float(optax.tree.norm(gradient)) for gradient in gradients]
  assert min(norms) < CLIP < max(norms)
  found = train(make(config, 20, params, PERIODS), params, gradients)
  for name, start in flat(params).items():
    level = name.split("/")[2].rpartition("_")[2]
    every = PERIODS.get(f"cms_{level}", 1)
    clipped = [
      flat(gradient)[name] * min(1.0, CLIP / norm)
      for gradient, norm in zip(gradients, norms, strict=True)
    ]
    want = adamw_by_hand(config, np.asarray(start), clipped, every)
    for step, values in enumerate(want):
      np.testing.assert_allclose(
        found[step][name], values, rtol=1e-5, atol=1e-5, err_msg=name
      )
      if (step + 1) % every:
        before = found[step - 1][name] if step else start
        np.testing.assert_array_equal(found[step][name], before)


def test_period_of_one_step_is_the_plain_optimizer():
  config = OptConfig(peak_lr=0.1, warmup_steps=2)
  plain = make(config, 20, SLOW)
  other = make(config, 20, SLOW, {"cms_1": 1, "cms_2": 1})
  structure = lambda optimizer: jax.tree.structure(optimizer.init(SLOW))
  assert structure(plain) == structure(other)
  gradients = random_gradients(SLOW, 3)
  jax.tree.map(
    np.testing.assert_array_equal,
    train(plain, SLOW, gradients),
    train(other, SLOW, gradients),
  )


@pytest.mark.parametrize("steps", [20, 1000])
def test_schedule_warms_up_and_ends_low(steps):
  config = OptConfig(peak_lr=1e-2, end_lr_ratio=0.1, warmup_steps=50)
  rates = [float(registry.schedule(config, steps)(i)) for i in range(steps)]
  warmup = min(50, steps // 2)
  assert rates[0] > 0
  np.testing.assert_allclose(rates[warmup - 1], 1e-2, rtol=1e-5)
  assert np.all(np.diff(rates[:warmup]) > 0)
  assert np.all(np.diff(rates[warmup - 1 :]) <= 0)
  np.testing.assert_allclose(rates[-1], 1e-3, rtol=1e-5)


@pytest.mark.parametrize(("params", "periods"), [(PARAMS, {}), (SLOW, PERIODS)])
def test_state_shardings_follow_the_parameters(params, periods):
  optimizer = make(OptConfig(), 10, params, periods)
  state = jax.eval_shape(optimizer.init, params)
  names = jax.tree_util.tree_map_with_path(
    lambda path, _: "/".join(path_names(path)), params
  )
  laid = registry.state_shardings(optimizer, state, names, "rest")
  assert jax.tree.structure(laid) == jax.tree.structure(state)
  counted = dict.fromkeys(jax.tree.leaves(names), 0)
  for path, where in jax.tree_util.tree_leaves_with_path(laid):
    if where != "rest":
      assert jax.tree_util.keystr(path, simple=True, separator="/").endswith(
        where
      )
      counted[where] += 1
  for name, count in counted.items():  # moments, and sums of gradients
    levels = {part.rpartition("_")[2] for part in name.split("/")}
    assert count == (3 if periods and levels & {"2", "3"} else 2), name
