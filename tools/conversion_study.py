"""How much memory and time conversions take at a model's real size, and whether any bit is lost on the way.

  python -m openmoe_jax.tools.conversion_study --gin_file=models/openmoe_base.gin
  python -m openmoe_jax.tools.conversion_study --gin_file=models/openmoe_8b.gin --dtype=bfloat16 --way=orbax,hf

Writes a checkpoint of random numbers, converts it from format to format along --way, each time in a process of its own
through `openmoe-convert`, and compares the last one with the first bit by bit. Prints a Markdown table. Needs disk for
two checkpoints at a time, in --work_dir.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, List, Optional, Sequence
import zlib

import numpy as np

from openmoe_jax import command_line
from openmoe_jax import names
from openmoe_jax import paths
from openmoe_jax.config import ModelConfig, RunConfig, require, to_dict
from openmoe_jax.convert.orbax import OrbaxSink
from openmoe_jax.convert.tensors import PARAMS, Source, TensorInfo, part_rows
from openmoe_jax.convert.transfer import transfer


class RandomSource(Source):
  """Normal numbers, the same for every way of reading along the first axis."""

  def __init__(self, model: ModelConfig):
    self.where, self.model, self.run = 'random numbers', model, to_dict(RunConfig(model=model))
    self.tensors = {PARAMS + n: TensorInfo(s, np.dtype(np.float32)) for n, s in names.t5x_shapes(model).items()}

  def read(self, name: str, axis: int = 0, start: int = 0, stop: Optional[int] = None) -> np.ndarray:
    require(axis == 0, 'random numbers are read along the first axis only')
    shape = self.tensors[name].shape
    stop = shape[0] if stop is None else stop
    rows = [np.random.default_rng([zlib.crc32(name.encode()), row]).standard_normal(shape[1:], np.float32)
            for row in range(start, stop)]
    return np.stack(rows)


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  parser = command_line.Parser(prog='conversion_study', description=__doc__)
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help='of the first checkpoint')
  parser.add_argument('--way', default='orbax,hf,orbax,t5x', help='formats, from the first to the last')
  parser.add_argument('--work_dir', help='default: a temporary folder')
  args = parser.parse_args(argv)
  formats = args.way.split(',')
  require(formats[0] == 'orbax' and set(formats) <= {'orbax', 'hf', 't5x'}, f'--way={args.way!r} must begin with orbax, '
          'and hold orbax, hf and t5x only')
  run = command_line.run_config(args, check_required=False)
  with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
    study(run, formats, args.dtype, args.gin_file, pathlib.Path(folder))


def study(run: RunConfig, formats: List[str], dtype: str, gin_files: Sequence[str], folder: pathlib.Path) -> None:
  """Prints a line for each conversion, and whether first and last are the same."""
  from openmoe_jax import conversion
  source = RandomSource(run.model)
  size = sum(info.nbytes for info in source.tensors.values()) // (2 if dtype == 'bfloat16' else 1)
  largest = max(info.nbytes for info in source.tensors.values()) // (2 if dtype == 'bfloat16' else 1)
  print(f'{paths.human_bytes(size)} of parameters in {dtype}; the largest tensor of a layer has '
        f'{paths.human_bytes(largest)}', flush=True)
  transfer(source, OrbaxSink(RunConfig(model=run.model), 1), folder / '0', dtype=conversion.dtype_of(dtype))
  print('\n| conversion | seconds | MB/s | peak memory |\n|---|---|---|---|')
  flags = [f'--gin_file={file}' for file in gin_files]
  for i, (a, b) in enumerate(zip(formats, formats[1:])):
    begin = time.monotonic()
    # A child's peak would count this process's own, until it is replaced: so a fresh interpreter starts it.
    more = flags if a == 't5x' else []
    process = subprocess.Popen([sys.executable, '-m', 'openmoe_jax.conversion', f'{a}-to-{b}', str(folder / str(i)),
                                str(folder / str(i + 1)), '--vocabulary=none' if b == 'hf' else '--params_only', *more],
                               stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    require(status == 0, f'{a}-to-{b} failed')
    seconds = time.monotonic() - begin
    print(f'| {a} to {b} | {seconds:.0f} | {size / seconds / 1e6:.0f} | '
          f'{paths.human_bytes(usage.ru_maxrss * 1024)} |', flush=True)
    if i:
      shutil.rmtree(folder / str(i))
  flags_of = conversion.parser().parse_args(['check', str(folder), *flags])
  first, last = (conversion.open_source(str(folder / str(i)), flags_of, False) for i in (0, len(formats) - 1))
  print(f'\nthe last is {"the same as" if same(first, last) else "NOT"} the first, bit by bit')


def same(first: Any, second: Any) -> bool:
  """Whether two sources hold the same tensors with the same bits."""
  if {n: i[:2] for n, i in first.tensors.items()} != {n: i[:2] for n, i in second.tensors.items()}:
    return False
  for name, info in first.tensors.items():
    axis = second.axis(name)
    rows = part_rows(info, axis)
    for start in range(0, info.shape[axis], rows):
      stop = min(start + rows, info.shape[axis])
      a, b = (np.ascontiguousarray(s.read(name, axis, start, stop)).view(np.uint8) for s in (first, second))
      if not np.array_equal(a, b):
        return False
  return True


if __name__ == '__main__':
  main()
