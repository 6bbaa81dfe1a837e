"""Arithmetic and memory traffic of a compiled program, instruction by instruction, loops counted as often as they run.

FLOPs are those of matrix products (twice the multiply-adds), which a TPU compiler calls convolutions; what the vector
unit does beside them is not counted, as everywhere in this package. Bytes are what passes between an instruction and
the device's main memory; arrays that the compiler has placed in the fast memory of the core cost none.
"""

import collections
import dataclasses
import math
import re
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from openmoe_jax import splash
from openmoe_jax.tpu.hlo import Array, Instruction, Module

# Instructions that move nothing by themselves.
_FREE = frozenset(('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call',
                   'after-all', 'partition-id', 'replica-id', 'opt-barrier', 'add-dependency', 'iota', 'domain'))


@dataclasses.dataclass(frozen=True)
class Work:
  """What a run of the program does on one device.

  Attributes:
    flops_of: FLOPs of matrix products by part of the model (`parts.part_of`).
    bytes_of: bytes to and from main memory, likewise.
    kernel_flops: the part of `flops` that is in custom kernels.
    unknown: custom kernels whose FLOPs no formula gives: target -> how often they run.
  """
  flops_of: Dict[str, float]
  bytes_of: Dict[str, float]
  kernel_flops: float
  unknown: Dict[str, float]

  @property
  def flops(self) -> float:
    return sum(self.flops_of.values())

  @property
  def bytes(self) -> float:
    return sum(self.bytes_of.values())


def work(module: Module, part_of: Callable[[str], str] = lambda source: '') -> Work:
  """Counts a whole program.

  Args:
    part_of: an instruction's place in the traced program -> the part of the model that it belongs to.
  """
  kernels = 0.
  unknown: Dict[str, float] = {}
  flops_of, bytes_of = collections.Counter(), collections.Counter()
  for computation, instruction, times in module.executed(fused=True):
    count = matrix_flops(module, computation, instruction)
    if count is None and is_kernel(instruction):
      count = kernel_flops(module, computation, instruction)
      if count is None:
        target = instruction.attribute('custom_call_target') or '?'
        unknown[target] = unknown.get(target, 0) + times
      kernels += times * (count or 0)
    if count:
      flops_of[part_of(instruction.source)] += times * count
  for computation, instruction, times in module.executed():
    moved = memory_bytes(module, computation, instruction)
    if moved:
      bytes_of[part_of(instruction.source)] += times * moved
  return Work(dict(flops_of), dict(bytes_of), kernels, unknown)


def product_flops(module: Module, computation: str, instruction: Instruction) -> float:
  """FLOPs of a matrix product or of a kernel; 0 of anything else, and of a kernel that no formula is for."""
  own = kernel_flops if is_kernel(instruction) else matrix_flops
  return own(module, computation, instruction) or 0.


def matrix_flops(module: Module, computation: str, instruction: Instruction) -> Optional[float]:
  """FLOPs of a `dot` or `convolution`; None for anything else."""
  if instruction.opcode == 'dot':
    left = _operand(module, computation, instruction, 0)
    contracted = [int(d) for d in re.findall(r'\d+', instruction.attribute('lhs_contracting_dims') or '')]
    return 2. * math.prod(instruction.arrays[0].dims) * math.prod(left.dims[d] for d in contracted)
  if instruction.opcode == 'convolution':
    left, right = (_operand(module, computation, instruction, i) for i in (0, 1))
    return _convolution(left.dims, right.dims, instruction.arrays[0].dims, instruction)
  return None


