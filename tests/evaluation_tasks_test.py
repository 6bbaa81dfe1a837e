"""The original's evaluation tasks: prompts letter by letter, targets, ends of sequence, post-processing, and data that are
missing or wrong. Records are in the layouts of their publishers."""

import gzip
import json

import numpy as np
import pytest

from openmoe_jax import vocabulary
from openmoe_jax.config import ConfigError, DataConfig, EvalConfig
from openmoe_jax.task_eval import seqio_tasks
from openmoe_jax.tasks import evaluation
from openmoe_jax.tasks.evaluation import metrics, postprocessors, prompts

TRIVIA = {'Question': 'Who wrote Emma?', 'Answer': {'Value': 'Jane Austen', 'Aliases': ['Austen', 'J. Austen']}}
MMLU = {'prompt': 'The following are questions about birds.\n\nWhat flies?\nA. stones\nB. birds\nC. trees\nD. seas\nAnswer: B'
                  '\n\nWhat swims?\nA. stones\nB. trees\nC. fish\nD. hills\nAnswer:', 'answer': 'C'}
ARC = {'id': 'x', 'answerKey': '2', 'question': {'stem': 'What is hot?', 'choices': [
    {'text': 'ice', 'label': '1'}, {'text': 'fire', 'label': '2'}, {'text': 'snow', 'label': '3'},
    {'text': 'rain', 'label': '4'}]}}
THREE = {**ARC, 'question': {**ARC['question'], 'choices': ARC['question']['choices'][:3]}}
HUMAN = {'task_id': 'X/0', 'prompt': 'def f(x):\n  """One more."""\n', 'canonical_solution': '  return x + 1\n',
         'test': 'def check(f):\n  assert f(1) == 2\n', 'entry_point': 'f'}
BOOL = {'question': 'is it wet', 'title': 'Rain', 'answer': True, 'passage': 'Rain is water.'}
FILES = {
    'trivia_qa/unfiltered.nocontext/validation.jsonl': [TRIVIA],
    'mmlu/train.jsonl': [MMLU],
    'lambada/lambada_test.jsonl': [{'text': 'She came and went away.  '}],
    'human_eval/HumanEval.jsonl.gz': [HUMAN],
    'bool_q/dev.jsonl': [BOOL],
    'ai2_arc/ARC-Challenge/ARC-Challenge-Test.jsonl': [THREE, ARC],
    'ai2_arc/ARC-Easy/test.jsonl': [{'question': 'What is hot?', 'answerKey': 'B', 'choices': {
        'text': ['ice', 'fire', 'snow', 'rain'], 'label': ['A', 'B', 'C', 'D']}}],
    'wmt16_translate/ro-en/test.jsonl': [{'translation': {'en': 'Good day', 'ro': 'Bună ziua tuturor celor de aici'}}]}
OPTIONS = '\n\nOptions:\n(A): ice\n(B): fire\n(C): snow\n(D): rain\n\nAnswer:'
ONE_SHOT = ('[NLU] Question: Which American-born Sinclair won the Nobel Prize for Literature in 1930?\n'
            'Answer: sinclair lewis.\n\nQuestion: Who wrote Emma?\nAnswer: <extra_id_0> .')
WHAT = 'Complete the following Python code without any tests or explanation\n'

# task: (inputs, targets of all examples, EOS behind inputs and targets)
WANT = {
    'trivia_qa_v010_nocontext': ('Answer the following trivia question:\nQuestion: Who wrote Emma?Answer:',
                                 ['Jane Austen'], (0, 0)),
    'ul2_trivia_qa_v010_nocontext': ('[NLU] Question: Who wrote Emma? Answer: <extra_id_0>', ['Jane Austen'], (1, 1)),
    'trivia_qa_v010_nocontext_oneshot': (ONE_SHOT, ['Jane Austen'], (1, 1)),
    'sft_trivia_qa_v010_nocontext': ('USER: Answer the following trivia question:\nQuestion: Who wrote Emma?Answer: '
                                     'ASSISTANT: ', ['Jane Austen'], (0, 0)),
    'mmlu': (MMLU['prompt'], ['C'], (0, 1)),
    'ul2_mmlu': (MMLU['prompt'], ['C'], (1, 1)),
    'sft_mmlu': ('USER: Answer the following question:\nWhat swims?\nChoose your answer from:A. stones\nB. trees\nC. fish\n'
                 'D. hills\nASSISTANT: ', ['C'], (0, 1)),
    'lambada': ('She came and went', ['away.'], (0, 1)),
    'ul2_lambada': ('[NLU] She came and went <extra_id_0>', ['away.'], (1, 1)),
    'humaneval': (WHAT + HUMAN['prompt'], [HUMAN['canonical_solution']], (0, 1)),
    'ul2_humaneval': ('[S2S] ' + WHAT + HUMAN['prompt'] + ' <extra_id_0>', [HUMAN['canonical_solution']], (1, 1)),
    'boolq': ('Rain is water.\n\nQuestion: is it wet? Tell me yes or no? \n\nAnswer:', [' no', ' yes'], (0, 0)),
    'ul2_boolq': ('[NLU] Rain is water.\n\nQuestion: is it wet?\n\nOPTIONS:\n- no\n- yes\n\nAnswer: <extra_id_0>',
                  ['no', 'yes'], (1, 1)),
    'arc': ('Question: What is hot?' + OPTIONS, [' A', ' B', ' C', ' D'], (0, 1)),
    'ul2_arc': ('[NLU] Question: What is hot?' + OPTIONS + ' <extra_id_0>', [f'<extra_id_0> {x}' for x in 'ABCD'], (1, 1)),
    'wmt16_enro_v003': ('translate English to Romanian: Good day', ['Bună ziua tuturor celor de aici'], (1, 1))}


