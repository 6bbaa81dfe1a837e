"""Zarr arrays through TensorStore: opened once, read and written in parts, with little memory."""

import threading
from typing import Any, Dict, Mapping, Optional, Tuple

from etils import epath
import numpy as np
import tensorstore

from openmoe_jax import paths
from openmoe_jax.convert.tensors import TensorInfo, part_rows

# A chunk that is larger than the parts asked for stays decoded between them; nothing else is kept.
_ORDINARY_CACHE_BYTES = 64 << 20


def kvstore(folder: paths.PathLike) -> Dict[str, Any]:
  """A folder as TensorStore names it."""
  folder = str(paths.path(folder)).rstrip('/') + '/'
  if folder.startswith('gs://'):
    bucket, _, inside = folder[len('gs://'):].partition('/')
    return {'driver': 'gcs', 'bucket': bucket, 'path': inside}
  return {'driver': 'file', 'path': folder}


def context(largest_chunk_bytes: int = 0) -> tensorstore.Context:
  """Shared by all arrays of one checkpoint."""
  cache = max(_ORDINARY_CACHE_BYTES, largest_chunk_bytes + (1 << 20))
  return tensorstore.Context({'cache_pool': {'total_bytes_limit': cache}, 'data_copy_concurrency': {'limit': 2}})


class Arrays:
  """Open Zarr arrays by name. `spec(name)` gives the TensorStore spec of one."""

  def __init__(self, specs: Mapping[str, Any], shared: tensorstore.Context):
    self._specs = specs
    self._context = shared
    self._open: Dict[str, Any] = {}
    self._lock = threading.Lock()

  def __getitem__(self, name: str) -> tensorstore.TensorStore:
    with self._lock:
      if name not in self._open:
        self._open[name] = tensorstore.open(self._specs[name], context=self._context).result()
      return self._open[name]


def create(folder: epath.Path, shape: Tuple[int, ...], chunks: Tuple[int, ...], dtype: np.dtype,
           compressor: Optional[Mapping[str, Any]], shared: tensorstore.Context) -> tensorstore.TensorStore:
  """A Zarr array in a folder of its own; one that is there already is opened if it is the same."""
  spec = {'driver': 'zarr', 'kvstore': kvstore(folder), 'metadata': {
      'shape': list(shape), 'chunks': [max(c, 1) for c in chunks], 'dtype': zarr_dtype(dtype), 'compressor': compressor,
      'fill_value': None, 'order': 'C', 'filters': None, 'dimension_separator': '.'}}
  return tensorstore.open(spec, create=True, open=True, context=shared).result()


def zarr_dtype(dtype: np.dtype) -> str:
  return 'bfloat16' if dtype.name == 'bfloat16' else dtype.str


def part_index(rank: int, axis: int, start: int, stop: Optional[int]) -> Tuple[slice, ...]:
  """start..stop of one axis and all of the others; () for a scalar."""
  return tuple(slice(start, stop) if i == axis else slice(None) for i in range(rank))


def part_shape(info: TensorInfo, axis: int) -> Tuple[int, ...]:
  """The shape of all parts of a tensor but the last: chunks of this shape are written once each."""
  return tuple(part_rows(info, axis) if i == axis else size for i, size in enumerate(info.shape))
