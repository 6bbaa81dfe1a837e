"""What is to be done: the raw files, cut into pieces of work that do not depend on who does them.

Files of up to a shard's size are put together, larger ones are cut where their format allows it: .jsonl at lines,
.parquet at row groups. A plan is plain data; what identifies it is written beside the shards, so that a preparation
only goes on with what it began with.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from openmoe_jax import paths
from openmoe_jax.config import require
from openmoe_jax.preparation import datasets, reading
from openmoe_jax.preparation.reading import Limits, Segment

MEGABYTE = 1 << 20
# A shard's size, by default: in between, such that there are about this many. (A stream of a run has files of its own.)
_LEAST, _MOST, _SHARDS = MEGABYTE, 256 * MEGABYTE, 32
_THREADS = 16  # that ask about files
# Text takes so many times the space of its compressed file, roughly; shards are closed by size, whatever this says.
_COMPRESSION = 3
_WILDCARDS = frozenset('*?[')


class File(NamedTuple):
  """Attributes:
    path: of the file.
    name: below the folder that was asked for.
    size: bytes.
  """
  path: str
  name: str
  size: int


class Piece(NamedTuple):
  """Attributes:
    segments: in order.
    sizes: input bytes of each, compressed where they are.
  """
  segments: Tuple[Segment, ...]
  sizes: Tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
  """Attributes:
    data_set: {'name': NAME[:VERSION]}, or the arguments of `datasets.text`, `validation` among them.
    output: the TFDS folder.
    shard_bytes: about the size of a shard.
    limits: of what is in memory.
    files: of the input, in order; among them those that hold no records but tell something about others.
    pieces: each for one process at a time.
  """
  data_set: Mapping[str, Any]
  output: str
  shard_bytes: int
  limits: Limits
  files: Tuple[File, ...]
  pieces: Tuple[Piece, ...]

  @property
  def builder(self) -> datasets.DataSet:
    return _builder(self.data_set)

  @property
  def folder(self) -> Any:
    """Where the data set will be."""
    builder = self.builder
    return paths.path(self.output) / builder.name / builder.version

  @property
  def work(self) -> Any:
    """Where its shards are until then."""
    return self.folder.parent / f'{self.folder.name}.unfinished'

  def identity(self) -> Dict[str, Any]:
    """What must be the same when a preparation goes on."""
    pieces = json.dumps([[segment[2:] for segment in piece.segments] for piece in self.pieces])
    return {'data set': dict(self.data_set), 'shard bytes': self.shard_bytes, 'limits': list(self.limits),
            'input files': [list(file) for file in self.files],
            'pieces': hashlib.sha256(pieces.encode()).hexdigest()[:16]}


def _builder(data_set: Mapping[str, Any]) -> datasets.DataSet:
  return datasets.text(**data_set) if 'validation' in data_set else datasets.find(**data_set)


def make(data_set: Mapping[str, Any], inputs: Sequence[str], output: str, limits: Limits,
         shard_bytes: Optional[int] = None) -> Plan:
  """Looks at the input files, and cuts them.

  Args:
    data_set, output, limits: of `Plan`.
    inputs: files, folders (with what is below them) and patterns with wildcards, local or gs://.
    shard_bytes: about the size of a shard; None: by the size of the input.

  Raises:
    ConfigError: something is not there, or holds no files of the kinds that the data set is made of.
  """
  builder = _builder(data_set)
  files = find_files(inputs, builder.suffixes)
  used = [file for file in files if not builder.skips(file.name)]
  require(bool(used), f'--input={" ".join(inputs)}: none of the {len(files)} files is one that {builder.name} is made '
          f'of ({builder.layout})')
  if shard_bytes is None:
    shard_bytes = min(max(sum(map(_weight, used)) // _SHARDS, _LEAST), _MOST)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    parts = threads.map(lambda file: list(_cut(file, shard_bytes)), used)
    pieces = tuple(_grouped([part for some in parts for part in some], shard_bytes))
  return Plan(dict(data_set), output, shard_bytes, limits, tuple(files), pieces)


# Files.


def find_files(inputs: Sequence[str], suffixes: Sequence[str]) -> List[File]:
  """The files in `inputs` whose names end in one of `suffixes` (none: all), in the order of inputs and names."""
  found: Dict[str, str] = {}
  others = 0
  for text in inputs:
    where = f'--input={text}'
    path = paths.path(text)
    if path.is_dir():
      names = _below(path)
    elif path.exists():
      require(not suffixes or reading.is_kind(path.name, suffixes), f'{where}: not a {" or ".join(suffixes)} file')
      path, names = path.parent, [path.name]
    else:
      require(not _WILDCARDS.isdisjoint(text), f'{where}: no such file or folder')
      path, names = _matching(text)
      require(bool(names), f'{where}: no file has such a name')
    wanted = [name for name in names if not suffixes or reading.is_kind(name, suffixes)]
    others += len(names) - len(wanted)
    for name in wanted:
      require(str(path / name) not in found, f'{where}: {path / name} is there twice')
      found[str(path / name)] = name
  require(bool(found), f'--input={" ".join(inputs)}: no files' + (
      f' that end in {", ".join(suffixes)}, only {others} others' if others else ''))
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    sizes = threads.map(lambda file: paths.path(file).stat().length, found)
    return [File(file, name, size) for (file, name), size in zip(found.items(), sizes)]


def _below(folder: Any) -> List[str]:
  """Files in a folder and the folders in it, hidden ones left out."""
  names = []
  for parent, _, files in folder.walk():
    inside = parent.relative_to(folder)
    names += [str(inside / name) for name in files]
  return sorted(name for name in names if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
  return any(part.startswith('.') for part in name.split('/'))


def _matching(pattern: str) -> Tuple[Any, List[str]]:
  """The folder in front of the first wildcard, and the files in it that fit, folders with what is below them."""
  parts = pattern.split('/')
  first = next(i for i, part in enumerate(parts) if not _WILDCARDS.isdisjoint(part))
  folder = paths.path('/'.join(parts[:first]) or ('/' if pattern.startswith('/') else '.'))
  names = []
  for found in sorted(folder.glob('/'.join(parts[first:]))):
    name = str(found.relative_to(folder))
    names += [f'{name}/{below}' for below in _below(found)] if found.is_dir() else [name]
  return folder, [name for name in names if not _is_hidden(name)]


# Pieces.


def _weight(file: File) -> int:
  """About how much text is in a file."""
  plain = not reading.is_kind(file.name, reading.PARQUET + tuple(reading.COMPRESSED_JSON))
  return file.size if plain else file.size * _COMPRESSION


def _cut(file: File, shard_bytes: int) -> Iterator[Tuple[Segment, int, int]]:
  """(segment, about how much text, input bytes) for the segments of a file."""
  weight = _weight(file)
  if weight > shard_bytes and reading.is_kind(file.name, reading.PLAIN_JSON):
    count = -(-file.size // shard_bytes)
    bounds = [file.size * i // count for i in range(count + 1)]
    for start, stop in zip(bounds, bounds[1:]):
      yield Segment(file.path, file.name, start, stop), stop - start, stop - start
  elif weight > shard_bytes and reading.is_kind(file.name, reading.PARQUET):
    sizes = reading.row_groups(file.path)
    start = 0
    for stop in range(1, len(sizes) + 1):
      if stop == len(sizes) or sum(size.text for size in sizes[start:stop + 1]) > shard_bytes:
        part = sizes[start:stop]
        yield (Segment(file.path, file.name, start, stop), sum(size.text for size in part),
               sum(size.compressed for size in part))
        start = stop
  else:
    yield Segment(file.path, file.name), weight, file.size


def _grouped(parts: Sequence[Tuple[Segment, int, int]], shard_bytes: int) -> Iterator[Piece]:
  """Neighbours together, as long as they fit into a shard."""
  group: List[Tuple[Segment, int]] = []
  total = 0
  for segment, weight, size in parts:
    if group and total + weight > shard_bytes:
      yield Piece(*zip(*group))
      group, total = [], 0
    group.append((segment, size))
    total += weight
  if group:
    yield Piece(*zip(*group))
