"""Records of raw files, one after the other: memory does not grow with the file.

  .jsonl, .jsonl.zst, .jsonl.gz, .json.gz, .json.zst   a JSON object a line
  .parquet   a row at a time, by row group
  .csv       a row at a time
  others     UTF-8 text; long ones are cut at the ends of lines

Files are local or gs://. What is wrong with one record is a `Malformed` in its place; what is wrong with a file is a
`ConfigError`.
"""

import contextlib
import csv
import functools
import io
import json
from typing import Any, BinaryIO, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from openmoe_jax import paths
from openmoe_jax.config import ConfigError

PLAIN_JSON = ('.jsonl',)
COMPRESSED_JSON = {'.jsonl.zst': 'zstd', '.json.zst': 'zstd', '.jsonl.gz': 'gzip', '.json.gz': 'gzip'}
JSON_LINES = PLAIN_JSON + tuple(COMPRESSED_JSON)
PARQUET = ('.parquet',)
CSV = ('.csv',)

_BLOCK = 1 << 20
_BATCH_BYTES = 1 << 23  # of rows of a parquet file that are in memory at once
_MOST_ROWS = 1000


class Segment(NamedTuple):
  """A part of a file.

  Attributes:
    file: path.
    name: the path below the folder that was asked for.
    start, stop: bytes of a .jsonl file (lines that begin there), row groups of a .parquet file; others are whole. A
      stop of -1 is the end of the file.
  """
  file: str
  name: str
  start: int = 0
  stop: int = -1


class Unusable(Exception):
  """A record that does not become an example; the text says why."""


class LeftOut(Unusable):
  """By design: it is not of the kind that the data set holds."""


class Malformed(Unusable):
  """It is not what it should be."""


class Record(NamedTuple):
  """Attributes:
    number: of lines, rows or parts before it in its segment.
    value: a line of JSON, fields, or what is wrong.
    done: bytes of the segment's file that have been read.
  """
  number: int
  value: Union[bytes, Mapping[str, Any], Unusable]
  done: int


class Limits(NamedTuple):
  """Attributes:
    record_bytes: longer lines are malformed.
    text_bytes: longer text files are cut.
  """
  record_bytes: int
  text_bytes: int


def is_kind(file: str, suffixes: Sequence[str]) -> bool:
  return file.lower().endswith(tuple(suffixes))


def records(segment: Segment, limits: Limits, columns: Optional[Sequence[str]] = None) -> Iterator[Record]:
  """What a segment holds, in order.

  Args:
    segment: to read.
    limits: of what is in memory.
    columns: of parquet files that are wanted, as far as they are there; None: all.

  Raises:
    ConfigError: the file cannot be read, or is not complete.
  """
  if is_kind(segment.file, JSON_LINES):
    return _json_records(segment, limits)
  if is_kind(segment.file, PARQUET):
    return _parquet_records(segment, columns)
  if is_kind(segment.file, CSV):
    return _csv_records(segment)
  return _text_records(segment, limits)


def fields(record: Record) -> Mapping[str, Any]:
  """The fields of a record.

  Raises:
    Unusable: it has none.
  """
  value = record.value
  if isinstance(value, Unusable):
    raise value
  if not isinstance(value, bytes):
    return value
  try:
    value = json.loads(value.decode())
  except UnicodeDecodeError as error:
    raise Malformed(f'not UTF-8 at byte {error.start} of the line') from error
  except json.JSONDecodeError as error:
    raise Malformed(f'not JSON: {error.msg}, column {error.colno}') from error
  except (ValueError, RecursionError) as error:
    raise Malformed(f'not JSON: {error}') from error
  if not isinstance(value, dict):
    raise Malformed(f'a JSON {type(value).__name__}, not an object with fields')
  return value


@contextlib.contextmanager
def _opened(file: str, what: str) -> Iterator[BinaryIO]:
  """A file, in which everything that goes wrong is its fault."""
  try:
    with paths.path(file).open('rb') as stream:
      yield stream if isinstance(stream, io.IOBase) else _PythonFile(stream)
  except ConfigError:
    raise
  except Exception as error:  # pyarrow, fsspec and TensorFlow raise many kinds.
    reason = str(error).strip().split('\n', 1)[0]
    if 'runcated' in reason or 'nd of file' in reason:
      reason = f'it is truncated; copy or download it again ({reason})'
    raise ConfigError(f'{file} cannot be read as {what}: {reason}') from error


class _PythonFile(io.RawIOBase):
  """TensorFlow's file, which is what a gs:// path opens, with all that pyarrow wants of one."""

  def __init__(self, stream: Any):
    super().__init__()
    self._stream = stream

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    content = self._stream.read(len(buffer))
    buffer[:len(content)] = content
    return len(content)

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    self._stream.seek(offset, whence)
    return self.tell()

  def tell(self) -> int:
    return self._stream.tell()


# JSON lines.


def _json_records(segment: Segment, limits: Limits) -> Iterator[Record]:
  for number, (line, done) in enumerate(_json_lines(segment, limits.record_bytes)):
    if line is None:
      too_long = f'a line longer than {paths.human_bytes(limits.record_bytes)}'
      yield Record(number, Malformed(too_long), done)
    elif line.strip():
      yield Record(number, line, done)


