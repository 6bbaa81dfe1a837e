"""Checkpoints: what comes back is what went in, in any layout and on any mesh, and damage is noticed."""

import asyncio
import dataclasses
import gc
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from openmoe_jax import checkpoint_layout as layout
from openmoe_jax import checkpoints, loading
from openmoe_jax.checkpoints import CheckpointError, Checkpointer
from openmoe_jax.config import ConfigError, MeshConfig
from openmoe_jax.optimizers import make_optimizer
from openmoe_jax.partitioning import make_mesh
from openmoe_jax.train import born_sharded
import tiny_run

STREAMS = {0: b'first', 1: b'second', 2: b'', 3: b'\x00\xff' * 100}
MODEL = dict(vocab_size=128, emb_dim=16, mlp_dim=32, num_layers=4)


def make(tmp_path, mesh=(1, 1, 1), **changes):
  """A run, and a template and maker of its state (random numbers) on a mesh of fake devices."""
  model = {**MODEL, **changes.pop('model', {})}
  run = tiny_run.tiny_run(tmp_path / 'run', model=model, **changes)
  data, expert, tensor = mesh
  devices = jax.devices()[:data * expert * tensor]
  grid = make_mesh(MeshConfig(data=data, expert=expert, model=tensor), devices)
  template, _ = born_sharded(run, make_optimizer(run.optimizer, run.train.train_steps), grid)

  def random_state():
    rng = np.random.default_rng(0)
    array = lambda x: rng.standard_normal(x.shape).astype(x.dtype) if x.dtype == np.float32 else np.zeros(x.shape, x.dtype)
    return jax.tree.map(lambda x: jax.device_put(array(x), x.sharding), template)
  return run, template, random_state


def at_step(state, step):
  """Another state, recognisable by its step."""
  moved = jax.tree.map(lambda x: jax.device_put(np.asarray(x) + np.asarray(step, x.dtype), x.sharding), state)
  return moved.replace(step=jax.device_put(np.int32(step), state.step.sharding))


