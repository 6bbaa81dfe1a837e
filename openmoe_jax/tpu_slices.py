"""Chips and slices of Google's TPUs: published figures, and what the names of slices mean.

Sources (read 2026-11):
  [1] docs.cloud.google.com/tpu/docs/v2, /v3, /v4, /v5e, /v5p, /v6e, /tpu7x: peak FLOP/s, HBM capacity and bandwidth,
      bandwidth of links and data centre network, topologies. That of links is published for both directions of all links
      of a chip together: v5e 400 GB/s over 4 links, v5p 1,200 over 6, v6e 800 over 4, tpu7x 1,200 over 6.
  [2] Jouppi et al. 2020, A Domain-Specific Supercomputer for Training Deep Neural Networks (CACM 63:7): links of v2, 4 of
      496 Gbit/s, and v3, 4 of 656 Gbit/s, each way.
  [3] Jouppi et al. 2023, TPU v4 (ISCA, arXiv 2304.01433): links of v4, 6 of 50 GB/s each way.
The data centre network of v2, v3 and v4 is not published per chip; it is taken to be as slow as the slowest that is.
"""

import dataclasses
import difflib
import functools
import math
import re
from typing import Dict, Tuple

from openmoe_jax.config import ConfigError, require

GB = 1e9
GIB = 2 ** 30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of chip; figures are those of the whole chip.

  Attributes:
    name: as slices are named.
    kind: how JAX calls such a device, or the beginning of it (v5e's begins as v5p's does, so it stands first).
    peak_flops: bfloat16 FLOP/s.
    hbm_bytes, hbm_bandwidth: bytes, and bytes/s.
    link_bandwidth: bytes/s of one link, one way.
    torus: number of dimensions in which chips are connected; two links in each.
    dcn_bandwidth: bytes/s of a chip's share of the data centre network, one way.
    devices: how many devices of JAX a chip is.
    counts_cores: whether names of slices count TensorCores, of which each chip has `cores`.
    wraps: a dimension of that many chips (or a multiple) is a ring, a shorter one is a line.
    config: how libtpu is to see it: 'megacore' makes one device of two cores.
  """
  name: str
  kind: str
  peak_flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float
  torus: int
  dcn_bandwidth: float
  devices: int = 1
  cores: int = 2
  counts_cores: bool = True
  wraps: int = 4
  config: str = 'default'

  @property
  def device_flops(self) -> float:
    """Bfloat16 FLOP/s of one of its devices."""
    return self.peak_flops / self.devices

  @property
  def device_hbm_bandwidth(self) -> float:
    """Bytes/s of the main memory of one of its devices."""
    return self.hbm_bandwidth / self.devices


_SLOWEST_DCN = 25e9 / 8

CHIPS: Dict[str, Chip] = {chip.name: chip for chip in (  # from [1], the links of v2 and v3 from [2], of v4 from [3]
    Chip('v2', 'TPU v2', 46e12, 16 * GIB, 700 * GB, 62 * GB, 2, _SLOWEST_DCN, devices=2, wraps=16),
    Chip('v3', 'TPU v3', 123e12, 32 * GIB, 900 * GB, 82 * GB, 2, _SLOWEST_DCN, devices=2, wraps=32),
    Chip('v4', 'TPU v4', 275e12, 32 * GIB, 1200 * GB, 50 * GB, 3, _SLOWEST_DCN, config='megacore'),
    Chip('v5e', 'TPU v5 lite', 197e12, 16 * GIB, 819 * GB, 50 * GB, 2, 25e9 / 8, cores=1, counts_cores=False, wraps=16),
    Chip('v5p', 'TPU v5', 459e12, 95 * GIB, 2765 * GB, 100 * GB, 3, 50e9 / 8, config='megacore'),
    Chip('v6e', 'TPU v6', 918e12, 32 * GIB, 1638 * GB, 100 * GB, 2, 100e9 / 8, cores=1, counts_cores=False, wraps=16),
    Chip('tpu7x', 'TPU7x', 2307e12, 192 * GIB, 7380 * GB, 100 * GB, 3, 100e9 / 8, devices=2),
)}
_OTHER_NAMES = {'v5litepod': 'v5e', 'v5lite': 'v5e', 'v7x': 'tpu7x'}

# Chips along each dimension, of every slice that can be had, by number of chips; [1].
_FLAT = ('2x2', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x4x12', '4x8x8', '4x8x12', '8x8x8', '8x8x12',
          '8x8x16', '8x12x16', '8x16x16', '12x16x16', '16x16x16', '16x16x24')
_TOPOLOGIES = {
    'v2': ('2x2', '4x4', '8x8', '8x16', '16x16'),
    'v3': ('2x2', '4x4', '4x8', '8x8', '8x16', '16x16', '16x32', '32x32'),
    'v4': _CUBES[:-1],
    'v5e': ('1x1', '2x2', '2x4', *_FLAT[1:]),
    'v5p': _CUBES,
    'v6e': ('1x1', '2x2', '2x4', *_FLAT[1:]),
    'tpu7x': _CUBES,
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice, or several equal ones joined by the data centre network.

  Attributes:
    name: as it was asked for, such as 'v4-128'.
    chip: what it is made of.
    shape: chips along each dimension of one slice.
    slices: how many of them.
  """
  name: str
  chip: Chip
  shape: Tuple[int, ...]
  slices: int = 1

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices

  @property
  def devices(self) -> int:
    """Devices that JAX sees; memory and peak of a chip are shared out equally between its own."""
    return self.chips * self.chip.devices

  @property
  def device_hbm_bytes(self) -> float:
    return self.chip.hbm_bytes / self.chip.devices

  @property
  def topology(self) -> str:
    """libtpu's name: 'v4:4x4x4'."""
    shape = self.shape if self.chip.torus == 2 else self.shape + (1,) * (3 - len(self.shape))
    return f'{self.chip.name}:' + 'x'.join(map(str, shape))

  def ring(self, dimension: int) -> bool:
    """Whether the chips along a dimension of a slice form a ring."""
    size = self.shape[dimension]
    return size >= self.chip.wraps and size % self.chip.wraps == 0 and (self.chip.torus == 2 or min(self.shape) >= 4)


