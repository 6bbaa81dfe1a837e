"""What a compiled program computes while a collective is under way: read off the order of its instructions.

A collective that the compiler runs asynchronously is two instructions, a start and a done; between them the program goes
on. The matrix products there hide it, as far as they take as long as the links do.
"""

from typing import Dict, List, Sequence, Tuple

from openmoe_jax.tpu.hlo import Instruction, Module
from openmoe_jax.tpu.operations import is_kernel, kernel_flops, matrix_flops


def flops_between(module: Module, kinds: Sequence[str]) -> Dict[Tuple[str, str], float]:
  """{(computation, start): FLOPs of matrix products until its done}; those of several under way are shared evenly.

  Args:
    module: scheduled, so that the order of instructions is that of execution.
    kinds: opcodes that are looked at, without '-start'.
  """
  found: Dict[Tuple[str, str], float] = {}
  for computation, body in module.computations.items():
    under_way: List[str] = []
    for instruction in body:
      if instruction.opcode.endswith('-start') and instruction.opcode[:-len('-start')] in kinds:
        under_way.append(instruction.name)
        found[computation, instruction.name] = 0.
      elif instruction.opcode.endswith('-done'):
        under_way = [name for name in under_way if name not in instruction.operands]
      elif under_way:
        done = _flops(module, computation, instruction)
        for name in under_way if done else ():
          found[computation, name] += done / len(under_way)
  return found


def _flops(module: Module, computation: str, instruction: Instruction) -> float:
  """Of one instruction and all that it calls."""
  own = kernel_flops if is_kernel(instruction) else matrix_flops
  total = own(module, computation, instruction) or 0.
  inside = [instruction.attribute('body').lstrip('%')] if instruction.opcode == 'while' else (
      instruction.called() if instruction.opcode in ('fusion', 'call', 'conditional') else ())
  times = (module.trips(instruction) or 1) if instruction.opcode == 'while' else 1
  for name in inside:
    total += times * sum(_flops(module, name, i) for i in module.computations[name])
  return total
