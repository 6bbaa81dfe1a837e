"""Our checkpoints read and written a layer at a time: Orbax reads what we write, and we read what Orbax wrote."""

import dataclasses
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from openmoe_jax import checkpoints, loading, names
from openmoe_jax.checkpoints import Checkpointer
from openmoe_jax.config import ConfigError, RunConfig, from_dict
from openmoe_jax.convert import tensors as tensors_lib
from openmoe_jax.convert.orbax import OrbaxSink, OrbaxSource
from openmoe_jax.convert.tensors import PARAMS, SLOTS
from openmoe_jax.convert.transfer import read_all, transfer
from openmoe_jax.optimizers import make_optimizer
from openmoe_jax.partitioning import make_mesh
from openmoe_jax.train import born_sharded
import tiny_run

SILENT = lambda text: None
MODEL = dict(vocab_size=128, emb_dim=16, mlp_dim=32, num_layers=4)


def save(folder, **changes):
  """A run with a saved step 7 of random numbers; (run, state)."""
  run = tiny_run.tiny_run(folder, model={**MODEL, **changes.pop('model', {})}, **changes)
  template, _ = born_sharded(run, make_optimizer(run.optimizer, 100), make_mesh(run.mesh, jax.devices()[:1]))
  rng = np.random.default_rng(0)
  number = lambda x: (rng.standard_normal(x.shape).astype(x.dtype) if x.dtype == np.float32 else
                      np.full(x.shape, 7, x.dtype))
  state = jax.tree.map(lambda x: jax.device_put(number(x), x.sharding), template)
  checkpointer = Checkpointer(run)
  checkpointer.save(state, {i: b'' for i in range(4)}, wait=True)
  checkpointer.close()
  return run, state, template


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  return save(tmp_path_factory.mktemp('saved') / 'run')


def test_reads_what_orbax_wrote(saved):
  run, state, _ = saved
  source = OrbaxSource(run.model_dir)
  assert source.step == 7 and source.model == run.model
  flat = names.to_t5x_names(run.model, jax.device_get(state.params))
  _, slots = names.adafactor_to_t5x(run.model, 7, jax.device_get(state.opt_state.stats))
  wanted = {**{PARAMS + n: x for n, x in flat.items()},
            **{SLOTS + n: x for n, x in slots.items() if np.shape(x) != (1,)}}
  assert source.tensors.keys() == wanted.keys()
  for name, x in wanted.items():
    np.testing.assert_array_equal(source.read(name), x, err_msg=name)
    assert source.tensors[name].shape == x.shape
    if x.ndim == 2:
      np.testing.assert_array_equal(source.read(name, 1, 1, 3), x[:, 1:3])
  read_all(source, say=SILENT)
  assert not any(n.startswith(SLOTS) for n in OrbaxSource(run.model_dir, with_state=False).tensors)


@pytest.mark.parametrize('changes', [{}, pytest.param(dict(model=dict(
    num_layers=6, moe_interval=3, mlp_dim=160, emb_dim=144)), marks=pytest.mark.slow), dict(model=dict(num_experts=0, moe_interval=1))])
def test_orbax_reads_what_we_wrote(tmp_path, monkeypatch, changes):
  run, state, template = save(tmp_path / 'run', **changes)
  source = OrbaxSource(run.model_dir)
  monkeypatch.setattr(tensors_lib, 'PART_BYTES', 3000)  # many parts, the last one shorter
  transfer(source, OrbaxSink(run, source.step), tmp_path / 'out', say=SILENT)
  copy = dataclasses.replace(run, model_dir=str(tmp_path / 'out'))
  restored = Checkpointer(copy).restore(template, with_data=False)
  assert restored.step == 7 and not restored.damaged
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), restored.state, state)
  again = OrbaxSource(tmp_path / 'out')
  assert again.tensors.keys() == source.tensors.keys()
  read_all(again, say=SILENT)


@pytest.mark.slow
def test_a_run_goes_on_from_a_converted_checkpoint(tmp_path):
  """Parameters, optimizer state and step: two more steps give the very numbers of a warm start from the original."""
  ends = {}
  first = tiny_run.tiny_run(tmp_path / 'first', train=dict(train_steps=3, log_period=1, eval_period=0))
  gin = tmp_path / 'run.gin'
  gin.write_text(tiny_run.gin_text(first))
  done = tiny_run.run_process(gin)
  assert done.returncode == 0, done.stderr
  source = OrbaxSource(tmp_path / 'first')
  transfer(source, OrbaxSink(from_dict(RunConfig, dict(source.run)), source.step), tmp_path / 'converted', say=SILENT)
  for start in ('first', 'converted'):
    run = tiny_run.tiny_run(tmp_path / f'from_{start}', train=dict(train_steps=5, log_period=1, eval_period=0),
                            checkpoint=dict(initial_checkpoint_path=str(tmp_path / start), restore='full'))
    gin.write_text(tiny_run.gin_text(run))
    done = tiny_run.run_process(gin)
    assert done.returncode == 0 and 'beginning at step 3' in done.stdout, done.stderr
    ends[start] = tiny_run.curve(tmp_path / f'from_{start}')
  assert ends['first'] == ends['converted'] and len(ends['first']) > 2