@functools.cache
def names() -> Tuple[str, ...]:
  """Every slice that has a name of its own, by its default shape."""
  return tuple(_name(chip, shape) for chip in CHIPS.values() for shape in _TOPOLOGIES[chip.name])


def larger(slice_: Slice, times: float) -> str:
  """The smallest slice of the same chips with more of them, at least `times` as many; '' if there is none."""
  enough = [t for t in _TOPOLOGIES[slice_.chip.name] if _chips(t) > slice_.chips and _chips(t) >= times * slice_.chips]
  return _name(slice_.chip, min(enough, key=_chips)) if enough else ''


def _chips(topology: str) -> int:
  return math.prod(map(int, topology.split('x')))


def _name(chip: Chip, topology: str) -> str:
  return f'{chip.name}-{_chips(topology) * (chip.cores if chip.counts_cores else 1)}'


def parse(text: str) -> Slice:
  """The slice called 'v4-128', 'v5litepod-256', 'v5p:4x4x8' (a shape in chips), or '2*v5e-256' (several of them).

  v2, v3, v4, v5p and tpu7x count TensorCores, of which a chip has two; v5e and v6e count chips.

  Raises:
    ConfigError: no such slice, with the nearest ones that there are.
  """
  match = re.fullmatch(r'(?:(\d+)\*)?([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+)*))', text.strip().lower())
  if not match:
    near = difflib.get_close_matches(text.strip().lower(), names(), 3, 0.)
    raise ConfigError(f'--topology={text!r} is not the name of a slice, such as v4-128, v5p:4x4x8 or 2*v5e-256; near: '
                      f'{", ".join(near)}')
  slices, kind, number, shape = match.groups()
  kind = _OTHER_NAMES.get(kind, kind)
  require(kind in CHIPS, f'--topology={text!r}: there is no TPU {kind!r}; there are {", ".join(CHIPS)}')
  require(slices is None or int(slices) > 0, f'--topology={text!r} is no slice at all')
  chip, known = CHIPS[kind], _TOPOLOGIES[kind]
  if shape:
    found = shape if shape in known else None
  else:
    found = next((t for t in known if _name(chip, t) == f'{kind}-{number}'), None)
  if found is None:
    wanted = _chips(shape) if shape else int(number) / (chip.cores if chip.counts_cores else 1)
    near = sorted(known, key=lambda t: abs(math.log(_chips(t) / max(wanted, .5))))[:3]
    raise ConfigError(f'--topology={text!r}: {chip.name} has no such slice; nearest: '
                      f'{", ".join(f"{_name(chip, t)} ({t})" for t in near)}')
  return Slice(text.strip(), chip, tuple(map(int, found.split('x'))), int(slices or 1))
