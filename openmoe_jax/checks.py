"""Checks of settings, each of which fails with one clear line."""

import math
import numbers
from typing import Any, Tuple


class ConfigError(ValueError):
  """A setting that cannot work. The message names the setting, its value and what would be valid."""


def require(condition: bool, message: str) -> None:
  """Raises `ConfigError(message)` unless `condition` holds."""
  if not condition:
    raise ConfigError(message)


def one_of(name: str, value: Any, valid: Tuple[str, ...]) -> None:
  require(value in valid, f'{name} = {value!r} is not known; valid: {", ".join(map(repr, valid))}')


def integers(owner: Any, least: int, *names: str) -> None:
  """Makes the fields plain integers (NumPy's are taken, too) and checks that they are at least `least`."""
  for name in names:
    value = getattr(owner, name)
    require(isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least,
            f'{type(owner).__name__}.{name} = {value!r} must be an integer of at least {least}')
    object.__setattr__(owner, name, int(value))


def not_negative(owner: Any, *names: str) -> None:
  """Makes the fields plain floats and checks that they are finite and not negative."""
  for name in names:
    value = getattr(owner, name)
    require(isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value) and value >= 0,
            f'{type(owner).__name__}.{name} = {value!r} must be a number that is not negative')
    object.__setattr__(owner, name, float(value))
