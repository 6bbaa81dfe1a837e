"""MT-Bench: answers in FastChat's format, going on after an interruption, scores and their picture."""

import functools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
from openmoe_jax import chat
from openmoe_jax import checkpoint_flags
from openmoe_jax import mt_bench
from openmoe_jax.analysis import radar
from openmoe_jax.config import ConfigError, ModelConfig
from openmoe_jax.loading import Model
from openmoe_jax.names import from_t5x_names
from openmoe_jax.tools import mt_bench as tool
import published_data
import pytest
from tests import numpy_reference

CATEGORIES = ('writing', 'math', 'stem', 'riddles')
RECORDS = [{'question_id': 90 + i, 'category': CATEGORIES[i % 4], 'turns': [f'What is {i}?', f'And {i} again?']}
           for i in range(8)]
RECORDS[1]['reference'] = ['one', 'two']  # as the published file has for some


class Fake:
  """Answers with the last question, the number of earlier turns and how it was asked; a letter is a token."""
  config = types.SimpleNamespace(vocab_size=8576)
  vocabulary = types.SimpleNamespace(encode=lambda text: [1 + ord(c) % 100 for c in text])

  def __init__(self, fail_after=None):
    self.calls, self.fail_after = [], fail_after

  def generate(self, texts, **options):
    if len(self.calls) == self.fail_after:
      raise KeyboardInterrupt
    self.calls.append((list(texts), options))
    return [f' {text.count("</s>")} before, t={options["temperature"]}, seed={options["seed"]}, row={row} </s> more'
            for text, row in zip(texts, options['row_ids'])]


@functools.lru_cache(maxsize=None)
def model():
  """A model of random numbers."""
  config = ModelConfig(vocab_size=8576, emb_dim=16, mlp_dim=16, num_heads=4, head_dim=4, num_layers=2, moe_interval=2,
                       num_experts=4, group_size=16, dtype='float32', scan_blocks=False)
  params = jax.tree.map(jnp.asarray, from_t5x_names(config, numpy_reference.random_params(config, 0)))
  data = {'vocabulary': '', 'extra_ids': 300, 'task_feature_lengths': {'targets': 128}}
  return Model(config, params, 0, {'data': data})


def write(file, records):
  file.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return file


def read(file):
  return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def questions(tmp_path):
  return mt_bench.read_questions(write(tmp_path / 'question.jsonl', RECORDS))


def test_questions(questions):
  assert [q.id for q in questions] == list(range(90, 98)) and questions[1].category == 'math'
  assert questions[2].turns == ('What is 2?', 'And 2 again?')


def test_published_questions():
  questions = mt_bench.read_questions(published_data.require_published('mt_bench_question.jsonl'))
  assert [q.id for q in questions] == list(range(81, 161)) and all(len(q.turns) == 2 for q in questions)
  assert set(q.category for q in questions) == set(mt_bench.TEMPERATURES)


def test_answers_have_the_format_of_fastchat(questions, tmp_path):
  file = tmp_path / 'answers' / 'm.jsonl'
  done = []
  assert mt_bench.write_answers(Fake(), questions, file, 'm', num_choices=2, progress=done.append) == (8, 0)
  answers = read(file)
  assert [set(a) for a in answers] == [{'question_id', 'answer_id', 'model_id', 'choices', 'tstamp'}] * 8
  assert [a['question_id'] for a in answers] == list(range(90, 98)) and {a['model_id'] for a in answers} == {'m'}
  assert len({a['answer_id'] for a in answers}) == 8 and all(a['tstamp'] > 1.7e9 for a in answers)
  assert [c['index'] for c in answers[0]['choices']] == [0, 1]
  # Writing: 0.7; math: 0; STEM: 0.1; a category that FastChat does not know: 0.7.
  turns = [a['choices'][1]['turns'] for a in answers[:4]]
  assert turns == [[f'0 before, t={t}, seed=0, row={row}', f'1 before, t={t}, seed=1, row={row}']
                   for t, row in ((.7, 1), (0., 3), (.1, 5), (.7, 7))]
  assert sum(done) == 8


