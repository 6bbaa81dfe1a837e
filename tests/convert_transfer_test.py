"""The engine of conversions: parts, checksums, interruptions, refusals."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from hypothesis import given, settings, strategies as st
import ml_dtypes
import numpy as np
import pytest

from openmoe_jax import paths
from openmoe_jax.config import ConfigError, ModelConfig
from openmoe_jax.convert import tensors as tensors_lib
from openmoe_jax.convert import transfer as transfer_lib
from openmoe_jax.convert.tensors import PARAMS, Sink, Source, TensorInfo, sum_bits
from openmoe_jax.convert.transfer import JOURNAL, transfer
import tiny_run

SILENT = lambda text: None


class Memory(Source):
  """Arrays in memory."""

  def __init__(self, arrays, axes={}, damaged=()):
    self.where, self.arrays, self.axes, self.damaged = 'memory', arrays, axes, damaged
    self.tensors = {name: TensorInfo(x.shape, x.dtype) for name, x in arrays.items()}
    self.model = ModelConfig(vocab_size=8, emb_dim=4, mlp_dim=4, num_heads=1, head_dim=2, num_layers=1)
    self.fingerprint = {name: sum_bits(x) for name, x in arrays.items()}
    self.largest_read, self.checked = 0, None

  def axis(self, name):
    return self.axes.get(name, 0)

  def read(self, name, axis=0, start=0, stop=None):
    if name in self.damaged:
      raise ConfigError(f'{name} is damaged')
    x = self.arrays[name]
    part = x[tuple(slice(start, stop) if i == axis else slice(None) for i in range(x.ndim))]
    self.largest_read = max(self.largest_read, part.nbytes)
    return part

  def check(self, sums):
    self.checked = dict(sums)


class Files(Sink):
  """Every part as a file of its own; `wanted` insists on axes."""

  def __init__(self, wanted={}):
    self.wanted, self.records = wanted, None

  def axis(self, name):
    return self.wanted.get(name)

  def begin(self, directory, tensors, axes, resumed):
    self.folder, self.axes, self.resumed = directory, dict(axes), resumed
    directory.mkdir(parents=True, exist_ok=True)

  def write(self, name, start, part):
    with open(self.folder / f'{name.replace("/", ".")}-{start:06d}.npy', 'wb') as file:
      np.save(file, part.view(np.uint16) if part.dtype == ml_dtypes.bfloat16 else part)

  def close(self, name):
    return {'closed': name}

  def finish(self, records):
    self.records = dict(records)
    (self.folder / 'complete').write_text('yes')


def joined(folder, name, axis):
  files = sorted(pathlib.Path(folder).glob(f'{name.replace("/", ".")}-*.npy'))
  parts = [np.load(file) for file in files]
  return np.concatenate(parts, axis) if parts[0].ndim else parts[0]


def some_arrays(seed=0, count=6):
  rng = np.random.default_rng(seed)
  return {f'{PARAMS}w{i}': rng.normal(size=rng.integers(1, 9, rng.integers(0, 4))).astype(np.float32)
          for i in range(count)}


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(4, 200), st.data())
def test_any_parts_along_any_axis_are_the_whole(tmp_path_factory, seed, part_bytes, data):
  folder = tmp_path_factory.mktemp('parts')
  arrays = some_arrays(seed)
  choose = lambda x: data.draw(st.integers(0, max(x.ndim - 1, 0)))
  source = Memory(arrays, {name: choose(x) for name, x in arrays.items()})
  sink = Files({name: choose(x) for name, x in arrays.items() if data.draw(st.booleans())})
  before, tensors_lib.PART_BYTES = tensors_lib.PART_BYTES, part_bytes
  try:
    records = transfer(source, sink, folder / 'out', say=SILENT, workers=2)
  finally:
    tensors_lib.PART_BYTES = before
  assert not (folder / 'out.partial').exists() and (folder / 'out' / 'complete').exists()
  for name, x in arrays.items():
    axis = sink.wanted.get(name, source.axes[name])
    assert sink.axes[name] == axis
    np.testing.assert_array_equal(joined(folder / 'out', name, axis), x)
    assert records[name] == {'read': sum_bits(x), 'sum': sum_bits(x), 'closed': name}
  rows = [x.nbytes // (x.shape[sink.axes[n]] if x.ndim else 1) for n, x in arrays.items()]
  assert source.largest_read <= max(part_bytes, *rows)
  assert source.checked == {name: sum_bits(x) for name, x in arrays.items()}


def test_only_parameters_are_cast(tmp_path):
  arrays = {PARAMS + 'w': np.float32([1, 1 + 2**-9, 3e38]), 'state/param_states/w/v': np.float32([1, 1 + 2**-9, 3e38])}
  sink = Files()
  records = transfer(Memory(arrays), sink, tmp_path / 'out', dtype=ml_dtypes.bfloat16, say=SILENT)
  cast = arrays[PARAMS + 'w'].astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(joined(tmp_path / 'out', PARAMS + 'w', 0), cast.view(np.uint16))
  np.testing.assert_array_equal(joined(tmp_path / 'out', 'state/param_states/w/v', 0), arrays['state/param_states/w/v'])
  assert records[PARAMS + 'w']['sum'] == sum_bits(cast.astype(np.float32))
  with pytest.raises(ConfigError, match='beyond the range of float16'):
    transfer(Memory(arrays), Files(), tmp_path / 'half', dtype=np.float16, say=SILENT)


def test_sum_of_bits_is_that_of_our_checkpoints():
  from openmoe_jax import checkpoint_layout
  x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
  assert sum_bits(x) == checkpoint_layout.checksums({'x': x})['x'] == sum_bits(x.T) == sum_bits(x[::-1])
  assert (sum_bits(x[:2]) + sum_bits(x[2:])) % 2**32 == sum_bits(x)


def test_goes_on_where_an_error_stopped_it(tmp_path):
  arrays = some_arrays(1)
  names = sorted(arrays, key=lambda n: -arrays[n].nbytes)
  with pytest.raises(ConfigError, match='is damaged'):
    transfer(Memory(arrays, damaged=names[3:]), Files(), tmp_path / 'out', workers=1, say=SILENT)
  assert not (tmp_path / 'out').exists() and not (tmp_path / 'out.partial' / 'complete').exists()
  said = []
  sink = Files()
  source = Memory(arrays, damaged=names[:3])  # which are not read a second time
  transfer(source, sink, tmp_path / 'out', say=said.append)
  assert sink.resumed and f'going on: 3 of {len(arrays)} tensors' in said[0]
  for name, x in arrays.items():
    np.testing.assert_array_equal(joined(tmp_path / 'out', name, 0), x)
  assert sink.records.keys() == arrays.keys() and not (tmp_path / 'out' / JOURNAL).exists()


def test_an_unfinished_conversion_of_something_else_is_begun_again(tmp_path):
  with pytest.raises(ConfigError):
    transfer(Memory(some_arrays(1), damaged=[PARAMS + 'w0']), Files(), tmp_path / 'out', say=SILENT)
  said, sink = [], Files()
  arrays = some_arrays(2)
  transfer(Memory(arrays), sink, tmp_path / 'out', say=said.append)
  assert 'of something else; it is begun again' in said[0] and not sink.resumed
  for name, x in arrays.items():
    np.testing.assert_array_equal(joined(tmp_path / 'out', name, 0), x)


def test_nothing_is_overwritten(tmp_path):
  (tmp_path / 'taken').mkdir()
  (tmp_path / 'taken' / 'thesis.txt').write_text('mine')
  with pytest.raises(ConfigError, match='not empty .*thesis.txt.*nothing is overwritten'):
    transfer(Memory(some_arrays()), Files(), tmp_path / 'taken', say=SILENT)
  (tmp_path / 'out.partial').mkdir()
  (tmp_path / 'out.partial' / 'thesis.txt').write_text('mine')
  with pytest.raises(ConfigError, match='in the way'):
    transfer(Memory(some_arrays()), Files(), tmp_path / 'out', say=SILENT)
  (tmp_path / 'file').write_text('mine')
  with pytest.raises(ConfigError, match='is a file'):
    transfer(Memory(some_arrays()), Files(), tmp_path / 'file', say=SILENT)
  (tmp_path / 'empty').mkdir()
  transfer(Memory(some_arrays()), Files(), tmp_path / 'empty', say=SILENT)
  assert (tmp_path / 'empty' / 'complete').exists()


def test_a_full_disk_is_noticed_before_or_told_in_a_line(tmp_path, monkeypatch):
  monkeypatch.setattr(paths, 'free_bytes', lambda folder: 1000)
  with pytest.raises(ConfigError, match='1000 bytes left; the conversion needs'):
    transfer(Memory(some_arrays()), Files(), tmp_path / 'out', say=SILENT)
  monkeypatch.undo()

  class Full(Files):
    def write(self, name, start, part):
      raise OSError(28, 'No space left on device')
  with pytest.raises(ConfigError, match='is full; what is written is kept'):
    transfer(Memory(some_arrays()), Full(), tmp_path / 'out', say=SILENT)


def test_two_conversions_do_not_share_a_folder(tmp_path):
  class Nested(Files):
    def begin(self, *args):
      super().begin(*args)
      with pytest.raises(ConfigError, match='another conversion is writing'):
        transfer(Memory(some_arrays()), Files(), tmp_path / 'out', say=SILENT)
  transfer(Memory(some_arrays()), Nested(), tmp_path / 'out', say=SILENT)
  assert os.listdir(tmp_path) == ['out']


_SLOW = '''
import sys, time
sys.path.insert(0, {tests!r})
import numpy as np
import convert_transfer_test as test

class Slow(test.Memory):
  def read(self, *args):
    time.sleep({pause})
    return super().read(*args)

test.transfer(Slow(test.some_arrays(3, 40)), test.Files(), {out!r}, workers=2)
'''


def test_kill_nine_again_and_again(tmp_path):
  """Real processes are killed at any moment; what is left never looks complete, and the last one finishes."""
  out = tmp_path / 'out'
  start = lambda pause: subprocess.Popen(
      [sys.executable, '-c', _SLOW.format(tests=str(tiny_run.TESTS), out=str(out), pause=pause)],
      env=tiny_run.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  journal = tmp_path / 'out.partial' / JOURNAL
  finished = lambda: len(paths.entries(journal))
  for kill in range(3):
    before, process = finished(), start(.1)
    end = time.time() + 120
    while finished() < before + 4 and process.poll() is None and time.time() < end:
      time.sleep(.01)
    assert process.poll() is None, process.stdout.read()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and before + 4 <= finished() < 40
  last = start(0)
  text = last.communicate(timeout=120)[0]
  assert last.returncode == 0 and 'going on: ' in text, text
  for name, x in some_arrays(3, 40).items():
    np.testing.assert_array_equal(joined(out, name, 0), x)
  assert sorted(os.listdir(tmp_path)) == ['out']


def test_the_journal_is_json_and_an_unreadable_entry_only_costs_time(tmp_path):
  arrays = some_arrays(1)
  names = sorted(arrays, key=lambda n: -arrays[n].nbytes)
  with pytest.raises(ConfigError):
    transfer(Memory(arrays, damaged=names[3:]), Files(), tmp_path / 'out', workers=1, say=SILENT)
  entries = [p for p in (tmp_path / 'out.partial' / JOURNAL).iterdir() if p.name != 'plan.json']
  assert all(json.loads(p.read_text())['name'] in arrays for p in entries)
  entries[0].write_text('{"name": "w')
  said = []
  transfer(Memory(arrays), Files(), tmp_path / 'out', say=said.append)
  assert 'going on: 2 of' in said[0] and (tmp_path / 'out' / 'complete').exists()


def test_read_all_checks(tmp_path):
  source = Memory(some_arrays(4))
  transfer_lib.read_all(source, say=SILENT)
  assert source.checked == {name: sum_bits(x) for name, x in source.arrays.items()}
