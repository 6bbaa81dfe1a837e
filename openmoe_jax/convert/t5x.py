"""Checkpoints of T5X, which the original trained with (SPEC 7): an index beside one folder for every array.

A folder is a Zarr array. How it is cut into chunks depends on the machine that wrote it, and so does its path in the
index, of which only the last component means anything: arrays are looked for beside the index and nowhere else.
"""

import concurrent.futures
import itertools
import os
import re
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple
import zlib

from etils import epath
import jax
import numpy as np
import tensorstore

from openmoe_jax import names
from openmoe_jax import paths
from openmoe_jax.checkpoints import one_line
from openmoe_jax.config import ConfigError, ModelConfig, require
from openmoe_jax.convert import t5x_index
from openmoe_jax.convert import zarr_files
from openmoe_jax.convert.t5x_index import Leaf
from openmoe_jax.convert.tensors import PARAMS, PART_BYTES, SLOTS, Sink, Source, TensorInfo, require_same

_STEP = re.compile(r'checkpoint_(\d+)')
_UNFINISHED = re.compile(r'checkpoint_\d+\.tmp-.*')  # T5X renames the folder when everything is in it
_MOST_DAMAGES = 8  # in an error message
_OPENERS = 16  # arrays looked at together, which counts where a file is far away


class T5XSource(Source):
  """A checkpoint that T5X saved.

  `read` gives float32, bfloat16, float16 or float64, whichever is stored.

  Args:
    directory: local or gs://; the folder of one step, or the folder that holds several (the newest is taken).
    model: what the checkpoint is of.
    with_state: read Adafactor's statistics as well, where there are any.

  Raises:
    ConfigError: there is no checkpoint; its arrays are not those of the model; files are missing, or links that lead
      out of the checkpoint; or its optimizer keeps momentum.
  """

  def __init__(self, directory: paths.PathLike, model: ModelConfig, with_state: bool = True):
    self.model = model
    self._folder = step_folder(directory)
    self.where = str(self._folder)
    _require_no_way_out(self._folder, t5x_index.FILE)
    file = self._folder / t5x_index.FILE
    try:
      content = file.read_bytes()
    except OSError as error:
      raise ConfigError(f'{file} cannot be read: {error}') from error
    index = t5x_index.parse(str(file), content, with_state)
    leaves = {PARAMS + name: leaf for name, leaf in index.target.items()}
    require_same(self.where, {name: leaf.shape for name, leaf in leaves.items()},
                 {PARAMS + name: shape for name, shape in names.t5x_shapes(model).items()})
    leaves.update(_slots_in_use(self.where, model, index.slots))
    named = _STEP.fullmatch(self._folder.name)
    self.step = index.step if index.step is not None else int(named.group(1)) if named else 0

    surveys = self._survey({name: leaf for name, leaf in leaves.items() if leaf.array is None})
    self._inline = {name: leaf.array for name, leaf in leaves.items() if leaf.array is not None}
    self.tensors = {name: TensorInfo(leaf.shape, leaf.dtype, surveys[name].chunk if name in surveys else None)
                    for name, leaf in leaves.items()}
    self._folders = {name: leaf.folder for name, leaf in leaves.items()}
    largest = max((self.tensors[name]._replace(shape=s.chunk).nbytes for name, s in surveys.items()), default=0)
    self._arrays = zarr_files.Arrays({name: survey.spec for name, survey in surveys.items()},
                                     zarr_files.context(largest))
    files = zlib.crc32(repr([(name, surveys[name].files) for name in sorted(surveys)]).encode())
    self.fingerprint = {'path': self.where, 'step': self.step, 'index': zlib.crc32(content), 'files': files}

  def _survey(self, leaves: Mapping[str, Leaf]) -> Dict[str, '_Survey']:
    """Looks at the folders of all arrays, so that what is damaged is known before anything is written."""
    shared = zarr_files.context()

    def look(name: str) -> Any:
      try:
        return _look(self._folder, leaves[name], shared)
      except (ConfigError, OSError) as error:
        return f'{name} (folder {leaves[name].folder}): {error}'

    with concurrent.futures.ThreadPoolExecutor(_OPENERS) as pool:
      surveys = dict(zip(leaves, pool.map(look, leaves)))
    damages = [survey for survey in surveys.values() if isinstance(survey, str)]
    more = [f'... and {len(damages) - _MOST_DAMAGES} more'] if len(damages) > _MOST_DAMAGES else []
    require(not damages, f'{self.where} is damaged: ' + '; '.join(damages[:_MOST_DAMAGES] + more))
    return surveys

  def axis(self, name: str) -> int:
    """The first axis, unless the chunks that lie side by side at one place of it are too many to keep at a time."""
    info = self.tensors[name]
    if not info.chunk:
      return 0
    shares = [chunk / max(size, 1) for chunk, size in zip(info.chunk, info.shape)]
    return 0 if shares[0] * info.nbytes <= PART_BYTES else int(np.argmin(shares))

  def read(self, name: str, axis: int = 0, start: int = 0, stop: Optional[int] = None) -> np.ndarray:
    index = zarr_files.part_index(len(self.tensors[name].shape), axis, start, stop)
    if name in self._inline:
      return np.array(self._inline[name][index], order='C')
    try:
      part = np.ascontiguousarray(self._arrays[name][index].read().result())
    except Exception as error:
      raise ConfigError(f'{self._folder / self._folders[name]}: {name} cannot be read; the checkpoint is damaged: '
                        f'{one_line(error)}') from error
    return part.view(self.tensors[name].dtype) if part.dtype == t5x_index.BFLOAT16_BITS else part


