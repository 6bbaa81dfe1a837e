"""The training program: a run from beginning to end, going on with it, and every mistake in one line."""

import contextlib
import dataclasses
import io
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

from openmoe_jax import checkpoints, loading, train as train_lib
from openmoe_jax.checkpoints import CheckpointError
from openmoe_jax.config import ConfigError
from openmoe_jax.training_loop import TrainingError
import tiny_run

MESH = dict(data=4, expert=2)


@pytest.fixture(scope='module', autouse=True)
def compiled_programs_are_kept(tmp_path_factory):
  """These tests build the same few programs again and again."""
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  old = {name: getattr(jax.config, name) for name in names}
  jax.config.update(names[0], str(tmp_path_factory.mktemp('cache')))
  jax.config.update(names[1], .05)
  yield
  for name, value in old.items():
    jax.config.update(name, value)


def run_train(run):
  """Trains and returns what was printed."""
  text = io.StringIO()
  with contextlib.redirect_stdout(text):
    train_lib.train(run)
  return text.getvalue()


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run of 12 steps on 8 devices that was not interrupted."""
  run = tiny_run.tiny_run(tmp_path_factory.mktemp('finished') / 'run', mesh=MESH, checkpoint=dict(period=5, max_to_keep=0))
  return run, run_train(run)


def test_a_run_leaves_everything_behind(finished):
  run, text = finished
  folder = pathlib.Path(run.model_dir)
  assert {'config.json', 'checkpoints', 'metrics.jsonl', 'tensorboard', 'loss.png', 'expert_load.png', 'routing.png'} == {
      p.name for p in folder.iterdir() if not p.name.startswith('.')}
  assert checkpoints.finished_steps(folder / 'checkpoints') == [5, 10, 12]
  records = tiny_run.curve(folder)
  assert [(r['kind'], r['step']) for r in records] == [
      ('train', 2), ('train', 4), ('train', 6), ('eval', 6), ('train', 8), ('train', 10), ('train', 12), ('eval', 12)]
  last = records[-2]
  assert last['tokens'] == 12 * 8 * 32 and 0 < last['target_tokens'] <= last['tokens']
  for name in ('loss', 'cross_ent_loss', 'z_loss', 'auxiliary_loss', 'router_z_loss', 'accuracy', 'grad_norm',
               'param_norm', 'learning_rate', 'fraction_tokens_left_behind', 'router_confidence', 'expert_usage'):
    assert np.isfinite(last[name]), name
  assert np.shape(last['expert_load']) == (1, 4) and abs(np.mean(last['expert_load']) - 1) < 1e-5
  assert records[-1]['loss'] < records[3]['loss'] < 9.2 and 2 < records[-1]['unigram_entropy'] < 6
  assert 'step 12/12  loss ' in text and 'tokens/s' in text and 'validation at step 12: tiny_task loss' in text


def test_the_saved_model_is_the_trained_one(finished):
  run, _ = finished
  model = loading.load(run.model_dir)
  assert model.config == run.model and model.step == 12
  assert model.vocabulary.vocab_size <= run.model.vocab_size


@pytest.mark.slow
def test_a_finished_run_has_nothing_to_do_and_extends(finished, tmp_path):
  run, _ = finished
  short = dataclasses.replace(tiny_run.tiny_run(tmp_path / 'run', mesh=MESH, train=dict(train_steps=7)))
  run_train(short)
  before = tiny_run.curve(tmp_path / 'run')
  assert 'nothing to train' in run_train(short)
  assert tiny_run.curve(tmp_path / 'run') == before
  longer = tiny_run.tiny_run(tmp_path / 'run', mesh=MESH)
  text = run_train(longer)
  assert 'resuming from checkpoint 7' in text and 'train.train_steps: 7 -> 12' in text
  whole = [r for r in tiny_run.curve(run.model_dir)]
  extended = [r for r in tiny_run.curve(tmp_path / 'run') if r['step'] != 7]  # the end of the shorter run
  assert extended == whole


@pytest.mark.slow
def test_goes_on_on_another_mesh_and_layout(finished, tmp_path):
  run, _ = finished
  first = tiny_run.tiny_run(tmp_path / 'run', mesh=MESH, train=dict(train_steps=6))
  run_train(first)
  other = tiny_run.tiny_run(tmp_path / 'run', mesh=dict(data=2, expert=2, model=2), model=dict(scan_blocks=True))
  text = run_train(other)
  assert 'resuming from checkpoint 6' in text and 'mesh.model: 1 -> 2' in text
  for ours, theirs in zip(tiny_run.curve(tmp_path / 'run'), tiny_run.curve(run.model_dir)):
    assert (ours['kind'], ours['step']) == (theirs['kind'], theirs['step'])
    np.testing.assert_allclose(ours['loss'], theirs['loss'], rtol=2e-5)


@pytest.mark.slow
def test_warm_start(finished, tmp_path):
  run, _ = finished
  trained = loading.load(run.model_dir)
  settings = dict(initial_checkpoint_path=run.model_dir, period=0)
  text = run_train(tiny_run.tiny_run(tmp_path / 'params', mesh=MESH, train=dict(train_steps=1), checkpoint=settings))
  assert 'warm start: parameters of' in text and 'beginning at step 0' in text
  full = tiny_run.tiny_run(tmp_path / 'full', mesh=MESH, train=dict(train_steps=13),
                           checkpoint=dict(settings, restore='full'))
  assert 'beginning at step 12' in run_train(full)
  reset = tiny_run.tiny_run(tmp_path / 'reset', mesh=MESH, train=dict(train_steps=1),
                            checkpoint=dict(settings, restore='full', reset_step=True))
  assert 'beginning at step 0' in run_train(reset)
  norm = lambda model_dir: tiny_run.curve(model_dir)[0]['param_norm']
  expected = float(np.sqrt(sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(trained.params))))
  for name in ('params', 'full', 'reset'):
    np.testing.assert_allclose(norm(tmp_path / name), expected, rtol=1e-5)
  again = dataclasses.replace(full, checkpoint=dataclasses.replace(full.checkpoint, initial_checkpoint_path='/gone'))
  assert 'resuming from checkpoint 13' in run_train(again)  # model_dir's own checkpoint wins
  with pytest.raises(ConfigError, match='holds another model'):
    run_train(tiny_run.tiny_run(tmp_path / 'wide', mesh=MESH, model=dict(emb_dim=64), checkpoint=settings))
  with pytest.raises(ConfigError, match='/nowhere holds no checkpoint'):
    run_train(tiny_run.tiny_run(tmp_path / 'none', mesh=MESH, checkpoint=dict(initial_checkpoint_path='/nowhere')))


def test_another_models_model_dir_is_refused(finished):
  run, _ = finished
  wide = tiny_run.tiny_run(run.model_dir, mesh=MESH, model=dict(emb_dim=64))
  with pytest.raises(ConfigError, match='model.emb_dim was 32, is 64'):
    run_train(wide)
  allowed = dataclasses.replace(wide, checkpoint=dataclasses.replace(wide.checkpoint, allow_setting_changes=True))
  with pytest.raises(ConfigError, match='holds another model: token_embedder/embedding: .8576, 32. in the checkpoint'):
    run_train(allowed)
  assert checkpoints.finished_steps(pathlib.Path(run.model_dir) / 'checkpoints') == [5, 10, 12]


@pytest.mark.slow
def test_changed_data_starts_the_streams_anew(finished, tmp_path):
  run_train(tiny_run.tiny_run(tmp_path, mesh=MESH, train=dict(train_steps=2)))
  changed = tiny_run.tiny_run(tmp_path, mesh=MESH, data=dict(seed=5), train=dict(train_steps=4))
  with pytest.raises(ConfigError, match='data.seed was 0, is 5'):
    run_train(changed)
  text = run_train(dataclasses.replace(changed, checkpoint=dataclasses.replace(changed.checkpoint,
                                                                               allow_setting_changes=True)))
  assert 'every data stream begins anew' in text and 'step 4/4' in text


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_and_the_data_go_on(finished, tmp_path, monkeypatch):
  """In a whole run: the same batches as of the undisturbed one, the same numbers before, others after."""
  make = train_lib.make_train_step

  def make_with_a_bad_step(*args, **kwargs):
    step = make(*args, **kwargs)

    def call(state, batch):
      bad = int(state.step) == 6
      weights = batch['decoder_loss_weights'] * (np.float32(np.nan) if bad else np.float32(1))
      return step(state, {**batch, 'decoder_loss_weights': weights})
    return call

  monkeypatch.setattr(train_lib, 'make_train_step', make_with_a_bad_step)
  run = tiny_run.tiny_run(tmp_path, mesh=MESH, checkpoint=dict(period=7))
  text = run_train(run)
  assert 'step 7: loss is nan; the step is skipped' in text and 'step 8: finite again after 1 skipped steps' in text
  assert checkpoints.finished_steps(tmp_path / 'checkpoints') == [12]
  train = lambda model_dir: {r['step']: r for r in tiny_run.curve(model_dir) if r['kind'] == 'train'}
  ours, undisturbed = train(tmp_path), train(finished[0].model_dir)
  assert [ours[step]['skipped_steps'] for step in sorted(ours)] == [0, 0, 0, 1, 1, 1]
  assert [r['batch_hashes'] for r in ours.values()] == [r['batch_hashes'] for r in undisturbed.values()]
  same = [abs(ours[step]['loss'] / undisturbed[step]['loss'] - 1) < 1e-6 for step in sorted(ours)]
  assert same == [True, True, True, False, False, False] and np.isfinite(ours[12]['loss'])


@pytest.mark.slow
def test_nan_stops_with_a_clear_message_and_keeps_the_checkpoint(tmp_path):
  run = tiny_run.tiny_run(tmp_path, mesh=MESH, checkpoint=dict(period=1),
                          optimizer=dict(name='adamw', schedule='constant', learning_rate=1e30))
  with pytest.raises(TrainingError, match=r'(loss|grad_norm|param_norm) is (nan|inf) at step \d+.*Checkpoint \d+ is kept'
                     ) as error:
    run_train(run)
  assert '--replay_step=' in str(error.value)
  assert checkpoints.finished_steps(tmp_path / 'checkpoints')


@pytest.mark.slow
def test_replay_shows_batch_loss_and_routing(finished, tmp_path):
  from openmoe_jax.replay import replay
  run = tiny_run.tiny_run(tmp_path, mesh=MESH, train=dict(train_steps=6, log_period=1),
                          checkpoint=dict(period=5, max_to_keep=0))
  run_train(run)
  logged = [r for r in tiny_run.curve(tmp_path) if r['kind'] == 'train' and r['step'] == 6][0]
  text = replay(run, 6)
  assert 'with the parameters of checkpoint 5, the very ones of this step' in text
  loss = float(text.split('  loss ')[1].split()[0])
  np.testing.assert_allclose(loss, logged['loss'], rtol=1e-5)
  assert 'microbatch 0 row 7' in text and 'layer 1: expert load' in text and 'experts of the first tokens' in text
  assert 'def' in text or 'return' in text or 'object' in text
  first = replay(run, 1)
  assert 'random parameters that a new run begins with' in first
  logged = [r for r in tiny_run.curve(tmp_path) if r['step'] == 1][0]
  np.testing.assert_allclose(float(first.split('  loss ')[1].split()[0]), logged['loss'], rtol=1e-5)
  assert 'checkpoint 5, the nearest that is kept' in replay(run, 3)


@pytest.mark.exhaustive
def test_replay_after_a_warm_start_and_after_changed_data(finished, tmp_path):
  """Neither begins with step 1 and the first batch."""
  from openmoe_jax.replay import replay
  run, _ = finished
  loss_of = lambda text: float(text.split('  loss ')[1].split()[0])
  settings = dict(period=2, max_to_keep=0, initial_checkpoint_path=run.model_dir, restore='full')
  warm = tiny_run.tiny_run(tmp_path, mesh=MESH, train=dict(train_steps=16, log_period=1), checkpoint=settings)
  run_train(warm)
  logged = lambda: {r['step']: r['loss'] for r in tiny_run.curve(tmp_path) if r['kind'] == 'train'}
  assert sorted(logged()) == [13, 14, 15, 16]
  np.testing.assert_allclose(loss_of(replay(warm, 15)), logged()[15], rtol=1e-5)
  first = replay(warm, 13)  # there is no checkpoint before it
  assert 'step 13' in first and 'checkpoint 14, the nearest' in first
  with pytest.raises(ConfigError, match='began after step 12'):
    replay(warm, 12)
  changed = tiny_run.tiny_run(tmp_path, mesh=MESH, data=dict(seed=5), train=dict(train_steps=20, log_period=1),
                              checkpoint=dict(settings, allow_setting_changes=True))
  run_train(changed)
  np.testing.assert_allclose(loss_of(replay(changed, 19)), logged()[19], rtol=1e-5)
  shutil.rmtree(tmp_path / 'checkpoints' / '18' / 'params')
  with pytest.raises(CheckpointError, match='checkpoint 18 cannot be read'):
    replay(changed, 19)


@pytest.mark.slow
def test_an_update_that_breaks_down_is_not_saved(tmp_path):
  """The loss of a step is of the parameters before it: a good loss says nothing about what is saved after it."""
  run = tiny_run.tiny_run(tmp_path, mesh=MESH, checkpoint=dict(period=1), train=dict(train_steps=3),
                          optimizer=dict(schedule='constant', learning_rate=1e38, clipping_threshold=0.))
  with pytest.raises(TrainingError, match='not finite at step 1.*There is no checkpoint yet'):
    run_train(run)
  assert not checkpoints.finished_steps(tmp_path / 'checkpoints')


@pytest.mark.slow
def test_an_evaluation_that_fails_loses_no_steps(tmp_path, monkeypatch):
  from openmoe_jax.evaluation import Evaluator
  run = tiny_run.tiny_run(tmp_path, mesh=MESH, checkpoint=dict(period=0), train=dict(train_steps=3, eval_period=0))
  with monkeypatch.context() as patch:
    def fail(self, params):
      raise OSError('the disk of the validation data is gone')
    patch.setattr(Evaluator, '__call__', fail)
    with pytest.raises(OSError):
      run_train(run)
  assert checkpoints.finished_steps(tmp_path / 'checkpoints') == [3]


def test_validation_data_that_cannot_be_read_are_noticed_before_any_step(tmp_path):
  run = tiny_run.tiny_run(tmp_path / 'run', mesh=MESH, data=dict(mixture_or_task='tiny_broken_validation'))
  with pytest.raises(ConfigError, match='data of tiny_broken_validation cannot be read'):
    run_train(run)
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_without_evaluation(tmp_path):
  run = tiny_run.tiny_run(tmp_path / 'run', mesh=MESH, data=dict(eval_split=''), train=dict(train_steps=2))
  run_train(run)
  assert {r['kind'] for r in tiny_run.curve(tmp_path / 'run')} == {'train'}


def test_an_accelerator_asked_for_in_the_environment_and_not_there(tmp_path):
  gin_file = tmp_path / 'run.gin'
  gin_file.write_text(tiny_run.gin_text(tiny_run.tiny_run(tmp_path / 'run')))
  done = tiny_run.run_process(gin_file, JAX_PLATFORMS='cuda')
  assert done.returncode == 2 and "JAX_PLATFORMS = 'cuda' was asked for" in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1, done.stderr


MISTAKES = [
    ('--gin.DataConfig.mixture_or_task=tiny_tusk', 'tiny_tusk.*did you mean tiny_task'),
    ('--gin.DataConfig.vocabulary=/no/such.model', '/no/such.model.*no such file'),
    ('--gin.ModelConfig.vocab_size=1000', 'must be at least 84'),
    ('--gin.MeshConfig.data=3', 'there are 8'),
    ('--gin.MeshConfig.platform=tpu', "platform = 'tpu' was asked for"),
    ('--gin.ModelConfig.num_experts=3 --gin.MeshConfig.expert=2', 'num_experts = 3 must be a multiple'),
    ('--gin.DataConfig.batch_size=4', 'rows of a microbatch must be a multiple'),
    ('--gin.DataConfig.batch_size=6', 'batch_size = 6 must be a multiple'),
    ('--gin.ModelConfig.emb_dims=4', "no setting 'emb_dims'.*did you mean emb_dim"),
    ('--gin.ModelConfig.moe_interval=3', 'moe_interval = 3 must divide'),
    ('--num_processes=2', 'give all three or none'),
    ('--replay_step=0', 'the first step is 1'),
    ('--replay_step=1000000000', 'the first step is 1, the last one 12'),
    ('--gin.ModelConfig.num_expert_replicas=999999', 'num_expert_replicas = 999999 asks for at least'),
    ('--gin.TrainConfig.train_steps=1e999', 'train_steps = inf must be an integer'),
    ('--gin.DataConfig.task_feature_lengths=targets:16,targets:32', 'must be a dictionary'),
    ('--model_dir=/dev/null/run', 'cannot be (used|written to)'),
    ('--unknown_flag', 'unknown_flag'),
    ('--model_dir=', 'model_dir is empty'),
]


@pytest.mark.parametrize('flags, message', MISTAKES)
def test_mistakes_end_in_one_line_before_any_compile(tmp_path, capsys, monkeypatch, flags, message):
  gin_file = tmp_path / 'run.gin'
  gin_file.write_text(tiny_run.gin_text(tiny_run.tiny_run(tmp_path / 'run')))
  monkeypatch.setattr(sys, 'argv', ['openmoe-train'])
  with pytest.raises(SystemExit) as end:
    train_lib.main([f'--gin_file={gin_file}', *flags.split()])
  err = capsys.readouterr().err
  assert end.value.code == 2 and len(err.strip().splitlines()) == 1, err
  import re
  assert re.search(message, err), err
  assert not (tmp_path / 'run').exists()


def test_no_room_is_noticed_before_any_compile(tmp_path, monkeypatch):
  monkeypatch.setattr('openmoe_jax.paths.free_bytes', lambda directory: 1000)
  with pytest.raises(ConfigError, match='has 1000 bytes left; one checkpoint needs'):
    run_train(tiny_run.tiny_run(tmp_path / 'run', mesh=MESH))


def test_print_config_shows_every_setting_and_runs_nothing(tmp_path, capsys):
  gin_file = tmp_path / 'run.gin'
  gin_file.write_text(tiny_run.gin_text(tiny_run.tiny_run(tmp_path / 'run')))
  train_lib.main([f'--gin_file={gin_file}', '--gin.ModelConfig.emb_dim=64', '--print_config'])
  text = capsys.readouterr().out
  for line in ('ModelConfig.emb_dim', "'tiny_task'", 'TrainConfig.stop_on_nan', 'CheckpointConfig.keep_period'):
    assert line in text
  assert not (tmp_path / 'run').exists()


def test_main_gives_one_line_for_a_checkpoint_that_cannot_be_written(tmp_path, capsys, monkeypatch):
  gin_file = tmp_path / 'run.gin'
  gin_file.write_text(tiny_run.gin_text(tiny_run.tiny_run(tmp_path / 'run')))
  full = OSError(28, 'No space left on device', str(tmp_path / 'run' / 'metrics.jsonl'))
  gone = FileNotFoundError(2, 'No such file or directory', str(tmp_path / 'run' / 'metrics.jsonl'))
  for error, part in ((CheckpointError('checkpoint of step 3 could not be written'), 'of step 3'), (full, 'Make room'),
                      (OSError(28, 'No space left on device'), 'Make room'), (gone, 'moved or removed')):
    def fail(*unused_args, error=error):
      raise error
    monkeypatch.setattr(train_lib, 'train', fail)
    with pytest.raises(SystemExit) as end:
      train_lib.main([f'--gin_file={gin_file}'])
    err = capsys.readouterr().err
    assert end.value.code == 1 and len(err.strip().splitlines()) == 1 and part in err
