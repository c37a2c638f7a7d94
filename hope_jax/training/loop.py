"""One training run, from a config to result.json."""

import contextlib
import dataclasses
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.typing import ArrayPytree as Tree

from hope_jax import config as config_lib
from hope_jax.analysis import dynamics, flops
from hope_jax.config import Config, Json
from hope_jax.data import pipeline
from hope_jax.interchange import safetensors as safetensors_lib
from hope_jax.runs import compilation, files, interruption, processes, progress
from hope_jax.runs import workdir as workdir_lib
from hope_jax.training import evaluation, faults, metrics, sharding
from hope_jax.training import step as step_lib


def run(config: Config, workdir: epath.Path) -> Json:
  """Trains, resuming if `workdir` holds a checkpoint; returns the result.

  A run that was interrupted and resumed gives the same result as one that was
  not, bit for bit on the same devices.
  """
  if not processes.is_alone():  # the hash reads all code
    processes.check_same(
      {"--workdir": str(files.absolute(workdir)), "code": workdir_lib.code()}
      | workdir_lib.flatten(config)
    )
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batches(config, mesh)
  sharding.check_kernels(config, mesh)
  compiled = step_lib.build(config, mesh)
  _announce(jax.devices()[0], compiled)
  with progress.waiting("reading the data", patience=2.0):
    sources, data = processes.agree(
      lambda: (pipeline.load(config), pipeline.fingerprint(config))
    )
  processes.check_same({f"data's {name}": data[name] for name in data})
  with contextlib.ExitStack() as stack:

    def enter() -> Json | None:
      workdir_lib.claim(workdir, config, data)
      stack.enter_context(workdir_lib.locked(workdir))
      return workdir_lib.read_result(workdir)

    result = processes.from_first(enter)
    if result is not None:
      print(f"{workdir} is finished: {workdir_lib.RESULT} exists")
      return result
    with sharding.activate(mesh):
      result = train(
        config, workdir, mesh, compiled=compiled, sources=sources, data=data
      )
    if processes.is_first():
      workdir_lib.write_json(workdir / workdir_lib.RESULT, result)
  return result


def _announce(device: Any, compiled: step_lib.Compiled) -> None:
  """Prints the model's size and, if the MFU cannot be computed, the reason."""
  count = step_lib.count_parameters(compiled.abstract_state.params)
  progress.say(f"{count:,} parameters")
  missing = flops.why_no_mfu(device)
  if missing:
    progress.say(missing)


def _flops_per_token(config: Config, params: Tree) -> float:
  """FLOPs per token, cached, as counting them traces the whole model."""
  return compilation.remembered(
    "flops",
    f"{config.model} {config.data.sequence_length} {workdir_lib.code()}",
    lambda: flops.per_token(config, params),
  )