def test_conversations_use_the_template(questions, tmp_path):
  fake = Fake()
  mt_bench.write_answers(fake, questions[:1], tmp_path / 'm.jsonl', 'm', top_p=.9)
  (first, options), (second, _) = fake.calls
  assert first == [chat.prompt('What is 0?')] and options['stop'] == '</s>' and options['top_p'] == .9
  assert second == [chat.prompt('And 0 again?', [('What is 0?', '0 before, t=0.7, seed=0, row=0')])]


def test_batches_ask_alike_questions_together(questions, tmp_path):
  fake = Fake()
  mt_bench.write_answers(fake, questions, tmp_path / 'm.jsonl', 'm', batch_size=3)
  assert [(len(texts), options['temperature']) for texts, options in fake.calls] == [
      (3, .7), (3, .7), (1, .7), (1, .7), (2, 0.), (2, 0.), (2, .1), (2, .1)]


def test_going_on_after_an_interruption(questions, tmp_path):
  whole, parts = tmp_path / 'whole.jsonl', tmp_path / 'parts.jsonl'
  mt_bench.write_answers(Fake(), questions, whole, 'm', batch_size=2)
  with pytest.raises(KeyboardInterrupt):
    mt_bench.write_answers(Fake(fail_after=5), questions, parts, 'm', batch_size=2)
  before = read(parts)
  assert len(before) == 4
  fake, done = Fake(), []
  assert mt_bench.write_answers(fake, questions, parts, 'm', batch_size=2, progress=done.append) == (4, 0)
  assert done[0] == 4 and sum(done) == 8
  after = read(parts)
  assert [a['choices'] for a in after] == [a['choices'] for a in read(whole)]
  assert [a for a in after if a in before] == before  # the same answer_id: they were not made again
  assert mt_bench.write_answers(Fake(fail_after=0), questions, parts, 'm') == (0, 0)


@pytest.mark.slow
def test_a_model_answers_the_same_in_other_company(questions, tmp_path):
  asked = [question for question in questions if mt_bench.TEMPERATURES.get(question.category, .7) == .7]
  whole, parts = tmp_path / 'whole.jsonl', tmp_path / 'parts.jsonl'
  options = {'max_new_tokens': 4, 'seed': 3, 'batch_size': 2}
  mt_bench.write_answers(model(), asked, whole, 'm', **options)
  answers = read(whole)
  assert len(answers) == 4
  write(parts, [answers[0], answers[2]])  # the first of each batch
  mt_bench.write_answers(model(), asked, parts, 'm', **options)
  assert [a['choices'] for a in read(parts)] == [a['choices'] for a in answers]
  turns = [turn for a in answers for turn in a['choices'][0]['turns']]
  assert all(turns) and len(set(turns)) == 8
  mt_bench.write_answers(model(), asked[:1], tmp_path / 'choices.jsonl', 'm', num_choices=2, **options)
  first, second = (choice['turns'] for choice in read(tmp_path / 'choices.jsonl')[0]['choices'])
  assert first[0] != second[0] and first[1] != second[1]


def test_earlier_turns_are_left_out_where_they_do_not_fit(questions, tmp_path):
  fake = Fake()
  alone = len(chat.prompt('And 0 again?'))
  # A quarter of the window stays free for the answer.
  window = (alone + 2) * 4 // 3
  assert mt_bench.write_answers(fake, questions, tmp_path / 'm.jsonl', 'm', window=window) == (8, 8)
  assert all('before' not in prompt for texts, _ in fake.calls for prompt in texts)
  assert mt_bench.write_answers(fake, questions, tmp_path / 'n.jsonl', 'n', window=400) == (8, 0)
  assert fake.calls[0][1]['window'] == window


