"""BIG-bench-Lite: 24 tasks that stand for the whole benchmark (Srivastava et al. 2022, version bigbench_lite_v1).

A task's score is the mean over its parts of their normalised preferred scores, whatever their sizes; the benchmark's is
the mean over its tasks: 100 is perfect, 0 is guessing, below 0 worse than guessing.
"""

import dataclasses
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from openmoe_jax import gin_utils
from openmoe_jax.bigbench import prompting, reading
from openmoe_jax.bigbench.metrics import METRICS
from openmoe_jax.bigbench.reading import Part, Task
from openmoe_jax.bigbench.requests import Request, Response, Score, requests, score
from openmoe_jax.config import require

TASKS = (
    'auto_debugging', 'bbq_lite_json', 'code_line_description', 'conceptual_combinations', 'conlang_translation',
    'emoji_movie', 'formal_fallacies_syllogisms_negation', 'hindu_knowledge', 'known_unknowns',
    'language_identification', 'linguistics_puzzles', 'logic_grid_puzzle', 'logical_deduction',
    'misconceptions_russian', 'novel_concepts', 'operators', 'parsinlu_reading_comprehension',
    'play_dialog_same_or_different', 'repeat_copy_logic', 'strange_stories', 'strategyqa', 'symbol_interpretation',
    'vitaminc_fact_verification', 'winowhy')

Respond = Callable[[Sequence[Request]], Sequence[Response]]


@dataclasses.dataclass(frozen=True)
class TaskScore:
  """A task's parts together.

  Attributes:
    name: of the task.
    normalised: mean of the parts' normalised preferred scores.
    figures: mean over the parts that have it, for every figure.
    parts: the parts' scores.
  """
  name: str
  normalised: float
  figures: Dict[str, float]
  parts: Tuple[Score, ...]


@dataclasses.dataclass(frozen=True)
class Report:
  """What `evaluate` found.

  Attributes:
    normalised: the mean of the tasks' normalised scores: the benchmark's aggregate if `complete`.
    tasks: scores by task.
    complete: whether all of BIG-bench-Lite is there, every example of it.
  """
  normalised: float
  tasks: Dict[str, TaskScore]
  complete: bool


def read_lite(path: str, names: Sequence[str] = TASKS) -> Dict[str, Task]:
  """BIG-bench-Lite's tasks, or those in `names`, from the source distribution or a folder (`reading.read_tasks`).

  Raises:
    ConfigError: a name that is none of BIG-bench-Lite, or as `reading.read_tasks`.
  """
  for name in names:
    require(name in TASKS, f'BIG-bench-Lite task {name!r} is not known{gin_utils.suggest(name, TASKS)}; valid: '
            f'{", ".join(TASKS)}')
  return reading.read_tasks(path, names)


def evaluate(tasks: Mapping[str, Task], respond: Respond, shots: int = 3, seed: int = 42,
             max_examples: Optional[int] = None, strip: bool = True, preferred_only: bool = False,
             max_tokens: int = 256) -> Report:
  """Puts every task's questions to a model.

  Args:
    tasks: from `read_lite`.
    respond: answers a part's requests, in order; called once per part, so that it can batch by length.
    shots, seed, strip: as in `prompting.examples`.
    max_examples: questions per task at most, divided evenly among its parts; None for all (the benchmark's figure).
    preferred_only: leave out figures that do not count for the aggregate, and the requests for them.
    max_tokens: of a generated answer.

  Raises:
    ConfigError: as `check` and `prompting.examples`, before anything is asked.
  """
  check(tasks, shots, max_examples)
  scores: Dict[str, List[Score]] = {}
  for task in tasks.values():
    limit = None if max_examples is None else max_examples // len(task.parts)
    for part in task.parts:
      part = only_preferred(part) if preferred_only else part
      asked = list(prompting.examples(part, shots, seed, limit, strip))
      answers = respond(requests(part, asked, max_tokens))
      scores.setdefault(task.name, []).append(score(part, asked, answers, shots))
  whole = all(got.examples == len(part.samples) for task in tasks.values()
              for got, part in zip(scores[task.name], task.parts))
  return aggregate(scores, whole)


def check(tasks: Mapping[str, Task], shots: int, max_examples: Optional[int] = None) -> None:
  """Raises `ConfigError` if some task has too few examples for `shots`, or more parts than `max_examples`."""
  for task in tasks.values():
    limit = None
    if max_examples is not None:
      require(max_examples >= len(task.parts), f'max_examples = {max_examples} is less than one for each of the '
              f'{len(task.parts)} parts of {task.name}')
      limit = max_examples // len(task.parts)
    for part in task.parts:
      prompting.examples(part, shots, max_examples=limit)


def only_preferred(part: Part) -> Part:
  """The part without metrics that its preferred score does not come from."""
  kept = next(name for name in part.metrics if part.preferred_score in METRICS[name].figures)
  return dataclasses.replace(part, metrics=(kept,))


def aggregate(scores: Mapping[str, Sequence[Score]], whole: bool = True) -> Report:
  """Scores of parts by task, made into one figure.

  Args:
    whole: whether the scores are of all examples.
  """
  tasks = {}
  for name, parts in scores.items():
    figures = list(dict.fromkeys(figure for part in parts for figure in part.figures))
    tasks[name] = TaskScore(name, float(np.mean([part.normalised for part in parts])), {
        figure: float(np.mean([part.figures[figure] for part in parts if figure in part.figures]))
        for figure in figures}, tuple(parts))
  return Report(float(np.mean([task.normalised for task in tasks.values()])), tasks, whole and set(tasks) == set(TASKS))