def step_folder(directory: paths.PathLike) -> epath.Path:
  """The folder of one step, from that folder or from one that holds several (the newest that is complete).

  Raises:
    ConfigError: there is none.
  """
  folder = paths.path(directory)
  require(not _UNFINISHED.fullmatch(folder.name), f'{folder} was never finished by T5X; give another step')
  if (folder / t5x_index.FILE).exists():
    return folder
  steps = {int(match.group(1)): match.group(0) for match in map(_STEP.fullmatch, paths.entries(folder))
           if match and (folder / match.group(0) / t5x_index.FILE).exists()}
  require(bool(steps), f'{folder} holds no T5X checkpoint: expected a folder checkpoint_<step> with the file '
          f'{t5x_index.FILE} in it, or a folder of such folders')
  return folder / steps[max(steps)]


def _require_no_way_out(checkpoint: epath.Path, name: str) -> None:
  """Raises `ConfigError` if something in a local checkpoint is a link that leads out of it."""
  if paths.is_local(checkpoint):
    root, real = os.path.realpath(checkpoint), os.path.realpath(checkpoint / name)
    require(real.startswith(os.path.join(root, '')), f'{checkpoint / name} leads to {real}, outside the checkpoint, '
            'where nothing is read; `cp -rL` makes a copy with files in place of links')


def _slots_in_use(where: str, model: ModelConfig, slots: Mapping[str, Leaf]) -> Dict[str, Leaf]:
  """Adafactor's statistics without the slots that are not used; complete, or empty."""
  momentum = [name for name, leaf in slots.items() if name.endswith('/m') and leaf.shape != t5x_index.UNUSED]
  require(not momentum, f'{where} has an optimizer that keeps momentum ({len(momentum)} slots, e.g. {momentum[:1]}), '
          'which ours does not; it can be read without the optimizer state')
  if not slots:
    return {}
  try:  # which knows what is in use and what belongs to what
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, np.float32) for name, leaf in slots.items()}
    _, kept = names.adafactor_from_t5x(model.replace(scan_blocks=False), 0, shapes)
  except ConfigError as error:
    raise ConfigError(f'{where}: optimizer state: {one_line(error, 2000)}') from error
  return {SLOTS + name: slots[name] for name in names.flatten_names(kept)}


class _Survey(NamedTuple):
  """What is known of a Zarr array without reading it.

  Attributes:
    spec: opens it.
    chunk: the shape of its chunks.
    files: name, size and time of its files; on an object store of its metadata only, as each takes a request.
  """
  spec: Dict[str, Any]
  chunk: Tuple[int, ...]
  files: List[Tuple[str, int, Any]]


