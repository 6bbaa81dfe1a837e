"""What to warn of while a model trains: a loss that jumps, and experts that no tokens come to any more. Once an episode."""

import collections
from typing import Any, Dict, List, Mapping, Sequence

import numpy as np

_MOST_STEPS, _LEAST_STEPS = 128, 32  # that a loss is compared with
_LEAST_DEVIATION = .005  # of the mean: smaller fluctuations are no measure
_WINDOWS = 10  # logged windows in a row without load
_MOST_NAMED = 12


class LossSpikes:
  """Compares the loss of every step with those of the steps before it.

  A spike begins with a loss more than `sigmas` standard deviations above their mean, and ends below half of that.

  Args:
    sigmas: 0 never warns.
    saved: what `state` gave.
  """

  def __init__(self, sigmas: float, saved: Mapping[str, Any] = {}):
    self._sigmas = sigmas
    self._losses = collections.deque(saved.get('losses', ()), _MOST_STEPS)
    self._spiking = saved.get('spiking', False)

  def after_step(self, loss: float) -> List[str]:
    """Takes the loss of a step; the warning, or nothing."""
    lines = []
    if self._sigmas and len(self._losses) >= _LEAST_STEPS:
      mean = float(np.mean(self._losses))
      deviation = max(float(np.std(self._losses)), _LEAST_DEVIATION * abs(mean))
      above = (loss - mean) / deviation if deviation else 0.
      if above > self._sigmas and not self._spiking:
        lines.append(f'loss spike: {loss:.4g} is {above:.1f} standard deviations above {mean:.4g}, the mean of the '
                     f'{len(self._losses)} steps before')
      self._spiking = above > (self._sigmas / 2 if self._spiking else self._sigmas)
    self._losses.append(float(loss))
    return lines

  def state(self) -> Dict[str, Any]:
    """JSON values."""
    return {'losses': list(self._losses), 'spiking': bool(self._spiking)}


class DeadExperts:
  """Finds experts that have got next to nothing in each of the last ten logged windows.

  Args:
    least_load: share of the mean load below which a window counts; 0 never warns.
    layers: decoder layer of each row of `expert_load`.
    saved: what `state` gave.
  """

  def __init__(self, least_load: float, layers: Sequence[int], saved: Mapping[str, Any] = {}):
    self._least_load = least_load
    self._layers = layers
    self._windows = np.asarray(saved.get('windows', 0), np.int64)  # in a row, per layer and expert

  def after_window(self, expert_load: Any, steps: int) -> List[str]:
    """Takes a window's mean load [sparse layers, E], mean 1, and its number of steps; the warning, or nothing."""
    load = np.asarray(expert_load)
    before = self._windows if self._windows.shape == load.shape else np.zeros(load.shape, np.int64)
    self._windows = np.where(load < self._least_load, before + 1, 0)
    dying = np.argwhere(self._windows == _WINDOWS)
    if not len(dying):
      return []
    named = [f'{expert} of layer {self._layers[layer]}' for layer, expert in dying[:_MOST_NAMED]]
    more = f' and {len(dying) - len(named)} more' if len(dying) > len(named) else ''
    return [f'dead experts: {", ".join(named)}{more} have got less than {self._least_load:g} of the mean load for '
            f'{_WINDOWS * steps} steps']

  def state(self) -> Dict[str, Any]:
    """JSON values."""
    return {'windows': self._windows.tolist()}
