"""AdamW (Loshchilov and Hutter 2019, 1711.05101).

  mu <- b1 mu + (1 - b1) g,   nu <- b2 nu + (1 - b2) g^2
  w  <- w - rate (mu^ / (sqrt(nu^) + eps) + weight_decay w)

with mu^, nu^ corrected for their start at zero.
"""

from typing import Any

import optax

from hope_jax.config import OptConfig
from hope_jax.optim.moments import Moment


def transform(
  config: OptConfig, rate: optax.Schedule, is_decayed: Any
) -> optax.GradientTransformation:
  """The update of one group of parameters; see `registry.Optimizer`."""
  return optax.adamw(
    rate,
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=is_decayed,
  )


def describe(config: OptConfig) -> tuple[Moment, ...]:
  """mu and nu as associative memories of gradients (paper section 4, App. C).

  Each takes steps of gradient descent on its objective, with rate 1 - b1 or
  1 - b2.
  """
  b1, b2 = config.b1, config.b2
  return (
    Moment("mu", "-⟨m, g⟩", f"GD with decay: m <- {b1:g} m + {1 - b1:g} g"),
    Moment("nu", "1/2 ‖v - g²‖²", f"GD: v <- {b2:g} v + {1 - b2:g} g²"),
  )
