"""Where the original's numbers (golden data) are found.

Small files that tests rely on are in tests/data. The whole set is looked for in the folder $OPENMOE_GOLDEN, then in
shared/golden beside the repository; tests that need a file which is nowhere are skipped, loudly.
"""

import json
import os
import pathlib
import warnings

import numpy as np
import pytest

_REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def golden_path(name: str) -> pathlib.Path:
  """The first place that has `name`; where none has, the last place looked at (which then does not exist)."""
  folders = [_REPOSITORY / 'tests' / 'data']
  if os.environ.get('OPENMOE_GOLDEN'):
    folders.append(pathlib.Path(os.environ['OPENMOE_GOLDEN']))
  folders.append(_REPOSITORY.parent / 'shared' / 'golden')
  for folder in folders:
    if (folder / name).exists():
      break
  return folder / name


def require_golden(name: str) -> pathlib.Path:
  """`golden_path(name)`, or skips the test with a warning if there is no such file."""
  path = golden_path(name)
  if not path.exists():
    message = (f'golden file {name} not found: parity with the original is NOT tested here. '
               'Set OPENMOE_GOLDEN to its folder.')
    warnings.warn(message)
    pytest.skip(message)
  return path


def load_arrays(name: str) -> dict:
  """The arrays of a golden .npz file by name."""
  with np.load(require_golden(name)) as file:
    return dict(file)


def load_json(name: str):
  return json.loads(require_golden(name).read_text())
