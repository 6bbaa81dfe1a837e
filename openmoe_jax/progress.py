"""The live line of a training run, and the rates it shows."""

import time
from typing import Any, Mapping, Optional

from rich.console import Console
from rich.live import Live
from rich.text import Text

from openmoe_jax.tpu_slices import CHIPS

# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets. The beginning of the device's name decides.
_PEAK_FLOPS = (*((chip.kind, chip.device_flops) for chip in CHIPS.values()),
               ('NVIDIA A100', 312e12), ('NVIDIA H100', 989e12), ('NVIDIA H200', 989e12),
               ('NVIDIA B200', 2250e12))
_UNITS = ((1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'))


def short_number(value: float) -> str:
  """12345 -> '12.3k'."""
  for size, unit in _UNITS:
    if abs(value) >= .9995 * size:  # what rounds to 1000 of the smaller unit
      return f'{value / size:.3g}{unit}'
  return f'{value:.3g}'


def duration(seconds: float) -> str:
  """3700 -> '1h02m'."""
  seconds = int(seconds + 0.5)
  if seconds < 60:
    return f'{seconds}s'
  if seconds < 3600:
    return f'{seconds // 60}m{seconds % 60:02d}s'
  if seconds < 86400:
    return f'{seconds // 3600}h{seconds % 3600 // 60:02d}m'
  return f'{seconds // 86400}d{seconds % 86400 // 3600:02d}h'


def peak_flops(device_kind: str, count: int) -> Optional[float]:
  """Most FLOP/s of `count` devices together, or None for a device without a fixed figure, such as a CPU."""
  return next((count * peak for name, peak in _PEAK_FLOPS if device_kind.startswith(name)), None)


class Clock:
  """Seconds per step over recent steps, without compilation, evaluation and waiting for checkpoints."""

  def __init__(self, memory: float = 0.9):
    self._memory = memory
    self._last: Optional[float] = None
    self.seconds_per_step: Optional[float] = None

  def pause(self) -> None:
    """What follows until the next `tick` is not training."""
    self._last = None

  def tick(self) -> None:
    """One more step is finished."""
    now = time.monotonic()
    if self._last is not None:
      took = now - self._last
      old = self.seconds_per_step
      self.seconds_per_step = took if old is None else self._memory * old + (1 - self._memory) * took
    self._last = now


class Progress:
  """Shows one line that changes on a terminal, and a plain line every `log_period` steps elsewhere.

  Args:
    train_steps: where the run ends.
    tokens_per_step: positions of a batch.
    flops_per_token: model arithmetic of one training step per token, forward and backward; 0 if unknown.
    peak_flops: of all devices together; None where it is not known, then FLOP/s are shown instead of MFU.
    show: False on every process but the first.
  """

  def __init__(self, train_steps: int, tokens_per_step: int, flops_per_token: float = 0.,
               peak_flops: Optional[float] = None, show: bool = True, console: Optional[Console] = None):
    self.console = console or Console(highlight=False, soft_wrap=True)
    self.clock = Clock()
    self._train_steps = train_steps
    self._tokens_per_step = tokens_per_step
    self._flops_per_token = flops_per_token
    self._peak_flops = peak_flops
    self._show = show
    self._live: Optional[Live] = None

  def __enter__(self) -> 'Progress':
    if self._show and self.console.is_terminal:
      self._live = Live(Text(''), console=self.console, refresh_per_second=4, transient=False)
      self._live.__enter__()
    return self

  def __exit__(self, *error) -> None:
    if self._live:
      self._live.__exit__(*error)
      self._live = None

  def say(self, text: str) -> None:
    """A line that stays, above the one that changes."""
    if self._show:
      self.console.print(Text(text))

  def rates(self) -> Mapping[str, float]:
    """tokens_per_second and, where known, flops_per_second and mfu; empty before two steps were timed."""
    seconds = self.clock.seconds_per_step
    if not seconds:
      return {}
    rates = {'tokens_per_second': self._tokens_per_step / seconds, 'seconds_per_step': seconds}
    if self._flops_per_token:
      rates['flops_per_second'] = rates['tokens_per_second'] * self._flops_per_token
      if self._peak_flops:
        rates['mfu'] = rates['flops_per_second'] / self._peak_flops
    return rates

  def line(self, step: int, metrics: Mapping[str, Any]) -> str:
    """step, loss, tokens/s, MFU or FLOP/s, tokens dropped, time left."""
    width = len(str(self._train_steps))
    parts = [f'step {step:{width}d}/{self._train_steps}', f'loss {float(metrics["loss"]):.4f}']
    rates = self.rates()
    if rates:
      parts.append(f'{short_number(rates["tokens_per_second"])} tokens/s')
      if 'mfu' in rates:
        parts.append(f'MFU {100 * rates["mfu"]:.1f}%')
      elif 'flops_per_second' in rates:
        parts.append(f'{short_number(rates["flops_per_second"])}FLOP/s')
    if 'fraction_tokens_left_behind' in metrics:
      parts.append(f'dropped {100 * float(metrics["fraction_tokens_left_behind"]):.1f}%')
    if rates:
      parts.append(f'ETA {duration((self._train_steps - step) * rates["seconds_per_step"])}')
    return '  '.join(parts)

  def update(self, step: int, metrics: Mapping[str, Any], logged: bool) -> None:
    """Step `step` is finished with these metrics; `logged`: it is one of those that plain output shows."""
    if not self._show:
      return
    if self._live:
      self._live.update(Text(self.line(step, metrics)))
    elif logged:
      self.console.print(Text(self.line(step, metrics)))
