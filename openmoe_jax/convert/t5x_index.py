"""The file `checkpoint` of a T5X checkpoint (SPEC 7): a tree of names whose leaves are arrays, or tell where one lies.

    {'version': 3, 'optimizer': {'target': parameters,
                                 'state': {'step': int32, 'param_states': parameters with m, v, v_row and v_col each}}}

It is msgpack as Flax writes it, which holds numbers, strings and arrays of numbers: nothing in it is ever executed. An
array of its own folder is described by a TensorStore spec, of which we take the shape, the type and the folder's name.
"""

import re
from typing import Any, Dict, Iterator, Mapping, NamedTuple, Optional, Tuple

from flax import serialization
import ml_dtypes
import numpy as np

from openmoe_jax import names
from openmoe_jax.checkpoints import one_line
from openmoe_jax.config import ConfigError, ModelConfig, require
from openmoe_jax.convert.tensors import PARAMS, SLOTS

FILE = 'checkpoint'
COMPRESSOR = {'id': 'gzip', 'level': 1}
UNUSED = (1,)  # the shape of a slot that is not used
_VERSION = 3
_VERSIONS = (1, 2, 3)  # of what differs between them, only the type that bfloat16 is stored as concerns us
_DRIVERS = ('file', 'gfile', 'gcs')
_SLOT_NAMES = ('m', 'v', 'v_col', 'v_row')
# Before version 3, the bits of bfloat16 were stored under this type; no parameter is an integer.
BFLOAT16_BITS = np.dtype(np.uint16)
_VALUES = {**dict.fromkeys(('bfloat16', 'uint16', '<u2', '|u2'), np.dtype(ml_dtypes.bfloat16)),
           **dict.fromkeys(('float16', '<f2'), np.dtype(np.float16)),
           **dict.fromkeys(('float32', '<f4'), np.dtype(np.float32)),
           **dict.fromkeys(('float64', '<f8'), np.dtype(np.float64))}


class Leaf(NamedTuple):
  """One array of the tree.

  Attributes:
    shape: of it.
    dtype: of its values, bfloat16 where the bits of bfloat16 are stored.
    folder: the name of the Zarr array, in the folder of the index; '' where the array is in the index.
    array: the array itself, None where it has a folder.
  """
  shape: Tuple[int, ...]
  dtype: np.dtype
  folder: str
  array: Optional[np.ndarray]


class Index(NamedTuple):
  """Attributes:

    target: parameter -> its array.
    slots: '<parameter>/<slot>' -> its array, slots that are not used included.
    step: training steps done; None where the index does not say.
  """
  target: Dict[str, Leaf]
  slots: Dict[str, Leaf]
  step: Optional[int]


def parse(where: str, content: bytes, with_state: bool) -> Index:
  """Reads the index.

  Args:
    where: its path, for messages.
    content: of the file.
    with_state: whether to look at the optimizer's slots.

  Raises:
    ConfigError: it is no T5X index, of a version that we do not know, or has leaves that are no arrays.
  """
  try:
    tree = serialization.msgpack_restore(content)
    version, optimizer = tree['version'], tree['optimizer']
    state = optimizer.get('state') or {}
    step = None if state.get('step') is None else int(np.asarray(state['step']).item())
    target = dict(_flatten(optimizer['target']))
    slots = dict(_flatten(state.get('param_states') or {})) if with_state else {}
  except Exception as error:  # msgpack and Flax raise errors of many kinds
    raise ConfigError(f'{where} is not a T5X checkpoint index, or is damaged: {type(error).__name__}: '
                      f'{one_line(error)}') from error
  require(type(version) is int and version in _VERSIONS,
          f'{where} has version {version!r:.80}; known are {", ".join(map(str, _VERSIONS))}')
  scanned = [name for name in target if re.search(r'(^|/)layers/', name)]
  require(not scanned, f'{where} keeps all layers in one array ({len(scanned)} such, e.g. {scanned[:1]}), as T5X does '
          'with scan_layers; only layers of their own (decoder/layers_0, decoder/layers_1, ...) can be read')
  return Index({name: _leaf(where, PARAMS + name, value) for name, value in target.items()},
               {name: _leaf(where, SLOTS + name, value) for name, value in slots.items()}, step)


