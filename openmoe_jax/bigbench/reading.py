"""Reads BIG-bench's task files: from a folder or straight from the `bigbench` source distribution.

A task is a folder with a `task.json`, which holds examples, or whose sub-folders hold one each: the task's parts. The
fields and their defaults are those of the benchmark's documentation of JSON tasks; where its program does something
else than a file's author meant, the program decides, since published figures come from it.
"""

import dataclasses
import json
import pathlib
import re
import tarfile
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from openmoe_jax.bigbench import metrics as metrics_lib
from openmoe_jax.config import ConfigError, require

# Every example's choices are shuffled by a generator of its own with this seed, whatever seed picks the shots.
CHOICE_SEED = 42
# What an answer is where a task names neither a regular expression nor a stop string: up to the first of . ? ! ; \n.
DEFAULT_OUTPUT_REGEX = r'[^\.\?\!\;\n]+'
# Where task folders lie below what a user may name: the tasks' own folder, the package, the unpacked distribution.
FOLDERS = ('.', 'benchmark_tasks', 'bigbench/benchmark_tasks', '*/bigbench/benchmark_tasks')


@dataclasses.dataclass(frozen=True)
class Sample:
  """One example, ready to stand in a prompt.

  Attributes:
    text: the question with its prefix, its choices if they are to be shown, and the prefix of the answer.
    targets: right answers; as a worked example one of them follows `text`.
    choices: possible answers of a multiple-choice question, in the file's order; empty if it is none.
    scores: what each choice is worth.
  """
  text: str
  targets: Tuple[str, ...]
  choices: Tuple[str, ...] = ()
  scores: Tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Part:
  """A task without sub-tasks, or one sub-task: what has metrics of its own.

  Attributes:
    name: 'TASK' or 'TASK:SUBTASK', by folder names.
    samples: the examples, the file's repetitions left out.
    metrics: names of its metrics (`metrics.RANGES`; 'rouge' stands for three figures).
    preferred_score: the metric that counts.
    low_score: that metric's value at 0 normalised: for 'multiple_choice_grade' what guessing gets, in percent.
    high_score: its value at 100 normalised.
    task_prefix: begins every prompt.
    separator: stands between worked examples.
    output_regex: an answer is its first match in the generated text; None for all of it.
    stop_string: the generated text ends with its first occurrence; None for no such string.
    absolute_normalization: log-likelihoods count as they are, not made to sum to 1 over the choices.
  """
  name: str
  samples: Tuple[Sample, ...]
  metrics: Tuple[str, ...]
  preferred_score: str
  low_score: float
  high_score: float
  task_prefix: str = ''
  separator: str = '\n'
  output_regex: Optional[str] = DEFAULT_OUTPUT_REGEX
  stop_string: Optional[str] = None
  absolute_normalization: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
  """A task by its folder's name: itself as the only part, or its sub-tasks in alphabetical order."""
  name: str
  parts: Tuple[Part, ...]


def read_tasks(path: str, names: Sequence[str]) -> Dict[str, Task]:
  """Tasks by name, in the order of `names`.

  Args:
    path: the source distribution (.tar.gz; read as a stream, nothing is unpacked), its unpacked folder, or the folder
      in which task folders lie.
    names: the tasks' folder names.

  Raises:
    ConfigError: nothing there, a task missing, or a file that is no task.
  """
  place = pathlib.Path(path).expanduser()
  require(place.exists(), f'BIG-bench = {path!r} does not exist; it is the bigbench source distribution (.tar.gz) or '
          'a folder with its tasks')
  documents = _folder_documents(place, names) if place.is_dir() else _archive_documents(place, names)
  missing = [name for name in names if name not in documents]
  require(not missing, f'BIG-bench = {path!r} lacks task.json of {", ".join(missing)}; bigbench 1.0.0 has them')
  return {name: _task(name, documents[name]) for name in names}


def _folder_documents(place: pathlib.Path, names: Sequence[str]) -> Dict[str, Dict[str, Any]]:
  """{task: {'' or sub-task: document}} of a folder."""
  homes = [home for pattern in FOLDERS for home in ([place] if pattern == '.' else sorted(place.glob(pattern)))]
  found = {}
  for name in names:
    home = next((home for home in homes if (home / name / 'task.json').is_file()), None)
    if home is not None:
      files = [home / name / 'task.json', *sorted((home / name).glob('*/task.json'))]
      found[name] = {'' if file.parent.name == name and file.parent.parent == home else file.parent.name:
                     _document(str(file), file.read_bytes()) for file in files}
  return found


def _archive_documents(place: pathlib.Path, names: Sequence[str]) -> Dict[str, Dict[str, Any]]:
  """As `_folder_documents`, of a compressed archive, in one pass."""
  found = {}
  pattern = re.compile(r'(?:^|/)benchmark_tasks/([^/]+)/(?:([^/]+)/)?task\.json$')
  try:
    with tarfile.open(place, 'r|*') as archive:
      for member in archive:
        match = pattern.search(member.name)
        if match and match[1] in names and member.isfile():
          content = archive.extractfile(member).read()
          found.setdefault(match[1], {})[match[2] or ''] = _document(f'{place}:{member.name}', content)
  except (tarfile.TarError, EOFError, OSError) as error:
    raise ConfigError(f'BIG-bench = {str(place)!r} cannot be read as a .tar.gz: {error}') from error
  return {name: dict(sorted(documents.items())) for name, documents in found.items()}


