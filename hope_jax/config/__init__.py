"""Frozen configuration dataclasses, the only place where defaults are set.

`configs/*.py` return an `ml_collections.ConfigDict` with the groups
`model / opt / data / mesh / train / eval`.  It is converted once, at the
boundary, by `from_config_dict`; unknown fields and wrong types raise a one-line
`ConfigError`.
"""

from hope_jax.config.data import DataConfig as DataConfig
from hope_jax.config.data import MQARConfig as MQARConfig
from hope_jax.config.data import RecordsConfig as RecordsConfig
from hope_jax.config.data import TextConfig as TextConfig
from hope_jax.config.fields import ConfigError as ConfigError
from hope_jax.config.fields import Json as Json
from hope_jax.config.fields import convert as convert
from hope_jax.config.fields import nearest as nearest
from hope_jax.config.model import CMSConfig as CMSConfig
from hope_jax.config.model import MemoryConfig as MemoryConfig
from hope_jax.config.model import ModelConfig as ModelConfig
from hope_jax.config.model import RopeScaling as RopeScaling
from hope_jax.config.optimizer import OptConfig as OptConfig
from hope_jax.config.run import Config as Config
from hope_jax.config.run import EvalConfig as EvalConfig
from hope_jax.config.run import MeshConfig as MeshConfig
from hope_jax.config.run import TrainConfig as TrainConfig
from hope_jax.config.run import from_config_dict as from_config_dict
from hope_jax.config.run import to_dict as to_dict
