"""Our own checkpoints, read and written a layer at a time: no stack of layers is ever in memory.

Orbax itself reads and writes whole stacked arrays. The files are Zarr arrays beside a JSON index, and a step written
here is one that Orbax reads: `openmoe_jax.load`, `INITIAL_CHECKPOINT_PATH` and all else take it like any other.
"""

import json
import re
import time
from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple

from etils import epath
import numpy as np

from openmoe_jax import checkpoint_layout as layout
from openmoe_jax import checkpoints
from openmoe_jax import names
from openmoe_jax import paths
from openmoe_jax.checkpoint_files import FilesHandler, FilesSave
from openmoe_jax.config import ConfigError, ModelConfig, RunConfig, require, to_dict
from openmoe_jax.convert import zarr_files
from openmoe_jax.convert.tensors import PARAMS, SLOTS, Sink, Source, TensorInfo, require_same
from openmoe_jax.partitioning import STACKED

_STATS = 'stats/'  # of Adafactor's state in the item opt_state
_ITEMS = {PARAMS: ('params', ''), SLOTS: ('opt_state', _STATS)}
_HANDLERS = {'params': 'orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler',
             'config': 'openmoe_jax.checkpoint_files.FilesHandler'}


class _Place(NamedTuple):
  """Where a tensor lies: item of the step, array in it, row of that array (None: the whole of it)."""
  item: str
  array: str
  row: Optional[int]


def _place(model: ModelConfig, name: str) -> _Place:
  """'target/decoder/layers_5/mlp/wo/kernel' -> params, decoder/blocks/layers_1/mlp/wo/kernel, row 1 (interval 4)."""
  prefix = PARAMS if name.startswith(PARAMS) else SLOTS
  item, before = _ITEMS[prefix]
  path = name[len(prefix):]
  found = re.fullmatch(r'decoder/layers_(\d+)/(.+)', path)
  if not found:
    return _Place(item, before + path, None)
  block, inner = divmod(int(found.group(1)), model.moe_interval)
  return _Place(item, f'{before}decoder/{STACKED}/layers_{inner}/{found.group(2)}', block)


class OrbaxSource(Source):
  """A step that this library saved, or converted.

  Args:
    path: a model_dir, its `checkpoints` folder (both: the newest step), or one step's folder.
    with_state: read Adafactor's statistics as well, where there are any.

  Raises:
    ConfigError: no checkpoint there, or one whose arrays are not those of its model.
  """

  def __init__(self, path: paths.PathLike, with_state: bool = True):
    directory = checkpoints.resolve(path)
    self.where = str(directory)
    try:
      self.run = checkpoints.read_config(directory)
      progress = checkpoints.read_progress(directory)
    except Exception as error:
      raise ConfigError(f'{directory} is not a complete checkpoint: {checkpoints.one_line(error)}') from error
    self.model = checkpoints.read_model_config(directory)
    self.step = progress['step']
    self._sums = progress['checksums']
    require('router_state' not in self._sums, f'{directory} holds a router_state (ModelConfig.router = '
            f'{self.model.router!r}), which no conversion carries over')
    self.checksums = 'they have the checksums that they were written with'
    self.fingerprint = {'step': self.step, 'checksums': self._sums}
    items = ['params']
    # Another optimizer's state has no counterpart in other formats.
    if with_state and self.run['optimizer']['name'] == 'adafactor' and self._sums.get('opt_state'):
      items.append('opt_state')
    self.has_other_state = with_state and len(items) == 1 and bool(self._sums.get('opt_state'))
    specs, infos = {}, {}
    for item in items:
      for array in self._sums[item]:
        if item == 'params' or array.startswith(_STATS):
          specs[item, array] = _spec(directory / item, array)
    shared = zarr_files.context(layout.CHUNK_BYTES)
    self._arrays = zarr_files.Arrays(specs, shared)
    for key in specs:
      try:
        infos[key] = self._arrays[key]
      except Exception as error:
        raise ConfigError(f'{directory / key[0]}: the array {key[1]} cannot be opened: '
                          f'{checkpoints.one_line(error)}') from error
    self._places, self.tensors = {}, {}
    stored = {}
    for name in self._names(items):
      place = self._places[name] = _place(self.model, name)
      store = infos.get((place.item, place.array))
      if store is None:
        continue
      shape, chunk = tuple(store.shape), tuple(store.chunk_layout.read_chunk.shape)
      if place.row is not None:
        shape, chunk = shape[1:], chunk[1:]
      self.tensors[name] = TensorInfo(shape, store.dtype.numpy_dtype, chunk)
      stored[name] = shape
    require_same(self.where, {n: s for n, s in stored.items() if n.startswith(PARAMS)},
                 {PARAMS + n: s for n, s in names.t5x_shapes(self.model).items()})

  def _names(self, items: Any) -> Any:
    yield from (PARAMS + name for name in names.t5x_shapes(self.model))
    if 'opt_state' in items:
      for name in names.t5x_shapes(self.model):
        for slot in ('v', 'v_row', 'v_col'):
          if _place(self.model, f'{SLOTS}{name}/{slot}').array in self._sums['opt_state']:
            yield f'{SLOTS}{name}/{slot}'

  def read(self, name: str, axis: int = 0, start: int = 0, stop: Optional[int] = None) -> np.ndarray:
    place = self._places[name]
    index = zarr_files.part_index(len(self.tensors[name].shape), axis, start, stop)
    try:
      return self._arrays[place.item, place.array][index if place.row is None else (place.row, *index)].read().result()
    except Exception as error:
      raise ConfigError(f'{self.where}: {place.item}/{place.array} cannot be read: '
                        f'{checkpoints.one_line(error)}') from error

  def check(self, sums: Mapping[str, int]) -> None:
    totals: Dict[Tuple[str, str], int] = {}
    for name, value in sums.items():
      place = self._places[name]
      totals[place.item, place.array] = (totals.get((place.item, place.array), 0) + value) % 2**32
    for (item, array), value in totals.items():
      require(self._sums[item][array] == value, f'{self.where}: the array {item}/{array} does not have the checksum it '
              'was written with; the checkpoint is damaged')


