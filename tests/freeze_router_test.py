"""tools/freeze_router: the table is the router's mean choice, and training goes on from it."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import checkpoints, data, loading, vocabulary
from openmoe_jax.attention import make_logit_mask
from openmoe_jax.model import OpenMoE
from openmoe_jax.names import from_t5x_names
from openmoe_jax.optimizers import make_optimizer
from openmoe_jax.partitioning import make_mesh
from openmoe_jax.routers import hashing
from openmoe_jax.tools import freeze_router
from openmoe_jax.train import born_sharded, train
from openmoe_jax.train_state import init_train_state
from openmoe_jax.train_step import make_train_step
from tests import numpy_reference, tiny_run

pytestmark = pytest.mark.slow  # many programs are compiled, or processes started

SETTINGS = dict(model=dict(emb_dim=8, mlp_dim=8, head_dim=4), data=dict(eval_split=''), checkpoint=dict(period=0),
                train=dict(train_steps=4, num_microbatches=2, plots=False))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A checkpoint of step 2 with random parameters, and what the tool made of it: run, frozen run's folder, output."""
  folder = tmp_path_factory.mktemp('freeze')
  run = tiny_run.tiny_run(folder / 'run', **SETTINGS)
  vocabulary.configure(run.data.vocabulary, run.data.extra_ids)
  params = jax.tree.map(jnp.asarray, from_t5x_names(run.model, numpy_reference.random_params(run.model, 0)))
  state = init_train_state(run.model, make_optimizer(run.optimizer, run.train.train_steps), params)
  streams = data.TrainStreams(run.data)
  streams.skip(2)
  checkpointer = checkpoints.Checkpointer(run)
  checkpointer.save(state.replace(step=jnp.int32(2)), streams.state(), {'window': {}}, wait=True)
  checkpointer.close()
  return run, str(folder / 'frozen')


@pytest.fixture(scope='module')
def output(made):
  run, out = made
  return freeze_router.freeze(freeze_router_args(run.model_dir, out))


def freeze_router_args(checkpoint, out, batches=3):
  return argparse.Namespace(checkpoint=checkpoint, out=out, batches=batches)


def test_table_against_a_loop_over_tokens(made, output):
  run, out = made
  streams = data.TrainStreams(run.data)
  streams.skip(2)
  model = loading.load(run.model_dir)
  record = jax.jit(lambda p, b: OpenMoE(run.model, record_routing=True).apply({'params': p}, b, method='features')[2])
  sums, seen = np.zeros((run.model.vocab_size, 4)), np.zeros(run.model.vocab_size, int)
  for _ in range(3):
    batch = {name: x.reshape(-1, x.shape[-1]) for name, x in next(streams).items()}
    ids, real = batch['decoder_input_tokens'].reshape(-1), np.asarray(make_logit_mask(batch['decoder_input_tokens']))
    probs = np.asarray(jax.nn.softmax(record(model.params, batch).router_logits[0])).reshape(-1, 4)
    for token, p, counts in zip(ids, probs, real.reshape(-1)):
      if counts:
        sums[token] += p
        seen[token] += 1
  frozen = loading.load(out)
  table = np.asarray(frozen.router_state['experts'])[0]
  want = np.argsort(-sums, axis=1)[:, :2]
  np.testing.assert_array_equal(table[seen > 0], want[seen > 0])
  by_hash = np.asarray(hashing.experts_of(run.model, jnp.arange(run.model.vocab_size)))
  np.testing.assert_array_equal(table[seen == 0], by_hash[seen == 0])
  assert f'{seen.sum()} tokens of {(seen > 0).sum()} different ids' in output
  share = float(output.split('layer 1: ')[1].split('%')[0])
  assert 60 < share <= 100  # an untrained router sees little but the token
  assert frozen.config == run.model.replace(router='frozen') and frozen.step == 2
  jax.tree.map(np.testing.assert_array_equal, frozen.params, model.params)


def test_training_goes_on_by_the_table(made, output):
  run, out = made
  run = dataclasses.replace(run, model_dir=out, model=run.model.replace(router='frozen'))
  optimizer = make_optimizer(run.optimizer, run.train.train_steps)
  template, _ = born_sharded(run, optimizer, make_mesh(run.mesh, jax.devices()[:1]))
  checkpointer = checkpoints.Checkpointer(run)
  restored = checkpointer.restore(template, range(run.data.num_streams))
  checkpointer.close()
  streams = data.TrainStreams(run.data, run.train.num_microbatches)
  streams.restore(restored.data_state)
  assert streams.position == restored.step == 2
  before, batch = jax.device_get(restored.state), next(streams)
  state = restored.state
  step = make_train_step(run.model, optimizer, 2).lower(state, batch).compile()
  after = jax.device_get(step(state, batch)[0])
  assert after.step == 3
  np.testing.assert_array_equal(after.router_state['experts'], before.router_state['experts'])
  kernel = lambda state: state.params['decoder']['layers_1']['mlp']['router']['router_weights']['w']['kernel']
  assert (kernel(after) != kernel(before)).any()  # gates learn
  ids = np.random.RandomState(0).randint(1, 500, (1, 32)).astype(np.int32)
  rows = {'decoder_input_tokens': ids, 'decoder_target_tokens': ids}
  record = jax.jit(lambda v: OpenMoE(run.model, record_routing=True).apply(v, rows, method='features')[2])(after.variables)
  np.testing.assert_array_equal(np.asarray(record.assignment.expert_index).reshape(1, 32, 2),
                                after.router_state['experts'][0][ids])


@pytest.mark.parametrize('changes, message', (
    (dict(checkpoint='nowhere'), 'nowhere holds no checkpoint'),
    (dict(batches=0), '--batches=0 must be at least 1'),
    (dict(out='run'), 'holds checkpoints already; give a new folder'),
    (dict(checkpoint='frozen'), "has the router 'frozen'; what can be frozen is 'top_k' and 'switch'")))
def test_mistakes_are_one_line(made, output, changes, message, capsys, tmp_path):
  run, out = made
  places = {'nowhere': 'nowhere', 'run': run.model_dir, 'frozen': out}
  arguments = {'checkpoint': run.model_dir, 'out': str(tmp_path / 'new'), 'batches': 3,
               **{name: places.get(value, value) for name, value in changes.items()}}
  with pytest.raises(SystemExit) as stop:
    freeze_router.main([arguments['checkpoint'], arguments['out'], f'--batches={arguments["batches"]}'])
  text = capsys.readouterr().err
  assert stop.value.code == 2 and message in text and text.count('\n') == 1


@pytest.mark.parametrize('source', ('', 'run'))
def test_a_frozen_router_does_not_start_without_a_table(made, source, tmp_path):
  run, _ = made
  frozen = tiny_run.tiny_run(tmp_path / 'new', **{
      **SETTINGS, 'train': dict(num_microbatches=1, plots=False), 'model': {**SETTINGS['model'], 'router': 'frozen'},
      'checkpoint': dict(initial_checkpoint_path=source and run.model_dir)})
  with pytest.raises(checkpoints.ConfigError, match='openmoe_jax.tools.freeze_router CHECKPOINT OUT makes'):
    train(frozen)