def _is_spec(value: Any) -> bool:
  return isinstance(value, Mapping) and 'driver' in value and 'kvstore' in value


def _flatten(tree: Mapping[Any, Any], prefix: str = '') -> Iterator[Tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping) and not _is_spec(value):
      yield from _flatten(value, f'{prefix}{key}/')
    else:
      yield f'{prefix}{key}', value


def _leaf(where: str, name: str, value: Any) -> Leaf:
  if isinstance(value, (np.ndarray, np.generic)):
    array = np.asarray(value)
    dtype = values_dtype(where, name, array.dtype.name)
    return Leaf(array.shape, dtype, '', array.view(dtype) if array.dtype == BFLOAT16_BITS else array)
  require(_is_spec(value), f'{where}: {name} is {value!r:.80} instead of an array')
  require(value['driver'] == 'zarr', f"{where}: {name} has the driver {value['driver']!r}; T5X writes 'zarr'")
  metadata = value.get('metadata')
  shape = metadata.get('shape') if isinstance(metadata, Mapping) else None
  require(isinstance(shape, (list, tuple)) and all(type(size) is int and size >= 0 for size in shape),
          f'{where}: {name} has the shape {shape!r:.80} instead of a list of sizes')
  return Leaf(tuple(shape), values_dtype(where, name, value.get('dtype', metadata.get('dtype'))),
              _folder(where, name, value), None)


def values_dtype(where: str, name: str, stored: Any) -> np.dtype:
  """The type of an array's values; `stored` is the name of the type that they are stored as, NumPy's or Zarr's."""
  require(isinstance(stored, str) and stored in _VALUES, f'{where}: {name} has the type {stored!r:.80}; float32, '
          'bfloat16 (also as uint16), float16 and float64 can be read')
  return _VALUES[stored]


def _folder(where: str, name: str, spec: Mapping[str, Any]) -> str:
  """The last component of a spec's path, which is a folder beside the index wherever the checkpoint was written.

  Whatever could lead out of the checkpoint is refused.
  """
  kvstore = spec['kvstore']
  require(isinstance(kvstore, Mapping) and kvstore.get('driver') in _DRIVERS,
          f'{where}: {name} lies in {kvstore!r:.80}; known are the drivers {", ".join(_DRIVERS)}')
  path = kvstore.get('path', spec.get('path'))  # old versions of TensorStore kept it one level higher
  parts = path.removesuffix('/').split('/') if isinstance(path, str) else ['']
  require(parts[-1] not in ('', '.') and '..' not in parts and not set(parts[-1]) & set('\\\0'),
          f'{where}: {name} lies in {path!r}, which is not the name of a folder beside the index')
  return parts[-1]


def serialize(model: ModelConfig, step: int, arrays: Mapping[str, Tuple[Tuple[int, ...], Tuple[int, ...], str]]
              ) -> bytes:
  """The index of a checkpoint as the original wrote it, byte for byte.

  Args:
    model: what the checkpoint is of.
    step: training steps done.
    arrays: 'target/<parameter>' and 'state/param_states/<parameter>/<slot>' -> shape, chunks and type's name of the
      Zarr array. If there are slots at all, those not mentioned are zeros of shape (1,), as the optimizer expects.
  """
  flat: Dict[str, Any] = {f'{SLOTS}{name}/{slot}': np.zeros(UNUSED, np.float32)
                          for name in names.t5x_shapes(model) for slot in _SLOT_NAMES
                          if any(array.startswith(SLOTS) for array in arrays)}
  for name, (shape, chunks, dtype) in arrays.items():
    flat[name] = {'driver': 'zarr', 'dtype': dtype, 'kvstore': {'driver': 'file', 'path': f'{folder_name(name)}/'},
                  'metadata': {'chunks': list(chunks), 'compressor': dict(COMPRESSOR), 'shape': list(shape)}}
  flat['state/step'] = np.asarray(step, np.int32)
  # JAX sorts the keys of dictionaries; msgpack keeps the order.
  tree = names.unflatten_names({name: flat[name] for name in sorted(flat, key=lambda name: name.split('/'))})
  return serialization.msgpack_serialize({'version': _VERSION, 'optimizer': tree}, in_place=True)


def folder_name(name: str) -> str:
  """The folder of a tensor."""
  return name.replace('/', '.')