def test_mistakes_in_questions_and_answers(questions, tmp_path):
  file = tmp_path / 'bad.jsonl'
  for text, message in (('', 'has no questions'), ('{', 'line 1: not JSON'), ('[1]', 'line 1: not a JSON object'),
                        ('{"question_id": "x"}', "question_id = 'x'"),
                        ('{"question_id": 1, "category": "a", "turns": []}', 'turns = \\[\\] must be texts'),
                        ('{"question_id": 1, "category": "a", "turns": [" "]}', 'must be texts'),
                        ('\n' + 2 * (json.dumps(RECORDS[0]) + '\n'), 'line 3: question 90 is there twice')):
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
      mt_bench.read_questions(file)
  with pytest.raises(ConfigError, match='no such file of questions'):
    mt_bench.read_questions(tmp_path / 'none.jsonl')
  mt_bench.write_answers(Fake(), questions, tmp_path / 'm.jsonl', 'm')
  with pytest.raises(ConfigError, match="an answer of the model 'm', not of 'other'"):
    mt_bench.write_answers(Fake(), questions, tmp_path / 'm.jsonl', 'other')
  with pytest.raises(ConfigError, match='1 choices, not 2'):
    mt_bench.write_answers(Fake(), questions, tmp_path / 'm.jsonl', 'm', num_choices=2)
  with pytest.raises(ConfigError, match='max_new_tokens = 0 must be at least 1'):
    mt_bench.write_answers(Fake(), questions, tmp_path / 'n.jsonl', 'n', max_new_tokens=0)
  fake = Fake()
  with pytest.raises(ConfigError, match='question 90 has 98 tokens .* does not fit the window of 50 positions'):
    mt_bench.write_answers(fake, questions, tmp_path / 'n.jsonl', 'n', window=50)
  assert not fake.calls


def judgment(question, turn, score, name='m'):
  return {'question_id': question, 'model': name, 'judge': ['gpt-4', 'single-v1'], 'user_prompt': '', 'judgment': '',
          'score': score, 'turn': turn, 'tstamp': 1.}


def test_scores_and_their_means(questions, tmp_path):
  records = [judgment(90 + i, turn, i + turn / 2) for i in range(1, 8) for turn in (1, 2)]
  records += [judgment(90, 1, 9), judgment(90, 1, 3), judgment(90, 2, -1)]  # judged twice; without a score
  records += [judgment(91, 1, 10, 'better'), judgment(92, 2, 9, 'better')]
  scores, without = mt_bench.read_scores(write(tmp_path / 'judged.jsonl', records), questions)
  assert without == 1 and len(scores) == 17
  better, own = mt_bench.summarise(scores, questions)
  assert better == ('better', {'math': 10., 'stem': 9.}, {1: 10., 2: 9.}, 9.5, 2)
  assert own.model == 'm' and own.num_scores == 15 and list(own.categories) == list(CATEGORIES)
  np.testing.assert_allclose(own.categories['writing'], (3 + 4.5 + 5) / 3, rtol=1e-15)
  np.testing.assert_allclose(own.categories['math'], (1.5 + 2 + 5.5 + 6) / 4, rtol=1e-15)
  np.testing.assert_allclose(own.turns[1], (3 + sum(i + .5 for i in range(1, 8))) / 8, rtol=1e-15)
  np.testing.assert_allclose(own.average, (3 + sum(2 * i + 1.5 for i in range(1, 8))) / 15, rtol=1e-15)
  lines = mt_bench.table([better, own]).splitlines()
  assert lines[0] == '| model | turn 1 | turn 2 | average | math | stem | writing | riddles | scores |'
  assert lines[2] == '| better | 10.00 | 9.00 | 9.50 | 10.00 | 9.00 |  |  | 2 |'
  assert lines[-1].startswith('| OpenMoE-8B/32E (paper) | 4.69 | 3.26 | 3.98 |') and len(lines) == 8
  assert {line.count('|') for line in lines} == {10}


def test_published_figures_are_those_of_the_paper():
  text = published_data.require_published('paper_tables.md').read_text()
  for name, figures in mt_bench.PUBLISHED.items():
    assert f'{name} {" ".join(f"{figure:.2f}" for figure in figures)}' in text


@pytest.mark.parametrize('record, message', [
    (judgment(1, 1, 5), 'question 1 is not among the questions'),
    (judgment(90, 3, 5), 'turn = 3; question 90 has 2 turns'),
    (judgment(90, 1, 11), 'score = 11 must be between 0 and 10'),
    (judgment(90, 1, None), 'score = None'), (judgment(90, 1, -1), 'has no scores'),
    (judgment(90, True, 5), 'turn = True')])
