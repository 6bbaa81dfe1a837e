"""Reads the text of a compiled program (XLA's HLO): computations, instructions, and how often each of them runs.

The compiler's own cost analysis counts the body of a loop once; here every instruction carries the product of the trip
counts of the loops around it.
"""

import dataclasses
import functools
import math
import re
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

ITEMSIZE = {'pred': 1, 's4': .5, 'u4': .5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 's32': 4, 'u32': 4, 's64': 8, 'u64': 8,
            'f16': 2, 'bf16': 2, 'f32': 4, 'f64': 8, 'c64': 8, 'f8e4m3fn': 1, 'f8e5m2': 1, 'token': 0, 'opaque': 0}
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_END = re.compile(r'^\}(,| //|\s*$)')  # of a computation
_OPERAND = re.compile(r'%([\w.\-]+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r'\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')


class Array(NamedTuple):
  """One array of an instruction's result.

  Attributes:
    dtype: HLO's name, such as 'bf16'.
    dims: its shape.
    space: 0 is the device's main memory (HBM), 1 its fast memory (VMEM), 5 the host's.
  """
  dtype: str
  dims: Tuple[int, ...]
  space: int = 0

  @property
  def bytes(self) -> float:
    """Without the padding of a tiled layout."""
    return math.prod(self.dims) * ITEMSIZE.get(self.dtype, 4)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line.

  Attributes:
    name, opcode: 'fusion.7', 'fusion'.
    shape: text of the result's type.
    operands: names of the instructions whose results it takes.
    argument: what stands in the parentheses, for parameters and constants.
    attributes: the text after the operands.
    root: whether its result is its computation's.
  """
  name: str
  opcode: str
  shape: str
  operands: Tuple[str, ...]
  argument: str
  attributes: str
  root: bool = False

  @functools.cached_property
  def arrays(self) -> Tuple[Array, ...]:
    """The result's arrays; several if it is a tuple."""
    return tuple(Array(dtype, tuple(int(re.sub(r'\D', '', d)) for d in dims.split(',') if d), _space(layout))
                 for dtype, dims, layout in _ARRAY.findall(self.shape))

  @property
  def bytes(self) -> float:
    return sum(array.bytes for array in self.arrays)

  def attribute(self, name: str) -> Optional[str]:
    """The text of `name=...` up to the next attribute, brackets balanced; None if it is not there."""
    at = re.search(rf'(?:^|[\s,]){name}=', self.attributes)
    return self.attributes[at.end():_end(self.attributes, at.end())].strip() if at else None

  def called(self) -> Tuple[str, ...]:
    """Names of the computations that it runs, but for the condition of a loop."""
    names = [name for kind, name in _CALLED.findall(self.attributes) if kind != 'condition']
    for group in _BRANCHES.findall(self.attributes):
      names += [name.strip().lstrip('%') for name in group.split(',')]
    return tuple(names)

  @property
  def source(self) -> str:
    """The place in the traced program: 'jit(step)/while/body/...', '' if unknown."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found.group(1) if found else ''


def _space(layout: str) -> int:
  found = re.search(r'S\((\d+)\)', layout or '')
  return int(found.group(1)) if found else 0


def _end(text: str, start: int) -> int:
  """Where the value that starts there ends: at a comma outside of all brackets and quotes."""
  depth, quoted = 0, False
  for i in range(start, len(text)):
    c = text[i]
    if c == '"' and text[i - 1] != '\\':
      quoted = not quoted
    elif not quoted:
      depth += (c in '([{') - (c in ')]}')
      if c == ',' and depth == 0:
        return i
  return len(text)


def _balanced(text: str, start: int) -> int:
  """Index after the bracket that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] in '([{') - (text[i] in ')]}')
    if depth == 0:
      return i + 1
  return len(text)


def parse_instruction(line: str) -> Optional[Instruction]:
  """An Instruction, or None if the line is none."""
  match = _INSTRUCTION.match(line)
  if not match:
    return None
  root, name, rest = match.groups()
  stop = _balanced(rest, 0) if rest.startswith('(') else rest.find(' ')
  shape, rest = rest[:stop], rest[stop:].lstrip()
  paren = rest.find('(')
  if stop < 0 or paren < 0:
    return None
  close = _balanced(rest, paren)
  inside = rest[paren + 1:close - 1]
  return Instruction(name, rest[:paren], shape, tuple(_OPERAND.findall(inside)), inside, rest[close:].lstrip(', '),
                     bool(root))


