"""A folder of recorded routing: parquet parts for each checkpoint, policy and domain, and what model they are of.

    OUTPUT/recording.json                                               the model and how its data were cut
    OUTPUT/step=1200/policy=t5x_eval/domain=TASK/part-00000.parquet     a row group for each sparse layer
    OUTPUT/step=1200/policy=t5x_eval/domain=TASK/_finished.json         how much there is, once it is all there

pandas, pyarrow, DuckDB and the like read the folders' names as columns ('hive' partitions). A part is written whole or not
at all; the batches it holds are named in its metadata, which is where an interrupted recording goes on.
"""

import io
import json
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence
import urllib.parse

import numpy as np
import pyarrow
from pyarrow import parquet

from openmoe_jax import paths
from openmoe_jax.config import ConfigError, ModelConfig, from_dict, require

ABOUT, FINISHED = 'recording.json', '_finished.json'
_FORMAT = 1


class Key(NamedTuple):
  """What a sub-folder holds: a checkpoint's step, the name of a policy, and that of a task."""
  step: int
  policy: str
  domain: str

  def folder(self) -> str:
    return f'step={self.step}/policy={self.policy}/domain={urllib.parse.quote(self.domain, safe="")}'


class Part(NamedTuple):
  """How much a file holds, or several."""
  batches: int
  tokens: int


class Recording:
  """A folder of recorded routing that is read.

  Attributes:
    config: ModelConfig of the model.
    about: everything in recording.json.

  Raises:
    ConfigError: there is none, or its description is damaged.
  """

  def __init__(self, folder: paths.PathLike):
    self.folder = paths.path(folder)
    file = self.folder / ABOUT
    require(file.exists(), f'{folder} holds no recorded routing: there is no {ABOUT}; `openmoe-analyze record` writes one')
    try:
      self.about = json.loads(file.read_text())
      self.config = from_dict(ModelConfig, self.about['model'])
    except (ValueError, KeyError, TypeError) as error:
      raise ConfigError(f'{file} is damaged: {error}') from error
    self.layers = [i for i in range(self.config.num_layers) if self.config.is_sparse(i)]

  def keys(self) -> List[Key]:
    """All that was recorded to its end, by step, policy and domain."""
    found = []
    for step in _values(self.folder, 'step'):
      for policy in _values(self.folder / f'step={step}', 'policy'):
        for domain in _values(self.folder / f'step={step}' / f'policy={policy}', 'domain'):
          key = Key(int(step), policy, domain)
          if (self.folder / key.folder() / FINISHED).exists():
            found.append(key)
    return sorted(found)

  def finished(self, key: Key) -> Dict[str, Any]:
    """batches and tokens of a key, and the sizes of `routers.groups.Grouping` under its policy."""
    return json.loads((self.folder / key.folder() / FINISHED).read_text())

  def read(self, key: Key, layer: int, columns: Sequence[str]) -> Dict[str, np.ndarray]:
    """Columns of one sparse layer (its number among the decoder's layers), in the order in which they were recorded.

    Raises:
      ConfigError: a layer without experts, or a file that cannot be read or lacks a column.
    """
    require(layer in self.layers, f'layer {layer} holds no experts; the sparse layers of {self.folder} are '
            f'{", ".join(map(str, self.layers))}')
    pieces = []
    for file in part_files(self.folder / key.folder()):
      try:
        with file.open('rb') as stream:
          source = parquet.ParquetFile(stream)
          missing = sorted(set(columns) - set(source.schema_arrow.names))
          require(not missing, f'{file} has no column {", ".join(missing)}')
          pieces.append(source.read_row_group(self.layers.index(layer), list(columns)))
      except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f'{file} cannot be read: {" ".join(str(error).split())}') from error
    require(bool(pieces), f'{self.folder / key.folder()} holds no parts')
    table = pyarrow.concat_tables(pieces)
    return {name: table[name].to_numpy() for name in columns}


