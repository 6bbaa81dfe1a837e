"""Files of PyTorch weights: where each tensor lies in them, and its bytes, without reading a file as a whole.

safetensors: 8 bytes with the length of a JSON header, the header, the tensors' bytes. PyTorch's own files are ZIP
archives with a pickle in them, which only PyTorch reads, and only with `weights_only`: it builds nothing but tensors.
"""

import contextlib
import json
import os
import threading
from typing import Any, Dict, NamedTuple, Tuple

from etils import epath
import ml_dtypes
import numpy as np

from openmoe_jax import paths
from openmoe_jax.config import ConfigError, require

DTYPES = {'F64': np.dtype(np.float64), 'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16),
          'BF16': np.dtype(ml_dtypes.bfloat16), 'I8': np.dtype(np.int8)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100 << 20  # the safetensors format's own limit
_TORCH_DTYPES = {'torch.float64': 'F64', 'torch.float32': 'F32', 'torch.float16': 'F16', 'torch.bfloat16': 'BF16'}


class Place(NamedTuple):
  """A tensor in a file, C order.

  Attributes:
    begin: of its first byte, from the beginning of the file.
  """
  file: epath.Path
  shape: Tuple[int, ...]
  dtype: np.dtype
  begin: int

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def safetensors_places(file: epath.Path) -> Dict[str, Place]:
  """Tensor name -> its place.

  Raises:
    ConfigError: no safetensors file, or one that is cut off.
  """
  size = _size(file)
  length = int.from_bytes(read_bytes(file, 0, 8), 'little') if size >= 8 else 0
  require(0 < length <= min(_LONGEST_HEADER, size - 8), f'{file} is not a safetensors file, or is cut off: its header '
          f'would have {length} bytes, the file has {size}')
  try:
    header = json.loads(read_bytes(file, 8, length))
    entries = {name: entry for name, entry in header.items() if name != '__metadata__'}
    places = {}
    for name, entry in entries.items():
      begin, end = entry['data_offsets']
      require(entry['dtype'] in DTYPES, f'{file}: {name} has dtype {entry["dtype"]}; valid: {", ".join(DTYPES)}')
      place = Place(file, tuple(int(n) for n in entry['shape']), DTYPES[entry['dtype']], 8 + length + begin)
      require(min((*place.shape, begin)) >= 0 and end - begin == place.nbytes and 8 + length + end <= size,
              f'{file}: {name} {list(place.shape)} should be bytes {begin} to {end} after the header, but the file has '
              f'only {size - 8 - length} there, or they do not fit the shape: it is damaged or cut off')
      places[name] = place
  except ConfigError:
    raise
  except Exception as error:
    raise ConfigError(f'{file} is not a safetensors file: its header cannot be read ({error})') from error
  return places


def torch_places(file: epath.Path) -> Dict[str, Place]:
  """The same of a file of `torch.save`; needs PyTorch, and the file on a local disk.

  Raises:
    ConfigError: PyTorch is missing; no file of weights (a pickle of anything else is refused, not run).
  """
  try:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
  except ImportError as error:
    raise ConfigError(f"{file} is PyTorch's own format, and PyTorch is missing: pip install "
                      "'openmoe_jax[torch]'") from error
  require(paths.is_local(file), f"{file} is PyTorch's own format, which is read from local disks only; copy it first")
  try:
    with FakeTensorMode():  # tensors without data, which know where their data lie in the file
      state = torch.load(os.fspath(file), weights_only=True, map_location='cpu')
    size = _size(file)
    places = {}
    for name, tensor in state.items():
      code = _TORCH_DTYPES.get(str(tensor.dtype))
      require(code is not None, f'{file}: {name} has dtype {tensor.dtype}; valid: {", ".join(_TORCH_DTYPES)}')
      require(tensor.is_contiguous(), f'{file}: {name} is a strided view of another tensor; save it with .contiguous()')
      offset = tensor.untyped_storage()._checkpoint_offset
      require(offset is not None, f'{file} is in the format of PyTorch before 1.6; load it and save it again')
      place = Place(file, tuple(tensor.shape), DTYPES[code], offset + tensor.storage_offset() * DTYPES[code].itemsize)
      require(place.begin + place.nbytes <= size, f'{file} is cut off: {name} should end at byte '
              f'{place.begin + place.nbytes} of {size}')
      places[name] = place
  except ConfigError:
    raise
  except Exception as error:
    raise ConfigError(f'{file} cannot be read as weights of PyTorch: {" ".join(str(error).split())[:200]}') from error
  return places


def _size(file: epath.Path) -> int:
  require(file.exists(), f'{file} is missing')
  return file.stat().length


class Reader:
  """Bytes of files that stay open; from several threads at once."""

  def __init__(self):
    self._open: Dict[str, int] = {}
    self._lock = threading.Lock()

  def read(self, place: Place, start: int, stop: int) -> np.ndarray:
    """Indices start..stop of the tensor's first axis, which lie together."""
    row = place.nbytes // max(place.shape[0], 1) if place.shape else place.nbytes
    shape = (stop - start, *place.shape[1:]) if place.shape else ()
    data = self._bytes(place.file, place.begin + start * row, (stop - start) * row)
    return np.frombuffer(data, place.dtype).reshape(shape)

  def _bytes(self, file: epath.Path, begin: int, count: int) -> bytes:
    if not paths.is_local(file):
      return read_bytes(file, begin, count)
    with self._lock:
      if str(file) not in self._open:
        self._open[str(file)] = os.open(file, os.O_RDONLY)
      descriptor = self._open[str(file)]
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
      got = os.preadv(descriptor, [view[done:]], begin + done)
      require(got > 0, f'{file} is cut off')
      done += got
    return data

  def close(self) -> None:
    with self._lock, contextlib.suppress(OSError):
      while self._open:
        os.close(self._open.popitem()[1])


def read_bytes(file: epath.Path, begin: int, count: int) -> bytes:
  with file.open('rb') as stream:
    stream.seek(begin)
    data = stream.read(count)
  require(len(data) == count, f'{file} is cut off')
  return data


def safetensors_header(tensors: Dict[str, Tuple[Tuple[int, ...], np.dtype]]) -> Tuple[bytes, Dict[str, int]]:
  """The beginning of a safetensors file, and where each tensor's bytes begin in it.

  Args:
    tensors: name -> (shape, dtype), in the order of the file.
  """
  header: Dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  at = 0
  for name, (shape, dtype) in tensors.items():
    end = at + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    header[name] = {'dtype': _CODES[dtype], 'shape': list(shape), 'data_offsets': [at, end]}
    at = end
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  begin = 8 + len(text)
  return len(text).to_bytes(8, 'little') + text, {name: begin + header[name]['data_offsets'][0] for name in tensors}
