"""From what the model has written to what the metrics compare; (text, example, is_target) as seqio calls them."""

from typing import Any, List, Mapping, Optional, Tuple, Union

_SENTINEL = '<extra_id_0> '
Example = Optional[Mapping[str, Any]]


def _answers(example: Mapping[str, Any]) -> List[str]:
  return [answer.decode('utf-8') if isinstance(answer, bytes) else str(answer) for answer in example['answers']]


def all_answers(text: str, example: Example = None, is_target: bool = False) -> Union[str, List[str]]:
  """TriviaQA's targets are all that count as right; predictions stay as they are."""
  return _answers(example) if is_target else text


def short_answer(text: str, example: Example = None, is_target: bool = False) -> Union[str, List[str]]:
  """As `all_answers`, but a prediction ends before the first full stop, comma, backspace or newline."""
  if is_target:
    return _answers(example)
  for end in ('.', ',', '\b', '\n'):
    text = text.split(end)[0]
  return text.strip()


def first_letter(text: str, example: Example = None, is_target: bool = False) -> str:
  """A, B, C or D where the prediction begins with one; any other prediction is '', which no target equals."""
  letter = text.strip()[:1]
  return letter if is_target or letter in tuple('ABCD') else ''


def first_word(text: str, example: Example = None, is_target: bool = False) -> str:
  """A prediction's first word, without one semicolon, full stop or comma at its end."""
  if is_target:
    return text
  word = text.strip().split('\n')[0].split(' ')[0]
  return word[:-1] if word.endswith((';', '.', ',')) else word


def first_word_after_sentinel(text: str, example: Example = None, is_target: bool = False) -> str:
  return text if is_target else first_word(text.split(_SENTINEL)[-1])


def after_sentinel(text: str, example: Example = None, is_target: bool = False) -> str:
  """What a prediction says after <extra_id_0> and a space, or all of it."""
  return text if is_target else text.split(_SENTINEL)[-1]


def ranked(score: Any, example: Example = None, is_target: bool = False) -> Union[Any, Tuple[Any, bool, float, int]]:
  """Targets as t5's rank classification takes them: (idx, is_correct, weight, number of target tokens)."""
  if not is_target:
    return score
  return tuple(map(int, example['idx'])), bool(example['is_correct']), 1.0, len(example['targets'])
