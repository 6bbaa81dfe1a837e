"""Evaluation data as published: which data sets there are, their fields, and how a line of a published file is read.

A data set's fields are those of its TFDS version that a task needs. Files of JSON lines may hold them as TFDS names
them, or as the data set's authors published them; where the two differ, both names stand in the readers below.
"""

import gzip
import json
import zlib
from typing import Any, Callable, Dict, Iterator, Mapping, NamedTuple, Tuple, Union

from openmoe_jax import paths
from openmoe_jax.config import ConfigError, require


class Record:
  """One line of a file; every complaint about it names the file and the line."""

  def __init__(self, values: Mapping[str, Any], where: str):
    self._values = values
    self.where = where

  def get(self, *names: str) -> Any:
    """The value under the first of `names` that is there; 'a/b' is field b of the object in field a."""
    for name in names:
      value = self._values
      for part in name.split('/'):
        value = value.get(part) if isinstance(value, dict) else None
      if value is not None:
        return value
    raise ConfigError(f'{self.where}: the record has no field {" or ".join(map(repr, names))}')

  def text(self, *names: str) -> str:
    value = self.get(*names)
    require(isinstance(value, str), f'{self.where}: field {names[0]!r} must be text; it is {value!r}')
    return value

  def texts(self, *names: str) -> Tuple[str, ...]:
    value = self.get(*names)
    require(isinstance(value, list) and all(isinstance(item, str) for item in value),
            f'{self.where}: field {names[0]!r} must be a list of texts; it is {value!r}')
    return tuple(value)


def _trivia_qa(record: Record) -> Dict[str, Any]:
  return {'question': record.text('question', 'Question'), 'value': record.text('answer/value', 'Answer/Value'),
          'aliases': record.texts('answer/aliases', 'Answer/Aliases')}


def _mmlu(record: Record) -> Dict[str, Any]:
  answer = record.text('answer').strip()
  require(answer in ('A', 'B', 'C', 'D'), f"{record.where}: field 'answer' must be A, B, C or D; it is {answer!r}")
  return {'prompt': record.text('prompt'), 'answer': answer}


def _lambada(record: Record) -> Dict[str, Any]:
  passage = record.text('passage', 'text')
  require(' ' in passage.strip(), f'{record.where}: the passage {passage!r} has no last word to leave out')
  return {'passage': passage}


def _human_eval(record: Record) -> Dict[str, Any]:
  return {name: record.text(name) for name in HUMAN_EVAL_FIELDS}


def _bool_q(record: Record) -> Dict[str, Any]:
  answer = record.get('answer', 'label')
  require(isinstance(answer, bool), f"{record.where}: field 'answer' must be true or false; it is {answer!r}")
  return {'passage': record.text('passage'), 'question': record.text('question'), 'answer': answer}


def _ai2_arc(record: Record) -> Dict[str, Any]:
  """The authors nest stem and choices in the question; others keep choices beside it, as objects or as two lists."""
  nested = isinstance(record.get('question'), dict)
  choices = record.get('question/choices' if nested else 'choices')
  if isinstance(choices, list):
    choices = {name: [choice.get(name) if isinstance(choice, dict) else None for choice in choices]
               for name in ('text', 'label')}
  options = Record(choices if isinstance(choices, dict) else {}, f'{record.where}, choices')
  texts, labels, key = options.texts('text'), [str(label) for label in options.get('label')], record.get('answerKey')
  require(len(texts) == len(labels) and str(key) in labels,
          f"{record.where}: 'answerKey' = {key!r} must be the label of one of the choices; they have {labels}")
  return {'question': record.text('question/stem' if nested else 'question'), 'options': texts,
          'label': labels.index(str(key))}


def _translation(record: Record) -> Dict[str, Any]:
  return {language: record.text(language, f'translation/{language}') for language in ('en', 'ro')}


HUMAN_EVAL_FIELDS = ('task_id', 'prompt', 'canonical_solution', 'test', 'entry_point')


class Dataset(NamedTuple):
  """A published data set.

  Attributes:
    name: its name in TFDS, with the configuration: also its folder among local files.
    version: the TFDS version.
    fields: {field: (its place in a TFDS example, type)}; type is 'string', 'strings' (a list), 'bool' or 'int'.
    read: makes these fields from a line of a file.
    files: {split: names that its authors gave to the file}.
  """
  name: str
  version: str
  fields: Mapping[str, Tuple[str, str]]
  read: Callable[[Record], Dict[str, Any]]
  files: Mapping[str, Tuple[str, ...]] = {}

  @property
  def tfds_name(self) -> str:
    return f'{self.name}:{self.version}'

  def file_names(self, split: str) -> Tuple[str, ...]:
    """What the file of a split may be called, in the order in which they are tried."""
    names = (f'{split}.jsonl', *self.files.get(split, ()))
    return tuple(name + ending for name in names for ending in ('', '.gz'))


def _strings(*names: str) -> Dict[str, Tuple[str, str]]:
  return {name: (name, 'string') for name in names}


def _arc(which: str) -> Dataset:
  return Dataset(f'ai2_arc/ARC-{which}', '1.0.0', {
      **_strings('question'), 'options': ('choices/text', 'strings'), 'label': ('answerKey', 'int')}, _ai2_arc,
                 {'train': (f'ARC-{which}-Train.jsonl',), 'validation': (f'ARC-{which}-Dev.jsonl',),
                  'test': (f'ARC-{which}-Test.jsonl',)})


TRIVIA_QA = Dataset('trivia_qa/unfiltered.nocontext', '1.1.0', {
    **_strings('question'), 'value': ('answer/value', 'string'), 'aliases': ('answer/aliases', 'strings')}, _trivia_qa)
MMLU = Dataset('mmlu', '1.0.0', _strings('prompt', 'answer'), _mmlu)
LAMBADA = Dataset('lambada', '1.0.0', _strings('passage'), _lambada, {'test': ('lambada_test.jsonl',)})
HUMAN_EVAL = Dataset('human_eval', '1.0.0', _strings(*HUMAN_EVAL_FIELDS), _human_eval, {'train': ('HumanEval.jsonl',)})
BOOL_Q = Dataset('bool_q', '1.0.0', {**_strings('passage', 'question'), 'answer': ('answer', 'bool')}, _bool_q,
                 {'train': ('train.jsonl',), 'validation': ('dev.jsonl',)})
ARC_CHALLENGE = _arc('Challenge')
ARC_EASY = _arc('Easy')
WMT16_EN_RO = Dataset('wmt16_translate/ro-en', '1.0.0', _strings('en', 'ro'), _translation)


def lines(file: paths.PathLike) -> Iterator[Record]:
  """The records of a file of JSON lines, plain or gzip; blank lines are passed over.

  Raises:
    ConfigError: the file cannot be read, or a line is no JSON object.
  """
  try:
    with paths.path(file).open('rb') as raw, (gzip.open(raw) if str(file).endswith('.gz') else raw) as stream:
      for number, line in enumerate(stream, 1):
        if line.strip():
          where = f'{file}, line {number}'
          yield Record(_parsed(line, where), where)
  except (OSError, EOFError, zlib.error) as error:  # gzip raises all three for damaged files.
    raise ConfigError(f'{file} cannot be read: {error}') from error


def _parsed(line: Union[bytes, str], where: str) -> Mapping[str, Any]:
  try:
    values = json.loads(line)
  except ValueError as error:  # JSON's errors, and text that is not UTF-8.
    raise ConfigError(f'{where} is not JSON: {error}') from error
  require(isinstance(values, dict), f'{where} must be a JSON object with named fields')
  return values
