"""MT-Bench (Zheng et al., 2023, arXiv 2306.05685): answers of a model for a judge to score, and the scores it gave.

Files are those of FastChat's llm_judge: question.jsonl, model_answer/MODEL.jsonl and model_judgment/gpt-4_single.jsonl.
"""

import json
import numbers
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple
import uuid

import numpy as np

from openmoe_jax import chat, paths, text_decoding
from openmoe_jax.config import ConfigError, require

# Sampling of FastChat's answers by category; _OTHERWISE for a category that is not there.
TEMPERATURES = {'writing': .7, 'roleplay': .7, 'extraction': 0., 'math': 0., 'coding': 0., 'reasoning': 0., 'stem': .1,
                'humanities': .1}
_OTHERWISE = .7
_ROOM = .25  # share of the window that is kept free for an answer, where more of a conversation would fill it

# Mean scores that the OpenMoE paper publishes, given by GPT-4: first turn, second turn, both.
PUBLISHED = {'GPT-J-6B': (2.51, 2.35, 2.43), 'TinyLLaMA-1.1B': (4.08, 2.54, 3.31), 'OpenLLaMA-3B': (4.36, 3.62, 3.99),
             'OpenMoE-8B/32E': (4.69, 3.26, 3.98)}


class Question(NamedTuple):
  """A question and what is asked about its answer."""
  id: int
  category: str
  turns: Tuple[str, ...]


class Score(NamedTuple):
  """What a judge gave one turn of one answer, 1 to 10."""
  model: str
  question: int
  category: str
  turn: int
  score: float


class Summary(NamedTuple):
  """Mean scores of a model.

  Attributes:
    model: its name.
    categories: {category: mean}, in the order of the questions.
    turns: {turn: mean}.
    average: mean over all turns of all questions.
    num_scores: how many there are.
  """
  model: str
  categories: Dict[str, float]
  turns: Dict[int, float]
  average: float
  num_scores: int


def _records(file: paths.PathLike, what: str, fields: Dict[str, type]) -> Iterator[Tuple[str, Dict[str, Any]]]:
  """(place in the file, record) of a file of JSON lines; raises ConfigError where a field is not of its type."""
  file = paths.path(file)
  require(file.is_file(), f'{file}: no such file of {what}')
  try:
    lines = file.read_text().split('\n')
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f'{file} cannot be read: {error}') from error
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    place = f'{file}, line {number}'
    try:
      record = json.loads(line)
    except ValueError as error:
      raise ConfigError(f'{place}: not JSON ({error})') from error
    require(isinstance(record, dict), f'{place}: not a JSON object')
    for field, kind in fields.items():
      value = record.get(field)
      require(isinstance(value, kind) and not isinstance(value, bool), f'{place}: {field} = {value!r}; the {what} of '
              f'MT-Bench have {", ".join(fields)}')
    yield place, record


def read_questions(file: paths.PathLike) -> List[Question]:
  """The questions of a file, in its order.

  Raises:
    ConfigError: no such file, or a line that is not a question.
  """
  questions: Dict[int, Question] = {}
  for place, record in _records(file, 'questions', {'question_id': int, 'category': str, 'turns': list}):
    turns = record['turns']
    require(bool(turns) and all(isinstance(turn, str) and turn.strip() for turn in turns), f'{place}: turns = '
            f'{turns!r} must be texts')
    require(record['question_id'] not in questions, f'{place}: question {record["question_id"]} is there twice')
    questions[record['question_id']] = Question(record['question_id'], record['category'], tuple(turns))
  require(bool(questions), f'{paths.path(file)} has no questions')
  return list(questions.values())


def read_answers(file: paths.PathLike, model_id: str, num_choices: int) -> Dict[int, Dict[str, Any]]:
  """{question id: record} of a file of answers, to go on with; empty if there is no such file.

  Raises:
    ConfigError: it holds something else, or answers of another model or of another number of choices.
  """
  if not paths.path(file).exists():
    return {}
  answers = {}
  for place, record in _records(file, 'answers', {'question_id': int, 'model_id': str, 'choices': list}):
    require(record['model_id'] == model_id, f'{place}: an answer of the model {record["model_id"]!r}, not of '
            f'{model_id!r}; name another file, or that model')
    require(len(record['choices']) == num_choices, f'{place}: {len(record["choices"])} choices, not {num_choices}; '
            'name another file, or that number')
    answers[record['question_id']] = record
  return answers