def _document(file: str, content: bytes) -> Dict[str, Any]:
  try:
    document = json.loads(content.decode('utf-8'))
  except (ValueError, RecursionError) as error:
    raise ConfigError(f'{file} is no JSON file: {error}') from error
  require(isinstance(document, dict), f'{file} holds {type(document).__name__}, a task is an object')
  return document


def _task(name: str, documents: Mapping[str, Any]) -> Task:
  if 'examples' in documents['']:
    return Task(name, (part(name, documents['']),))
  parts = tuple(part(f'{name}:{sub}', document) for sub, document in documents.items() if sub)
  require(bool(parts), f'task {name} has neither examples nor sub-tasks')
  return Task(name, parts)


def part(name: str, document: Mapping[str, Any]) -> Part:
  """The part that a task file describes.

  Raises:
    ConfigError: a field is missing or cannot be used; the message names part and field.
  """
  def field(key, default, kind):
    value = document.get(key, default)
    require(isinstance(value, kind), f'{name}: {key} = {value!r} is {type(value).__name__}, expected {kind.__name__}')
    return value

  wanted = tuple(dict.fromkeys(field('metrics', None, list)))
  for metric in wanted:
    require(metric in metrics_lib.METRICS, f'{name}: metric {metric!r} is not supported; valid: '
            f'{", ".join(metrics_lib.METRICS)}')
  preferred = field('preferred_score', None, str)
  computed = [figure for metric in wanted for figure in metrics_lib.METRICS[metric].figures]
  require(preferred in metrics_lib.RANGES and preferred in computed, f'{name}: preferred_score = {preferred!r} is not '
          f'among its metrics\' figures; valid: {", ".join(f for f in computed if f in metrics_lib.RANGES) or "none"}')
  kinds = {metrics_lib.METRICS[metric].kind for metric in wanted}
  examples = _distinct(name, field('examples', None, list))
  samples = tuple(_sample(f'{name}: example {number}', example, kinds, {
      # Anything but false, 0, null and '' shows the choices, the string "false" too: so does the benchmark's program.
      'show_choices': bool(document.get('append_choices_to_input', True)),
      'input_prefix': field('example_input_prefix', '\nQ: ', str),
      'output_prefix': field('example_output_prefix', '\nA: ', str),
      'choice_prefix': field('choice_prefix', '\n  choice: ', str)}) for number, example in enumerate(examples))
  low, high = metrics_lib.RANGES[preferred]
  if preferred == 'multiple_choice_grade':
    low = 100 * float(np.mean([np.mean(sample.scores) for sample in samples]))
  require(high > low, f'{name}: guessing gets {low:g}, the best possible {preferred} is {high:g}; nothing to measure')
  regex = None if document.get('output_regex') is None else field('output_regex', None, str)
  stop = None if document.get('stop_string') is None else field('stop_string', None, str)
  if regex is None and stop is None:
    regex = DEFAULT_OUTPUT_REGEX
  return Part(name=name, samples=samples, metrics=wanted, preferred_score=preferred, low_score=low, high_score=high,
              task_prefix=field('task_prefix', '', str), separator=field('few_shot_example_separator', '\n', str),
              output_regex=_checked_regex(name, regex), stop_string=stop or None,
              absolute_normalization=bool(document.get('absolute_normalization', False)))


def _checked_regex(name: str, regex: Optional[str]) -> Optional[str]:
  try:
    groups = re.compile(regex or '').groups
  except (re.error, OverflowError, RecursionError) as error:
    raise ConfigError(f'{name}: output_regex = {regex!r} is no regular expression: {error}') from error
  require(groups <= 1, f'{name}: output_regex = {regex!r} has {groups} groups, at most one can be the answer')
  return regex or None


def _distinct(name: str, examples: List[Any]) -> List[Any]:
  """Without repetitions, in order; two examples are the same if they are written alike."""
  require(bool(examples), f'{name}: examples is empty')
  return list({json.dumps(example): example for example in examples}.values())


def _sample(where: str, example: Any, kinds: set, style: Mapping[str, Any]) -> Sample:
  require(isinstance(example, dict) and isinstance(example.get('input'), str),
          f'{where} has no text under "input"')
  scores = example.get('target_scores')
  require(scores is not None or 'choice' not in kinds, f'{where} lacks target_scores, which its metrics need')
  require(isinstance(scores, (dict, type(None))) and all(
      isinstance(score, (int, float)) and np.isfinite(score) for score in (scores or {}).values()),
      f'{where}: target_scores is no object of numbers')
  require(scores is None or bool(scores), f'{where}: target_scores is empty')
  targets = example.get('target')
  require(targets is not None or kinds <= {'choice'}, f'{where} lacks target, which its metrics need')
  text = example['input']
  if scores and style['show_choices']:
    shown = np.random.RandomState(CHOICE_SEED).permutation(sorted(scores))
    text += ''.join(style['choice_prefix'] + choice for choice in shown)
  if targets is None:
    require(bool(scores), f'{where} has neither target nor target_scores')
    best = max(scores.values())
    require(best != 0 if len(scores) == 1 else best > min(scores.values()), f'{where} has no right choice')
    targets = next(choice for choice, score in scores.items() if score == best)
  targets = targets if isinstance(targets, list) else [targets]
  require(bool(targets) and all(isinstance(target, str) for target in targets),
          f'{where}: target = {targets!r} is neither text nor a list of texts')
  return Sample(style['input_prefix'] + text + style['output_prefix'], tuple(targets), tuple(scores or ()),
                tuple(float(score) for score in (scores or {}).values()))