def _convolution(left: Sequence[int], right: Sequence[int], out: Sequence[int], instruction: Instruction) -> float:
  """Twice the multiply-adds of which both factors exist: batched products are convolutions full of holes."""
  labels = re.match(r'(\w+)_(\w+)->(\w+)', instruction.attribute('dim_labels') or '')
  lhs, rhs, result = labels.groups()
  groups = int(instruction.attribute('feature_group_count') or 1)
  batch_groups = int(instruction.attribute('batch_group_count') or 1)
  window = _window(instruction.attribute('window') or '', len(lhs) - 2)
  pairs = 1.
  for spatial in range(len(lhs) - 2):
    at = str(spatial)
    pairs *= _valid_pairs(left[lhs.index(at)], right[rhs.index(at)], out[result.index(at)], *window[spatial])
  return (2. * left[lhs.index('f')] / groups * right[rhs.index('o')] * left[lhs.index('b')] / batch_groups * pairs)


def _window(text: str, rank: int) -> List[Tuple[int, int, int, int]]:
  """(stride, padding at the low end, dilation of the input, dilation of the kernel) of each spatial dimension."""
  found = dict(re.findall(r'(\w+)=([\dx_\-]+)', text))
  numbers = lambda name, default: [int(n) for n in found[name].split('x')] if name in found else [default] * rank
  low = [int(p.split('_')[0]) for p in found['pad'].split('x')] if 'pad' in found else [0] * rank
  return list(zip(numbers('stride', 1), low, numbers('lhs_dilate', 1), numbers('rhs_dilate', 1)))


def _valid_pairs(size: int, kernel: int, out: int, stride: int, low: int, dilation: int, kernel_dilation: int) -> int:
  """Pairs of an output and a kernel position that meet an input element, along one spatial dimension."""
  at = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None, :] * kernel_dilation
  return int(np.sum((at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)))


def is_kernel(instruction: Instruction) -> bool:
  """Whether this is a kernel of Pallas or Mosaic, or an instruction of which only a kernel remains."""
  return (instruction.opcode == 'custom-call' and 'tpu_custom_call' in instruction.attributes or
          instruction.opcode == 'ragged-dot')


def kernel_flops(module: Module, computation: str, instruction: Instruction) -> Optional[float]:
  """FLOPs of a custom kernel: as it says itself, or by formula for products of ragged groups; None if unknown."""
  if 'splash' in instruction.name + instruction.source:
    return _splash(module, computation, instruction)
  if 'ragged-dot-metadata' in instruction.name:  # where the groups begin: integers only
    return 0.
  stated = re.search(r'"flops":"?(\d+)', instruction.attributes)
  if stated and int(stated.group(1)) > 0:
    return float(stated.group(1))
  if instruction.opcode == 'ragged-dot' or re.search(r'ragged|gmm', instruction.name + instruction.source):
    return _ragged(module, computation, instruction)
  return None


def _splash(module: Module, computation: str, instruction: Instruction) -> Optional[float]:
  """Products of queries [.., H, L, K] with the keys of their blocks: 2 forward, 5 backward (scores computed again)."""
  shapes = [_operand(module, computation, instruction, i) for i in range(len(instruction.operands))]
  rows = next((a.dims for a in shapes if a is not None and len(a.dims) >= 3 and a.dtype in ('bf16', 'f32')), None)
  if rows is None or not splash.usable(rows[-2]):
    return None
  products = 5 if 'dkv' in instruction.name + instruction.source else 2
  return products * 2. * math.prod(rows) * splash.computed_keys(rows[-2])


def _ragged(module: Module, computation: str, instruction: Instruction) -> Optional[float]:
  """[M, K] by [E, K, N] in groups of rows, 2 M K N; or its gradient [K, M] by [M, N] -> [E, K, N], the same."""
  out = instruction.arrays[0].dims
  arrays = [_operand(module, computation, instruction, i) for i in range(len(instruction.operands))]
  matrices = [a.dims for a in arrays if a is not None and len(a.dims) in (2, 3) and a.dtype not in ('s32', 'pred')]
  if len(out) == 3 and len(matrices) >= 2:  # gradient of the kernels
    rows = [set(m) for m in matrices[:2]]
    shared = rows[0] & rows[1] - {out[1]} & rows[1]
    longest = max(shared or {max(matrices[0])})
    return 2. * longest * out[1] * out[2]
  kernels = next((m for m in matrices if len(m) == 3), None)
  if len(out) == 2 and kernels:
    return 2. * out[0] * math.prod(kernels[1:])
  return None