def _look(checkpoint: epath.Path, leaf: Leaf, shared: tensorstore.Context) -> _Survey:
  """Raises `ConfigError` if an array is not what the index says, lacks files or lies outside the checkpoint."""
  folder = checkpoint / leaf.folder
  _require_no_way_out(checkpoint, leaf.folder)
  files = paths.entries(folder)
  require('.zarray' in files, 'the array is missing (no file .zarray)')
  for name in files:
    _require_no_way_out(checkpoint, os.path.join(leaf.folder, name))
  # The files alone say how the array is stored, as for T5X. Without the option, missing chunks would read as zeros.
  spec = {'driver': 'zarr', 'kvstore': zarr_files.kvstore(folder), 'fill_missing_data_reads': False,
          'recheck_cached_data': 'open', 'recheck_cached_metadata': 'open'}
  try:
    store = tensorstore.open(spec, context=shared).result()
  except Exception as error:
    raise ConfigError(f'cannot be opened: {one_line(error)}') from error
  stored = t5x_index.values_dtype(str(folder), '.zarray', store.dtype.name)
  require(tuple(store.shape) == leaf.shape and stored == leaf.dtype, f'.zarray says {list(store.shape)} {stored}, the '
          f'index {list(leaf.shape)} {leaf.dtype}')
  separator = store.spec().to_json()['metadata'].get('dimension_separator', '.')
  require(separator == '.', f'.zarray has the dimension_separator {separator!r}; T5X writes "."')
  chunk = tuple(store.chunk_layout.read_chunk.shape)
  present = set(files)
  # Lazily: as many names as there are files at most, whatever .zarray says.
  for place in itertools.product(*(range(-(-size // part)) for size, part in zip(store.shape, chunk))):
    name = '.'.join(map(str, place)) or '0'
    require(name in present, f'the chunk {name} is missing')
  local = paths.is_local(folder)
  stats = [(name, (folder / name).stat()) for name in files if local or name == '.zarray']
  return _Survey(spec, chunk, [(name, stat.length, stat.mtime) for name, stat in stats])


class T5XSink(Sink):
  """A folder with one step in it, DESTINATION/checkpoint_<step>, that T5X reads like its own.

  Without optimizer state the index has `target` and `state/step` and nothing else. That is all that T5X's evaluation
  and inference look for; its training needs `fallback_to_scratch` to begin with new statistics.

  Args:
    model: what is written.
    step: training steps done.
  """

  def __init__(self, model: ModelConfig, step: int):
    self._model, self._step = model, step

  def describe(self) -> Any:
    return ['t5x', self._step]

  def begin(self, directory: epath.Path, tensors: Mapping[str, TensorInfo], axes: Mapping[str, int],
            resumed: bool) -> None:
    del resumed  # arrays that are there are opened again
    self._folder = directory / f'checkpoint_{self._step}'
    self._axes = axes
    shared = zarr_files.context()
    self._stores = {
        name: zarr_files.create(self._folder / t5x_index.folder_name(name), info.shape,
                                zarr_files.part_shape(info, axes[name]), info.dtype, t5x_index.COMPRESSOR, shared)
        for name, info in tensors.items()}

  def write(self, name: str, start: int, part: np.ndarray) -> None:
    axis = self._axes[name]
    index = zarr_files.part_index(part.ndim, axis, start, start + part.shape[axis])
    self._stores[name][index].write(part).result()

  def finish(self, records: Mapping[str, Mapping[str, Any]]) -> None:
    del records
    content = t5x_index.serialize(self._model, self._step, {
        name: (tuple(store.shape), tuple(store.chunk_layout.read_chunk.shape), store.dtype.name)
        for name, store in self._stores.items()})
    file = self._folder / t5x_index.FILE
    if not paths.is_local(file):  # an object store replaces an object at once
      file.write_bytes(content)
      return
    temporary = self._folder / f'.{t5x_index.FILE}.{os.getpid()}.tmp'
    temporary.write_bytes(content)
    temporary.replace(file)
