"""The data sets that can be prepared: what they are called, what they hold, and what a raw record becomes in each.

Names, versions and features are those that the tasks read (SPEC 10 and 12).
"""

import dataclasses
import difflib
import hashlib
import json
import re
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from openmoe_jax import chat
from openmoe_jax.config import ConfigError, require
from openmoe_jax.preparation import reading
from openmoe_jax.preparation.reading import LeftOut, Malformed
from openmoe_jax.preparation.tfrecord import Value

Fields = Mapping[str, Any]
Example = Dict[str, Value]
TRAIN, VALIDATION = 'train', 'validation'


@dataclasses.dataclass(frozen=True)
class DataSet:
  """Attributes:
    name, version: in the TFDS folder.
    features: names of texts.
    lists: names of lists of texts.
    splits: that it has.
    example: from the fields of a record and `context`, the split and the example. Raises `Unusable`.
    suffixes: of files that are read; none: every file.
    skips: whether a file, by its name below the folder, holds no records.
    columns: of parquet files that are read; None: all.
    context: from all files, something that `example` needs of all of them.
    layout: of the raw files, for people.
  """
  name: str
  example: Callable[[Fields, Any], Tuple[str, Example]]
  layout: str
  version: str = '1.0.0'
  features: Tuple[str, ...] = ('text', 'meta')
  lists: Tuple[str, ...] = ()
  splits: Tuple[str, ...] = (TRAIN,)
  suffixes: Tuple[str, ...] = reading.JSON_LINES + reading.PARQUET
  skips: Callable[[str], bool] = lambda name: False
  columns: Optional[Tuple[str, ...]] = None
  context: Callable[[Sequence[reading.Segment], reading.Limits], Any] = lambda files, limits: None


# Fields.


def text_of(record: Fields, name: str, empty: bool = False) -> bytes:
  """A field as UTF-8.

  Raises:
    Malformed: it is missing, not a string, or holds half a surrogate pair.
    LeftOut: it is blank, unless `empty` allows that.
  """
  if name not in record:
    raise Malformed(f'no field {name!r}; it has {", ".join(map(repr, sorted(record)))}'[:300])
  text = record[name]
  if not isinstance(text, str):
    raise Malformed(f'field {name!r} is {"null" if text is None else "not a string"}')
  if not empty and (not text or text.isspace()):
    raise LeftOut('empty')
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise Malformed(f'field {name!r} has half a surrogate pair at character {error.start}') from error


def as_json(value: Any) -> bytes:
  """JSON on one line, as UTF-8; what JSON does not know (dates) becomes a string."""
  text = json.dumps(value, ensure_ascii=False, separators=(',', ':'), default=str)
  return text.encode('utf-8', 'backslashreplace')  # of half a surrogate pair makes what JSON writes for it


# Pre-training.


def _redpajama(record: Fields, _: Any) -> Tuple[str, Example]:
  text = text_of(record, 'text')
  meta = record['meta'] if 'meta' in record else {name: value for name, value in record.items() if name != 'text'}
  return TRAIN, {'text': text, 'meta': meta.encode('utf-8', 'replace') if isinstance(meta, str) else as_json(meta)}


def _the_stack(record: Fields, _: Any) -> Tuple[str, Example]:
  text = text_of(record, 'content')
  return TRAIN, {'text': text, 'meta': as_json({name: value for name, value in record.items() if name != 'content'})}


REDPAJAMA = ('common_crawl', 'c4', 'github', 'arxiv', 'book', 'wikipedia', 'stackexchange')


# Conversations.


def turns_of(record: Fields) -> Tuple[List[str], List[str]]:
  """What the user said and what GPT-4 answered, turn by turn, of a record of WildChat; a last question is dropped.

  Raises:
    LeftOut: it is not GPT-4, there is no answer, or the two do not take turns.
    Malformed: there is no conversation.
  """
  model, talk = record.get('model'), record.get('conversation')
  if not isinstance(model, str) or not isinstance(talk, list):
    raise Malformed("no fields 'model' and 'conversation'")
  if not model.lower().startswith('gpt-4'):
    raise LeftOut('not GPT-4')
  turns: Dict[str, List[str]] = {'user': [], 'assistant': []}
  for i, turn in enumerate(talk):
    role, content = (turn.get('role'), turn.get('content')) if isinstance(turn, dict) else (None, None)
    if not isinstance(content, str):
      raise Malformed("a turn has no 'content'")
    if role != ('user', 'assistant')[i % 2]:
      raise LeftOut('user and assistant do not take turns')
    turns[role].append(content)
  user, assistant = turns['user'][:len(turns['assistant'])], turns['assistant']
  if not user or not all(content.strip() for content in user + assistant):
    raise LeftOut('without an answer')
  return user, assistant


