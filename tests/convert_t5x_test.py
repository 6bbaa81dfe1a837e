"""T5X checkpoints in and out, against the one that the original wrote and against a writer of our own."""

import concurrent.futures
import gzip
import json
import os
import pathlib
import shutil
import tarfile
import tempfile

from flax import serialization
import hypothesis
from hypothesis import strategies as st
import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
import tensorstore

from openmoe_jax import names
from openmoe_jax import optimizers
from openmoe_jax import paths
from openmoe_jax.config import ConfigError, ModelConfig
from openmoe_jax.convert import t5x
from openmoe_jax.convert import tensors as tensors_lib
from openmoe_jax.convert.t5x import T5XSink, T5XSource
from openmoe_jax.convert.tensors import PARAMS, SLOTS, TensorInfo, part_rows
from openmoe_jax.convert.transfer import transfer
from tests import golden, golden_model

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TINY = ModelConfig(vocab_size=11, emb_dim=6, mlp_dim=5, num_heads=2, head_dim=4, num_layers=2, moe_interval=2,
                   num_experts=3)
WO = 'target/decoder/layers_0/mlp/wo/kernel'  # [5, 6]
WO_FOLDER = WO.replace('/', '.')
V_ROW = 'state/param_states/decoder/layers_1/mlp/expert/wo/kernel/v_row'


def random_arrays(model, seed=0, dtype=np.float32, with_state=True):
  """Tensor name -> random array, for all that a checkpoint of this model holds."""
  rng = np.random.default_rng(seed)
  shapes = {PARAMS + name: shape for name, shape in names.t5x_shapes(model).items()}
  arrays = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
  if with_state:
    params = names.unflatten_names({n: jax.ShapeDtypeStruct(s, np.float32) for n, s in names.t5x_shapes(model).items()})
    stats = jax.eval_shape(optimizers.adafactor().init, params).stats
    for name, leaf in names.flatten_names(stats).items():
      arrays[SLOTS + name] = rng.random(size=leaf.shape).astype(np.float32)
  return arrays


def write_t5x(folder, arrays, step=7, chunks=lambda shape: shape, compressor=lambda: {'id': 'gzip', 'level': 1},
              kvstore=lambda name: {'driver': 'file', 'path': f'{name}/'}, version=3, inline=()):
  """A checkpoint as T5X lays it out; bfloat16 becomes uint16 where `version` is below 3."""
  flat = {}
  for name, array in arrays.items():
    if name in inline:
      flat[name] = array
      continue
    if array.dtype == BFLOAT16 and version < 3:
      array = array.view(np.uint16)
    place = {'driver': 'file', 'path': f'{folder}/{name.replace("/", ".")}/'}
    spec = {'driver': 'zarr', 'dtype': array.dtype.name,
            'metadata': {'chunks': list(chunks(array.shape)), 'compressor': compressor(), 'shape': list(array.shape)}}
    tensorstore.open({**spec, 'kvstore': place}, create=True).result().write(array).result()
    flat[name] = {**spec, 'kvstore': kvstore(name.replace('/', '.'))}
  if any(name.startswith(SLOTS) for name in arrays):
    for name in list(flat):
      if name.startswith(PARAMS):
        for slot in ('m', 'v', 'v_row', 'v_col'):
          flat.setdefault(f'{SLOTS}{name[len(PARAMS):]}/{slot}', np.zeros((1,), np.float32))
  flat['state/step'] = np.asarray(step, np.int32)
  write_index(folder, {'version': version, 'optimizer': names.unflatten_names(flat)})


def write_index(folder, tree):
  (pathlib.Path(folder) / 'checkpoint').write_bytes(serialization.msgpack_serialize(tree))


def read_index(folder):
  return serialization.msgpack_restore((pathlib.Path(folder) / 'checkpoint').read_bytes())


