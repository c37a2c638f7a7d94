"""The scores of a run's newest checkpoint on a split."""

from etils import epath

from hope_jax.config import Config, Json
from hope_jax.data import pipeline
from hope_jax.inference import trained, variants
from hope_jax.runs import progress
from hope_jax.runs import workdir as workdir_lib
from hope_jax.training import evaluation, sharding
from hope_jax.training import step as step_lib


def evaluate(
  config: Config,
  workdir: epath.Path,
  split: str,
  *,
  with_dynamics: bool = False,
  with_positions: bool = False,
) -> dict:
  """Scores the newest checkpoint of `workdir` as the model of `config`."""
  if with_dynamics:
    variants.check_dynamics(config.model)
  mesh = sharding.mesh_or_default(config)
  sharding.check_kernels(config, mesh)
  source = pipeline.load(config)[split]
  tokenizer = pipeline.load_tokenizer(config)
  if tokenizer is not None:
    data = {"tokenizer": tokenizer.sha256}
    workdir_lib.check_data(workdir, config, data)
  with sharding.activate(mesh):
    count, size = len(source), config.eval.batch_size
    count = min(count, config.eval.batches * size or count)
    length = config.data.sequence_length
    progress.say(
      f"{count} x {length} = {count * length:,} tokens of"
      f" {config.data.path or config.data.kind}"
    )
    step, params = trained.read_params(workdir, config, mesh)
    scores: Json = evaluation.evaluate(
      step_lib.make_eval_step(config, params, mesh),
      params,
      source,
      config=config,
      mesh=mesh,
      with_positions=with_positions,
    )
    if with_dynamics:
      scores |= evaluation.inner_dynamics(
        params, source, config=config, mesh=mesh
      )
  derived = evaluation.derived(scores["loss"], config)
  return {"step": step, "split": split, **scores, **derived}