def _operand(module: Module, computation: str, instruction: Instruction, index: int) -> Optional[Array]:
  found = module.by_name[computation].get(instruction.operands[index]) if index < len(instruction.operands) else None
  return found.arrays[0] if found is not None and found.arrays else None


def memory_bytes(module: Module, computation: str, instruction: Instruction) -> float:
  """Bytes that one execution reads from and writes to main memory.

  A fusion that only looks at a slice of an operand, or writes one in place, counts that slice.
  """
  opcode = instruction.opcode
  if opcode in _FREE or opcode == 'async-start' or opcode.endswith(('-done', '-update')):
    return 0.
  operands = [module.by_name[computation].get(name) for name in instruction.operands]
  if opcode == 'fusion':
    return _fusion_bytes(module, instruction, operands)
  results = instruction.arrays
  if opcode.endswith('-start'):  # operands, results and bookkeeping; of a copy the result, the operand and bookkeeping
    opcode = opcode[:-len('-start')]
    results = results[:1] if opcode == 'copy' else results[len(operands):2 * len(operands)]
  out = sum(a.bytes for a in _main(results))
  taken = [sum(a.bytes for a in _main(o.arrays)) if o is not None else 0. for o in operands]
  if opcode in ('dynamic-slice', 'slice', 'gather'):
    return out + (sum(a.bytes for a in results) if taken[0] else 0.)
  if opcode in ('dynamic-update-slice', 'scatter'):
    return 2 * taken[-1 if opcode == 'scatter' else 1]
  return out + sum(taken)


def _main(arrays: Tuple[Array, ...]) -> List[Array]:
  return [a for a in arrays if a.space == 0]


def _fusion_bytes(module: Module, instruction: Instruction, operands) -> float:
  inside = instruction.called()[0]
  body = module.computations[inside]
  users: Dict[str, List[Instruction]] = {}
  for i in body:
    for name in i.operands:
      users.setdefault(name, []).append(i)
  parameters = {int(i.argument): i for i in body if i.opcode == 'parameter'}
  total = 0.
  for number, operand in enumerate(operands):
    arrays = _main(operand.arrays) if operand else []
    if not arrays:
      continue
    whole = sum(a.bytes for a in arrays)
    part = _part(users, parameters[number], whole) if number in parameters else whole
    total += part
  root = module.root(inside)
  results = [module.by_name[inside].get(n) for n in root.operands] if root.opcode == 'tuple' else [root]
  for array, result in zip(instruction.arrays, results):
    if array.space != 0:
      continue
    result = _behind_bitcast(module, inside, result)
    if result is not None and result.opcode == 'dynamic-update-slice':
      update = module.by_name[inside].get(result.operands[1])
      total += update.bytes if update else array.bytes
    else:
      total += array.bytes
  return total


def _part(users: Dict[str, List[Instruction]], parameter: Instruction, whole: float) -> float:
  """Bytes of a fusion's parameter that are read: less than all where only slices of it are used."""
  part, todo, seen = 0., [parameter], set()
  while todo:
    at = todo.pop()
    for user in users.get(at.name, ()):
      if user.opcode == 'bitcast':
        todo.append(user)
      elif user.opcode in ('dynamic-slice', 'slice', 'gather') and user.operands[0] == at.name:
        if user.name not in seen:
          part += user.bytes
        seen.add(user.name)
      elif user.opcode == 'dynamic-update-slice' and user.operands[0] == at.name:
        continue  # written in place
      else:
        return whole
  return min(part, whole)


def _behind_bitcast(module: Module, computation: str, instruction: Optional[Instruction]) -> Optional[Instruction]:
  while instruction is not None and instruction.opcode in ('bitcast', 'copy', 'convert') and instruction.operands:
    if instruction.opcode != 'bitcast':
      break
    instruction = module.by_name[computation].get(instruction.operands[0])
  return instruction