def edit_index(folder, change):
  """Applies `change` to the dictionary {tensor name: leaf of the index}, spec or array."""
  tree = read_index(folder)
  flat = {}

  def walk(node, prefix):
    for key, value in node.items():
      if isinstance(value, dict) and 'driver' not in value:
        walk(value, f'{prefix}{key}/')
      else:
        flat[prefix + key] = value
  walk(tree['optimizer'], '')
  change(flat)
  write_index(folder, {**tree, 'optimizer': names.unflatten_names(flat)})


def copy(source, sink, directory, axis=None):
  """What the engine of a conversion does, without its threads and its journal."""
  axes = {name: source.axis(name) if axis is None else axis % len(i.shape) for name, i in source.tensors.items()}
  sink.begin(paths.path(directory), source.tensors, axes, False)
  for name, info in source.tensors.items():
    rows = part_rows(info, axes[name])
    for start in range(0, info.shape[axes[name]], rows):
      sink.write(name, start, source.read(name, axes[name], start, min(start + rows, info.shape[axes[name]])))
  sink.finish({name: {} for name in source.tensors})


def same(a, b):
  assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, a.dtype, b.shape, b.dtype)
  assert a.tobytes() == b.tobytes()


def snapshot(folder):
  return {path: (os.lstat(path).st_size, os.lstat(path).st_mtime_ns) for path in pathlib.Path(folder).rglob('*')}