def _spec(folder: epath.Path, array: str) -> Dict[str, Any]:
  inside = array.replace('/', '.')
  if (folder / 'manifest.ocdbt').exists():
    base = zarr_files.kvstore(folder)
    store = {'driver': 'ocdbt', 'base': base, 'path': f'{inside}/'}
  else:
    store = zarr_files.kvstore(folder / inside)
  return {'driver': 'zarr', 'kvstore': store, 'fill_missing_data_reads': False}  # else missing chunks are zeros


class OrbaxSink(Sink):
  """A model_dir-like folder with one step in it: DESTINATION/checkpoints/<step>.

  Args:
    run: the configuration that is kept beside the step; its model is the one that is written.
    step: training steps done.
  """

  def __init__(self, run: RunConfig, step: int):
    self._run, self._model, self._step = run, run.model, step
    self._stores: Dict[Tuple[str, str], Any] = {}

  def describe(self) -> Any:
    return ['orbax', self._step, to_dict(self._run)]

  def begin(self, directory: epath.Path, tensors: Mapping[str, TensorInfo], axes: Mapping[str, int],
            resumed: bool) -> None:
    del resumed  # arrays that are there are opened again
    self._axes = axes
    self._folder = directory / checkpoints.CHECKPOINTS / str(self._step)
    shared = zarr_files.context()
    for name, info in tensors.items():
      place = _place(self._model, name)
      key = place.item, place.array
      if key not in self._stores:
        chunk = zarr_files.part_shape(info, axes[name])
        lead = (self._model.num_blocks,) if place.row is not None else ()
        self._stores[key] = zarr_files.create(
            self._folder / place.item / place.array.replace('/', '.'), (*lead, *info.shape),
            (*(1 for _ in lead), *chunk), info.dtype, {'id': 'zstd', 'level': 1}, shared)

  def write(self, name: str, start: int, part: np.ndarray) -> None:
    place = _place(self._model, name)
    axis = self._axes[name]
    index = zarr_files.part_index(part.ndim, axis, start, start + part.shape[axis] if part.ndim else None)
    self._stores[place.item, place.array][index if place.row is None else (place.row, *index)].write(part).result()

  def finish(self, records: Mapping[str, Mapping[str, Any]]) -> None:
    sums: Dict[str, Dict[str, int]] = {}
    for name, record in records.items():
      place = _place(self._model, name)
      of_item = sums.setdefault(place.item, {})
      of_item[place.array] = (of_item.get(place.array, 0) + record['sum']) % 2**32
    if 'opt_state' in sums:  # Adafactor's count of updates
      count = np.asarray(self._step, np.int32)
      store = zarr_files.create(self._folder / 'opt_state' / 'count', (), (), count.dtype, None, zarr_files.context())
      store.write(count).result()
      sums['opt_state']['count'] = self._step
      self._stores['opt_state', 'count'] = store
    for item in sums:
      arrays = {array: tuple(store.shape) for (of, array), store in self._stores.items() if of == item}
      paths.write_text(self._folder / item / '_METADATA', json.dumps(_metadata(arrays)))
    config = {'config.json': json.dumps(to_dict(self._run), indent=2),
              'progress.json': json.dumps({'step': self._step, 'checksums': sums})}
    (self._folder / 'config').mkdir(parents=True, exist_ok=True)
    FilesHandler().save(self._folder / 'config', FilesSave({name: text.encode() for name, text in config.items()}))
    now = time.time_ns()
    paths.write_text(self._folder / '_CHECKPOINT_METADATA', json.dumps({
        'item_handlers': {**{item: _HANDLERS['params'] for item in sums}, 'config': _HANDLERS['config']},
        'metrics': {}, 'performance_metrics': {}, 'init_timestamp_nsecs': now, 'commit_timestamp_nsecs': now,
        'custom_metadata': {}}))
    for item in (*sums, 'config', '.'):  # what tells a complete step on an object store
      paths.write_text(self._folder / item / 'commit_success.txt', 'written by a conversion\n')


def _metadata(arrays: Mapping[str, Tuple[int, ...]]) -> Dict[str, Any]:
  """Orbax's index of one item."""
  tree = {}
  for name, shape in arrays.items():
    keys = name.split('/')
    tree[str(tuple(keys))] = {
        'key_metadata': [{'key': key, 'key_type': 2} for key in keys],
        'value_metadata': {'value_type': 'jax.Array', 'skip_deserialize': False, 'write_shape': list(shape)}}
  return {'tree_metadata': tree, 'use_ocdbt': False, 'use_zarr3': False, 'store_array_data_equal_to_fill_value': True,
          'custom_metadata': None}