def _json_lines(segment: Segment, limit: int) -> Iterator[Tuple[Optional[bytes], int]]:
  """(line, bytes read), without the line's end; None for a line that is too long."""
  compression = next((c for suffix, c in COMPRESSED_JSON.items() if is_kind(segment.file, (suffix,))), None)
  with _opened(segment.file, f'JSON lines ({compression})' if compression else 'JSON lines') as raw:
    if compression:
      import pyarrow
      with pyarrow.input_stream(raw, compression=compression) as stream:
        for line, _ in _lines(stream, limit):
          yield line, raw.tell()
      return
    # A line belongs to the segment in which it begins: one that began before is passed over.
    position = max(segment.start - 1, 0)
    raw.seek(position)
    first = segment.start > 0
    for line, size in _lines(raw, limit):
      begin, position = position, position + size
      if first:
        first = False
        continue
      if 0 <= segment.stop <= begin:
        return
      if not begin and line and line.startswith(b'\xef\xbb\xbf'):
        line = line[3:]  # a byte order mark
      yield line, position - segment.start


def _lines(stream: BinaryIO, limit: int) -> Iterator[Tuple[Optional[bytes], int]]:
  """(line without its end, its bytes in the stream); None in place of a line of more than `limit` bytes."""
  parts: List[bytes] = []
  size = 0
  while block := stream.read(_BLOCK):
    *ended, rest = block.split(b'\n')
    for line in ended:
      size += len(line)
      yield (b''.join([*parts, line]) if parts else line) if size <= limit else None, size + 1
      parts, size = [], 0
    size += len(rest)
    parts = parts + [rest] if size <= limit else []
  if size:
    yield b''.join(parts) if size <= limit else None, size


# Other files.


def _parquet_records(segment: Segment, columns: Optional[Sequence[str]]) -> Iterator[Record]:
  from pyarrow import parquet
  with _opened(segment.file, 'parquet') as raw:
    # Without these two, pyarrow reads whole row groups ahead.
    file = parquet.ParquetFile(raw, buffer_size=_BLOCK, pre_buffer=False)
    known = file.schema_arrow.names
    wanted = None if columns is None else [name for name in columns if name in known]
    number = done = 0
    for group in range(segment.start, file.num_row_groups if segment.stop < 0 else segment.stop):
      info = file.metadata.row_group(group)
      size = _row_group(info)
      row_bytes = max(size.text // max(info.num_rows, 1), 1)
      rows = min(max(_BATCH_BYTES // row_bytes, 1), _MOST_ROWS)
      begin, before = done, number
      for batch in file.iter_batches(rows, row_groups=[group], columns=wanted, use_threads=False):
        for row in batch.to_pylist():
          number += 1
          done = begin + size.compressed * (number - before) // info.num_rows
          yield Record(number - 1, row, done)


class RowGroup(NamedTuple):
  """Attributes:
    text: bytes of its values.
    compressed: bytes in the file.
  """
  text: int
  compressed: int


def row_groups(file: str) -> List[RowGroup]:
  """The row groups of a parquet file."""
  from pyarrow import parquet
  with _opened(file, 'parquet') as raw:
    metadata = parquet.read_metadata(raw)
    return [_row_group(metadata.row_group(i)) for i in range(metadata.num_row_groups)]


def _row_group(info: Any) -> RowGroup:
  return RowGroup(info.total_byte_size, sum(info.column(i).total_compressed_size for i in range(info.num_columns)))


def _csv_records(segment: Segment) -> Iterator[Record]:
  """Rows as {'row': fields, 'path': of the file}; these files are small."""
  with _opened(segment.file, 'CSV') as raw:
    content = raw.read()
    rows = list(csv.reader(io.StringIO(content.decode('utf-8-sig'), newline='')))
  for number, row in enumerate(rows):
    yield Record(number, {'row': row, 'path': segment.name}, len(content) * (number + 1) // len(rows))


def _text_records(segment: Segment, limits: Limits) -> Iterator[Record]:
  """A text file as {'text', 'path'}; the parts of a long one have ':0', ':1' and so on behind their path."""
  with _opened(segment.file, 'text') as raw:
    number = done = 0
    rest, more = b'', True
    while more or rest:
      part = rest + raw.read(limits.text_bytes + 1 - len(rest)) if more else rest
      more = len(part) > limits.text_bytes
      cut = _last_cut(part, limits.text_bytes) if more else len(part)
      part, rest = part[:cut], part[cut:]
      if number and not part:
        return
      done += len(part)
      name = f'{segment.name}:{number}' if number or more else segment.name
      yield Record(number, _text(part, name), done)
      number += 1


def _last_cut(part: bytes, limit: int) -> int:
  """Where a text is cut: behind the last line that fits, or else between two characters."""
  cut = part.rfind(b'\n', 0, limit) + 1
  if not cut:
    cut = limit
    while cut > 1 and part[cut] & 0xC0 == 0x80:
      cut -= 1
  return cut


def _text(content: bytes, name: str) -> Union[Mapping[str, Any], Unusable]:
  try:
    text = content.decode('utf-8-sig')
  except UnicodeDecodeError:
    return LeftOut('not UTF-8 text')
  return LeftOut('not UTF-8 text') if '\0' in text else {'text': text, 'path': name}


# Messages.


def place(segment: Segment, number: int) -> str:
  """Where record `number` of a segment stands, for people: FILE:LINE, or FILE, row N."""
  if is_kind(segment.file, PARQUET):
    from pyarrow import parquet
    with _opened(segment.file, 'parquet') as raw:
      metadata = parquet.read_metadata(raw)
      before = sum(metadata.row_group(i).num_rows for i in range(segment.start))
    return f'{segment.file}, row {before + number + 1}'
  if is_kind(segment.file, JSON_LINES + CSV):
    return f'{segment.file}:{_lines_before(segment) + number + 1}'
  return segment.file


@functools.lru_cache(maxsize=8)
def _lines_before(segment: Segment) -> int:
  """Lines that begin in front of the segment."""
  count, left = (1, segment.start - 1) if segment.start else (0, 0)
  with _opened(segment.file, 'text') as raw:
    while left > 0 and (block := raw.read(min(left, _BLOCK))):
      count += block.count(b'\n')
      left -= len(block)
  return count