def test_bfloat16_parameters_load_as_float32(saved, tmp_path):
  run, state, _ = saved
  source = OrbaxSource(run.model_dir, with_state=False)
  transfer(source, OrbaxSink(run, source.step), tmp_path / 'out', dtype=ml_dtypes.bfloat16, say=SILENT)
  loaded = loading.load(tmp_path / 'out')  # checks the checksums
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(
      np.asarray(a), np.asarray(b).astype(ml_dtypes.bfloat16).astype(np.float32)), loaded.params, state.params)
  assert OrbaxSource(tmp_path / 'out').tensors[PARAMS + 'token_embedder/embedding'].dtype == ml_dtypes.bfloat16


def test_expert_chunks_are_read_alone(saved):
  """A layer's tensor is read without the other layers of its stack."""
  source = OrbaxSource(saved[0].model_dir)
  info = source.tensors[PARAMS + 'decoder/layers_3/mlp/expert/wi_0/kernel']
  assert info.chunk == info.shape == (4, 16, 64)


def damage(run, tmp_path, change):
  shutil.copytree(run.model_dir, tmp_path / 'copy')
  step = tmp_path / 'copy' / 'checkpoints' / '7'
  change(step)
  with pytest.raises(ConfigError) as error:
    transfer(OrbaxSource(tmp_path / 'copy'), OrbaxSink(run, 7), tmp_path / 'out', say=SILENT)
  assert not (tmp_path / 'out').exists() and '\n' not in str(error.value)
  return str(error.value)


def test_a_cut_file_of_orbax(saved, tmp_path):
  def cut(step):
    largest = max((f for f in (step / 'params').rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:largest.stat().st_size // 2])
  text = damage(saved[0], tmp_path, cut)
  assert 'cannot be read' in text or 'cannot be opened' in text


def test_changed_numbers_are_noticed_by_their_checksum(saved, tmp_path):
  def change(step):
    file = step / 'config' / 'progress.json'
    progress = json.loads(file.read_text())
    progress['checksums']['params']['decoder/logits_dense/kernel'] += 1
    file.write_text(json.dumps(progress))
    sums = step / 'config' / 'checksums_0.json'
    import zlib
    sums.write_text(json.dumps({**json.loads(sums.read_text()), 'progress.json': zlib.crc32(file.read_bytes())}))
  text = damage(saved[0], tmp_path, change)
  assert 'params/decoder/logits_dense/kernel does not have the checksum' in text


def test_a_missing_chunk_of_a_converted_checkpoint_is_noticed(saved, tmp_path):
  run = saved[0]
  transfer(OrbaxSource(run.model_dir), OrbaxSink(run, 7), tmp_path / 'first', say=SILENT)
  next((tmp_path / 'first' / 'checkpoints' / '7' / 'params' / 'decoder.logits_dense.kernel').glob('[0-9]*')).unlink()
  with pytest.raises(ConfigError, match='logits_dense/kernel'):
    transfer(OrbaxSource(tmp_path / 'first'), OrbaxSink(run, 7), tmp_path / 'out', say=SILENT)


@pytest.mark.parametrize('missing', ['config/config.json', 'config/progress.json', 'params'])
def test_an_incomplete_step_is_refused(saved, tmp_path, missing):
  def remove(step):
    path = step / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  text = damage(saved[0], tmp_path, remove)
  assert 'checkpoint' in text or 'cannot be opened' in text


def test_no_checkpoint(tmp_path):
  with pytest.raises(ConfigError, match='holds no checkpoint'):
    OrbaxSource(tmp_path)


def test_other_optimizers_state_is_left_behind(tmp_path):
  run, _, _ = save(tmp_path / 'run', optimizer=dict(name='adamw'))
  source = OrbaxSource(run.model_dir)
  assert source.has_other_state and not any(n.startswith(SLOTS) for n in source.tensors)


def test_the_layout_of_a_step_is_orbaxs(saved, tmp_path):
  """File by file what Orbax writes, but for its own caches of metadata, and arrays in folders instead of a database."""
  run = saved[0]
  transfer(OrbaxSource(run.model_dir), OrbaxSink(run, 7), tmp_path / 'out', say=SILENT)
  ours, theirs = (pathlib.Path(p) / 'checkpoints' / '7' for p in (tmp_path / 'out', run.model_dir))
  index = lambda step, item: json.loads((step / item / '_METADATA').read_text())['tree_metadata']
  for item in ('params', 'opt_state'):
    assert index(ours, item) == index(theirs, item)
  handlers = lambda step: json.loads((step / '_CHECKPOINT_METADATA').read_text())['item_handlers']
  assert handlers(ours).items() <= handlers(theirs).items()
  assert checkpoints.finished_steps(tmp_path / 'out' / 'checkpoints') == [7]
