"""Collective operations of a compiled program: kind, bytes, mesh axes, and how long the links need at least.

Time model, for links that work at their published speed and know of no congestion but their own traffic: a group of
devices occupies some dimensions of the torus. A ring of n chips sends both ways; a line of n chips, one way at a time.

* all-gather, reduce-scatter: every device receives (sends) the rest of the whole array, (n - 1) / n of it, over all
  links of the group's dimensions at once; all-reduce is one after the other.
* all-to-all: what a device sends travels n / 4 hops in a ring and n / 3 in a line on average; the busiest link of a
  ring carries n / 8 of what one device sends, that of a line n / 4. Dimensions work side by side: the longest counts.
* collective-permute: the hops of the pair that is furthest apart.
* between slices: what a device sends over its chip's share of the data centre network.
Two devices that share a chip share its links.
"""

import dataclasses
import math
import re
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from openmoe_jax.tpu.hlo import Instruction, Module
from openmoe_jax.tpu.schedule import flops_between
from openmoe_jax.tpu_slices import Slice

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute',
         'collective-broadcast')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction.

  Attributes:
    kind: of KINDS.
    axes: names of the mesh axes over which its devices differ, joined by '+'; 'none' of a group of one.
    network: 'ici', or 'dcn' if groups reach across slices.
    bytes: that one device sends over links in one execution.
    seconds: the links' time of one execution.
    hidden: the part of `seconds` during which the matrix unit has something to do, as the program is scheduled.
    times: executions in a run of the program.
    source: place in the traced program.
  """
  kind: str
  axes: str
  network: str
  bytes: float
  seconds: float
  times: float
  source: str = ''
  hidden: float = 0.


def collectives(module: Module, mesh_shape: Dict[str, int], devices: Sequence, slice_: Slice) -> List[Collective]:
  """Every collective of a program.

  Args:
    mesh_shape: sizes of the mesh axes in order; the program's partition number is a device's place in the mesh.
    devices: those of the mesh, flat, with `coords`, `core_on_chip` and, of several slices, `slice_index`.
    slice_: what they are.
  """
  found, between = [], flops_between(module, KINDS)
  for computation, instruction, times in module.executed(fused=True):
    kind = kind_of(module, computation, instruction)
    across = _across_slices(instruction, mesh_shape, devices, slice_, times)
    if across is not None and times:
      found.append(across)
    if kind is None or not times:
      continue
    groups = _groups(instruction, len(devices))
    if max(map(len, groups), default=1) < 2:
      continue
    group = max(groups, key=len)
    axes = mesh_axes_of(groups, mesh_shape)
    size = _sent(module, computation, instruction, kind, len(group))
    crosses = len({getattr(devices[d], 'slice_index', None) or 0 for d in group}) > 1
    seconds = _seconds(kind, size, group, groups, devices, slice_, crosses)
    hidden = min(between.get((computation, instruction.name), 0.) / slice_.chip.device_flops, seconds)
    found.append(Collective(kind, axes, 'dcn' if crosses else 'ici', size, seconds, times, instruction.source, hidden))
  return found


def _across_slices(instruction: Instruction, mesh_shape: Dict[str, int], devices: Sequence, slice_: Slice, times: float
                   ) -> Optional[Collective]:
  """The part of a collective that goes from slice to slice: the compiler makes a transfer of the host's runtime of it,
  after (before) one within the slices. None for any other instruction."""
  found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
  if instruction.opcode != 'send' or found is None:
    return None
  kind, n, whole = found.group(1).lower().replace('_', '-'), slice_.slices, instruction.arrays[0].bytes
  sent = {'all-gather': whole * (n - 1), 'all-reduce': 2 * whole * (n - 1) / n, 'collective-permute': whole}.get(
      kind, whole * (n - 1) / n)
  places = np.asarray([device.slice_index for device in devices]).reshape(tuple(mesh_shape.values()))
  axes = '+'.join(name for axis, name in enumerate(mesh_shape) if np.diff(places, axis=axis).any())
  seconds = sent / (slice_.chip.dcn_bandwidth / slice_.chip.devices)
  return Collective(kind, axes, 'dcn', sent, seconds, times, instruction.source)


def kind_of(module: Module, computation: str, instruction: Instruction) -> Optional[str]:
  """Which collective an instruction begins; None if it is none.

  An all-reduce of which the same fusion keeps only a slice is what a TPU executes as reduce-scatter.
  """
  opcode = instruction.opcode[:-len('-start')] if instruction.opcode.endswith('-start') else instruction.opcode
  if opcode not in KINDS:
    return None
  if opcode == 'all-reduce':
    users = [i for i in module.computations[computation] if instruction.name in i.operands]
    if computation != module.entry and users and all(i.opcode == 'dynamic-slice' for i in users):
      return 'reduce-scatter'
  return opcode


def _sent(module: Module, computation: str, instruction: Instruction, kind: str, n: int) -> float:
  operands = [module.by_name[computation].get(name) for name in instruction.operands]
  whole = sum(o.bytes for o in operands if o is not None and o.arrays)
  if kind == 'all-gather':
    return whole * (n - 1)  # the operand is one device's share
  if kind == 'all-reduce':
    return 2 * whole * (n - 1) / n
  if kind == 'collective-permute':
    return whole
  return whole * (n - 1) / n


def _groups(instruction: Instruction, count: int) -> List[List[int]]:
  """Groups of partition numbers that communicate; the pairs of a permute, each from source to target."""
  pairs = instruction.attribute('source_target_pairs')
  if pairs:
    return [[int(a), int(b)] for a, b in re.findall(r'\{(\d+),(\d+)\}', pairs) if a != b]
  named = _NAMED_GROUPS.search(instruction.attributes)
  if named:
    return _groups_of_axes(*named.groups())
  text = instruction.attribute('replica_groups') or ''
  iota = re.match(r'\[([\d,]+)\]<=(.*)', text)
  if iota:
    return _iota(iota.group(2)).reshape(int(iota.group(1).split(',')[0]), -1).tolist()
  listed = [[int(d) for d in group.split(',') if d] for group in re.findall(r'\{([\d,]*)\}', text)]
  return [group for group in listed if group] or [list(range(count))]


# mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b','a':(1)2}: axes of a mesh of the compiler's own, or parts of axes.
_NAMED_GROUPS = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}")


def _groups_of_axes(sizes: str, order: Optional[str], axes: str) -> List[List[int]]:
  shape = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
  count = math.prod(shape.values())
  ids = _iota(order) if order and order.startswith('[') else (
      np.asarray([int(d) for d in order.split(',')]) if order else np.arange(count))
  # Every axis in pieces: the part before, the one that communicates, the part behind.
  pieces, moving = [], []
  wanted = {name: (int(before or 1), int(size or 0)) for name, before, size in
            re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
  for name, size in shape.items():
    before, part = wanted.get(name, (1, 1))
    part = part or size
    moving.append(len(pieces) + 1)
    pieces += [before, part, size // before // part]
  ids = ids.reshape(pieces)
  rest = [d for d in range(len(pieces)) if d not in moving]
  return ids.transpose(*rest, *moving).reshape(-1, math.prod(pieces[d] for d in moving)).tolist()


def _iota(text: str) -> np.ndarray:
  """[2,4]T(1,0): 0 to 7 as a matrix, transposed; flat."""
  shape, order = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text).groups()
  ids = np.arange(math.prod(int(d) for d in shape.split(','))).reshape([int(d) for d in shape.split(',')])
  return (ids.transpose([int(d) for d in order.split(',')]) if order else ids).reshape(-1)


def mesh_axes_of(groups: Sequence[Sequence[int]], mesh_shape: Dict[str, int]) -> str:
  """The mesh axes along which members of a group differ: 'data+expert'."""
  sizes = tuple(mesh_shape.values())
  places = np.stack(np.unravel_index(np.asarray(groups[0]), sizes), axis=-1)
  differ = [name for name, column in zip(mesh_shape, places.T) if len(set(column)) > 1]
  return '+'.join(differ) or 'none'


def _seconds(kind: str, sent: float, group: Sequence[int], groups: Sequence[Sequence[int]], devices: Sequence,
             slice_: Slice, crosses: bool) -> float:
  """Seconds that the links of the group need for what every device sends."""
  chip = slice_.chip
  if crosses:  # a device's share of its chip's network, whatever goes inside the slices besides
    slices = len({devices[d].slice_index for d in group})
    return sent * ((slices - 1) / slices) / ((len(group) - 1) / len(group)) / (chip.dcn_bandwidth / chip.devices)
  cores = len({devices[d].core_on_chip for d in group})
  link = chip.link_bandwidth * cores / chip.devices  # what one device may use of it
  places = np.asarray([devices[d].coords for d in group])
  if kind == 'collective-permute':
    hops = max(_hops(np.asarray(devices[a].coords), np.asarray(devices[b].coords), slice_) for a, b in groups)
    return sent * max(hops, 0) / link
  spans = [(d, len(set(column))) for d, column in enumerate(places.T) if len(set(column)) > 1]
  if not spans:  # two cores of one chip
    return 0.
  if kind in ('all-to-all', 'ragged-all-to-all'):
    return max(sent * n / (8 if slice_.ring(d) else 4) for d, n in spans) / link
  ways = sum(2 if slice_.ring(d) and n == slice_.shape[d] else 1 for d, n in spans)
  return sent / (ways * link)


def _hops(a: np.ndarray, b: np.ndarray, slice_: Slice) -> int:
  total = 0
  for d, size in enumerate(slice_.shape):
    apart = abs(int(a[d]) - int(b[d]))
    total += min(apart, size - apart) if slice_.ring(d) else apart
  return total


def by_kind(found: Sequence[Collective]) -> List[Tuple[str, str, str, float, float, float, float]]:
  """(network, kind, axes, executions, bytes that a device sends, seconds, hidden), summed up, the slowest first."""
  sums: Dict[Tuple[str, str, str], List[float]] = {}
  for c in found:
    row = sums.setdefault((c.network, c.kind, c.axes), [0., 0., 0., 0.])
    row[0] += c.times
    row[1] += c.times * c.bytes
    row[2] += c.times * c.seconds
    row[3] += c.times * c.hidden
  return sorted(((*key, *row) for key, row in sums.items()), key=lambda r: -r[-2])
