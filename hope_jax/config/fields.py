"""Converts nested mappings to checked dataclasses; errors name the field.

A `ConfigError` is one line that says what to change; commands print it and
exit with code 2.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

Json = dict[str, Any]  # a JSON object


class ConfigError(ValueError):
  """A configuration that cannot be used; the message says what to change."""


def nearest(value: Any, choices: Iterable[str]) -> str:
  """ "; did you mean ...?" with the choice most like `value`, or nothing."""
  near = difflib.get_close_matches(str(value), [*map(str, choices)], n=1)
  return f"; did you mean {near[0]!r}?" if near else ""


def check_choice(value: str, name: str, choices: tuple[str, ...]):
  if value not in choices:
    raise ConfigError(
      f"unknown {name}={value!r}{nearest(value, choices)}"
      f" (all: {', '.join(map(str, choices))})"
    )


def check(
  group: Any,
  prefix: str,
  positive: tuple[str, ...] = (),
  below_one: tuple[str, ...] = (),
):
  """Checks each field of a group on its own.

  A field of a Literal type must have one of its values.  Numbers must be finite
  and not negative; those in `positive` must not be 0, and those in `below_one`
  must be below 1.
  """
  hints = _hints(type(group))
  for field in dataclasses.fields(group):
    name, value = field.name, getattr(group, field.name)
    choices = _choices(hints[name])
    for number in value if isinstance(value, tuple) else (value,):
      if choices:
        check_choice(number, f"{prefix}.{name}", choices)
        continue
      if isinstance(number, str | bool) or dataclasses.is_dataclass(number):
        continue
      if not (math.isfinite(number) and number >= 0):
        wanted = "a number that is not negative"
      elif name in positive and not number:
        wanted = "positive"
      elif name in below_one and number >= 1:
        wanted = "below 1"
      else:
        continue
      raise ConfigError(f"{prefix}.{name}={value!r} must be {wanted}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)


def _choices(hint: Any) -> tuple[Any, ...]:
  """The values of a Literal type or of a tuple of Literals; else none."""
  if typing.get_origin(hint) is tuple:
    hint = typing.get_args(hint)[0]
  is_literal = typing.get_origin(hint) is Literal
  return typing.get_args(hint) if is_literal else ()


def convert(cls: type, values: Any, where: str = "") -> Any:
  """Builds dataclass `cls` from a mapping; errors name the field."""
  if not hasattr(values, "items"):
    raise ConfigError(f"{where} must be a group of fields, got {values!r}")
  fields = {f.name: f for f in dataclasses.fields(cls)}
  hints = _hints(cls)
  arguments = {}
  for key, value in values.items():
    name = f"{where}.{key}" if where else key
    if key not in fields:
      raise ConfigError(f"unknown field {name!r}{nearest(key, fields)}")
    arguments[key] = _convert_value(hints[key], value, name)
  for key, field in fields.items():
    no_default = field.default is field.default_factory is dataclasses.MISSING
    if no_default and key not in arguments:
      raise ConfigError(f"{f'{where}.' if where else ''}{key} is missing")
  return cls(**arguments)


def _convert_value(hint: Any, value: Any, name: str) -> Any:
  if dataclasses.is_dataclass(hint):
    return convert(typing.cast(type, hint), value, name)
  origin, parts = typing.get_origin(hint), typing.get_args(hint)
  if hint is Any or (value is None and types.NoneType in parts):
    return value
  if origin is types.UnionType:  # one type or None
    return _convert_value(parts[0], value, name)
  if origin is list and isinstance(value, list):
    return [_convert_value(parts[0], item, name) for item in value]
  if origin is dict and isinstance(value, dict):
    return {
      key: _convert_value(parts[1], item, f"{name}.{key}")
      for key, item in value.items()
    }
  if origin is tuple:
    if isinstance(value, str) and parts[0] in (int, float):
      raise ConfigError(
        f"{name}={value} is not a list of values: write it as (1,2,3)"
      )
    if not isinstance(value, (tuple, list)):
      value = (value,)
    if all(isinstance(item, str) for item in value):  # "a,b" of a command line
      value = [part for item in value for part in item.split(",") if part]
    return tuple(_convert_value(parts[0], v, name) for v in value)
  if origin is Literal:
    check_choice(typing.cast(str, value), name, parts)
    return value
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  hint = origin or hint
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise ConfigError(
      f"{name}={value!r} must be of type {hint.__name__},"
      f" not {type(value).__name__}"
    )
  return value
