"""Raw files in the layouts in which data sets are published, and what lies in a prepared data set."""

import json
import pathlib
from typing import Any, Iterable, List, Mapping, Sequence

import pyarrow
from pyarrow import parquet

from openmoe_jax.tensorflow_setup import import_tfds


def json_lines(records: Iterable[Any]) -> bytes:
  return ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records).encode()


def write(file: Any, content: bytes) -> pathlib.Path:
  """Writes a file, compressed if its name says so."""
  file = pathlib.Path(file)
  file.parent.mkdir(parents=True, exist_ok=True)
  compression = {'.zst': 'zstd', '.gz': 'gzip'}.get(file.suffix)
  with pyarrow.output_stream(str(file), compression=compression) as stream:
    stream.write(content)
  return file


def write_parquet(file: Any, rows: Sequence[Mapping[str, Any]], row_group_size: int = 100) -> pathlib.Path:
  file = pathlib.Path(file)
  file.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file, row_group_size=row_group_size)
  return file


def examples(folder: Any, name: str, split: str = 'train') -> List[Mapping[str, Any]]:
  """What plain TFDS reads, in the order of the files, as text."""
  tfds = import_tfds()
  dataset = tfds.load(f'{name}:1.0.0', split=split, data_dir=str(folder), shuffle_files=False,
                      read_config=tfds.ReadConfig(interleave_cycle_length=1))
  plain = lambda value: value.decode() if isinstance(value, bytes) else [item.decode() for item in value]
  return [{key: plain(value) for key, value in example.items()} for example in dataset.as_numpy_iterator()]


def files(folder: Any) -> Mapping[str, bytes]:
  """{name: content} of everything in a folder and below."""
  folder = pathlib.Path(folder)
  return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob('*')) if file.is_file()}
