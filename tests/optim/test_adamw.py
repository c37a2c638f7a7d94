import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.config import OptConfig
from hope_jax.optim import adamw

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


def flat(tree):
  return {
    "/".join(adamw.path_names(path)): value
    for path, value in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_decay_mask_spares_memories_norms_convolutions_vectors():
  mask = flat(adamw.decay_mask(PARAMS))
  assert {name for name, decayed in mask.items() if decayed} == {
    "embed/embedding",
    "blocks/mixer/query/kernel",
  }


def test_groups_put_initial_states_and_gates_apart():
  groups = flat(adamw.groups(PARAMS))
  assert {name for name, group in groups.items() if group == "memory"} == {
    "blocks/mixer/initial/memory_output",
    "blocks/mixer/gates/eta/kernel",
    "blocks/cms/level_0/learn_rate",
  }


def test_optimizer_scales_the_memory_group_and_decays_by_mask():
  config = OptConfig(
    peak_lr=0.1, warmup_steps=0, weight_decay=0.5, memory_lr_ratio=0.25
  )
  optimizer = adamw.make(config, steps=1000)
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
  rate = adamw.schedule(config, 1000)(0)
  mask, groups = flat(adamw.decay_mask(PARAMS)), flat(adamw.groups(PARAMS))
  for name, update in flat(updates).items():
    # Adam's first step is the sign of the gradient.
    want = 1.0 + 0.5 * mask[name]
    want *= 0.25 if groups[name] == "memory" else 1.0
    np.testing.assert_allclose(update, -rate * want, rtol=1e-5)


def test_optimizer_clips_all_groups_by_one_norm():
  config = OptConfig(clip_norm=1.0, warmup_steps=0, weight_decay=0.0)
  grads = jax.tree.map(lambda x: 100.0 * jnp.ones_like(x), PARAMS)
  optimizer = adamw.make(config, steps=1000)
  _, state = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
  moments = [
    value / (1 - config.b1)
    for name, value in flat(state).items()
    if "mu" in name.split("/") or ".mu" in name
  ]
  assert len(moments) == len(jax.tree.leaves(PARAMS))
  np.testing.assert_allclose(optax.tree.norm(moments), 1.0, rtol=1e-5)


@pytest.mark.parametrize("steps", [20, 1000])
def test_schedule_warms_up_and_ends_low(steps):
  config = OptConfig(peak_lr=1e-2, end_lr_ratio=0.1, warmup_steps=50)
  rates = [float(adamw.schedule(config, steps)(i)) for i in range(steps)]
  warmup = min(50, steps // 2)
  assert rates[0] > 0
  np.testing.assert_allclose(rates[warmup - 1], 1e-2, rtol=1e-5)
  assert np.all(np.diff(rates[:warmup]) > 0)
  assert np.all(np.diff(rates[warmup - 1 :]) <= 0)
  np.testing.assert_allclose(rates[-1], 1e-3, rtol=1e-5)


def test_state_shardings_follow_the_parameters():
  optimizer = adamw.make(OptConfig(), steps=10)
  state = jax.eval_shape(optimizer.init, PARAMS)
  names = jax.tree_util.tree_map_with_path(
    lambda path, _: "/".join(adamw.path_names(path)), PARAMS
  )
  laid = adamw.state_shardings(optimizer, state, names, "rest")
  assert jax.tree.structure(laid) == jax.tree.structure(state)
  counted = dict.fromkeys(jax.tree.leaves(names), 0)
  for path, where in jax.tree_util.tree_leaves_with_path(laid):
    if where != "rest":
      assert jax.tree_util.keystr(path, simple=True, separator="/").endswith(
        where
      )
      counted[where] += 1
  assert set(counted.values()) == {2}  # both moments