@dataclasses.dataclass(frozen=True)
class Module:
  """A program.

  Attributes:
    computations: name -> its instructions in their order, which is the order of execution if the module is scheduled.
    entry: name of the one that is run.
  """
  computations: Dict[str, List[Instruction]]
  entry: str

  @functools.cached_property
  def by_name(self) -> Dict[str, Dict[str, Instruction]]:
    return {name: {i.name: i for i in body} for name, body in self.computations.items()}

  def root(self, computation: str) -> Instruction:
    body = self.computations[computation]
    return next((i for i in body if i.root), body[-1])

  def trips(self, loop: Instruction) -> Optional[int]:
    """How often a `while` runs: as the compiler says, or else as counter, step and bound say; None if nothing says."""
    found = _TRIPS.search(loop.attributes)
    if found:
      return int(found.group(1))
    condition, body = (loop.attribute(name).lstrip('%') for name in ('condition', 'body'))
    test = self._behind(condition, self.root(condition))
    if test is None or test.opcode != 'compare' or test.attribute('direction') not in ('LT', 'LE'):
      return None
    counter, bound = (self._behind(condition, self.by_name[condition].get(name)) for name in test.operands)
    if counter is None or counter.opcode != 'get-tuple-element' or self._constant(condition, bound) is None:
      return None
    index = int(counter.attribute('index'))
    home = self._home[loop.name]
    first = self._constant(home, self._element(home, self.by_name[home].get(loop.operands[0]), index))
    moved = self._sum(body, self._element(body, self.root(body), index))
    if first is None or moved is None or not moved[0] or moved[1].attribute('index') != str(index):
      return None
    last = self._constant(condition, bound) + (test.attribute('direction') == 'LE')
    return max(-(-(last - first) // moved[0]), 0)

  @functools.cached_property
  def unknown_loops(self) -> Tuple[str, ...]:
    """Loops that run nobody knows how often; their names."""
    return tuple(i.name for _, i, _ in self.executed() if i.opcode == 'while' and self.trips(i) is None)

  @functools.cached_property
  def _home(self) -> Dict[str, str]:
    return {i.name: name for name, body in self.computations.items() for i in body}

  def _element(self, computation: str, carry: Optional[Instruction], index: int) -> Optional[Instruction]:
    """What a tuple was made of."""
    if carry is None or carry.opcode != 'tuple':
      return None
    return self.by_name[computation].get(carry.operands[index])

  def _behind(self, computation: str, instruction: Optional[Instruction]) -> Optional[Instruction]:
    """What a chain of copies repeats."""
    while instruction is not None and instruction.opcode in ('copy', 'bitcast', 'convert', 'copy-done', 'copy-start'):
      instruction = self.by_name[computation].get(instruction.operands[0])
    return instruction

  def _constant(self, computation: str, instruction: Optional[Instruction]) -> Optional[int]:
    instruction = self._behind(computation, instruction)
    if instruction is None or instruction.opcode != 'constant':
      return None
    return int(instruction.argument) if re.fullmatch(r'-?\d+', instruction.argument.strip()) else None

  def _sum(self, computation: str, at: Optional[Instruction]) -> Optional[Tuple[int, Instruction]]:
    """(sum of constants, the parameter or element of a tuple that they are added to); None if it is anything else."""
    at = self._behind(computation, at)
    if at is None or at.opcode in ('get-tuple-element', 'parameter'):
      return at and (0, at)
    names = self.by_name[computation]
    if at.opcode == 'fusion':
      inside = at.called()[0]
      found = self._sum(inside, self.root(inside))
      if found is None or found[1].opcode != 'parameter':
        return None
      constant, rest = found[0], self._sum(computation, names.get(at.operands[int(found[1].argument)]))
      return rest and (constant + rest[0], rest[1])
    if at.opcode == 'add':
      for one, other in (at.operands, at.operands[::-1]):
        constant = self._constant(computation, names.get(other))
        if constant is not None:
          rest = self._sum(computation, names.get(one))
          return rest and (constant + rest[0], rest[1])
    return None

  def executed(self, computation: Optional[str] = None, times: float = 1., fused: bool = False
               ) -> Iterator[Tuple[str, Instruction, float]]:
    """(computation, instruction, how often it runs) of all that one run of the program executes.

    Of a conditional every branch counts, and a loop of `unknown_loops` once. What is inside a fusion is visited only if
    `fused`.
    """
    computation = self.entry if computation is None else computation
    for instruction in self.computations[computation]:
      yield computation, instruction, times
      yield from self.inside(instruction, times, fused)

  def inside(self, instruction: Instruction, times: float = 1., fused: bool = False
             ) -> Iterator[Tuple[str, Instruction, float]]:
    """As `executed`, of the computations that an instruction runs."""
    if instruction.opcode == 'while':
      trips = self.trips(instruction)
      yield from self.executed(instruction.attribute('body').lstrip('%'), times * (1 if trips is None else trips), fused)
    elif instruction.opcode in ('call', 'conditional', 'async-start') or fused and instruction.opcode == 'fusion':
      for name in instruction.called():
        yield from self.executed(name, times, fused)


def parse(text: str) -> Module:
  """The module that `compiled.as_text()` prints."""
  computations: Dict[str, List[str]] = {}
  entry, body = '', None
  for line in text.splitlines():
    start = _COMPUTATION.match(line)
    if start:
      body = computations.setdefault(start.group(2), [])
      entry = start.group(2) if start.group(1) else entry
    elif _END.match(line):
      body = None
    elif body and not line.startswith('  '):  # what a kernel says of itself goes on over several lines
      body[-1] += line
    elif body is not None:
      body.append(line)
  return Module({name: [i for i in map(parse_instruction, lines) if i is not None] for name, lines in computations.items()},
                entry)