def assert_same(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Steps 1, 2 and 3 of a run on one device; tests copy the folder before they change it."""
  run, template, initialise = make(tmp_path_factory.mktemp('saved'))
  first = initialise()
  checkpointer = Checkpointer(run)
  states = {}
  for step in (1, 2, 3):
    states[step] = at_step(first, step)
    checkpointer.save(states[step], STREAMS, {'window': {'count': step}})
  checkpointer.close()
  return run, template, states


def copy(saved, tmp_path):
  run, template, states = saved
  shutil.copytree(run.model_dir, tmp_path / 'copy')
  return dataclasses.replace(run, model_dir=str(tmp_path / 'copy')), template, states


def test_restores_the_newest_step_bit_for_bit(saved):
  run, template, states = saved
  restored = Checkpointer(run).restore(template, [1, 3])
  assert restored.step == 3 and int(restored.state.step) == 3 and not restored.damaged
  assert_same(restored.state, states[3])
  assert restored.data_state == {1: STREAMS[1], 3: STREAMS[3]}
  assert restored.progress['window'] == {'count': 3}


def test_no_checkpoint_is_not_an_error(tmp_path):
  run, template, _ = make(tmp_path)
  assert Checkpointer(run).restore(template) is None


@pytest.mark.parametrize('scan_blocks', [False, True])
def test_other_mesh_and_other_layout(saved, tmp_path, scan_blocks):
  run, _, states = saved
  plain, template, _ = make(tmp_path, mesh=(2, 2, 2), model=dict(scan_blocks=scan_blocks))
  assert run.model.scan_blocks is False
  restored = Checkpointer(dataclasses.replace(plain, model_dir=run.model_dir)).restore(template)
  assert restored.state.params['token_embedder']['embedding'].sharding.mesh.size == 8
  assert_same(layout.to_disk(plain.model, restored.state.params), layout.to_disk(run.model, states[3].params))
  assert_same(layout.to_disk(plain.model, restored.state.opt_state), layout.to_disk(run.model, states[3].opt_state))
  shardings = jax.tree.map(lambda x: x.sharding, restored.state)
  assert jax.tree.leaves(shardings) == jax.tree.leaves(jax.tree.map(lambda x: x.sharding, template))


def stored_arrays(folder):
  """{name: (shape, chunk shape)} read by tensorstore, without Orbax."""
  result = {}
  metadata = json.loads((folder / '_METADATA').read_text())
  for entry in metadata['tree_metadata'].values():
    name = '.'.join(key['key'] for key in entry['key_metadata'])
    spec = {'driver': 'zarr', 'kvstore': {'driver': 'ocdbt', 'base': f'file://{folder}/', 'path': f'{name}/'}}
    store = tensorstore.open(spec, open=True).result()
    result[name] = (tuple(store.shape), tuple(store.chunk_layout.read_chunk.shape or ()))
  return result


@pytest.mark.parametrize('scan_blocks, mesh', [(False, (1, 1, 1)), (True, (2, 2, 1))])
def test_stacked_blocks_are_chunked_by_layer_and_large_experts_by_expert(tmp_path, monkeypatch, scan_blocks, mesh):
  monkeypatch.setattr(layout, 'EXPERT_CHUNK_BYTES', 16 * 32 * 4)
  run, _, initialise = make(tmp_path, mesh=mesh, model=dict(scan_blocks=scan_blocks))
  checkpointer = Checkpointer(run)
  checkpointer.save(initialise(), {}, wait=True)
  for item in ('params', 'opt_state'):
    arrays = stored_arrays(checkpointer.directory / '0' / item)
    stacked = {name: shapes for name, shapes in arrays.items() if 'decoder.blocks.' in name}
    assert len(stacked) > 10 and not any('decoder.layers_' in name for name in arrays)
    for name, (shape, chunk) in stacked.items():
      assert shape[0] == run.model.num_blocks and chunk[0] == 1, (name, shape, chunk)
  arrays = stored_arrays(checkpointer.directory / '0' / 'params')
  shape, chunk = arrays['decoder.blocks.layers_1.mlp.expert.wi_0.kernel']
  assert shape == (2, 4, 16, 64) and chunk[:2] == (1, 1)
  shape, chunk = arrays['decoder.blocks.layers_1.mlp.router.router_weights.w.kernel']
  assert shape == (2, 16, 4) and chunk[0] == 1


def test_small_experts_share_a_chunk():
  assert layout.chunking('decoder/blocks/layers_1/mlp/expert/wo/kernel', (2, 4, 32, 16), jnp.float32).shard_axes == (0,)
  large = layout.chunking('decoder/blocks/layers_1/mlp/expert/wo/kernel', (2, 4, 1024, 256), jnp.float32)
  assert large.shard_axes == (0, 1)
  assert layout.chunking('token_embedder/embedding', (1 << 20, 1 << 10), jnp.float32).shard_axes == ()


def test_a_donated_state_is_saved_as_it_was(tmp_path):
  run, _, initialise = make(tmp_path, model=dict(vocab_size=16 * 1024, emb_dim=64, scan_blocks=True))
  state = initialise()
  increase = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)
  checkpointer = Checkpointer(run)
  for _ in range(3):
    kept = jax.tree.map(lambda x: np.array(x, copy=True), state.params)
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    checkpointer.save(state, {})
    for _ in range(5):
      state = increase(state)
    checkpointer.wait()
    assert_same(checkpointer.restore(template).state.params, kept)


def largest(folder):
  return max((f for f in folder.rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)


def flip(file):
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 0x10
  file.write_bytes(bytes(content))


DAMAGE = {
    'a flipped bit in an array': lambda step: flip(largest(step / 'params')),
    'an array file cut short': lambda step: largest(step / 'opt_state').write_bytes(b'\0' * 10),
    'an array file lost': lambda step: largest(step / 'params').unlink(),
    'optimizer state lost': lambda step: shutil.rmtree(step / 'opt_state'),
    'a flipped bit in a data position': lambda step: flip(step / 'data' / 'stream_00003'),
    'a data position lost': lambda step: (step / 'data' / 'stream_00003').unlink(),
    'config lost': lambda step: shutil.rmtree(step / 'config'),
    'config.json lost': lambda step: (step / 'config' / 'config.json').unlink(),
    'config.json cut short': lambda step: (step / 'config' / 'config.json').write_text('{"model": {'),
    'metadata emptied': lambda step: (step / 'params' / '_METADATA').write_text(''),
    'an empty folder': lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_a_damaged_newest_step_falls_back_and_says_so(saved, tmp_path, kind):
  run, template, states = copy(saved, tmp_path)
  DAMAGE[kind](pathlib.Path(run.model_dir) / 'checkpoints' / '3')
  checkpointer = Checkpointer(run)
  restored = checkpointer.restore(template, range(4))
  assert restored.step == 2 and list(restored.damaged) in ([3], []), restored
  assert_same(restored.state, states[2])
  if restored.damaged:  # an empty folder may not even count as a step
    assert restored.damaged[3]
    assert (pathlib.Path(run.model_dir) / 'damaged' / '3').exists()
  assert checkpointer.steps() == [1, 2]
  checkpointer.save(states[3], STREAMS, wait=True)  # the step that was damaged can be written again
  assert checkpointer.restore(template).step == 3


def test_a_step_damaged_twice_is_kept_twice(saved, tmp_path):
  run, template, states = copy(saved, tmp_path)
  for _ in range(2):
    (pathlib.Path(run.model_dir) / 'checkpoints' / '3' / 'config' / 'config.json').unlink()
    checkpointer = Checkpointer(run)
    assert checkpointer.restore(template).step == 2
    checkpointer.save(states[3], STREAMS, wait=True)
  assert sorted(p.name for p in (pathlib.Path(run.model_dir) / 'damaged').iterdir()) == ['3', '3_2']


def test_when_all_are_damaged_nothing_is_changed(saved, tmp_path):
  run, template, _ = copy(saved, tmp_path)
  folder = pathlib.Path(run.model_dir) / 'checkpoints'
  for step in (1, 2, 3):
    flip(largest(folder / str(step) / 'params'))
  with pytest.raises(CheckpointError, match='no checkpoint in .* can be read; nothing was changed'):
    Checkpointer(run).restore(template)
  assert {'1', '2', '3'} <= {p.name for p in folder.iterdir()}


@pytest.mark.parametrize('changes, message', [
    (dict(model=dict(emb_dim=32)), r'token_embedder/embedding: \[128, 16\] in the checkpoint, \[128, 32\] wanted'),
    (dict(model=dict(num_layers=6)), r'decoder/blocks/.*: \[2, .*\] in the checkpoint, \[3, .*\] wanted; .* more'),
    (dict(model=dict(num_experts=0)), 'decoder/blocks/.*: in the checkpoint only'),
    (dict(optimizer=dict(name='adamw')), 'opt_state.*not in the checkpoint'),
])
def test_another_models_shapes_are_an_error_by_name_and_never_skipped(saved, tmp_path, changes, message):
  run, _, _ = copy(saved, tmp_path)
  other, template, _ = make(tmp_path, **changes)
  checkpointer = Checkpointer(dataclasses.replace(other, model_dir=run.model_dir))
  with pytest.raises(ConfigError, match='holds (another model|the state of another optimizer)') as error:
    checkpointer.restore(template)
  assert re.search(message, str(error.value)), error.value
  assert checkpointer.steps() == [1, 2, 3]


def test_keeps_the_newest_and_the_periodic(tmp_path):
  run, _, initialise = make(tmp_path, checkpoint=dict(max_to_keep=2, keep_period=4))
  state = initialise()
  checkpointer = Checkpointer(run)
  for step in (2, 4, 6, 8, 10):
    checkpointer.save(at_step(state, step), {})
  checkpointer.close()
  assert checkpoints.finished_steps(checkpointer.directory) == [4, 8, 10]


def test_a_step_that_is_there_is_not_written_again(saved, tmp_path):
  run, template, states = copy(saved, tmp_path)
  checkpointer = Checkpointer(run)
  checkpointer.save(at_step(states[1], 3), {}, wait=True)
  assert_same(checkpointer.restore(template, [3]).state, states[3])


def test_a_write_that_fails_says_what_is_kept(saved, tmp_path, monkeypatch):
  run, template, states = copy(saved, tmp_path)
  checkpointer = Checkpointer(run)

  def full(self, directory, args):
    raise OSError(28, 'No space left on device')
  with monkeypatch.context() as patch:
    patch.setattr('openmoe_jax.checkpoint_files.FilesHandler.save', full)
    with pytest.raises(CheckpointError, match='step 4 .*the disk is full; the newest complete checkpoint is step 3'):
      checkpointer.save(at_step(states[1], 4), {0: b''}, wait=True)
  again = Checkpointer(run)
  assert again.restore(template).step == 3
  again.save(at_step(states[1], 4), {0: b''}, wait=True)
  assert again.restore(template).step == 4


@pytest.mark.parametrize('gathered', [False, True])
@pytest.mark.parametrize('file, shown', [('/x/orbax/checkpoint/serialization.py', False), ('/x/other.py', True)])
def test_echoes_of_a_failed_write_are_not_printed_as_tracebacks(saved, caplog, file, shown, gathered):
  """Orbax starts a task an array, awaits them all and raises the first failure; the others are never looked at."""
  Checkpointer(saved[0]).close()
  functions = {}
  exec(compile('async def write_fragment():\n  raise ValueError("No space left on device")', file, 'exec'), functions)

  async def main():
    write = functions['write_fragment']
    task = asyncio.gather(write(), write()) if gathered else asyncio.ensure_future(write())
    while not task.done():
      await asyncio.sleep(0)

  asyncio.run(main())
  gc.collect()
  assert any('never retrieved' in record.getMessage() for record in caplog.records) == shown


def test_load_gives_config_and_parameters_without_gin(saved):
  run, _, states = saved
  for name in ('', 'checkpoints', 'checkpoints/3'):
    model = loading.load(f'{run.model_dir}/{name}')
    assert model.config == run.model and model.step == 3
    assert_same(model.params, states[3].params)
  stacked = loading.load(run.model_dir, scan_blocks=True, dtype='bfloat16')
  assert stacked.config.dtype == 'bfloat16' and 'blocks' in stacked.params['decoder']
  with pytest.raises(ConfigError, match='holds no checkpoint'):
    loading.load('/nowhere/at/all')
  with pytest.raises(ConfigError, match='holds another model'):
    loading.load(run.model_dir, emb_dim=32)


def test_config_beside_a_step_describes_the_run(saved):
  run, _, _ = saved
  step = checkpoints.resolve(run.model_dir)
  assert json.loads((pathlib.Path(step) / 'config' / 'config.json').read_text())['model']['emb_dim'] == 16
  assert checkpoints.read_model_config(step) == run.model


def test_checksums_do_not_depend_on_sharding(tmp_path):
  _, _, one = make(tmp_path)
  run, _, eight = make(tmp_path, mesh=(2, 2, 2))
  assert layout.checksums(layout.to_disk(run.model, one().params)) == layout.checksums(
      layout.to_disk(run.model, eight().params))