class KeyWriter:
  """Adds parts to the folder of a key; goes on behind those that are there.

  Attributes:
    done: what the parts there hold together.
    waiting: batches that were added since the last part.
  """

  def __init__(self, folder: paths.PathLike, key: Key, layers: Sequence[int], part_tokens: int):
    self._folder = paths.path(folder) / key.folder()
    self._layers, self._part_tokens = layers, part_tokens
    self._folder.mkdir(parents=True, exist_ok=True)
    parts = [_read_part(file) for file in part_files(self._folder)]
    self._parts = len(parts)
    self.done = Part(sum(part.batches for part in parts), sum(part.tokens for part in parts))
    self._begin()

  def _begin(self) -> None:
    self._tokens: List[Dict[str, np.ndarray]] = []
    self._choices: List[List[Dict[str, np.ndarray]]] = [[] for _ in self._layers]
    self.waiting = 0

  def add(self, tokens: Mapping[str, np.ndarray], choices: Sequence[Mapping[str, np.ndarray]]) -> None:
    """A batch: columns of its tokens and, for each sparse layer, of their choices."""
    self._tokens.append(dict(tokens))
    for own, new in zip(self._choices, choices):
      own.append(dict(new))
    self.waiting += 1
    if sum(len(part['row']) for part in self._tokens) >= self._part_tokens:
      self.flush()

  def flush(self) -> None:
    """Writes what waits as a part."""
    if not self.waiting:
      return
    tokens = {name: np.concatenate([part[name] for part in self._tokens]) for name in self._tokens[0]}
    part = Part(self.waiting, len(tokens['row']))
    tables = []
    for layer, own in zip(self._layers, self._choices):
      choices = {name: np.concatenate([piece[name] for piece in own]) for name in own[0]}
      tables.append(pyarrow.table({'layer': np.full(part.tokens, layer, np.int16), **tokens, **choices}))
    stream = io.BytesIO()
    schema = tables[0].schema.with_metadata({'openmoe_jax': json.dumps(part._asdict())})
    with parquet.ParquetWriter(stream, schema, compression='zstd') as writer:
      for table in tables:
        writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=max(part.tokens, 1))
    paths.write_bytes(self._folder / f'part-{self._parts:05d}.parquet', stream.getvalue())
    self._parts += 1
    self.done = Part(self.done.batches + part.batches, self.done.tokens + part.tokens)
    self._begin()

  def finish(self, about: Mapping[str, Any]) -> None:
    """Writes what waits, and that this is all; `about` are sizes of the groups."""
    self.flush()
    paths.write_text(self._folder / FINISHED, json.dumps({**self.done._asdict(), **about}, indent=1) + '\n')


def begin(folder: paths.PathLike, about: Mapping[str, Any]) -> None:
  """Makes the folder of a recording, or checks that one that is there is of the same model and data settings.

  Raises:
    ConfigError: it is of something else.
  """
  about = json.loads(json.dumps({'format': _FORMAT, **about}))
  file = paths.path(folder) / ABOUT
  if not file.exists():
    paths.write_text(file, json.dumps(about, indent=1) + '\n')
    return
  known = Recording(folder).about
  for name in sorted(set(about) | set(known)):
    own, there = about.get(name), known.get(name)
    if isinstance(own, dict) and isinstance(there, dict):
      field = next((field for field in sorted({*own, *there}) if own.get(field) != there.get(field)), None)
      name, own, there = f'{name}.{field}', own.get(field), there.get(field)
      require(field is None, f'{folder} was recorded with {name} = {there!r}, now it is {own!r}; give another --output')
    require(own == there, f'{folder} was recorded with {name} = {there!r}, now it is {own!r}; give another --output')


def part_files(folder: paths.PathLike) -> List[Any]:
  """The parts in a folder, in order."""
  return [paths.path(folder) / name for name in paths.entries(folder) if name.endswith('.parquet')]


def _read_part(file: Any) -> Part:
  try:
    with file.open('rb') as stream:
      metadata: Optional[Mapping[bytes, bytes]] = parquet.read_schema(stream).metadata
    return Part(**json.loads(metadata[b'openmoe_jax']))
  except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
    raise ConfigError(f'{file} is damaged, or no part of a recording: {" ".join(str(error).split())}; delete it and all '
                      'later parts beside it to record them again') from error


def _values(folder: Any, name: str) -> List[str]:
  """The values that the sub-folders NAME=VALUE have."""
  return [urllib.parse.unquote(entry[len(name) + 1:]) for entry in paths.entries(folder) if entry.startswith(name + '=')]