@pytest.fixture(scope='module')
def original(tmp_path_factory):
  """The folder that holds the original's checkpoint_5."""
  folder = tmp_path_factory.mktemp('original')
  with tarfile.open(golden.require_golden('t5x_checkpoint.tar.gz')) as tar:
    tar.extractall(folder, filter='data')
  return folder / 't5x_checkpoint'


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  arrays = random_arrays(TINY)
  folder = tmp_path_factory.mktemp('written') / 'checkpoint_7'
  folder.mkdir()
  write_t5x(folder, arrays, chunks=lambda shape: [-(-size // 2) for size in shape])
  return folder, arrays


@pytest.fixture
def checkpoint(written, tmp_path):
  """A copy to damage."""
  return pathlib.Path(shutil.copytree(written[0], tmp_path / 'checkpoint_7'))


def refused(tmp_path, path, *words, **options):
  """Opening `path` raises ConfigError with these words in it, and touches nothing."""
  before = snapshot(tmp_path)
  with pytest.raises(ConfigError) as error:
    T5XSource(path, TINY, **options)
  for word in words:
    assert word in str(error.value), str(error.value)
  assert '\n' not in str(error.value)
  assert snapshot(tmp_path) == before


# The original's checkpoint.


def test_original_in(original):
  model = golden_model.config()
  source = T5XSource(original, model)
  assert source.step == 5 and source.where.endswith('checkpoint_5') and source.model == model
  stats = golden.load_arrays('train_adafactor_step5.npz')
  assert {name for name in source.tensors if name.startswith(SLOTS)} == {SLOTS + name for name in stats}
  for name, array in stats.items():
    same(source.read(SLOTS + name), array)
  folder = original / 'checkpoint_5'
  for name in golden_model.flat_params():
    name = PARAMS + name
    [chunk] = [file for file in (folder / name.replace('/', '.')).iterdir() if file.name != '.zarray']
    info = source.tensors[name]
    same(source.read(name), np.frombuffer(gzip.decompress(chunk.read_bytes()), np.float32).reshape(info.shape))
    assert info.chunk == info.shape
  changed = golden_model.flat_params()['decoder/decoder_norm/scale'] != source.read('target/decoder/decoder_norm/scale')
  assert changed.mean() > .9  # five steps of training
  assert set(T5XSource(folder, model, with_state=False).tensors) == {n for n in source.tensors if n.startswith(PARAMS)}


def test_original_in_and_out_is_the_same_folder(original, tmp_path):
  """Byte for byte: the index, and Zarr's metadata. Chunks are compared as numbers, as gzip may differ by version."""
  source = T5XSource(original, golden_model.config())
  copy(source, T5XSink(source.model, source.step), tmp_path)
  there, here = original / 'checkpoint_5', tmp_path / 'checkpoint_5'
  assert {p.relative_to(there) for p in there.rglob('*')} == {p.relative_to(here) for p in here.rglob('*')}
  assert (there / 'checkpoint').read_bytes() == (here / 'checkpoint').read_bytes()
  again = T5XSource(tmp_path, source.model)
  assert again.tensors == source.tensors and again.step == 5
  for name in source.tensors:
    folder = name.replace('/', '.')
    assert (there / folder / '.zarray').read_bytes() == (here / folder / '.zarray').read_bytes()
    same(again.read(name), source.read(name))
  assert again.fingerprint['index'] == source.fingerprint['index']


def test_original_through_the_engine_as_bfloat16(original, tmp_path):
  source = T5XSource(original, golden_model.config())
  transfer(source, T5XSink(source.model, source.step), tmp_path / 'out', dtype=BFLOAT16, say=lambda line: None)
  again = T5XSource(tmp_path / 'out', source.model)
  for name in source.tensors:
    same(again.read(name), source.read(name).astype(BFLOAT16 if name.startswith(PARAMS) else np.float32))


# A writer of our own.


@st.composite
def models(draw):
  moe_interval = draw(st.integers(1, 2))
  return ModelConfig(
      vocab_size=draw(st.integers(1, 9)), emb_dim=draw(st.integers(1, 7)), mlp_dim=draw(st.integers(1, 5)), num_heads=1,
      head_dim=draw(st.sampled_from((2, 4))), num_layers=moe_interval, moe_interval=moe_interval,
      num_experts=draw(st.sampled_from((0, 2, 3))), extra_mlp=draw(st.booleans()))


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(models(), st.data())
def test_any_chunks(model, data):
  """Whatever the chunks, types, compressors and paths: parts along any axis are NumPy's slices, also when written."""
  dtype = data.draw(st.sampled_from((np.dtype(np.float32), BFLOAT16, np.dtype(np.float16), np.dtype(np.float64))))
  version = data.draw(st.sampled_from((3, 3, 2)))
  arrays = random_arrays(model, 1, dtype, data.draw(st.booleans()))
  inline = data.draw(st.sets(st.sampled_from(sorted(arrays)), max_size=3))
  kvstores = {
      'relative': lambda name: {'driver': 'file', 'path': f'{name}/'},
      'no slash': lambda name: {'driver': 'file', 'path': name},
      'elsewhere': lambda name: {'driver': 'gfile', 'path': f'/disk/runs/checkpoint_7/{name}/'},
      'bucket': lambda name: {'driver': 'gcs', 'bucket': 'somebodys', 'path': f'runs/checkpoint_7/{name}/'}}
  with tempfile.TemporaryDirectory() as folder:
    write_t5x(
        folder, arrays, version=version, inline=inline,
        chunks=lambda shape: [data.draw(st.integers(1, size + 1)) for size in shape],
        compressor=lambda: data.draw(st.sampled_from((
            {'id': 'gzip', 'level': 1}, {'id': 'blosc'}, {'id': 'zstd'}, None))),
        kvstore=kvstores[data.draw(st.sampled_from(sorted(kvstores)))])
    source = T5XSource(folder, model)
    assert source.tensors.keys() == arrays.keys() and source.step == 7
    for name, array in arrays.items():
      info = source.tensors[name]
      assert info.shape == array.shape and info.dtype == array.dtype
      assert (info.chunk is None) == (name in inline)
      axis = data.draw(st.integers(0, array.ndim - 1))
      start = data.draw(st.integers(0, array.shape[axis] - 1))
      stop = data.draw(st.one_of(st.none(), st.integers(start + 1, array.shape[axis])))
      part = source.read(name, axis, start, stop)
      assert part.flags.c_contiguous
      same(part, np.ascontiguousarray(array[(slice(None),) * axis + (slice(start, stop),)]))
    copy(source, T5XSink(model, 7), folder + '/out', axis=data.draw(st.integers(0, 2)))
    again = T5XSource(folder + '/out', model)
    for name, array in arrays.items():
      same(again.read(name), array)


def test_reads_in_many_threads(written):
  folder, arrays = written
  source = T5XSource(folder, TINY)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    jobs = [(name, row) for name, array in arrays.items() for row in range(array.shape[0])]
    for (name, row), part in zip(jobs, pool.map(lambda job: source.read(job[0], 0, job[1], job[1] + 1), jobs)):
      same(part, arrays[name][row:row + 1])


def test_the_axis_that_chunks_are_cut_along(tmp_path, monkeypatch):
  write_t5x(tmp_path, random_arrays(TINY), chunks=lambda shape: (*shape[:-1], 1))
  source = T5XSource(tmp_path, TINY)
  assert source.axis(WO) == 0  # a part holds the whole
  monkeypatch.setattr(t5x, 'PART_BYTES', 60)
  assert source.axis(WO) == 1
  assert source.axis('target/decoder/decoder_norm/scale') == 0


@pytest.mark.parametrize('part_bytes', (24, 50, 1000))
@pytest.mark.parametrize('axis', (0, 1))
def test_chunks_written_are_the_parts(written, tmp_path, monkeypatch, part_bytes, axis):
  folder, arrays = written
  monkeypatch.setattr(tensors_lib, 'PART_BYTES', part_bytes)
  copy(T5XSource(folder, TINY), T5XSink(TINY, 7), tmp_path, axis=axis)
  again = T5XSource(tmp_path, TINY)
  chunk = list(arrays[WO].shape)
  chunk[axis] = part_rows(TensorInfo(arrays[WO].shape, np.dtype(np.float32)), axis)
  assert again.tensors[WO].chunk == tuple(chunk)
  for name, array in arrays.items():
    same(again.read(name), array)


def test_parts_that_do_not_fit_the_chunks_and_a_restart(written, tmp_path):
  """A tensor that was half written when a conversion died is written again from its beginning."""
  folder, arrays = written
  source = T5XSource(folder, TINY)
  axes = dict.fromkeys(source.tensors, 0)
  sink = T5XSink(TINY, 7)
  sink.begin(paths.path(tmp_path), source.tensors, axes, False)
  sink.write(WO, 0, np.full((3, 6), 9, np.float32))
  sink = T5XSink(TINY, 7)
  sink.begin(paths.path(tmp_path), source.tensors, axes, True)
  for name, array in arrays.items():
    for row in range(array.shape[0]):
      sink.write(name, row, array[row:row + 1])
  assert not (tmp_path / 'checkpoint_7' / 'checkpoint').exists()  # what tells that it is complete
  sink.finish({})
  again = T5XSource(tmp_path, TINY)
  for name, array in arrays.items():
    same(again.read(name), array)


def test_parameters_only(tmp_path):
  arrays = random_arrays(TINY, dtype=BFLOAT16, with_state=False)
  (tmp_path / 'checkpoint_3').mkdir()
  write_t5x(tmp_path / 'checkpoint_3', arrays, step=3)
  source = T5XSource(tmp_path, TINY)
  assert set(source.tensors) == set(arrays)
  copy(source, T5XSink(TINY, 3), tmp_path / 'out')
  index = read_index(tmp_path / 'out' / 'checkpoint_3')
  assert index['version'] == 3 and index['optimizer'].keys() == {'state', 'target'}
  assert index['optimizer']['state'] == {'step': 3} and index['optimizer']['state']['step'].dtype == np.int32
  assert index['optimizer']['target']['token_embedder']['embedding'] == {
      'driver': 'zarr', 'dtype': 'bfloat16', 'kvstore': {'driver': 'file', 'path': 'target.token_embedder.embedding/'},
      'metadata': {'chunks': [11, 6], 'compressor': {'id': 'gzip', 'level': 1}, 'shape': [11, 6]}}
  again = T5XSource(tmp_path / 'out', TINY)
  for name, array in arrays.items():
    same(again.read(name), array)


@pytest.mark.parametrize('state', ({}, {'param_states': {}}, None))
def test_the_step_of_a_checkpoint_without_state_is_in_its_name(checkpoint, state):
  tree = read_index(checkpoint)
  tree['optimizer']['state'] = state
  write_index(checkpoint, tree)
  source = T5XSource(checkpoint, TINY)
  assert source.step == 7 and all(name.startswith(PARAMS) for name in source.tensors)


def test_old_layouts(checkpoint, written):
  """Version 1 or 2, the path one level higher, and a type in the metadata only."""
  def old(flat):
    for name, leaf in flat.items():
      if isinstance(leaf, dict):
        leaf['path'] = leaf['kvstore'].pop('path')
        del leaf['dtype']
        leaf['metadata']['dtype'] = '<f4'
  edit_index(checkpoint, old)
  write_index(checkpoint, {**read_index(checkpoint), 'version': 1})
  source = T5XSource(checkpoint, TINY)
  same(source.read(WO), written[1][WO])


def test_bfloat16_as_uint16(tmp_path):
  arrays = random_arrays(TINY, dtype=BFLOAT16)
  write_t5x(tmp_path, arrays, version=2)
  assert json.loads((tmp_path / WO_FOLDER / '.zarray').read_text())['dtype'] == '<u2'
  scale = 'target/decoder/decoder_norm/scale'
  edit_index(tmp_path, lambda flat: flat.update({scale: arrays[scale].view(np.uint16)}))
  source = T5XSource(tmp_path, TINY)
  for name, array in arrays.items():
    assert source.tensors[name].dtype == array.dtype
    same(source.read(name), array)


def test_newest_complete_step(written, tmp_path):
  for name in ('checkpoint_7', 'checkpoint_10', 'checkpoint_12', 'checkpoint_100.tmp-1690000000', 'checkpoint_x'):
    shutil.copytree(written[0], tmp_path / name)
  (tmp_path / 'checkpoint_50').mkdir()
  assert T5XSource(tmp_path, TINY).where == str(tmp_path / 'checkpoint_12')
  refused(tmp_path, tmp_path / 'checkpoint_100.tmp-1690000000', 'never finished')
  refused(tmp_path, tmp_path / 'checkpoint_50', 'no T5X checkpoint', str(tmp_path / 'checkpoint_50'))
  refused(tmp_path, tmp_path / 'nothing', 'no T5X checkpoint')


def test_fingerprint(checkpoint):
  fingerprint = T5XSource(checkpoint, TINY).fingerprint
  assert json.loads(json.dumps(fingerprint)) == fingerprint == T5XSource(checkpoint, TINY).fingerprint
  os.utime(checkpoint / WO_FOLDER / '0.0', (1, 1))
  changed = T5XSource(checkpoint, TINY).fingerprint
  assert changed != fingerprint
  edit_index(checkpoint, lambda flat: flat.update({'state/step': np.int32(8)}))
  assert T5XSource(checkpoint, TINY).fingerprint != changed


# What is refused.


@pytest.mark.parametrize('damage', (
    lambda content: content[:-20],  # TensorStore reads without gzip's trailer (8 bytes): the values are whole
    lambda content: content[:20], lambda content: b'', lambda content: content[:30] + b'\0' + content[31:]))
def test_damaged_chunk(checkpoint, tmp_path, damage):
  chunk = checkpoint / WO_FOLDER / '1.0'
  chunk.write_bytes(damage(chunk.read_bytes()))
  source = T5XSource(checkpoint, TINY)
  before = snapshot(tmp_path)
  source.read(WO, 0, 0, 3)  # in another chunk
  with pytest.raises(ConfigError) as error:
    source.read(WO)
  assert WO in str(error.value) and str(checkpoint / WO_FOLDER) in str(error.value)
  assert snapshot(tmp_path) == before


def test_chunk_lost_after_opening(checkpoint):
  source = T5XSource(checkpoint, TINY)
  (checkpoint / WO_FOLDER / '1.0').unlink()
  with pytest.raises(ConfigError, match='1.0.*missing'):
    source.read(WO)


def test_all_damages_are_told_at_once(checkpoint, tmp_path):
  (checkpoint / WO_FOLDER / '1.0').unlink()
  shutil.rmtree(checkpoint / 'target.decoder.decoder_norm.scale')
  folder = checkpoint / 'target.token_embedder.embedding'
  zarray = json.loads((folder / '.zarray').read_text())
  zarray['shape'] = [12, 6]
  (folder / '.zarray').write_text(json.dumps(zarray))
  (checkpoint / V_ROW.replace('/', '.') / '.zarray').write_text('{')
  refused(tmp_path, checkpoint, f'{WO} (folder {WO_FOLDER}): the chunk 1.0 is missing',
          'target/decoder/decoder_norm/scale (folder target.decoder.decoder_norm.scale): the array is missing',
          '[12, 6] float32, the index [11, 6] float32', f'{V_ROW} (folder {V_ROW.replace("/", ".")}): cannot be opened')
  with pytest.raises(ConfigError) as error:
    T5XSource(checkpoint, TINY, with_state=False)
  assert V_ROW not in str(error.value)


def test_type_differs_from_the_index(checkpoint, tmp_path):
  edit_index(checkpoint, lambda flat: flat[WO].update(dtype='float16'))
  refused(tmp_path, checkpoint, WO, '[5, 6] float32, the index [5, 6] float16')


def test_missing_extra_and_misshaped_arrays(checkpoint, tmp_path):
  def change(flat):
    del flat[WO]
    flat['target/decoder/layers_9/mlp/wo/kernel'] = flat['target/token_embedder/embedding']
    flat['target/decoder/decoder_norm/scale']['metadata']['shape'] = [5]
  edit_index(checkpoint, change)
  refused(tmp_path, checkpoint, '(3 differences)', f'- {WO} [5, 6] (missing)',
          '+ target/decoder/layers_9/mlp/wo/kernel [11, 6] (unexpected)',
          '! target/decoder/decoder_norm/scale [5] instead of [6]')


def test_slots_that_do_not_fit(checkpoint, tmp_path):
  def change(flat):
    flat[f'{SLOTS}decoder/decoder_norm/scale/v'] = np.zeros((5,), np.float32)
    flat[f'{SLOTS}token_embedder/embedding/v'] = np.zeros((1,), np.float32)
  edit_index(checkpoint, change)
  refused(tmp_path, checkpoint, 'optimizer state: 2 of', "! decoder/decoder_norm/scale (6,): {'v': (5,)}",
          '! token_embedder/embedding (11, 6): nothing')
  assert T5XSource(checkpoint, TINY, with_state=False).step == 7


def test_momentum(checkpoint, tmp_path):
  edit_index(checkpoint, lambda flat: flat.update({f'{SLOTS}{WO[7:]}/m': np.zeros((5, 6), np.float32)}))
  refused(tmp_path, checkpoint, 'momentum', f'{WO[7:]}/m')
  assert set(T5XSource(checkpoint, TINY, with_state=False).tensors) == {
      PARAMS + name for name in names.t5x_shapes(TINY)}


def test_scanned_layers(checkpoint, tmp_path):
  edit_index(checkpoint, lambda flat: flat.update({'target/decoder/layers/mlp/wo/kernel': flat.pop(WO)}))
  refused(tmp_path, checkpoint, 'scan_layers', 'decoder/layers/mlp/wo/kernel')


@pytest.mark.parametrize('path', (
    '../checkpoint_7/' + WO_FOLDER, f'a/../{WO_FOLDER}/', '..', '../', '.', './', '/', '', f'{WO_FOLDER}//',
    f'a\\{WO_FOLDER}', 'a\0', None, 3))
def test_paths_that_could_lead_out(checkpoint, tmp_path, path):
  edit_index(checkpoint, lambda flat: flat[WO]['kvstore'].update(path=path))
  refused(tmp_path, checkpoint, WO, 'not the name of a folder')


def test_absolute_paths_mean_their_last_component(checkpoint, written, tmp_path):
  outside = tmp_path / 'outside' / WO_FOLDER
  shutil.copytree(written[0] / 'target.token_embedder.embedding', outside)
  edit_index(checkpoint, lambda flat: flat[WO]['kvstore'].update(path=f'{outside}/'))
  same(T5XSource(checkpoint, TINY).read(WO), written[1][WO])
  edit_index(checkpoint, lambda flat: flat[WO]['kvstore'].update(path='/etc/'))
  refused(tmp_path, checkpoint, f'{WO} (folder etc): the array is missing')


@pytest.mark.parametrize('link', ('', '0.0', '.zarray', 'index'))
def test_links_that_lead_out(checkpoint, tmp_path, link):
  path = checkpoint / 'checkpoint' if link == 'index' else checkpoint / WO_FOLDER / link
  outside = tmp_path / 'outside'
  path.rename(outside)
  path.symlink_to(outside)
  refused(tmp_path, checkpoint, str(path), f'{outside}, outside the checkpoint')


def test_links_that_stay_inside(checkpoint, written, tmp_path):
  (checkpoint / WO_FOLDER).rename(checkpoint / 'other')
  (checkpoint / WO_FOLDER).symlink_to('other')
  (tmp_path / 'link').symlink_to(checkpoint)
  same(T5XSource(tmp_path / 'link', TINY).read(WO), written[1][WO])


@pytest.mark.parametrize('change, words', (
    (lambda spec: spec.update(driver='n5'), "the driver 'n5'"),
    (lambda spec: spec.update(kvstore={'driver': 'http', 'path': WO_FOLDER}), 'the drivers file, gfile, gcs'),
    (lambda spec: spec.update(kvstore=f'file:///{WO_FOLDER}'), 'the drivers file, gfile, gcs'),
    (lambda spec: spec.update(dtype='int32'), "the type 'int32'"),
    (lambda spec: spec.update(dtype=['float32']), 'the type ['),
    (lambda spec: spec['metadata'].update(shape=[5, -6]), 'the shape [5, -6]'),
    (lambda spec: spec['metadata'].update(shape='56'), "the shape '56'"),
    (lambda spec: spec.pop('metadata'), 'the shape None')))
def test_strange_specs(checkpoint, tmp_path, change, words):
  edit_index(checkpoint, lambda flat: change(flat[WO]))
  refused(tmp_path, checkpoint, WO, words)


@pytest.mark.parametrize('leaf', (None, 3, 'text', np.zeros((5, 6), np.int32)))
def test_leaves_that_are_no_parameters(checkpoint, tmp_path, leaf):
  edit_index(checkpoint, lambda flat: flat.update({WO: leaf}))
  refused(tmp_path, checkpoint, WO)


def test_index_that_is_none(checkpoint, tmp_path):
  file = checkpoint / 'checkpoint'
  whole = file.read_bytes()
  tree = serialization.msgpack_restore(whole)
  objects = msgpack.ExtType(1, msgpack.packb(((1,), 'object', bytes(8))))
  contents = [whole[:-1], whole[:100], b'', whole + b'\0', b'model_checkpoint_path: "model.ckpt-5"\n', b'\xc1',
              b'\x80\x04\x95', b'\x91' * 5000 + b'\x01',
              msgpack.packb({'version': 3, 'optimizer': {'target': {'a': objects}}})]
  contents += [serialization.msgpack_serialize(t) for t in (
      {}, {'version': 3}, {'version': 3, 'optimizer': 5}, {'version': 3, 'optimizer': {'state': {}}},
      {**tree, 'optimizer': {**tree['optimizer'], 'state': 5}},
      {**tree, 'optimizer': {**tree['optimizer'], 'state': {'step': 'five'}}})]
  for content in contents:
    file.write_bytes(content)
    refused(tmp_path, checkpoint, str(file), 'not a T5X checkpoint index')
  for version in (4, 0, '3', True, 3.0, np.zeros(3)):
    write_index(checkpoint, {**tree, 'version': version})
    refused(tmp_path, checkpoint, str(file), 'has version', 'known are 1, 2, 3')
  file.unlink()
  file.mkdir()
  refused(tmp_path, checkpoint, str(file), 'cannot be read')
