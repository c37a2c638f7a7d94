"""One training run, from a config to result.json."""

import pathlib
from typing import Any

import jax

from hope_jax import config as config_lib
from hope_jax.config import Config
from hope_jax.data import pipeline
from hope_jax.training import (
  checkpoints,
  dynamics,
  evaluation,
  flops,
  interruption,
  metrics,
  sharding,
)
from hope_jax.training import step as step_lib
from hope_jax.training import workdir as workdir_lib


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains, resuming if `workdir` holds a checkpoint; returns the result.

  Interrupted and resumed, a run gives what it would have given at once, bit
  for bit on the same devices.
  """
  # 1. What there is: devices, data, an earlier session, an earlier result.
  options = config.train
  is_main = jax.process_index() == 0
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batches(config, mesh)
  sources = pipeline.load(config)
  workdir_lib.claim(workdir, config, write=is_main)
  if (result := workdir_lib.read_result(workdir)) is not None:
    print(f"{workdir} is finished: {workdir_lib.RESULT} exists")
    return result
  manager = checkpoints.open_manager(workdir, options.keep_checkpoints)

  # 2. The state, new or restored.
  compiled = step_lib.build(config, mesh)
  flops_per_token = flops.per_token(config, compiled.abstract_state.params)
  with sharding.activate(mesh):
    state = checkpoints.restore(manager, compiled.abstract_state)
    if state is None:
      state = compiled.init(jax.random.key(options.seed))
    start = int(state.step)
    parameters = step_lib.count_parameters(state.params)
    has_dynamics = bool(config.model.fast_levels)
    collect = dynamics.build(config, mesh)

    # 3. The input, from the step where the state is.
    batch_size = config.data.batch_size
    rows = sharding.process_rows(mesh, batch_size)
    batches = pipeline.prefetch(
      pipeline.TrainBatches(sources["train"], batch_size, rows, options.steps),
      start,
    )

    # 4. The books.
    tokens_per_step = batch_size * config.data.sequence_length
    peak = flops.peak_flops(jax.devices()[0])
    writer = metrics.Writer(workdir, config, start)
    meter = metrics.Meter(
      writer,
      tokens_per_step=tokens_per_step,
      flops_per_token=flops_per_token,
      peak_flops=peak and peak * jax.device_count(),
    )

    def is_due(step: int, every: int) -> bool:
      return every > 0 and step % every == 0

    def score(split: str) -> dict[str, float]:
      return evaluation.evaluate(
        compiled.eval_step,
        state.params,
        sources[split],
        config=config,
        mesh=mesh,
      )

    # 5. The loop: a step is dispatched before the last one's metrics are read.
    try:
      with interruption.watch() as should_stop:
        for step in range(start + 1, options.steps + 1):
          batch = sharding.put_batch(next(batches), mesh, batch_size, rows)
          state, scalars = compiled.train_step(state, batch)
          meter.flush()
          is_last, is_stop = step == options.steps, should_stop(step)
          if step == 1 or is_last or is_due(step, options.log_every):
            meter.hold(step, scalars)
          watch = has_dynamics and is_due(step, options.dynamics_every)
          check = is_due(step, options.eval_every) and not is_last
          keep = is_due(step, options.checkpoint_every) or is_last or is_stop
          if watch or check or keep:
            jax.block_until_ready(scalars)
            meter.flush()
            with meter.paused():
              if watch:
                sown = jax.device_get(collect(state.params, batch))
                writer.write("dynamics", step, dynamics.flatten(sown))
              if check:
                writer.write("eval", step, {"split": "valid", **score("valid")})
              if keep:
                checkpoints.save(manager, step, state)
          if is_stop and not is_last:
            raise interruption.Interrupted(f"saved step {step}")

      # 6. The result.
      scores = {split: score(split) for split in ("valid", "test")}
      for split, values in scores.items():
        writer.write("eval", options.steps, {"split": split, **values})
      test_loss = scores["test"]["loss"]
      result = {
        "model": config.model.sequence_layer,
        "parameters": parameters,
        "tokens": options.steps * tokens_per_step,
        "valid_loss": scores["valid"]["loss"],
        "test_loss": test_loss,
        **evaluation.derived(test_loss, config.data.kind),
        "accuracy": scores["test"]["accuracy"],
        "tokens_per_second": meter.median_tokens_per_second(),
        "flops_per_token": flops_per_token,
        "seconds": meter.seconds,
        "steps": options.steps,
        "seed": options.seed,
        "config": config_lib.to_dict(config),
      }
    finally:
      writer.close()
      manager.close()  # waits for the checkpoint that is being written
    if is_main:
      workdir_lib.write_json(workdir / workdir_lib.RESULT, result)
  return result