def write(folder, files):
  for name, records in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open(path, 'wt') if name.endswith('.gz') else open(path, 'w', encoding='utf-8')) as stream:
      stream.writelines(json.dumps(record) + '\n' for record in records)
  return folder


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return write(tmp_path_factory.mktemp('data'), FILES)


@pytest.fixture(autouse=True)
def configured():
  yield
  evaluation.configure('')


def read(name, folder, **changes):
  evaluation.configure(folder)
  split = 'test' if name == 'wmt16_enro_v003' else 'validation'
  return seqio_tasks.read(name, EvalConfig(**{'split': split, **changes}), DataConfig())


def test_all_tasks_of_the_original_are_there():
  assert set(WANT) | {'trivia_qa_v010_nocontext_fewshot'} == set(evaluation.NAMES) and len(evaluation.NAMES) == 17


@pytest.mark.parametrize('name', sorted(WANT))
def test_prompts_and_targets(data, name):
  inputs, targets, ends = WANT[name]
  examples = read(name, data).examples
  assert [example['targets_pretokenized'].decode() for example in examples] == targets
  tokens = vocabulary.get().encode
  for example, target in zip(examples, targets):
    assert example['inputs_pretokenized'].decode() == inputs
    assert example['inputs'].tolist() == tokens(inputs) + [1] * ends[0]
    assert example['targets'].tolist() == tokens(target) + [1] * ends[1]


def test_five_worked_questions(data):
  text = read('trivia_qa_v010_nocontext_fewshot', data).examples[0]['inputs_pretokenized'].decode()
  assert text.startswith('[NLU] Question: Which American') and text.count('Question: ') == 6
  assert text.endswith('Korean.\nQuestion: Who wrote Emma?\nAnswer: <extra_id_0>')
  assert [line.partition(': ')[2] for line in text.split('\n') if line.startswith('Answer')][:5] == [
      'sinclair lewis.', 'Automated hematology.', 'T.R.', 'One-half.', 'Korean.']


@pytest.mark.parametrize('name, says, want', (
    ('trivia_qa_v010_nocontext', ' Austen, who else', {'em': 100., 'f1': 100.}),
    ('trivia_qa_v010_nocontext', 'Jane\nAusten', {'em': 0., 'f1': 200 / 3}),
    ('ul2_trivia_qa_v010_nocontext', 'The J. Austen', {'em': 100., 'f1': 100.}),
    ('mmlu', ' C. fish', {'accuracy': 100.}), ('mmlu', 'fish', {'accuracy': 0.}),
    ('lambada', ' away., she said', {'accuracy': 100.}), ('lambada', 'away, x', {'accuracy': 0.}),
    ('ul2_lambada', 'no <extra_id_0> away.. x', {'accuracy': 100.}),
    ('ul2_humaneval', 'so: <extra_id_0>   return x + 1\n', {'exact_match': 100.}),
    ('humaneval', '  return 1 + x\n', {'exact_match': 0.}),
    ('wmt16_enro_v003', 'Bună ziua tuturor celor de aici', {'bleu': 100.}),
    ('wmt16_enro_v003', 'Nimic din toate acestea nu', {'bleu': 0.})))
def test_marks_of_a_generated_answer(data, name, says, want):
  questions = read(name, data)
  example, task = questions.examples[0], questions.task
  target = task.postprocess_fn(example['targets_pretokenized'].decode(), example=example, is_target=True)
  found = task.postprocess_fn(says, example=example, is_target=False)
  figures = {}
  for metric in task.predict_metric_fns:
    figures.update(metric([target], [found]))
  assert figures == pytest.approx(want)


