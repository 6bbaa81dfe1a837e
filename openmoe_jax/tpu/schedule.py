"""What a compiled program computes while a collective is under way: read off the order of its instructions.

A collective that the compiler runs asynchronously is two instructions, a start and a done; between them the program goes
on. The matrix products there hide it, as far as they take as long as the links do.
"""

from typing import Dict, List, Sequence, Tuple

from openmoe_jax.tpu.hlo import Instruction, Module
from openmoe_jax.tpu.operations import product_flops


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
  """Of one instruction and all that it runs."""
  inside = sum(times * product_flops(module, where, i) for where, i, times in module.inside(instruction, fused=True))
  return product_flops(module, computation, instruction) + inside