def test_mistakes_in_scores(questions, tmp_path, record, message):
  with pytest.raises(ConfigError, match=message):
    mt_bench.read_scores(write(tmp_path / 'judged.jsonl', [record]), questions)


def test_radar():
  figure = radar.radar_figure({'a': {'x': 1, 'y': 2, 'z': 3}, 'b': {'x': 4, 'z': 5, 'w': 6}}, title='Scores')
  axes = figure.axes[0]
  assert [label.get_text() for label in axes.get_xticklabels()] == ['x', 'y', 'z', 'w']
  first, second = axes.lines
  np.testing.assert_array_equal(first.get_ydata(), [1, 2, 3, np.nan, 1])
  np.testing.assert_array_equal(second.get_ydata(), [4, np.nan, 5, 6, 4])
  np.testing.assert_allclose(first.get_xdata(), np.array([0, 1, 2, 3, 0]) * np.pi / 2)
  assert axes.get_ylim() == (0, 10) and [t.get_text() for t in figure.legends[0].get_texts()] == ['a  2.00', 'b  5.00']
  with pytest.raises(ConfigError, match='at least three categories; there are 2'):
    radar.radar_figure({'a': {'x': 1, 'y': 2}})
  with pytest.raises(ConfigError, match='at most 8 models; there are 9'):
    radar.radar_figure({str(i): {'x': 1, 'y': 2, 'z': 3} for i in range(9)})


def test_program_reports(tmp_path, capsys):
  import matplotlib.image
  asked = str(write(tmp_path / 'question.jsonl', RECORDS))
  judged = write(tmp_path / 'judged.jsonl', [judgment(90 + i, 1, i + 1, name) for i in range(8) for name in 'ab'] +
                 [judgment(90, 2, -1)])
  tool.main(['report', str(judged), f'--questions={asked}', '--models=a', f'--output={tmp_path / "out"}'])
  said = capsys.readouterr().out
  assert '| a | 4.50 |  | 4.50 |' in said and '| b |' not in said and '1 judgments without a score' in said
  assert (tmp_path / 'out' / 'mt_bench.md').read_text() in said
  record, = json.loads((tmp_path / 'out' / 'mt_bench.json').read_text())
  assert record['model'] == 'a' and record['average'] == 4.5 and record['turns'] == {'1': 4.5}
  image = matplotlib.image.imread(tmp_path / 'out' / 'mt_bench.png')
  assert image.shape[0] > 600 and image.shape[1] > 800 and image[..., :3].std() > .05
  with pytest.raises(SystemExit):
    tool.main(['report', str(judged), f'--questions={asked}', '--models=a,c'])
  assert "has no scores of 'c', but of a, b" in capsys.readouterr().err


@pytest.mark.slow
def test_program_answers(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(checkpoint_flags, 'load_model', lambda args: model())
  asked, file = write(tmp_path / 'question.jsonl', RECORDS[::4]), tmp_path / 'tiny.jsonl'
  command = ['answer', 'checkpoint', f'--questions={asked}', f'--answers={file}', '--max_new_tokens=4',
             '--batch_size=2']
  tool.main(command)
  assert '2 of 2 questions answered now' in capsys.readouterr().out
  answers = read(file)
  assert {a['model_id'] for a in answers} == {'tiny'} and all(len(a['choices'][0]['turns']) == 2 for a in answers)
  tool.main(command)
  assert '0 of 2 questions answered now' in capsys.readouterr().out and read(file) == answers
  for more, message in ((['--model_id=other'], "not of 'other'"), (['--window=10'], 'does not fit the window of 10'),
                        (['--gin.X=1'], '--gin.X=1'), (['--num_choices=x'], "invalid int value: 'x'")):
    with pytest.raises(SystemExit) as exit_:
      tool.main(command + more)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and message in error and error.count('\n') == 1


def test_program_names_its_commands(capsys):
  with pytest.raises(SystemExit):
    tool.main([])
  assert 'answer|report' in capsys.readouterr().err
  assert pathlib.Path(tool.__file__).read_text().startswith('"""MT-Bench')
