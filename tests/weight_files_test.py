"""Where tensors lie in safetensors and PyTorch files, and what is refused."""

import json
import os
import pickle

from etils import epath
from hypothesis import given, settings, strategies as st
import ml_dtypes
import numpy as np
import pytest

from openmoe_jax.config import ConfigError
from openmoe_jax.convert import weight_files
from openmoe_jax.convert.weight_files import DTYPES, Reader, safetensors_header, safetensors_places


def write(file, arrays):
  header, begins = safetensors_header({name: (x.shape, x.dtype) for name, x in arrays.items()})
  data = bytearray(header)
  for name, x in arrays.items():
    assert begins[name] == len(data)
    data += x.tobytes()
  file.write_bytes(bytes(data))


def arrays_of(seed, dtypes=tuple(DTYPES.values())):
  rng = np.random.default_rng(seed)
  shape = lambda: tuple(rng.integers(1, 6, rng.integers(0, 4)))
  return {f'w.{i}': (rng.normal(size=shape()) * 50).astype(dtypes[rng.integers(len(dtypes))]) for i in range(5)}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.data())
def test_what_is_written_is_read(tmp_path_factory, seed, data):
  file = epath.Path(tmp_path_factory.mktemp('st') / 'model.safetensors')
  arrays = arrays_of(seed)
  write(file, arrays)
  places, reader = safetensors_places(file), Reader()
  assert places.keys() == arrays.keys()
  for name, x in arrays.items():
    length = x.shape[0] if x.ndim else 1
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    got = reader.read(places[name], start, stop)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got.astype(np.float64), (x[start:stop] if x.ndim else x).astype(np.float64))
  reader.close()


@pytest.mark.torch
def test_the_safetensors_library_reads_ours_and_we_its(tmp_path):
  torch = pytest.importorskip('torch')
  safetensors_torch = pytest.importorskip('safetensors.torch')
  arrays = arrays_of(3, (DTYPES['F32'], DTYPES['F16']))
  write(tmp_path / 'ours', arrays)
  for name, x in safetensors_torch.load_file(tmp_path / 'ours').items():
    np.testing.assert_array_equal(x.numpy(), arrays[name])
  halves = {n: torch.from_numpy(np.array(x)).bfloat16() for n, x in arrays.items()}
  safetensors_torch.save_file(halves, tmp_path / 'theirs')
  places = safetensors_places(epath.Path(tmp_path / 'theirs'))
  for name, x in arrays.items():
    got = Reader().read(places[name], 0, x.shape[0] if x.ndim else 1)
    np.testing.assert_array_equal(got, x.astype(ml_dtypes.bfloat16))


@pytest.mark.torch
def test_torch_files_are_read_where_their_bytes_lie(tmp_path):
  torch = pytest.importorskip('torch')
  whole = torch.arange(60.).reshape(12, 5)
  state = {'a': whole, 'view': whole[3:7], 'half': torch.ones(3, dtype=torch.bfloat16), 'scalar': torch.tensor(2.5)}
  torch.save(state, tmp_path / 'pytorch_model.bin')
  places = weight_files.torch_places(epath.Path(tmp_path / 'pytorch_model.bin'))
  reader = Reader()
  np.testing.assert_array_equal(reader.read(places['a'], 2, 9), whole[2:9])
  np.testing.assert_array_equal(reader.read(places['view'], 1, 4), whole[4:7])
  np.testing.assert_array_equal(reader.read(places['half'], 0, 3), np.ones(3, ml_dtypes.bfloat16))
  np.testing.assert_array_equal(reader.read(places['scalar'], 0, 1), np.float32(2.5))


class Harmful:
  """A pickle that would make a folder if it were run."""

  def __init__(self, folder):
    self.folder = folder

  def __reduce__(self):
    return os.mkdir, (self.folder,)


@pytest.mark.torch
def test_a_pickle_of_anything_but_weights_is_not_run(tmp_path):
  torch = pytest.importorskip('torch')
  trap = tmp_path / 'trap'
  torch.save({'w': Harmful(str(trap))}, tmp_path / 'pytorch_model.bin')
  (tmp_path / 'plain.bin').write_bytes(pickle.dumps(Harmful(str(trap))))
  for name in ('pytorch_model.bin', 'plain.bin'):
    with pytest.raises(ConfigError, match='cannot be read as weights'):
      weight_files.torch_places(epath.Path(tmp_path / name))
    with pytest.raises(ConfigError, match='is not a safetensors file'):
      safetensors_places(epath.Path(tmp_path / name))
  assert not trap.exists()


@pytest.mark.torch
def test_torch_files_that_are_cut_off_strided_or_of_other_numbers(tmp_path):
  torch = pytest.importorskip('torch')
  file = tmp_path / 'pytorch_model.bin'
  torch.save({'w': torch.zeros(1000)}, file)
  file.write_bytes(file.read_bytes()[:2000])
  with pytest.raises(ConfigError, match='cannot be read as weights'):
    weight_files.torch_places(epath.Path(file))
  torch.save({'w': torch.zeros(3, 4).T}, file)
  with pytest.raises(ConfigError, match='w is a strided view'):
    weight_files.torch_places(epath.Path(file))
  torch.save({'w': torch.zeros(3, dtype=torch.complex64)}, file)
  with pytest.raises(ConfigError, match='w has dtype torch.complex64'):
    weight_files.torch_places(epath.Path(file))


def header_bytes(header):
  text = json.dumps(header).encode()
  return len(text).to_bytes(8, 'little') + text


@pytest.mark.parametrize('content, message', [
    (b'', 'is not a safetensors file'),
    (b'\x80\x02}q\x00.', 'is not a safetensors file'),
    ((10**12).to_bytes(8, 'little') + b'{}', 'cut off: its header would have 1000000000000 bytes'),
    ((4).to_bytes(8, 'little') + b'{"a}', 'header cannot be read'),
    (header_bytes([1, 2]), 'header cannot be read'),
    (header_bytes({'w': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}}), 'damaged or cut off'),
    (header_bytes({'w': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 4]}}) + bytes(8), 'do not fit the shape'),
    (header_bytes({'w': {'dtype': 'F32', 'shape': [2], 'data_offsets': [-8, 0]}}) + bytes(8), 'do not fit the shape'),
    (header_bytes({'w': {'dtype': 'F32', 'shape': [-2], 'data_offsets': [0, -8]}}) + bytes(8), 'damaged or cut off'),
    (header_bytes({'w': {'dtype': 'C64', 'shape': [1], 'data_offsets': [0, 8]}}) + bytes(8), 'dtype C64; valid'),
    (header_bytes({'w': {'shape': [1], 'data_offsets': [0, 8]}}) + bytes(8), 'header cannot be read'),
])
def test_bad_safetensors_files(tmp_path, content, message):
  (tmp_path / 'bad.safetensors').write_bytes(content)
  with pytest.raises(ConfigError, match=message):
    safetensors_places(epath.Path(tmp_path / 'bad.safetensors'))


def test_a_missing_file(tmp_path):
  with pytest.raises(ConfigError, match='is missing'):
    safetensors_places(epath.Path(tmp_path / 'none.safetensors'))
