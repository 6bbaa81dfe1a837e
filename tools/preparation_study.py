"""How much memory and time it takes to prepare one large raw file, by format (Linux).

  python -m openmoe_jax.tools.preparation_study --gigabytes=2 --processes=2

Writes a file of documents like those of a web corpus (lengths are lognormal, 6 KB on average; the text is the standard
library's), prepares it with openmoe_jax.tools.prepare_data, and watches that program and its processes. Prints a
Markdown table; memory is the largest sum of resident memory over all of them, in which what they share counts several
times. A parquet file with a single row group is the hardest case: a row group is what readers like to take whole.
"""

import itertools
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import time
from typing import Iterator, List, Optional, Sequence

from openmoe_jax import command_line, paths
from openmoe_jax.config import require
from openmoe_jax.preparation import datasets

FORMATS = ('jsonl', 'jsonl.zst', 'parquet', 'parquet, one row group')
_SECONDS_BETWEEN_LOOKS = .05
_ROWS = 1000  # of a row group, as The Stack has them


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  parser = command_line.Parser(configured=False, prog='preparation_study', description=__doc__)
  parser.add_argument('--gigabytes', type=float, default=2, help='of text in a file (%(default)s)')
  parser.add_argument('--processes', type=int, default=os.cpu_count(), help='(default: one a core)')
  parser.add_argument('--formats', default=';'.join(FORMATS), help="separated by ';' (%(default)s)")
  parser.add_argument('--work_dir', help='default: a temporary folder')
  args = parser.parse_args(argv)
  formats = args.formats.split(';')
  require(set(formats) <= set(FORMATS), f'--formats={args.formats!r}: known are {"; ".join(FORMATS)}')
  require(args.gigabytes > 0 and args.processes > 0, '--gigabytes and --processes must be positive')
  print('| file | of | text | seconds | MB/s | MB a CPU-second | memory |\n|---|---|---|---|---|---|---|', flush=True)
  for kind in formats:
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
      file = write(pathlib.Path(folder), kind, args.gigabytes * 1e9)
      study(pathlib.Path(folder), file, kind, args.gigabytes * 1e9, args.processes)


def documents(total: float) -> Iterator[str]:
  """Texts of `total` bytes together."""
  from openmoe_jax.tasks import standard_library
  text = '\n'.join(document.text for kind in standard_library.KINDS
                   for document in standard_library.documents(kind, 'train'))
  choose = random.Random(0)
  while total > 0:
    length = min(int(choose.lognormvariate(8, 1.2)), len(text) // 2)
    start = choose.randrange(len(text) - length)
    yield text[start:start + length]
    total -= length


def write(folder: pathlib.Path, kind: str, total: float) -> pathlib.Path:
  """A raw file with `total` bytes of text."""
  import pyarrow
  from pyarrow import parquet
  file = folder / 'raw' / f'file.{kind.partition(",")[0]}'
  file.parent.mkdir()
  if file.suffix == '.parquet':
    schema = pyarrow.schema([('content', pyarrow.string()), ('lang', pyarrow.string()), ('size', pyarrow.int64())])
    texts = documents(total)
    batches = (pyarrow.record_batch([part, ['Python'] * len(part), list(map(len, part))], schema)
               for part in iter(lambda: list(itertools.islice(texts, _ROWS)), []))
    with parquet.ParquetWriter(file, schema) as writer:
      if kind == 'parquet':
        for batch in batches:
          writer.write_batch(batch)
      else:
        table = pyarrow.Table.from_batches(batches)
        writer.write_table(table, row_group_size=table.num_rows)
    return file
  with pyarrow.output_stream(str(file), compression='zstd' if file.suffix == '.zst' else None) as stream:
    for number, text in enumerate(documents(total)):
      stream.write(datasets.as_json({'text': text, 'meta': {'url': f'http://example.com/{number}'}}) + b'\n')
  return file


def study(folder: pathlib.Path, file: pathlib.Path, kind: str, text_bytes: float, processes: int) -> None:
  """Prepares a file and prints a line about that."""
  name = 'the_stack_dedup' if file.suffix == '.parquet' else 'redpajama_c4'
  before = os.times()
  begin = time.monotonic()
  program = subprocess.Popen(
      [sys.executable, '-m', 'openmoe_jax.tools.prepare_data', name, f'--input={file}', f'--output={folder / "tfds"}',
       f'--processes={processes}'], stdout=subprocess.DEVNULL)
  peak = [0]
  watcher = threading.Thread(target=_watch, args=(program, peak))
  watcher.start()
  status = program.wait()
  watcher.join()
  require(status == 0, f'preparing {file} failed')
  seconds, after = time.monotonic() - begin, os.times()
  cpu = after.children_user + after.children_system - before.children_user - before.children_system
  print(f'| .{kind} | {paths.human_bytes(file.stat().st_size)} | {paths.human_bytes(text_bytes)} | {seconds:.0f} | '
        f'{text_bytes / seconds / 1e6:.0f} | {text_bytes / cpu / 1e6:.0f} | {paths.human_bytes(peak[0])} |', flush=True)


def _watch(program: subprocess.Popen, peak: List[int]) -> None:
  page = os.sysconf('SC_PAGE_SIZE')
  while program.poll() is None:
    peak[0] = max(peak[0], sum(page * _resident_pages(process) for process in _family(program.pid)))
    time.sleep(_SECONDS_BETWEEN_LOOKS)


def _family(process: int) -> Iterator[int]:
  """A process, and those that it has started."""
  yield process
  try:
    children = pathlib.Path(f'/proc/{process}/task/{process}/children').read_text().split()
  except OSError:  # It has ended.
    return
  for child in children:
    yield from _family(int(child))


def _resident_pages(process: int) -> int:
  try:
    return int(pathlib.Path(f'/proc/{process}/statm').read_text().split()[1])
  except (OSError, IndexError):
    return 0


if __name__ == '__main__':
  main()
