"""openmoe-eval and what it is made of: log-likelihoods and answers are those of the model, results are kept, done work is
not done again, and several devices or processes change nothing."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import checkpoints, decoding, eval as eval_lib, evaluation as validation, loading, vocabulary
from openmoe_jax.analysis import plots, score_plots
from openmoe_jax.bigbench import lite
from openmoe_jax.config import ConfigError, DataConfig, EvalConfig, MeshConfig
from openmoe_jax.model import OpenMoE
from openmoe_jax.partitioning import make_mesh
from openmoe_jax.task_eval import bigbench_lite, programs, results, seqio_tasks, suite, tables
from openmoe_jax.task_eval.answers import Answer, Answerer
from openmoe_jax.tasks import evaluation
from tests import tiny_checkpoint, tiny_run
from tests.evaluation_tasks_test import BOOL, FILES, write

PROBLEMS = [json.loads(line) for line in
            (pathlib.Path(__file__).parent / 'data' / 'code_problems.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  return tiny_checkpoint.write(tmp_path_factory.mktemp('tiny') / 'run', steps=(3, 6), row_length=128)


@pytest.fixture(scope='module')
def model(checkpoint):
  return loading.load(checkpoint)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  texts = ['is it wet', 'is it', 'was that all of it so far', 'do they ever come back']
  return write(tmp_path_factory.mktemp('data'), {
      **FILES, 'bool_q/validation.jsonl': [{**BOOL, 'question': text, 'answer': bool(i % 2)} for i, text in enumerate(texts)],
      'lambada/test.jsonl': [{'text': text} for text in texts[1:]],
      'human_eval/train.jsonl': PROBLEMS})


@pytest.fixture(autouse=True)
def forget_folder():
  yield
  evaluation.configure('')


def settings(folder, **changes):
  return EvalConfig(**{'data_dir': str(folder), 'max_new_tokens': 8, **changes})


def questions(name, folder, **changes):
  evaluation.configure(folder)
  return seqio_tasks.read(name, settings(folder, **changes), DataConfig())


@functools.lru_cache(maxsize=None)
def forward(config):
  """Log-probabilities [128, V] of a row of 128 places by one plain forward pass."""
  def log_probs(params, tokens):
    batch = {'decoder_input_tokens': jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1], 'decoder_target_tokens': tokens}
    logits = OpenMoE(decoding.dropless(config)).apply({'params': params}, batch)
    return jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)[0])
  return jax.jit(log_probs)


def direct(model, prefix, target):
  """Log-likelihood of the target by a forward pass over the whole row."""
  tokens = np.zeros((1, 128), np.int32)
  tokens[0, :len(prefix) + len(target)] = [*prefix, *target]
  log_probs = np.asarray(forward(model.config)(model.params, tokens))
  return sum(float(log_probs[len(prefix) + i, token]) for i, token in enumerate(target))


# Answers.


@pytest.mark.slow
def test_log_likelihoods_are_those_of_a_forward_pass(model, folder):
  asked = questions('boolq', folder)
  found = seqio_tasks.evaluate(asked, Answerer(model, settings(folder)))
  for example, prediction in zip(asked.examples, found['predictions']):
    want = direct(model, example['inputs'].tolist(), example['targets'].tolist())
    assert prediction['log_likelihood'] == pytest.approx(want, abs=1e-5 * max(1, abs(want)))  # float32 sums
  assert set(found['figures']) >= {'accuracy', 'auc-pr'} and len(found['predictions']) == 8


def test_generated_answers_are_the_models(model, folder):
  asked = questions('lambada', folder)
  found = seqio_tasks.evaluate(asked, Answerer(model, settings(folder)))
  texts = [example['inputs_pretokenized'].decode() for example in asked.examples]
  assert [prediction['outputs'] for prediction in found['predictions']] == [[t] for t in model.generate(texts, 8)]
  assert found['figures'] == {'accuracy': 0.} and [p['target'] for p in found['predictions']] == ['it', 'far', 'back']


@pytest.mark.slow
def test_neither_batches_nor_neighbours_matter(model, folder):
  asked = questions('trivia_qa_v010_nocontext', folder)
  drawn = settings(folder, num_samples=3, temperature=1., seed=4)
  get = lambda s: seqio_tasks.evaluate(asked, Answerer(model, s))['predictions']
  assert get(drawn) == get(dataclasses.replace(drawn, batch_size=1))
  assert len(set(get(drawn)[0]['outputs'])) == 3
  scored = questions('arc', folder)
  values = [[p['log_likelihood'] for p in seqio_tasks.evaluate(scored, Answerer(model, settings(folder, batch_size=b)))
             ['predictions']] for b in (1, 16)]
  np.testing.assert_allclose(*values, rtol=0, atol=1e-5)


def test_long_questions(model, folder):
  refuse = Answerer(model, settings(folder, window=30))
  assert refuse.fit(range(1, 22), 8, 'x') == list(range(1, 22))
  with pytest.raises(ConfigError, match='a question of 22 tokens and an answer of 8 do not fit the window of 30'):
    refuse.fit(range(1, 23), 8, 'x')
  with pytest.raises(ConfigError, match='answers of 29 tokens leave no room'):
    refuse.fit([1], 29, 'x')
  for how, want in (('cut_left', list(range(4, 25))), ('cut_right', list(range(1, 22)))):
    cut = Answerer(model, settings(folder, window=30, long_prompts=how))
    assert cut.fit(range(1, 25), 8, 'x') == want and cut.cut == 1
  asked = questions('boolq', folder)
  with pytest.raises(ConfigError, match='boolq: a question of .* do not fit the window of 20'):
    seqio_tasks.evaluate(asked, Answerer(model, settings(folder, window=20)))
  cut = Answerer(model, settings(folder, window=20, long_prompts='cut_left'))
  seqio_tasks.evaluate(asked, cut)
  assert cut.cut == 8


def test_programs_are_run_only_if_allowed(model, folder, monkeypatch):
  asked = questions('humaneval', folder)
  gold = [[Answer([], '<extra_id_0> ' * (i % 2) + problem['canonical_solution'] + '\ndef other(): exit(1)'), Answer([], '')]
          for i, problem in enumerate(PROBLEMS)]
  answerer = Answerer(model, settings(folder, num_samples=2, temperature=1.))
  monkeypatch.setattr(answerer, 'generate', lambda *args, **kwargs: gold)
  assert set(seqio_tasks.evaluate(asked, answerer)['figures']) == {'exact_match'}
  found = seqio_tasks.evaluate(asked, answerer, allow_code_execution=True)
  assert found['figures']['pass@1'] == 50.
  assert [p['status'] for p in found['predictions']] == [['passed', 'failed']] * len(PROBLEMS)
  assert programs.completion('  return 1\nprint(2)') == '  return 1'


# BIG-bench-Lite, with made-up tasks under its names.


@pytest.fixture(scope='module')
def bigbench(tmp_path_factory):
  root = tmp_path_factory.mktemp('bigbench')
  for i, name in enumerate(lite.TASKS):
    document = {'name': name, 'metrics': ['multiple_choice_grade'], 'preferred_score': 'multiple_choice_grade',
                'examples': [{'input': f'{name} {j}?', 'target_scores': {'yes': j % 2, 'no': 1 - j % 2}} for j in range(4)]}
    if i < 2:
      document.update(metrics=['exact_str_match'], preferred_score='exact_str_match',
                      examples=[{'input': f'say {j}', 'target': [f'a{j}']} for j in range(4)])
    (root / name).mkdir()
    (root / name / 'task.json').write_text(json.dumps(document))
  return root


@pytest.mark.slow
def test_bigbench_lite(model, folder, bigbench):
  given = settings(folder, tasks=('bigbench_lite',), bigbench_data=str(bigbench), shots=1)
  tasks = bigbench_lite.read(given)
  assert bigbench_lite.count(tasks, given) == 2 * 4 + 22 * 4 * 2
  found = bigbench_lite.evaluate(tasks, Answerer(model, given))
  assert set(found['figures']) == {'normalised', *lite.TASKS} and len(found['predictions']) == 96
  choice = next(p for p in found['predictions'] if 'choices' in p)
  ids = [model.vocabulary.encode(text) for text in (choice['input'], *choice['choices'])]
  np.testing.assert_allclose(choice['response'], [direct(model, ids[0], target) for target in ids[1:]], rtol=1e-5)
  text = next(p for p in found['predictions'] if 'choices' not in p)
  assert model.generate([text['input']], 8)[0].startswith(text['response'][:1])


# The program.


def run(checkpoint, folder, out, *flags):
  eval_lib.main([f'--model_dir={checkpoint}', f'--gin.EvalConfig.data_dir={folder}', '--gin.EvalConfig.max_new_tokens=8',
                 f'--gin.EvalConfig.output_dir={out}', *flags])
  return json.loads((pathlib.Path(out) / 'results.json').read_text())


def test_from_checkpoint_to_table(checkpoint, folder, tmp_path, capsys):
  out = tmp_path / 'out'
  flags = ['--gin.EvalConfig.tasks=boolq,lambada', '--gin.EvalConfig.perplexity=demo_full_lm',
           '--gin.DataConfig.eval_batches=2']
  records = run(checkpoint, folder, out, *flags)
  assert [(r['task'], r['step'], r['tokens'], r['num_examples']) for r in records[:2]] == [
      ('boolq', 6, 6 * 8 * 128, 4), ('lambada', 6, 6 * 8 * 128, 3)]
  figures = records[2]['figures']
  assert figures['perplexity'] == pytest.approx(np.exp(figures['loss'])) and 7 < figures['loss'] < 12
  text = (out / 'results.md').read_text()
  assert '| boolq | accuracy |' in text and '| 57.80 | 66.00 | 61.20 |' in text and '# out, step 6' in text
  lines = (out / 'predictions' / '6' / 'boolq.jsonl').read_text().splitlines()
  assert len(lines) == 8 and json.loads(lines[0])['input'].startswith('Rain is water.')
  assert list((out / 'tensorboard').iterdir())
  capsys.readouterr()
  assert run(checkpoint, folder, out, *flags, '--gin.EvalConfig.batch_size=2') == records
  assert capsys.readouterr().out.count('done before') == 3
  again = run(checkpoint, folder, out, *flags, '--gin.EvalConfig.max_examples=2')
  assert again[0]['num_examples'] == 2 and 'done before' not in capsys.readouterr().out


@pytest.mark.slow  # loads four checkpoints
def test_every_checkpoint(checkpoint, folder, tmp_path):
  out = tmp_path / 'out'
  records = run(checkpoint, folder, out, '--gin.EvalConfig.tasks=arc', '--all_checkpoints')
  assert [r['step'] for r in records] == [3, 6] and (out / score_plots.STEPS_FILE).stat().st_size > 10_000
  assert '## By step' in (out / 'results.md').read_text()
  one = run(f'{checkpoint}/checkpoints/3', folder, tmp_path / 'one', '--gin.EvalConfig.tasks=arc')
  assert one[0]['figures'] == records[0]['figures'] and one[0]['step'] == 3


@pytest.mark.exhaustive
def test_a_mesh_and_int8(checkpoint, folder, tmp_path):
  flags = ['--gin.EvalConfig.tasks=boolq,lambada', '--gin.EvalConfig.perplexity=demo_full_lm',
           '--gin.DataConfig.eval_batches=1']
  one = run(checkpoint, folder, tmp_path / 'one', *flags)
  many = run(checkpoint, folder, tmp_path / 'many', *flags, '--gin.MeshConfig.expert=4', '--gin.MeshConfig.data=2')
  for a, b in zip(one, many):
    assert a['figures'] == pytest.approx(b['figures'], rel=1e-5), a['task']
  small = run(checkpoint, folder, tmp_path / 'int8', *flags, '--int8')
  assert small[2]['figures']['loss'] == pytest.approx(one[2]['figures']['loss'], abs=.01)
  assert small[2]['figures']['loss'] != one[2]['figures']['loss']


def test_perplexity_is_that_of_validation(checkpoint, model, tmp_path):
  from openmoe_jax.train_step import make_eval_step
  from openmoe_jax.config import RunConfig, from_dict
  run_config = from_dict(RunConfig, model.run)
  run_config = dataclasses.replace(run_config, model=decoding.dropless(model.config), data=dataclasses.replace(
      run_config.data, eval_mixture_or_task='demo_code_full_lm', eval_batches=1))
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  want = validation.Evaluator(run_config, mesh, make_eval_step(run_config.model, mesh=mesh))(model.params)
  got = run(checkpoint, '', tmp_path / 'out', '--gin.EvalConfig.perplexity=demo_code_full_lm', '--gin.EvalConfig.tasks=',
            '--gin.DataConfig.eval_batches=1')
  assert got[0]['figures']['loss'] == pytest.approx(want['demo_code_full_lm']['loss'], rel=1e-6)


@pytest.mark.parametrize('flags, message', (
    ([], 'nothing to evaluate'),
    (['--gin.EvalConfig.tasks=boolk'], 'did you mean boolq'),
    (['--gin.EvalConfig.tasks=boolq'], 'task boolq has no data: EvalConfig.data_dir is not set'),
    (['--gin.EvalConfig.tasks=boolq', '--gin.EvalConfig.data_dir=/nowhere'], "'/nowhere': no such folder"),
    (['--gin.EvalConfig.tasks=arc,arc'], 'names arc twice'),
    (['--gin.EvalConfig.tasks=bigbench_lite'], 'EvalConfig.bigbench_data is not set'),
    (['--gin.EvalConfig.tasks=demo_full_lm'], "EvalConfig.perplexity = ('demo_full_lm',) measures"),
    (['--gin.EvalConfig.perplexity=demo_ul2'], "demo_ul2 has the features 'inputs', 'targets'"),
    (['--gin.EvalConfig.tasks=arc', '--gin.TrainConfig.train_steps=3'], 'TrainConfig.train_steps has no effect'),
    (['--gin.EvalConfig.tasks=arc', '--gin.ModelConfig.emb_dim=3'], 'ModelConfig.emb_dim: the model is that of the'),
    (['--gin.EvalConfig.long_prompts=cut'], 'refuse'),
    (['--gin.EvalConfig.num_samples=2'], 'num_samples = 2 with temperature = 0'),
    (['--gin.EvalConfig.window=100'], 'leaves no room for a question'),
    (['--gin.EvalConfig.capacity_mode=some'], 'capacity_mode'),
    (['--gin.EvalConfig.taks=arc'], "no setting 'taks'; did you mean tasks"),
    (['--gin.EvalConfig.tasks=arc', '--gin.DataConfig.vocabulary=/nowhere.model'], '/nowhere.model'),
    (['--gin.EvalConfig.tasks=arc', '--gin.DataConfig.extra_ids=600', '--gin.EvalConfig.data_dir=DATA'], 'has 8792 ids'),
    (['--gin.EvalConfig.tasks=arc', '--gin.EvalConfig.data_dir=DATA', '--gin.EvalConfig.window=30',
      '--gin.EvalConfig.max_new_tokens=8'], 'arc: a question of')))
def test_mistakes_are_one_line(checkpoint, folder, tmp_path, capsys, flags, message):
  flags = [flag.replace('DATA', str(folder)) for flag in flags]
  with pytest.raises(SystemExit):
    eval_lib.main([f'--model_dir={checkpoint}', f'--gin.EvalConfig.output_dir={tmp_path}/out', *flags])
  said = capsys.readouterr().err
  assert message in said and said.count('\n') == 1 and not list((tmp_path / 'out').glob('results/*/*'))
  vocabulary.configure()


def test_folders_that_do_not_fit(checkpoint, folder, tmp_path, capsys):
  with pytest.raises(SystemExit):
    eval_lib.main(['--gin.EvalConfig.tasks=arc'])
  assert 'no model: give --model_dir=DIR' in capsys.readouterr().err
  with pytest.raises(SystemExit):
    eval_lib.main([f'--model_dir={tmp_path}/none', '--gin.EvalConfig.tasks=arc'])
  assert f'{tmp_path}/none' in capsys.readouterr().err
  run(checkpoint, folder, tmp_path / 'out', '--gin.EvalConfig.tasks=arc')
  other = tiny_checkpoint.write(tmp_path / 'other', steps=(1,))
  with pytest.raises(SystemExit):
    run(other, folder, tmp_path / 'out', '--gin.EvalConfig.tasks=arc')
  assert 'holds results of another model' in capsys.readouterr().err


def test_print_config(capsys):
  eval_lib.main(['--print_config', '--gin.EvalConfig.tasks=arc'])
  assert "EvalConfig.tasks = ('arc',)" in capsys.readouterr().out


# Tables and pictures.


def record(task, figures, step=6, tokens=10**9, **more):
  return {'task': task, 'step': step, 'tokens': tokens, 'figures': figures, 'num_examples': 1234, 'num_cut': 0,
          'seconds': 2., 'settings': {'shots': 3}, **more}


def test_tables():
  scores = {name: float(i) for i, name in enumerate(lite.TASKS)}
  text = tables.markdown([record('bigbench_lite', {'normalised': 5.5, **scores}, num_cut=3),
                          record('humaneval', {'exact_match': 0., 'pass@1': 9.5})], 'mine')
  assert '| bigbench_lite | normalised | 5.50 | 1,234 (3 cut) |' in text and '| winowhy | 23.00 | 4.69 | 5.27 |' in text
  row = next(line for line in text.splitlines() if line.startswith('| humaneval | pass@1'))
  assert '| 9.50 | 1,234 |' in row and '| 10.30 |' in row
  assert tables.line(record('humaneval', {'exact_match': 0., 'pass@1': 9.5})) == (
      'humaneval: pass@1 9.5, exact_match 0 (1,234 questions, 2 s)')


def test_published_figures_agree_with_their_mean():
  """Table 14 against the averages that the paper gives."""
  from openmoe_jax.task_eval import published
  for name, mean in published.BIGBENCH_LITE.items():
    scores = [scores[name] for scores in published.bigbench_tasks().values()]
    assert len(scores) == 24 and np.mean(scores) == pytest.approx(mean, abs=.025), name  # 6.91 against 6.93


def test_pictures(tmp_path):
  from openmoe_jax.task_eval.published import PublishedModel
  figure = score_plots.cost_figure([PublishedModel('mine', 3., 1e9, 2e9, 1e11)])
  axes, = figure.axes
  assert {text.get_text() for text in axes.texts} >= {'BIG-G 8B', 'BIG-G-sparse 8B', 'GPT-3 6B', 'OpenMoE-8B', 'mine'}
  offsets = np.concatenate([c.get_offsets() for c in axes.collections])
  assert offsets[:, 0].min() == pytest.approx(1.)  # relative to the cheapest, which is ours here
  assert plots.write_figure(figure, tmp_path / 'a.png') and (tmp_path / 'a.png').stat().st_size > 10_000
  assert score_plots.steps_figure([record('arc', {'accuracy': 1.})]) is None
  two = [record('arc', {'accuracy': float(s)}, step=s, tokens=None) for s in (3, 6)]
  assert score_plots.steps_figure(two).axes[0].get_xlabel() == 'steps'


def test_results_of_several_steps_and_settings(tmp_path):
  store = results.Results(tmp_path, {'checkpoint': 'a'})
  what = results.settings_of(settings('x'), dtype='float32')
  store.add(3, 5, suite.Result('perplexity of a b', {'perplexity': 2.}, [], 7, 0, 1.), what)
  assert store.find(3, 'perplexity of a b', what)['figures'] == {'perplexity': 2.}
  assert store.find(3, 'perplexity of a b', {**what, 'seed': 9}) is None and store.find(4, 'perplexity of a b', what) is None
  assert results.settings_of(settings('x', batch_size=3), dtype='float32') == what
  assert results.settings_of(settings('x', batch_size=3, capacity_mode='t5x')) != results.settings_of(
      settings('x', capacity_mode='t5x'))


# Two processes.


def one_of_two(port, process, checkpoint, folder, out):
  """What each process runs, with two devices of its own."""
  eval_lib.main([
      f'--model_dir={checkpoint}', f'--gin.EvalConfig.data_dir={folder}', '--gin.EvalConfig.max_new_tokens=8',
      f'--gin.EvalConfig.output_dir={out}', '--gin.EvalConfig.tasks=boolq,lambada',
      '--gin.EvalConfig.perplexity=demo_code_full_lm', '--gin.DataConfig.eval_batches=1',
      f'--coordinator_address=localhost:{port}', '--num_processes=2', f'--process_id={process}',
      '--gin.MeshConfig.expert=2'])


@pytest.mark.exhaustive
def test_two_processes_equal_one_device(checkpoint, folder, tmp_path):
  port = tiny_run.free_port()
  code = 'import sys; from tests.eval_test import one_of_two; one_of_two(*sys.argv[1:])'
  logs = [tmp_path / f'{i}.log' for i in range(2)]
  processes = [subprocess.Popen([sys.executable, '-c', code, str(port), str(i), checkpoint, str(folder),
                                 str(tmp_path / 'two')], stdout=log.open('w'), stderr=subprocess.STDOUT,
                                env=tiny_run.environment(devices=2)) for i, log in enumerate(logs)]
  try:
    for process, log in zip(processes, logs):
      assert process.wait(400) == 0, log.read_text()
  finally:
    for process in processes:
      process.kill()
  one = run(checkpoint, folder, tmp_path / 'one', '--gin.EvalConfig.tasks=boolq,lambada',
            '--gin.EvalConfig.perplexity=demo_code_full_lm', '--gin.DataConfig.eval_batches=1')
  two = json.loads((tmp_path / 'two' / 'results.json').read_text())
  for a, b in zip(one, two):
    assert a['figures'] == pytest.approx(b['figures'], rel=1e-5), a['task']
  read = lambda name: [json.loads(line) for line in
                       (tmp_path / name / 'predictions' / '6' / 'lambada.jsonl').read_text().splitlines()]
  assert read('one') == read('two')
