"""Changes to a run's config for evaluation: no writes, other data, longer."""

import dataclasses

from hope_jax.config import Config, ConfigError, ModelConfig


def switch_off(model: ModelConfig, levels: tuple[str, ...]) -> ModelConfig:
  """`model` without the writes of `levels`, or of all of them if empty."""
  if not model.fast_levels:
    raise ConfigError(
      f"--writes=off: {model.sequence_layer} has no level that writes"
    )
  if levels:
    frozen = model.frozen_levels + levels
    return dataclasses.replace(model, frozen_levels=frozen)
  return dataclasses.replace(model, inner_rates="off")


def elsewhere(config: Config, path: str) -> Config:
  """`config` on the data in `path`."""
  if config.data.is_generated:
    raise ConfigError(
      f"--path is for data that is read, not for {config.data.kind}"
    )
  records = dataclasses.replace(config.data.records, weights=())
  data = dataclasses.replace(config.data, path=path, records=records)
  return dataclasses.replace(config, data=data)


def lengthen(config: Config, length: int) -> Config:
  """`config` on sequences of `length` tokens, with about as many tokens in all.

  CMS levels that the optimizer changes once in n steps never change here:
  nothing is trained, and a step has another number of tokens.
  """
  if config.data.kind != "text":
    raise ConfigError(f"--length is for text, not {config.data.kind}")
  data = dataclasses.replace(config.data, sequence_length=length)
  old = config.eval.batch_size * config.data.sequence_length
  batch_size = max(1, old // length)
  batches = config.eval.batches
  if batches:
    batches = max(1, batches * old // (batch_size * length))
  changed = dataclasses.replace(
    config.eval, batch_size=batch_size, batches=batches
  )
  cms = config.model.cms.without_periods()
  model = dataclasses.replace(config.model, cms=cms)
  return dataclasses.replace(config, model=model, data=data, eval=changed)


def check_dynamics(model: ModelConfig) -> None:
  """`ConfigError` for a model without a level that writes."""
  if not model.fast_levels:
    raise ConfigError(
      f"--dynamics: {model.sequence_layer} has no level that writes"
    )
