"""Averages of training metrics between two logged steps; part of a checkpoint, so that a resumed run logs the same."""

import math
from typing import Any, Dict, List, Mapping, Optional

import numpy as np

from openmoe_jax.history import to_plain

# Reported as they are at the logged step instead of as a mean, or as a sum.
_LAST = ('learning_rate', 'param_norm')
_SUM = 'num_target_tokens'
_SKIPPED = 'skipped'  # 1: the other metrics of this step are no part of any mean


class MetricWindow:
  """Adds up metrics in float64, which JSON carries exactly."""

  def __init__(self, saved: Mapping[str, Any] = {}):
    """`saved`: what `state` gave, to go on from there."""
    self._steps = saved.get('steps', saved.get('count', 0))
    self._count = saved.get('count', 0)  # of those, the ones that were not skipped
    self._sums: Dict[str, np.ndarray] = {k: np.asarray(v, np.float64) for k, v in saved.get('sums', {}).items()}
    self._last: Dict[str, Any] = dict(saved.get('last', {}))
    self._hashes: List[str] = list(saved.get('batch_hashes', ()))
    self.target_tokens = saved.get('target_tokens', 0)
    self.skipped_steps = saved.get('skipped_steps', 0)
    self.skipped_in_a_row = saved.get('skipped_in_a_row', 0)

  def add(self, metrics: Mapping[str, np.ndarray], batch_hash: Optional[int] = None) -> None:
    """Takes one step's metrics (host arrays), and the name of its batch (`batch_hash`)."""
    self._steps += 1
    if batch_hash is not None:
      self._hashes.append(f'{int(batch_hash):08x}')
    weights = float(metrics[_SUM])
    self.target_tokens += int(round(weights)) if math.isfinite(weights) else 0
    if metrics.get(_SKIPPED):
      self.skipped_steps += 1
      self.skipped_in_a_row += 1
      return
    self.skipped_in_a_row = 0
    self._count += 1
    for name, value in metrics.items():
      if name in _LAST:
        self._last[name] = float(value)
      elif name != _SKIPPED:
        self._sums[name] = self._sums.get(name, 0.) + np.asarray(value, np.float64)

  def means(self) -> Dict[str, Any]:
    """Means over the window, without skipped steps; if all were skipped there are none. `num_target_tokens` is the mean
    of a step, `target_tokens` the sum and `skipped_steps` the number since the run began, `batch_hashes` has the name of
    every step's batch."""
    hashes = {'batch_hashes': list(self._hashes)} if self._hashes else {}
    return {**{name: to_plain(value / self._count) for name, value in self._sums.items()}, **self._last,
            'target_tokens': self.target_tokens, 'skipped_steps': self.skipped_steps, **hashes}

  def restart(self) -> None:
    self._steps, self._count, self._sums, self._last, self._hashes = 0, 0, {}, {}, []

  def state(self) -> Dict[str, Any]:
    """JSON values that `MetricWindow(saved)` goes on from."""
    return {'steps': self._steps, 'count': self._count, 'sums': to_plain(self._sums), 'last': dict(self._last),
            'target_tokens': self.target_tokens, 'skipped_steps': self.skipped_steps,
            'skipped_in_a_row': self.skipped_in_a_row, 'batch_hashes': list(self._hashes)}

  def __len__(self) -> int:
    """Steps, skipped ones too."""
    return self._steps


def not_finite(metrics: Mapping[str, Any]) -> str:
  """Name of the first metric that shows that training has broken down, the worst first, or ''."""
  return next((name for name in ('param_norm', 'loss', 'grad_norm')
               if name in metrics and not math.isfinite(float(metrics[name]))), '')
