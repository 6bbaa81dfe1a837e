"""model_dir/metrics.jsonl: what was logged and evaluated, a JSON object a line; the plots are made from it.

  {"kind": "train", "step": 20, "tokens": 81920, "loss": 5.1, ..., "expert_load": [[1.0, 0.9, ...], ...]}
  {"kind": "eval", "step": 20, "tokens": 81920, "source": "demo_code", "loss": 5.3, "accuracy": 0.2, ...}
  {"kind": "warning", "step": 23, "text": "loss spike: ..."}

A resumed run first drops what was written after the step that it resumes from, so the file always tells one story.
"""

import json
from typing import Any, Dict, List, Mapping

import numpy as np

from openmoe_jax import paths

FILE = 'metrics.jsonl'
Record = Dict[str, Any]


def to_plain(value: Any) -> Any:
  """Arrays and NumPy numbers as lists and Python numbers, exactly."""
  if isinstance(value, Mapping):
    return {key: to_plain(part) for key, part in value.items()}
  if hasattr(value, 'tolist'):
    return np.asarray(value).tolist()
  return value


class History:
  """Appends records on the process that writes; `write=False` everywhere else makes every call a no-op."""

  def __init__(self, model_dir: paths.PathLike, write: bool = True):
    self._file = paths.path(model_dir) / FILE
    self._write = write
    # An object store rewrites the whole object to append: there, lines wait for `flush`.
    self._waiting: List[str] = []
    self._at_once = paths.is_local(model_dir)

  def begin(self, step: int) -> None:
    """Keeps the records up to `step` (of the checkpoint the run goes on from) and drops later or broken ones."""
    if not self._write or not self._file.exists():
      return
    kept = ''.join(json.dumps(r) + '\n' for r in read(self._file) if r['step'] <= step)
    if kept != _text(self._file):
      paths.write_text(self._file, kept)

  def append(self, record: Mapping[str, Any]) -> None:
    if not self._write:
      return
    self._waiting.append(json.dumps(to_plain(record)) + '\n')
    if self._at_once:
      self.flush()

  def flush(self) -> None:
    """Puts everything on disk; called before a checkpoint, so that no checkpoint is ahead of its history."""
    if self._write and self._waiting:
      paths.append_text(self._file, ''.join(self._waiting))
      self._waiting = []

  def records(self, kind: str = '') -> List[Record]:
    self.flush()
    return [r for r in read(self._file) if not kind or r['kind'] == kind]


def read(file: paths.PathLike) -> List[Record]:
  """The records of a file; a line that was cut off by a crash, or is no record for another reason, is left out."""
  records = []
  for line in _text(paths.path(file)).splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      continue
    if isinstance(record, dict) and isinstance(record.get('step'), int) and 'kind' in record:
      records.append(record)
  return records


def _text(file: Any) -> str:
  return file.read_bytes().decode('utf-8', 'replace') if file.exists() else ''