def train(
  config: Config,
  workdir: epath.Path,
  mesh: jax.sharding.Mesh,
  *,
  compiled: step_lib.Compiled,
  sources: Json,
  data: dict[str, str],
) -> Json:
  """Trains in a folder that is claimed and locked; returns the result."""
  from hope_jax.runs import checkpoints  # takes 0.5 s, after first lines

  options = config.train

  # 1. The state, new or restored.
  compiling = progress.Waiting("compiling")
  manager = checkpoints.open_manager(workdir, options)
  flops_per_token = _flops_per_token(config, compiled.abstract_state.params)

  def last_state() -> step_lib.TrainState:
    state = checkpoints.restore(manager, compiled.abstract_state)
    return _first_state(config, compiled, data) if state is None else state

  state = last_state()
  start = step = int(state.step)
  parameters = step_lib.count_parameters(state.params)
  has_dynamics = bool(config.model.fast_levels)
  collect = dynamics.build(config, mesh)

  # 2. The input, from the state's step on.
  batch_size = config.data.batch_size
  rows = sharding.process_rows(mesh, batch_size)

  def read_on(state: step_lib.TrainState) -> Generator[pipeline.Batch]:
    first, offset = int(state.step), int(state.offset)
    batches = pipeline.TrainBatches(
      sources["train"], batch_size, rows, options.steps + offset
    )
    made = pipeline.prefetch(batches, first + offset, config.data.workers)
    return faults.with_timeout(made, config.data.timeout, pipeline.PREFETCH)

  batches = read_on(state)

  # 3. Logging, guards and timers.
  tokens_per_step = batch_size * config.data.sequence_length
  peak = flops.peak_flops(jax.devices()[0])
  writer = metrics.Writer(workdir, config, start)
  guard = faults.Guard(options, writer.records)
  watchdog = faults.Watchdog(options.hang_seconds)  # dumps stacks only
  meter = metrics.Meter(
    writer,
    tokens_per_step=tokens_per_step,
    flops_per_token=flops_per_token,
    peak_flops=peak and peak * jax.device_count(),
  )

  def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

  def score(split: str) -> dict[str, float]:
    known = writer.find("eval", step, split)
    if known is not None:  # by a session that was killed afterwards
      return known
    scores = evaluation.evaluate(
      compiled.eval_step,
      state.params,
      sources[split],
      config=config,
      mesh=mesh,
    )
    writer.write("eval", step, {"split": split, **scores})
    return scores

  # 4. The loop: a step is dispatched before the last one's metrics are read.
  try:
    with interruption.watch() as should_stop, watchdog.watch():
      valid = score("valid") if step == options.steps else None
      while step < options.steps:
        step += 1
        watchdog.step()
        processes.at_step(options.hang_seconds)
        batch = sharding.put_batch(next(batches), mesh, batch_size, rows)
        state, scalars = compiled.train_step(state, batch)
        compiling.end()
        seen = [meter.flush()]
        is_last, stop_code = step == options.steps, should_stop(step)
        if step == 1 or is_last or is_due(step, options.log_every):
          meter.hold(step, scalars)
        watch = has_dynamics and is_due(step, options.dynamics_every)
        check = is_due(step, options.eval_every) or is_last
        keep = is_due(step, options.checkpoint_every) or is_last or stop_code
        if watch or check or keep:
          jax.block_until_ready(scalars)
          seen.append(meter.flush())
        if guard.is_spike(*seen):
          batches.close()
          state, step, batches = _roll_back(last_state(), step, read_on)
          meter.forget()
          writer.write("rollback", step, {"offset": int(state.offset)})
          continue
        if watch or check or keep:
          with meter.paused():
            if watch:
              with progress.waiting("compiling the dynamics", patience=2.0):
                sown = jax.device_get(collect(state.params, batch))
              writer.write("dynamics", step, dynamics.flatten(sown))
            valid = score("valid") if check else None
            writer.sync()
            if keep:
              loss = None if valid is None else valid["loss"]
              checkpoints.save(manager, step, state, loss)
        if stop_code and not is_last:
          raise interruption.Interrupted(f"saved step {step}", stop_code)

    # 5. The result.
    assert valid is not None
    test = score("test")
    faults.check_end(
      options,
      losses={"valid": valid["loss"], "test": test["loss"]},
      bad=int(state.bad),
      bad_in_a_row=int(state.bad_in_a_row),
    )
    return {
      "model": config.model.sequence_layer,
      "parameters": parameters,
      "tokens": options.steps * tokens_per_step,
      "valid_loss": valid["loss"],
      "test_loss": test["loss"],
      **evaluation.derived(test["loss"], config),
      "accuracy": test["accuracy"],
      "tokens_per_second": meter.median_tokens_per_second(),
      "flops_per_token": flops_per_token,
      "seconds": meter.seconds,
      "steps": options.steps,
      "bad_steps": int(state.bad),
      "seed": options.seed,
      "config": config_lib.to_dict(config),
    }
  finally:
    compiling.end()
    batches.close()
    writer.close()
    checkpoints.close(manager)


def _first_state(
  config: Config, compiled: step_lib.Compiled, data: dict[str, str]
) -> step_lib.TrainState:
  """The first state, from the seed or with the parameters of an export."""
  state = compiled.init(jax.random.key(config.train.seed))
  if not config.train.init_from:
    return state
  folder = files.reach(config.train.init_from)
  workdir_lib.check_data(folder, config, data)
  params = safetensors_lib.load(folder, compiled.abstract_state.params)
  return dataclasses.replace(state, params=params)


def _roll_back(state: Tree, step: int, read_on: Any) -> tuple[Any, int, Any]:
  """Goes back from `step` to `state`, and on with data not read before."""
  offset = int(state.offset) + step - int(state.step)
  state = dataclasses.replace(state, offset=np.int32(offset))
  return state, int(state.step), read_on(state)
