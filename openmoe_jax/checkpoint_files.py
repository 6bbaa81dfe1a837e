"""Small files inside an Orbax checkpoint: every process adds its own, each with a checksum.

Orbax commits a step as a whole, so files saved through `FilesSave` appear together with the arrays or not at all. The
data streams' positions and the JSON descriptions of a step are kept this way.
"""

import dataclasses
import json
from typing import Any, Dict, Mapping, Optional
import zlib

from etils import epath
import jax
import orbax.checkpoint as ocp

_CHECKSUMS = 'checksums_{process}.json'
_NAME = 'checksums_'


class FilesHandler(ocp.CheckpointHandler):
  """Writes {file name: bytes}, those of each process by that process, and reads them all."""

  def save(self, directory: epath.Path, args: 'FilesSave') -> None:
    for name, content in args.files.items():
      (directory / name).write_bytes(content)
    sums = {name: zlib.crc32(content) for name, content in args.files.items()}
    (directory / _CHECKSUMS.format(process=jax.process_index())).write_text(json.dumps(sums, sort_keys=True))

  def restore(self, directory: epath.Path, args: Optional['FilesRestore'] = None) -> Dict[str, bytes]:
    return read_files(directory, args.names if args else None)

  def metadata(self, directory: epath.Path) -> Any:
    del directory
    return None

  def finalize(self, directory: epath.Path) -> None:
    pass

  def close(self) -> None:
    pass


def read_files(directory: epath.Path, names: Optional[Any] = None) -> Dict[str, bytes]:
  """The files of one item, or those called `names`.

  Raises:
    ValueError: a file is missing or does not have its checksum.
  """
  sums: Dict[str, int] = {}
  for entry in directory.iterdir():
    if entry.name.startswith(_NAME):
      sums.update(json.loads(entry.read_text()))
  wanted = sorted(sums) if names is None else list(names)
  files = {}
  for name in wanted:
    if name not in sums:
      raise ValueError(f'{directory} has no file {name}')
    content = (directory / name).read_bytes()
    if zlib.crc32(content) != sums[name]:
      raise ValueError(f'{directory / name} does not have the checksum it was written with')
    files[name] = content
  return files


@ocp.args.register_with_handler(FilesHandler, for_save=True)
@dataclasses.dataclass
class FilesSave(ocp.args.CheckpointArgs):
  """This process's files; processes must not use the same names."""
  files: Mapping[str, bytes]


@ocp.args.register_with_handler(FilesHandler, for_restore=True)
@dataclasses.dataclass
class FilesRestore(ocp.args.CheckpointArgs):
  """Which files to read; None for all, of every process."""
  names: Optional[Any] = None