def _wildchat_chat(record: Fields, _: Any) -> Tuple[str, Example]:
  user, assistant = turns_of(record)
  return TRAIN, {'user': [text_of({'content': turn}, 'content') for turn in user],
                 'assistant': [text_of({'content': turn}, 'content') for turn in assistant]}


def _wildchat_sft(record: Fields, _: Any) -> Tuple[str, Example]:
  user, assistant = turns_of(record)
  pair = {'input': chat.prompt(user[-1], list(zip(user[:-1], assistant[:-1]))),
          'output': f' {assistant[-1]} {chat.STOP}'}
  return TRAIN, {name: text_of(pair, name) for name in pair}


_WILDCHAT = dict(layout="WildChat: .parquet or JSON lines with 'model' and 'conversation', of which GPT-4's are taken",
                 columns=('model', 'conversation'))


def _orca(record: Fields, _: Any) -> Tuple[str, Example]:
  return TRAIN, {'system_prompt': text_of(record, 'system_prompt', empty=True), 'question': text_of(record, 'question'),
                 'response': text_of(record, 'response')}


_ORCA = ('system_prompt', 'question', 'response')


# Evaluation.


_HUMAN_EVAL = ('task_id', 'prompt', 'entry_point', 'canonical_solution', 'test')


def _human_eval(record: Fields, _: Any) -> Tuple[str, Example]:
  return TRAIN, {name: text_of(record, name) for name in _HUMAN_EVAL}


_LETTERS = 'ABCD'


def _mmlu_question(record: Fields) -> Tuple[str, str, str]:
  """(subject, the question with its options and 'Answer:', the answer's letter)."""
  if 'row' in record:  # subject_test.csv: question, four options, letter
    question, *choices, answer = record['row'] if len(record['row']) == 6 else ('', None)
    subject = re.sub(r'_(dev|val|test)\.csv$', '', record['path'].rpartition('/')[2])
  else:
    question, subject, choices, answer = (record.get(name) for name in ('question', 'subject', 'choices', 'answer'))
    answer = _LETTERS[answer] if isinstance(answer, int) and 0 <= answer < 4 else answer
  strings = [question, subject, *choices] if isinstance(choices, list) and len(choices) == 4 else [None]
  if not all(isinstance(text, str) for text in strings) or answer not in tuple(_LETTERS):
    raise Malformed('not a question, a subject, four choices and an answer from A to D')
  options = ''.join(f'\n{letter}. {choice}' for letter, choice in zip(_LETTERS, choices))
  return subject, f'{question}{options}\nAnswer:', answer


def _mmlu_is(kind: str, name: str) -> bool:
  return re.search(rf'(^|[^a-z]){kind}[^a-z]', name.rpartition('/')[2]) is not None


def _mmlu_shots(files: Sequence[reading.Segment], limits: reading.Limits) -> Mapping[str, str]:
  """{subject: what stands in front of its questions}, the five worked ones of the files named dev."""
  shots: Dict[str, List[str]] = {}
  for file in files:
    if _mmlu_is('dev', file.name):
      for record in reading.records(file, limits):
        try:
          subject, question, answer = _mmlu_question(reading.fields(record))
        except Malformed as reason:
          raise ConfigError(f'{reading.place(file, record.number)}: {reason}') from reason
        shots.setdefault(subject, []).append(f'{question} {answer}\n\n')
  return {subject: ''.join(questions[:5]) for subject, questions in shots.items()}


def _mmlu(record: Fields, shots: Mapping[str, str]) -> Tuple[str, Example]:
  subject, question, answer = _mmlu_question(record)
  prompt = ('The following are multiple choice questions (with answers) about '
            f'{subject.replace("_", " ")}.\n\n{shots.get(subject, "")}{question}')
  return TRAIN, {'prompt': text_of({'prompt': prompt}, 'prompt'), 'answer': answer.encode()}


