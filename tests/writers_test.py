"""Metric windows, history, progress line, TensorBoard and plots."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from openmoe_jax import history as history_lib
from openmoe_jax import progress as progress_lib
from openmoe_jax.analysis import plots
from openmoe_jax.history import History
from openmoe_jax.metric_window import MetricWindow, not_finite
from openmoe_jax.progress import Progress
from openmoe_jax.writers import Writers, scalars
import tiny_run


ROUTING = ('fraction_dropped_rank_0', 'fraction_dropped_rank_1', 'fraction_evicted', 'fraction_dropped_first_quarter',
           'fraction_dropped_last_quarter', 'router_entropy')


def metrics(step):
  rng = np.random.default_rng(step)
  load = rng.random((1, 4)).astype(np.float32)
  return {'loss': np.float32(rng.random()), 'cross_ent_loss': np.float32(5 / step), 'learning_rate': np.float32(step),
          'num_target_tokens': np.float32(100), 'expert_load': load / load.mean(), 'grad_norm': np.float32(1),
          'fraction_tokens_left_behind': np.float32(.25), 'expert_usage_per_layer': rng.random(1).astype(np.float32),
          **{name: np.float32(rng.random()) for name in ROUTING},
          'router_entropy_per_layer': rng.random(1).astype(np.float32)}


def test_a_window_goes_on_exactly_after_a_checkpoint():
  whole, first = MetricWindow(), MetricWindow()
  for step in range(1, 4):
    whole.add(metrics(step))
    first.add(metrics(step))
  second = MetricWindow(json.loads(json.dumps(first.state())))
  for step in range(4, 6):
    whole.add(metrics(step))
    second.add(metrics(step))
  assert len(second) == 5 and json.dumps(second.means()) == json.dumps(whole.means())
  assert second.means()['learning_rate'] == 5 and second.means()['target_tokens'] == 500
  second.restart()
  assert not len(second) and second.target_tokens == 500


def test_not_finite():
  assert not_finite({'loss': np.float32(1), 'grad_norm': np.float32(2)}) == ''
  assert not_finite({'loss': np.float32(1), 'grad_norm': np.float32(np.inf)}) == 'grad_norm'
  assert not_finite({'loss': np.float32(np.nan)}) == 'loss'


def test_history_drops_what_came_after_the_step_resumed_from(tmp_path):
  history = History(tmp_path)
  for step in (1, 2, 3):
    history.append({'kind': 'train', 'step': step, 'loss': np.float32(step) / 3})
  with (tmp_path / history_lib.FILE).open('a') as file:
    file.write('{"a": 1}\n5\n{"kind": "train", "st')  # what is no record; killed while writing
  with (tmp_path / history_lib.FILE).open('ab') as file:
    file.write(b'\xff\xfe\n')  # a damaged disk
  again = History(tmp_path)
  again.begin(2)
  again.append({'kind': 'eval', 'step': 2, 'loss': 1.})
  assert [(r['kind'], r['step']) for r in again.records()] == [('train', 1), ('train', 2), ('eval', 2)]
  assert np.float32(again.records('train')[0]['loss']) == np.float32(1) / 3
  assert [p.name for p in tmp_path.iterdir()] == [history_lib.FILE]
  silent = History(tmp_path / 'other', write=False)
  silent.append({'step': 1})
  silent.begin(0)
  assert not (tmp_path / 'other').exists()


def test_progress_line_and_plain_output():
  text = io.StringIO()
  progress = Progress(100, 4096, 1e9, None, console=Console(file=text, width=200))
  progress.clock.seconds_per_step = 2.
  with progress:
    progress.say('hello')
    progress.update(9, metrics(9), logged=False)
    progress.update(10, metrics(10), logged=True)
  lines = text.getvalue().splitlines()
  assert len(lines) == 2 and lines[0] == 'hello'
  assert lines[1].startswith('step  10/100  loss 0.') and lines[1].endswith(
      '2.05k tokens/s  2.05TFLOP/s  dropped 25.0%  ETA 3m00s')
  with_peak = Progress(100, 4096, 1e9, 8.192e12)
  with_peak.clock.seconds_per_step = 2.
  assert 'MFU 25.0%' in with_peak.line(10, metrics(10))


def test_progress_on_a_terminal_rewrites_one_line():
  text = io.StringIO()
  progress = Progress(100, 4096, console=Console(file=text, width=120, force_terminal=True))
  with progress:
    for step in range(1, 4):
      progress.update(step, metrics(step), logged=False)
    progress.say('a line that stays')
  assert 'a line that stays' in text.getvalue() and '\x1b[2K' in text.getvalue()


@pytest.mark.parametrize('value, text', [(12.345, '12.3'), (12345, '12.3k'), (999.9e3, '1M'), (.5, '0.5'), (3.1e12, '3.1T')])
def test_short_number(value, text):
  assert progress_lib.short_number(value) == text


def test_durations_and_peaks():
  assert [progress_lib.duration(s) for s in (5, 65, 3700, 90000)] == ['5s', '1m05s', '1h01m', '1d01h']
  assert progress_lib.peak_flops('TPU v5 lite', 4) == 4 * 197e12
  assert progress_lib.peak_flops('TPU v5', 1) == 459e12 and progress_lib.peak_flops('cpu', 1) is None


def test_scalars_have_layer_names():
  flat = scalars(metrics(1), tiny_run.MODEL)
  assert flat['expert_usage/layer_01'] and flat['expert_load/layer_01/max'] >= 1 >= flat['expert_load/layer_01/min']
  assert flat['expert_load/layer_01/expert_03'] > 0 and flat['loss'] < 1


def test_tensorboard_and_history_hold_the_same(tmp_path):
  writers = Writers(tmp_path, tiny_run.MODEL)
  record = metrics(3)
  writers.train(3, record)
  writers.evaluation(3, 'code', {'loss': 4., 'accuracy': .1, 'unigram_entropy': 6.})
  writers.text(3, {'config': 'x = 1'})
  writers.close()
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
  events = EventAccumulator(str(tmp_path / 'tensorboard'))
  events.Reload()
  tags = set(events.Tags()['tensors']) | set(events.Tags()['scalars'])
  assert {'train/loss', 'train/learning_rate', 'train/grad_norm', 'train/fraction_tokens_left_behind',
          'train/expert_load/layer_01/expert_00', 'expert_load/layer_01', 'eval/code/loss', 'config'} <= tags
  assert [r['kind'] for r in writers.history.records()] == ['train', 'eval']


def test_plots(tmp_path):
  history = History(tmp_path)
  assert plots.write_plots(tmp_path) == []
  for step in range(1, 40):
    history.append({'kind': 'train', 'step': step, 'tokens': step * 100, **metrics(step)})
    if step % 10 == 0:
      history.append({'kind': 'eval', 'step': step, 'tokens': step * 100, 'source': 'code', 'loss': 5., 'unigram_entropy': 6.})
  written = plots.write_plots(tmp_path, [1])
  assert [name.rpartition('/')[2] for name in written] == ['loss.png', 'expert_load.png', 'routing.png']
  import matplotlib.image
  for name in written:
    image = matplotlib.image.imread(name)
    assert image.shape[0] > 300 and image.shape[1] > 800 and image[..., :3].std() > .05


def test_plots_of_a_dense_model_have_no_load(tmp_path):
  History(tmp_path).append({'kind': 'train', 'step': 1, 'tokens': 10, 'cross_ent_loss': 3.})
  assert len(plots.write_plots(tmp_path)) == 1


def test_smoothing_keeps_ends_and_means():
  values = np.arange(10.)
  np.testing.assert_allclose(plots.smooth(values, 1), values)
  np.testing.assert_allclose(plots.smooth(values, 3)[1:-1], values[1:-1])
