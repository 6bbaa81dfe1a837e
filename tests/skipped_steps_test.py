"""Steps whose loss or gradients are not finite: nothing of them stays but the position in the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax.config import OptimizerConfig
from openmoe_jax.names import from_t5x_names
from openmoe_jax.optimizers import make_optimizer
from openmoe_jax.progress import Progress
from openmoe_jax.schedules import learning_rate_schedule
from openmoe_jax.train_state import TrainState, init_train_state
from openmoe_jax.train_step import make_train_step
from openmoe_jax.training_loop import TrainingError, TrainingLoop
from tests import numpy_reference, tiny_run

MODEL = tiny_run.MODEL.replace(vocab_size=32, emb_dim=8, mlp_dim=8, num_heads=1, head_dim=4, num_layers=1, moe_interval=1,
                               group_size=16, attention_query_blocks=1, loss_chunk_tokens=32, router='sigmoid',
                               aux_loss_factor=0.)


def make_batch(seed, weight=1.):
  target = np.random.RandomState(seed).randint(1, MODEL.vocab_size, (4, 8)).astype(np.int32)
  weights = np.ones((4, 8), np.float32)
  weights[2, 3] = weight
  return {'decoder_input_tokens': np.pad(target[:, :-1], ((0, 0), (1, 0))), 'decoder_target_tokens': target,
          'decoder_loss_weights': weights}


@pytest.mark.slow
@pytest.mark.parametrize('name, bad', (('adafactor', np.nan), ('adamw', np.inf)))
def test_a_skipped_step_leaves_no_trace(name, bad):
  """The state after good, bad, bad, good is that after good, good, bit for bit, moments and router biases included."""
  config = OptimizerConfig(name=name, learning_rate=.1, schedule='constant * linear_warmup', warmup_steps=8)
  optimizer, schedule = make_optimizer(config, 10), learning_rate_schedule(config, 10)
  params = from_t5x_names(MODEL, {n: jnp.asarray(x) for n, x in numpy_reference.random_params(MODEL, 0).items()})
  first = init_train_state(MODEL, optimizer, params)
  step = make_train_step(MODEL, optimizer, schedule=schedule).lower(first, make_batch(0)).compile()

  def after(*batches):
    state, metrics = init_train_state(MODEL, optimizer, params), []
    for batch in batches:
      state, values = step(state, batch)
      metrics.append(jax.device_get(values))
    return jax.device_get(state), metrics

  expected, metrics = after(make_batch(0), make_batch(1))
  state, with_bad = after(make_batch(0), make_batch(2, bad), make_batch(3, bad), make_batch(1))
  assert [m['skipped'] for m in metrics] == [0, 0] and [m['skipped'] for m in with_bad] == [0, 1, 1, 0]
  assert int(expected.step) == 2 and int(state.step) == 4
  jax.tree.map(np.testing.assert_array_equal, state.replace(step=expected.step), expected)
  for good, among_bad in zip(metrics, (with_bad[0], with_bad[3])):  # the learning rate too: it follows the updates
    jax.tree.map(np.testing.assert_array_equal, among_bad, good)
  assert metrics[0]['learning_rate'] < metrics[1]['learning_rate'] and not np.isfinite(with_bad[1]['loss'])
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), expected.params, jax.device_get(params))
  assert all(jax.tree.leaves(changed)) and np.any(expected.router_state['bias'])


class Recorder:
  """Stands for streams, writers and checkpoints: notes what the loop gives it."""

  def __init__(self, batches):
    self.batches, self.position, self.records, self.saved, self.warnings = batches, 0, [], {}, []

  def __next__(self):
    self.position += 1
    return self.batches[self.position - 1]

  def state(self):
    return self.position

  def train(self, step, record):
    self.records.append((step, record))

  def warning(self, step, text):
    self.warnings.append((step, text))

  def save(self, state, data_state, progress, wait=False):
    self.saved[int(state.step)] = (data_state, progress)

  def steps(self):
    return sorted(self.saved)

  def check(self):
    pass

  def flush(self):
    pass


def fake_step(state, batch):
  """A batch is the loss it has."""
  loss = batch['loss'][0, 0]
  finite = np.isfinite(loss)
  return TrainState(step=state.step + 1, params={}, opt_state=(), router_state={}), {
      'loss': loss, 'grad_norm': loss, 'param_norm': batch['param_norm'][0, 0], 'num_target_tokens': np.float32(10),
      'skipped': np.float32(not finite)}


NAN, INF = float('nan'), float('inf')


def train(losses, first=0, saved={}, norms=None, **settings):
  """Runs the loop over batches with these losses; returns what was noted, what was printed, and the error or None."""
  batches = [{'loss': np.full((1, 1), x, np.float32), 'param_norm': np.full((1, 1), n, np.float32)}
             for x, n in zip(losses, norms or [1.] * len(losses))]
  run = tiny_run.tiny_run('unused', data=dict(eval_split=''), checkpoint=dict(period=1),
                          train=dict(dict(train_steps=len(losses), log_period=2, eval_period=0), **settings))
  noted, said = Recorder(batches), []
  noted.position = first
  progress = Progress(len(losses), 1, show=False)
  progress.say = said.append
  loop = TrainingLoop(run, fake_step, noted, lambda batch: batch, lambda params: {}, noted, noted, progress)
  state = TrainState(step=first, params={}, opt_state=(), router_state={})
  try:
    loop.run(state, saved)
    error = None
  except TrainingError as raised:
    error = str(raised)
  return noted, [line for line in said if 'compil' not in line], error


def test_skipped_steps_are_counted_said_once_and_left_out_of_means():
  noted, said, error = train([4., NAN, INF, NAN, 2., 6.])
  assert error is None
  assert said == ['step 2: loss is nan; the step is skipped, parameters and optimizer stay as they are',
                  'step 5: finite again after 3 skipped steps; 3 since the run began']
  assert [step for step, _ in noted.warnings] == [2, 5]
  records = dict(noted.records)
  assert records[2]['loss'] == 4 and records[6]['loss'] == 4 and 'loss' not in records[4]
  assert [records[step]['skipped_steps'] for step in (2, 4, 6)] == [1, 3, 3]
  assert [len(records[step]['batch_hashes']) for step in (2, 4, 6)] == [2, 2, 2]  # the data go on


def test_no_checkpoint_is_made_of_the_steps_before_the_end():
  """They would push out the one that is worth going on from; the position that is saved is after the skipped batches."""
  noted, _, _ = train([4., NAN, NAN, NAN, 2., 6.])
  assert sorted(noted.saved) == [1, 5, 6] and noted.saved[5][0] == 5


@pytest.mark.parametrize('settings, stops', ((dict(max_skipped_steps=3), 5), (dict(max_skipped_steps=1), 2),
                                             (dict(max_skipped_steps=4), None),
                                             (dict(max_skipped_steps=1, stop_on_nan=False), None)))
def test_the_run_ends_after_so_many_in_a_row(settings, stops):
  noted, _, error = train([4., NAN, 3., INF, NAN, NAN, 1., 1.] if stops != 5 else [4., 3., NAN, INF, NAN, 1., 1., 1.],
                          **settings)
  if stops is None:
    assert error is None and max(noted.saved) == 8
    return
  row = settings['max_skipped_steps']
  assert f'loss is nan at step {stops} (skipped; {row} such in a row): training stopped' in error
  assert f'Checkpoint {stops - row} is kept' in error and max(noted.saved) == stops - row


def test_the_row_goes_on_after_a_restart():
  noted, _, _ = train([4., NAN, NAN], max_skipped_steps=3)
  position, progress = noted.saved[3]  # the end of a run is always saved
  assert position == 3
  _, said, error = train([4., NAN, NAN, NAN, 1.], first=3, saved=progress, max_skipped_steps=3)
  assert 'at step 4 (skipped; 3 such in a row)' in error and not said


def test_parameters_that_are_not_finite_end_the_run_whatever_the_settings():
  for loss in (1., NAN):
    _, _, error = train([4., 4., loss, 4.], norms=[1., 1., INF, 1.], stop_on_nan=False)
    assert 'param_norm is inf at step 3: training stopped' in error


def test_a_spike_is_warned_of_in_every_place_and_remembered():
  losses = [2., 2.1] * 20 + [9., 9.] + [2.] * 3
  noted, said, error = train(losses, log_period=10)
  assert error is None
  line = 'loss spike: 9 is 139.0 standard deviations above 2.05, the mean of the 40 steps before'
  assert noted.warnings == [(41, line)] and said == [f'step 41: {line}']
  position, progress = noted.saved[41]
  assert progress['loss_spikes']['spiking'] and len(progress['loss_spikes']['losses']) == 41
  assert not train(losses, first=position, saved=progress, log_period=10)[0].warnings  # the same episode
