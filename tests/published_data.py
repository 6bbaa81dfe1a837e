"""Where published data are that this repository does not hold: in $OPENMOE_DATA, else in shared/data beside it."""

import os
import pathlib
import warnings

import pytest

_BESIDE = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data'


def require_published(name: str) -> pathlib.Path:
  """The path of a file; skips the test with a warning if there is none."""
  path = pathlib.Path(os.environ.get('OPENMOE_DATA') or _BESIDE) / name
  if not path.exists():
    message = f'published file {name} not found: it is NOT tested here. Set OPENMOE_DATA to its folder.'
    warnings.warn(message)
    pytest.skip(message)
  return path