def write_answers(model: Any, questions: Sequence[Question], file: paths.PathLike, model_id: str, *,
                  num_choices: int = 1, max_new_tokens: int = 1024, window: Optional[int] = None,
                  batch_size: int = 16, seed: int = 0, progress: Callable[[int], None] = lambda count: None,
                  **options) -> Tuple[int, int]:
  """Answers all turns of the questions that a file does not answer yet; writes the file after every batch.

  An answer depends on the question, its place among `questions` and the seed, not on what was answered before: a run
  that is interrupted and goes on gives the same answers.

  Args:
    model: see `text_decoding`.
    questions: all of them, answered or not.
    file: of answers, sorted by question.
    model_id: name of the model in the file.
    num_choices: answers to each question, each a conversation of its own.
    max_new_tokens: of an answer.
    window: most positions of a conversation with its answer; no limit by default. Where a conversation leaves less than
      a quarter of it, earlier turns are left out.
    batch_size: most conversations at a time.
    seed: of the random draws, where the temperature of the category is not 0.
    progress: is told how many more questions are done.
    **options: of `text_decoding.generate_texts`: top_k, top_p, capacity_mode.

  Returns:
    numbers of questions answered now, and of turns that had to do without an earlier one.

  Raises:
    ConfigError: as `read_answers`; a number out of range; a question that does not fit the window.
  """
  for name, value in (('num_choices', num_choices), ('max_new_tokens', max_new_tokens), ('batch_size', batch_size)):
    require(value >= 1, f'{name} = {value} must be at least 1')
  fits = _fitting(model, window, max_new_tokens)
  for question in questions:
    for turn in question.turns:
      length = len(text_decoding.encode(model, [chat.prompt(turn)])[0])
      require(window is None or length < window, f'question {question.id} has {length} tokens with the template of the '
              f'chat: it does not fit the window of {window} positions')
  answers = read_answers(file, model_id, num_choices)
  progress(sum(question.id in answers for question in questions))
  left = [place for place, question in enumerate(questions) if question.id not in answers]
  shortened = 0
  for temperature, places in _batches(questions, left, max(batch_size // num_choices, 1)):
    conversations, cut = _converse(model, questions, places, num_choices, fits, dict(
        max_new_tokens=max_new_tokens, window=window, batch_size=batch_size, temperature=temperature, **options), seed)
    shortened += cut
    for place, choices in zip(places, conversations):
      answers[questions[place].id] = {
          'question_id': questions[place].id, 'answer_id': uuid.uuid4().hex, 'model_id': model_id,
          'choices': [{'index': index, 'turns': [answer for _, answer in conversation.turns]}
                      for index, conversation in enumerate(choices)], 'tstamp': time.time()}
    paths.write_text(file, ''.join(json.dumps(answers[key], ensure_ascii=False) + '\n' for key in sorted(answers)))
    progress(len(places))
  return len(left), shortened


def _fitting(model: Any, window: Optional[int], max_new_tokens: int) -> Callable[[str], bool]:
  if window is None:
    return lambda text: True
  room = min(max_new_tokens, int(window * _ROOM))
  return lambda text: len(text_decoding.encode(model, [text])[0]) + room < window


def _batches(questions: Sequence[Question], places: Sequence[int], size: int) -> Iterator[Tuple[float, List[int]]]:
  """(temperature, places) of questions that can be asked together: the same temperature and number of turns."""
  groups: Dict[Tuple[float, int], List[int]] = {}
  for place in places:
    question = questions[place]
    groups.setdefault((TEMPERATURES.get(question.category, _OTHERWISE), len(question.turns)), []).append(place)
  for (temperature, _), members in groups.items():
    for start in range(0, len(members), size):
      yield temperature, members[start:start + size]


def _converse(model: Any, questions: Sequence[Question], places: Sequence[int], num_choices: int,
              fits: Callable[[str], bool], options: Dict[str, Any],
              seed: int) -> Tuple[List[List[chat.Conversation]], int]:
  """All turns of some questions: [question][choice], and the number of turns that lack an earlier one."""
  choices = [[chat.Conversation() for _ in range(num_choices)] for _ in places]
  rows = [(place, index, conversation) for place, conversations in zip(places, choices)
          for index, conversation in enumerate(conversations)]
  shortened = 0
  for turn in range(len(questions[places[0]].turns)):
    prompts = [conversation.prompt(questions[place].turns[turn], fits) for place, _, conversation in rows]
    shortened += sum(left_out > 0 for _, left_out in prompts)
    # Each turn of each choice draws from random numbers of its own, whatever shares its batch.
    texts = model.generate([prompt for prompt, _ in prompts], stop=chat.STOP, seed=seed + turn,
                           row_ids=[place * num_choices + index for place, index, _ in rows], **options)
    for (place, _, conversation), text in zip(rows, texts):
      conversation.turns.append((questions[place].turns[turn], chat.answer(text)))
  return choices, shortened


def read_scores(file: paths.PathLike, questions: Sequence[Question]) -> Tuple[List[Score], int]:
  """Scores of a judge, and the number of judgments without one (-1: the judge's text had no score).

  Of several judgments of one turn, the last counts.

  Raises:
    ConfigError: a line that is not a judgment, a question or turn that is not among `questions`, a score out of range.
  """
  known = {question.id: question for question in questions}
  found: Dict[Tuple[str, int, int], Optional[Score]] = {}
  fields = {'question_id': int, 'model': str, 'score': numbers.Real, 'turn': int}
  for place, record in _records(file, 'scores', fields):
    model, number, turn, score = record['model'], record['question_id'], record['turn'], float(record['score'])
    require(number in known, f'{place}: question {number} is not among the questions')
    question = known[number]
    require(1 <= turn <= len(question.turns), f'{place}: turn = {turn}; question {number} has '
            f'{len(question.turns)} turns')
    require(score == -1 or 0 <= score <= 10, f'{place}: score = {score:g} must be between 0 and 10, or -1')
    found[model, number, turn] = None if score == -1 else Score(model, number, question.category, turn, score)
  scores = [score for score in found.values() if score is not None]
  require(bool(scores), f'{paths.path(file)} has no scores')
  return scores, len(found) - len(scores)


def summarise(scores: Sequence[Score], questions: Sequence[Question]) -> List[Summary]:
  """Mean scores of every model, the best first."""
  order = list(dict.fromkeys(question.category for question in questions))
  summaries = []
  for model in dict.fromkeys(score.model for score in scores):
    own = [score for score in scores if score.model == model]
    mean = lambda chosen: float(np.mean([score.score for score in chosen]))
    by_category = {name: [s for s in own if s.category == name] for name in order}
    by_turn = {turn: [s for s in own if s.turn == turn] for turn in sorted({score.turn for score in own})}
    summaries.append(Summary(model, {name: mean(chosen) for name, chosen in by_category.items() if chosen},
                             {turn: mean(chosen) for turn, chosen in by_turn.items()}, mean(own), len(own)))
  return sorted(summaries, key=lambda summary: -summary.average)


def table(summaries: Sequence[Summary]) -> str:
  """Markdown: turns, average and categories of every model, and the published ones below."""
  categories = list(dict.fromkeys(name for summary in summaries for name in summary.categories))
  turns = sorted({1, 2} | {turn for summary in summaries for turn in summary.turns})
  heads = ['model', *(f'turn {turn}' for turn in turns), 'average', *categories, 'scores']
  number = lambda value: '' if value is None else f'{value:.2f}'
  rows = [[summary.model, *(number(summary.turns.get(turn)) for turn in turns), number(summary.average),
           *(number(summary.categories.get(name)) for name in categories), str(summary.num_scores)]
          for summary in summaries]
  for model, (first, second, both) in PUBLISHED.items():
    published = {1: first, 2: second}
    rows.append([f'{model} (paper)', *(number(published.get(turn)) for turn in turns), number(both),
                 *('' for _ in categories), ''])
  lines = [heads, ['---'] + ['---:'] * (len(heads) - 1), *rows]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)