# One's own text.


def text(name: str, version: str = '1.0.0', validation: float = .01, text_field: str = '', id_field: str = ''
         ) -> DataSet:
  """Text files, and records with a field of text.

  A document belongs to the validation split if a hash of its id says so: for a text file its path below the folder, for
  a record the field `id_field`, or without one the text itself, so that copies of it stay together.

  Args:
    name, version: of the data set.
    validation: share of the documents; 0: there is only a training split.
    text_field: of records; '': 'text' or 'content', whichever is there.
    id_field: of records; dots lead into objects; '': none.
  """
  require(re.fullmatch(r'[a-z][a-z0-9_]*', name) is not None and name not in KNOWN, f'--name={name!r} must be '
          f'lower-case letters, digits and underscores, and none of {", ".join(KNOWN)}')
  require(re.fullmatch(r'\d+\.\d+\.\d+', version) is not None, f'--version={version!r} must be like 1.0.0')
  require(0 <= validation < 1, f'--validation={validation} must be at least 0 and less than 1')

  def example(record: Fields, _: Any) -> Tuple[str, Example]:
    field = text_field or ('content' if 'text' not in record and 'content' in record else 'text')
    document = text_of(record, field)
    if set(record) == {'text', 'path'}:  # a text file
      identity = as_json(record['path'])
    else:
      identity = as_json(_inside(record, id_field)) if id_field else document
    chance = int.from_bytes(hashlib.sha256(identity).digest()[:8], 'big') / 2**64
    meta = as_json({key: value for key, value in record.items() if key != field})
    return VALIDATION if chance < validation else TRAIN, {'text': document, 'meta': meta}

  return DataSet(name, example, 'any folder of text, code, JSON lines or .parquet', version, suffixes=(),
                 splits=(TRAIN, VALIDATION) if validation else (TRAIN,))


def _inside(record: Fields, path: str) -> Any:
  value: Any = record
  for name in path.split('.'):
    if not isinstance(value, Mapping) or name not in value:
      raise Malformed(f'no field {path!r}')
    value = value[name]
  return value


# All of them.


def _known() -> List[DataSet]:
  lines = reading.JSON_LINES
  return [
      *(DataSet(f'redpajama_{subset}', _redpajama, "RedPajama-1T: JSON lines with 'text' and 'meta'" + (
          ", or other fields in place of 'meta'" if subset == 'common_crawl' else '')) for subset in REDPAJAMA),
      DataSet('the_stack_dedup', _the_stack, "The Stack: .parquet with 'content' and other fields"),
      DataSet('wildchat_gpt4_sft', _wildchat_sft, features=('input', 'output'), **_WILDCHAT),
      DataSet('wildchat_gpt4_chat', _wildchat_chat, features=(), lists=('user', 'assistant'), **_WILDCHAT),
      DataSet('orca', _orca, f'OpenOrca: .parquet or JSON lines with {", ".join(map(repr, _ORCA))}', features=_ORCA,
              columns=_ORCA),
      DataSet('mmlu', _mmlu, 'MMLU: SUBJECT_test.csv and SUBJECT_dev.csv, or .parquet with test and dev in the names',
              features=('prompt', 'answer'), suffixes=reading.CSV + reading.PARQUET + lines,
              skips=lambda name: not _mmlu_is('test', name), context=_mmlu_shots),
      DataSet('human_eval', _human_eval, 'HumanEval.jsonl.gz', features=_HUMAN_EVAL, columns=_HUMAN_EVAL),
  ]


KNOWN = {data_set.name: data_set for data_set in _known()}


def find(name: str) -> DataSet:
  """The data set NAME or NAME:VERSION.

  Raises:
    ConfigError: there is none, or not in that version.
  """
  name, _, version = name.partition(':')
  close = difflib.get_close_matches(name, KNOWN, n=3, cutoff=.6)
  require(name in KNOWN, f'{name!r} is not a data set that can be prepared; ' + (
      f'did you mean {" or ".join(close)}?' if close else f'known: {", ".join(KNOWN)}, and text for your own'))
  found = KNOWN[name]
  require(version in ('', found.version), f'{name}:{version}: the tasks read version {found.version}, and only that '
          'one can be prepared')
  return found
