"""openmoe-lm-eval as a user calls it: tasks in local files, the paper's group on its data sets' layouts, mistakes."""

import functools
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests import tiny_harness  # first: skips without lm-eval
import lm_eval.tasks

from openmoe_jax import lm_harness, lm_harness_tasks, loading
from tests.tiny_harness import model

pytestmark = pytest.mark.lm_eval

CHOICE = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/choice.jsonl}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
doc_to_choice: "{{{{options}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ANSWER = """task: tiny_answer
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/answer.jsonl}}}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["{stop}"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
ROLLING = """task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/rolling.jsonl}}}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""
LAST_WORD = """task: tiny_last_word
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/rolling.jsonl}}}}
output_type: loglikelihood
validation_split: validation
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' ' + text.split(' ')[-1]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
QUESTIONS = ('def main(', 'x =', 'import os\n\nprint(os.')
OPTIONS = (['self):', 'args):', '1):'], [' x', ' y'], ['path)', 'name)'])
TEXTS = ('def main(args): return args', 'class A: pass')  # shorter than the window
STOP = 'zq'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  return tiny_harness.save(tmp_path_factory.mktemp('checkpoint') / 'run')


@pytest.fixture(scope='module', autouse=True)
def known_tasks():
  """lm-eval reads its thousands of task files once, not for every test."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(lm_eval.tasks, 'TaskManager', functools.lru_cache(lm_eval.tasks.TaskManager))
    yield


@pytest.fixture(scope='module')
def local(tmp_path_factory):
  """A folder of three tasks and their data; half of the answers are what the model says."""
  folder = tmp_path_factory.mktemp('tasks')
  said = model().generate(QUESTIONS[:2], 8, batch_size=2)
  write(folder / 'choice.jsonl', [{'question': q, 'options': o, 'answer': i % 2}
                                  for i, (q, o) in enumerate(zip(QUESTIONS, OPTIONS))])
  write(folder / 'answer.jsonl', [{'question': QUESTIONS[0], 'answer': said[0]},
                                  {'question': QUESTIONS[1], 'answer': said[1] + '?'}])
  write(folder / 'rolling.jsonl', [{'text': text} for text in TEXTS])
  for name, text in (('choice', CHOICE), ('answer', ANSWER), ('rolling', ROLLING), ('last_word', LAST_WORD)):
    (folder / f'{name}.yaml').write_text(text.format(folder=folder, stop=STOP))
  (folder / 'both.yaml').write_text('group: tiny_both\ntask: [tiny_choice, tiny_rolling]\n')
  return folder


def write(file, records):
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(''.join(json.dumps(record) + '\n' for record in records))


def run(capsys, *args):
  """What the program prints; results.json and results.md if it has --output."""
  lm_harness.main([str(arg) for arg in args])
  return capsys.readouterr().out


def refused(capsys, *args):
  """The one line on stderr of a call that ends with status 2."""
  with pytest.raises(SystemExit) as caught:
    lm_harness.main([str(arg) for arg in args])
  out, err = capsys.readouterr()
  lines = [line for line in err.splitlines() if ': error: ' in line]
  assert caught.value.code == 2 and out == '' and len(lines) == 1 and err.endswith(lines[0] + '\n'), (out, err)
  return lines[0]


@pytest.mark.filterwarnings('error:os.fork')  # lm-eval draws samples for the error of a perplexity
def test_four_kinds_of_tasks_in_local_files(checkpoint, local, tmp_path, capsys):
  files = ','.join(str(local / f'{name}.yaml') for name in ('choice', 'answer', 'rolling', 'last_word'))
  out = tmp_path / 'a' / 'out'
  table = run(capsys, checkpoint, '--tasks', files, '--output', out, '--log_samples', '--batch_size=2')
  results = json.loads((out / 'results.json').read_text())

  log_probs = [model().score([q] * len(o), o).log_probs for q, o in zip(QUESTIONS, OPTIONS)]
  right = np.mean([scores.argmax() == i % 2 for i, scores in enumerate(log_probs)])
  assert results['results']['tiny_choice']['acc,none'] == pytest.approx(right)
  assert results['results']['tiny_answer']['exact_match,none'] == 0.5
  total = model().score([''] * 2, TEXTS).log_probs.sum()
  rolling = results['results']['tiny_rolling']
  assert rolling['word_perplexity,none'] == pytest.approx(math.exp(-total / len(' '.join(TEXTS).split())), rel=1e-5)
  assert rolling['bits_per_byte,none'] == pytest.approx(-total / sum(map(len, TEXTS)) / math.log(2), rel=1e-5)

  word, cut = results['results']['tiny_last_word'], [text.rindex(' ') for text in TEXTS]
  last = model().score([text[:at] for text, at in zip(TEXTS, cut)], [text[at:] for text, at in zip(TEXTS, cut)])
  assert word['perplexity,none'] == pytest.approx(math.exp(-last.log_probs.mean()), rel=1e-5)
  assert word['acc,none'] == last.greedy.mean() and word['perplexity_stderr,none'] > 0

  config = results['config']
  assert (config['checkpoint'], config['window'], config['model_step']) == (checkpoint, tiny_harness.WINDOW, 0)
  assert config['truncated_contexts'] == {}
  assert (out / 'results.md').read_text().rstrip() in table and '|tiny_choice' in table and 'n-shot' in table
  samples = [json.loads(line) for line in (out / 'samples_tiny_choice.jsonl').read_text().splitlines()]
  got = [float(response[0][0]) for sample in samples for response in sample['resps']]
  np.testing.assert_allclose(got, np.concatenate(log_probs), rtol=0, atol=1e-5)
  assert sorted(path.name for path in out.iterdir()) == ['results.json', 'results.md'] + [
      f'samples_tiny_{name}.jsonl' for name in ('answer', 'choice', 'last_word', 'rolling')]


def test_a_folder_of_tasks_and_settings(checkpoint, local, tmp_path, capsys):
  out = tmp_path / 'out'
  table = run(capsys, checkpoint, '--tasks=tiny_cho*,tiny_answer', '--include_path', local, '--output', out,
              '--limit=1', '--gen_kwargs=max_gen_toks=3', '--num_fewshot=1',
              '--seed=3', '--window=48', '--batch_size=2')
  results = json.loads((out / 'results.json').read_text())
  assert {name: counts['effective'] for name, counts in results['n-samples'].items()} == {
      'tiny_choice': 1, 'tiny_answer': 1}
  assert results['configs']['tiny_answer']['generation_kwargs'] == {
      'until': [STOP], 'max_gen_toks': 3, 'do_sample': False}
  assert results['n-shot'] == {'tiny_choice': 1, 'tiny_answer': 1} and results['config']['fewshot_seed'] == 3
  assert results['config']['window'] == 48 and 'paper' not in table
  assert sorted(path.name for path in out.iterdir()) == ['results.json', 'results.md']


def test_a_cache_belongs_to_one_model(checkpoint, local, tmp_path, capsys, monkeypatch):
  flags = ('--tasks', local / 'choice.yaml', '--use_cache', tmp_path / 'cache', '--batch_size=2')
  table = run(capsys, checkpoint, *flags)
  other = tiny_harness.save(tmp_path / 'other', seed=1)
  run(capsys, other, *flags)
  assert len(list(tmp_path.glob('cache.*_rank0.db'))) == 2
  monkeypatch.setattr('openmoe_jax.scoring.score', None)
  assert run(capsys, checkpoint, *flags) == table


RECORDS = {
    'anli': {'premise': 'a dog runs.', 'hypothesis': 'an animal runs.', 'label': 0},
    'hellaswag': {'ctx_a': 'A man sits.', 'ctx_b': 'he', 'activity_label': 'Sitting', 'label': '1',
                  'endings': ['flies.', 'stands up.', 'is a tree.', 'sings.']},
    'winogrande': {'sentence': 'The cup fell and _ broke.', 'option1': 'the cup', 'option2': 'the sky', 'answer': '1'},
    'piqa': {'goal': 'boil water', 'sol1': 'heat it', 'sol2': 'cool it', 'label': 0},
    'arc': {'question': 'What is hot?', 'choices': {'text': ['ice', 'fire'], 'label': ['A', 'B']}, 'answerKey': 'B'},
    'boolq': {'passage': 'Ice is cold.', 'question': 'is ice cold', 'label': 1},
    'truthfulqa_mc2': {'question': 'Is it so?', 'mc1_targets': {'choices': ['yes', 'no'], 'labels': [1, 0]},
                       'mc2_targets': {'choices': ['yes', 'no', 'it is'], 'labels': [1, 0, 1]}},
    'openbookqa': {'question_stem': 'Fire is', 'choices': {'text': ['hot', 'cold'], 'label': ['A', 'B']},
                   'answerKey': 'A'},
    'rte': {'sentence1': 'a dog runs.', 'sentence2': 'an animal runs.', 'label': 0},
    'wic': {'sentence1': 'a bank of sand', 'sentence2': 'a bank of money', 'start1': 2, 'end1': 6, 'label': 0},
}
SPLITS = {'anli': 'test_r{}', 'arc': 'test', 'openbookqa': 'test'}


def test_the_papers_group_on_local_data(checkpoint, tmp_path, capsys):
  for task in lm_harness_tasks.PAPER:
    kind = task if task in RECORDS else task.split('_')[0]
    split = SPLITS.get(kind, 'validation').format(task[-1])
    write(tmp_path / 'data' / task / f'{split}.jsonl', [RECORDS[kind]] * 2)
  out = tmp_path / 'out'
  table = run(capsys, checkpoint, '--tasks=openmoe_13', '--data_dir', tmp_path / 'data', '--output', out,
              '--window=512', '--batch_size=4')
  results = json.loads((out / 'results.json').read_text())
  accuracies = [results['results'][task]['acc,none'] for task in lm_harness_tasks.PAPER]
  assert len(accuracies) == 13 and results['groups']['openmoe_13']['acc,none'] == pytest.approx(np.mean(accuracies))
  assert all(results['n-samples'][task]['effective'] == 2 for task in lm_harness_tasks.PAPER)
  piqa = model().score(['Question: boil water\nAnswer:'] * 2, [' heat it', ' cool it']).log_probs.argmax() == 0
  assert results['results']['piqa']['acc,none'] == piqa
  rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in table[table.index('| accuracy'):].splitlines()
          if line.startswith('| ')]
  assert rows[0][2] == 'OpenMoE-8B (paper)' and len(rows) == 1 + 13 + 1
  assert rows[6] == ['PIQA', f'{100 * piqa:.1f}', '74.2', '77.0', '73.3']
  assert rows[-1] == ['average', f'{100 * np.mean(accuracies):.1f}', '46.1', '48.7', '45.9']


def test_published_averages():
  for column, average in enumerate(lm_harness_tasks.AVERAGE[1:], 1):
    assert np.mean([row[column] for row in lm_harness_tasks.PAPER.values()]) == pytest.approx(average, abs=0.1)


def test_names_and_data_that_are_not_there(checkpoint, local, tmp_path, capsys, monkeypatch):
  (tmp_path / 'piqa').mkdir()
  (tmp_path / 'bad.yaml').write_text('nothing: here\n')
  again = (local / 'choice.yaml').read_text().replace('choice.jsonl', 'missing.jsonl')
  (tmp_path / 'again.yaml').write_text(again)

  def unreachable(**kwargs):
    raise ConnectionError(f"Couldn't reach {kwargs['path']!r} on the Hub")

  said = lambda *flags: refused(capsys, checkpoint, *flags)
  assert "'hellaswg' is no task, group or tag of lm-eval, and no YAML file; did you mean hellaswag" in said(
      '--tasks=piqa,hellaswg')
  assert 'did you mean openmoe_13 or' in said('--tasks=openmoe13')
  assert '--tasks: there is no file my.yaml' in said('--tasks=my.yaml')
  assert f'{tmp_path}/bad.yaml cannot be loaded: Unknown config shape' in said(f'--tasks={tmp_path}/bad.yaml')
  assert 'missing.jsonl' in said(f'--tasks={tmp_path}/again.yaml')
  assert '/piqa has no validation.jsonl, the split that piqa is evaluated on' in said(
      '--tasks=piqa', '--data_dir', tmp_path)
  assert "Duplicate task 'tiny_choice': found in both 'tiny_both' and 'tiny_choice'" in said(
      '--tasks=tiny_both,tiny_choice', '--include_path', local)
  assert 'both.yaml defines a group, which lm-eval finds by name only: --include_path=DIR --tasks=GROUP' in said(
      '--tasks', local / 'both.yaml')
  assert f'--include_path={tmp_path}/no is not a folder' in said('--tasks=piqa', f'--include_path={tmp_path}/no')
  monkeypatch.setattr('datasets.load_dataset', unreachable)
  assert ("piqa cannot be loaded: Couldn't reach 'baber/piqa' on the Hub; local files go to --data_dir: "
          'DIR/piqa/SPLIT.jsonl') in said('--tasks=piqa')
  assert 'DIR/anli_r1/SPLIT.jsonl' in said('--tasks=openmoe_13')


def test_generation_that_does_not_fit_is_refused_before_anything_runs(checkpoint, local, capsys, monkeypatch):
  monkeypatch.setattr('lm_eval.simple_evaluate', None)
  said = lambda *flags: refused(capsys, checkpoint, '--tasks', local / 'answer.yaml', *flags)
  assert ('task tiny_answer: max_gen_toks = 8 must be from 1 to 7: a context needs room, too, in the window of 8 '
          'positions') in said('--window=8')
  assert 'max_gen_toks = 99 must be from 1 to 31' in said('--gen_kwargs=max_gen_toks=99')
  assert 'beams = 2 is not known; valid: until, max_gen_toks' in said('--gen_kwargs=beams=2')
  assert "--gen_kwargs='top_k' must be NAME=VALUE" in said('--gen_kwargs=top_k')


def test_tasks_that_run_code_are_refused(checkpoint, local, tmp_path, capsys):
  (tmp_path / 'code.yaml').write_text((local / 'answer.yaml').read_text() + 'unsafe_code: true\n')
  assert 'task tiny_answer runs programs that the model writes, which this program never does' in refused(
      capsys, checkpoint, '--tasks', tmp_path / 'code.yaml')


def test_pytorch_is_not_imported():
  """Not by us and, as long as nothing is evaluated, not by lm-eval either, even where it is installed."""
  code = ('import sys, openmoe_jax.lm_harness, openmoe_jax.lm_harness_model\n'
          'assert not {"torch", "transformers"} & set(sys.modules), sorted(sys.modules)')
  subprocess.run([sys.executable, '-c', code], check=True, cwd=pathlib.Path(__file__).parent.parent)