@pytest.mark.parametrize('name, count, right', (('boolq', 2, 1), ('ul2_boolq', 2, 1), ('arc', 4, 1), ('ul2_arc', 4, 1)))
def test_marks_of_ranked_answers(data, name, count, right):
  """The answer with the best log-likelihood per token is taken; the right one is one of `count`."""
  questions = read(name, data)
  assert questions.by_likelihood and questions.count == 1 and len(questions.examples) == count
  metric, = questions.task.score_metric_fns
  targets = [questions.task.postprocess_fn('', example=e, is_target=True) for e in questions.examples]
  lengths = np.asarray([len(e['targets']) for e in questions.examples])
  for chosen in range(count):
    scores = -lengths * np.where(np.arange(count) == chosen, 1., 2.)
    assert metric(targets, scores.tolist())['accuracy'] == (100. if chosen == right else 0.)


def test_rank_classification_divides_by_the_number_of_tokens():
  metric = metrics.rank_classification(2)
  targets = [((0, 0), False, 1., 1), ((0, 1), True, 1., 4)]
  assert metric(targets, [-1., -3.])['accuracy'] == 100. and metric(targets, [-1., -5.])['accuracy'] == 0.


def test_last_letters():
  assert postprocessors.first_letter(' b') == '' and postprocessors.first_letter('D') == 'D'
  assert postprocessors.short_answer('a\b b') == 'a' and postprocessors.first_word('') == ''
  assert prompts.HUMAN_EVAL.startswith(WHAT)


def test_a_file_may_have_the_name_of_the_split_or_its_publishers(data, tmp_path):
  write(tmp_path, {'bool_q/validation.jsonl': [{**BOOL, 'question': 'is it dry'}], 'bool_q/dev.jsonl': [BOOL]})
  assert b'is it dry' in read('boolq', tmp_path).examples[0]['inputs_pretokenized']
  assert b'is it wet' in read('boolq', data).examples[0]['inputs_pretokenized']


def test_how_many_questions(tmp_path):
  write(tmp_path, {'bool_q/validation.jsonl': [{**BOOL, 'question': f'is it {i}'} for i in range(7)],
                   'lambada/test.jsonl': [{'text': f'a {i}'} for i in range(40)]})
  assert read('boolq', tmp_path).count == 7
  some = read('boolq', tmp_path, max_examples=3)
  assert some.count == 3 and len(some.examples) == 6
  assert read('lambada', tmp_path, max_examples=5).count == 5 and read('ul2_lambada', tmp_path).count == 32


@pytest.mark.parametrize('files, name, message', (
    ({}, 'boolq', 'there is no .*/bool_q/validation.jsonl.* and .* holds no prepared TFDS data set bool_q:1.0.0'),
    ({'bool_q/dev.jsonl': [{**BOOL, 'answer': 'yes'}]}, 'boolq', "dev.jsonl, line 1: field 'answer' must be true or false"),
    ({'bool_q/dev.jsonl': [BOOL, {'question': 'x'}]}, 'boolq', "line 2: the record has no field 'answer' or 'label'"),
    ({'bool_q/dev.jsonl': []}, 'boolq', 'has no record that the task can use'),
    ({'bool_q/dev.jsonl': [['x']]}, 'boolq', 'line 1 must be a JSON object'),
    ({'mmlu/train.jsonl': [{**MMLU, 'answer': 'E'}]}, 'mmlu', "must be A, B, C or D; it is 'E'"),
    ({'lambada/test.jsonl': [{'text': 'one'}]}, 'lambada', "'one' has no last word"),
    ({'ai2_arc/ARC-Challenge/test.jsonl': [THREE]}, 'arc', 'has no record that the task can use'),
    ({'ai2_arc/ARC-Challenge/test.jsonl': [{**ARC, 'answerKey': 'A'}]}, 'arc', "'answerKey' = 'A' must be the label"),
    ({}, 'boolk', "'boolk' is not a registered .* did you mean boolq"),
    ({}, 'demo_full_lm', 'has no metric')))
def test_mistakes(tmp_path, files, name, message):
  write(tmp_path, files)
  with pytest.raises(ConfigError, match=message) as error:
    read(name, tmp_path)
  assert '\n' not in str(error.value)


def test_splits_and_folders(data, tmp_path):
  with pytest.raises(ConfigError, match="EvalConfig.split = 'train': boolq has 'validation'"):
    read('boolq', data, split='train')
  with pytest.raises(ConfigError, match='EvalConfig.data_dir = .*nowhere.*: no such folder'):
    evaluation.configure(tmp_path / 'nowhere')
  (tmp_path / 'bool_q').mkdir()
  (tmp_path / 'bool_q' / 'dev.jsonl').write_text('{"question": ')
  with pytest.raises(ConfigError, match='dev.jsonl, line 1 is not JSON'):
    read('boolq', tmp_path)
  (tmp_path / 'bool_q' / 'dev.jsonl').rename(tmp_path / 'bool_q' / 'dev.jsonl.gz')
  with pytest.raises(ConfigError, match='dev.jsonl.gz cannot be read'):
    read('boolq', tmp_path)
