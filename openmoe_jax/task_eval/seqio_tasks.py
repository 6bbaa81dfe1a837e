"""Evaluation tasks of seqio: their examples, asked and marked as `seqio.Evaluator` does it.

A task with a metric of (targets, predictions) is answered by generation, one with a metric of (targets, scores) by the
log-likelihoods of its targets. Post-processing and metrics are the task's own.
"""

from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence

import numpy as np

from openmoe_jax import mixtures
from openmoe_jax.config import DataConfig, EvalConfig, require
from openmoe_jax.task_eval import programs
from openmoe_jax.task_eval.answers import Answerer

_RECORD = 'idx'  # of rank classification: number of the question, number of the answer


class Questions(NamedTuple):
  """A task and its examples.

  Attributes:
    task: seqio's.
    examples: dictionaries of NumPy arrays; `inputs` and `targets` are ids.
    by_likelihood: whether the targets are scored.
  """
  task: Any
  examples: List[Mapping[str, Any]]
  by_likelihood: bool

  @property
  def count(self) -> int:
    """Questions, each with all its possible answers."""
    return _records(self.examples, self.by_likelihood)


def read(name: str, settings: EvalConfig, data: DataConfig) -> Questions:
  """The examples of a registered task; the vocabulary is the configured one.

  Raises:
    ConfigError: no such task or split, a task that cannot be evaluated, no data.
  """
  mixtures.load_tasks(data, name)
  task = mixtures.find_mixture(name, 'EvalConfig.tasks')
  generates, ranks = bool(getattr(task, 'predict_metric_fns', ())), bool(getattr(task, 'score_metric_fns', ()))
  require(generates != ranks, f'EvalConfig.tasks: {name} has no metric of predictions or of scores, so there is nothing to '
          f"mark; EvalConfig.perplexity = ('{name}',) measures its perplexity")
  require(settings.split in task.splits, f'EvalConfig.split = {settings.split!r}: {name} has '
          f'{" and ".join(map(repr, sorted(task.splits)))}')
  examples: List[Mapping[str, Any]] = []
  with mixtures.reading(task):
    dataset = task.get_dataset(None, split=settings.split, shuffle=False, num_epochs=1, trim_output_features=False,
                               try_in_mem_cache=False)
    for example in dataset.as_numpy_iterator():
      examples.append(example)
      if settings.max_examples and _records(examples, ranks) > settings.max_examples:
        examples.pop()
        break
  require(examples, f'{name} gives no examples in split {settings.split!r}')
  return Questions(task, examples, ranks)


def _records(examples: Sequence[Mapping[str, Any]], ranks: bool) -> int:
  if ranks and np.ndim(examples[0].get(_RECORD)) == 1:
    return len({int(example[_RECORD][0]) for example in examples})
  return len(examples)


def evaluate(questions: Questions, answerer: Answerer, allow_code_execution: bool = False) -> Dict[str, Any]:
  """`figures`, the task's metrics (of generated answers, means over the samples), and `predictions`, a dictionary a
  question. Generated programs are run where that is allowed; pass@k is then among the figures."""
  if questions.by_likelihood:
    return _by_likelihood(questions, answerer)
  return _by_generation(questions, answerer, allow_code_execution)


def _by_generation(questions: Questions, answerer: Answerer, allow_code_execution: bool) -> Dict[str, Any]:
  task, examples = questions.task, questions.examples
  answers = answerer.generate([_ids(example, 'inputs') for example in examples], task.name)
  targets = [_processed(task, _text(answerer, example, 'targets'), example, True) for example in examples]
  figures: List[Dict[str, float]] = []
  processed: List[List[Any]] = []
  for sample in range(answerer.settings.num_samples):
    # As seqio gives them: decoded apart from the question, without the space that may stand in front.
    texts = [answerer.model.vocabulary.decode(answer[sample].ids) for answer in answers]
    processed.append([_processed(task, text, example, False) for text, example in zip(texts, examples)])
    figures.append(_marks(task.predict_metric_fns, targets, processed[-1]))
  predictions = [{**_described(answerer, example), 'target': target, 'outputs': [a.text for a in answer],
                  'answers': [values[i] for values in processed]}
                 for i, (example, answer, target) in enumerate(zip(examples, answers, targets))]
  means = {name: float(np.mean([marks[name] for marks in figures])) for name in figures[0]}
  if allow_code_execution and programs.has_programs(examples):
    rates, status = programs.run(examples, answers)
    means = {**rates, **means}
    for prediction, row in zip(predictions, status):
      prediction['status'] = row
  return {'figures': means, 'predictions': predictions}


def _by_likelihood(questions: Questions, answerer: Answerer) -> Dict[str, Any]:
  task, examples = questions.task, questions.examples
  scores, greedy = answerer.score([_ids(example, 'inputs') for example in examples],
                                  [_ids(example, 'targets') for example in examples], task.name)
  scores = [float(score) for score in scores]
  targets = [_processed(task, _text(answerer, example, 'targets'), example, True) for example in examples]
  predictions = [{**_described(answerer, example), 'target': _text(answerer, example, 'targets'), 'log_likelihood': score,
                  'greedy': bool(best)} for example, score, best in zip(examples, scores, greedy)]
  return {'figures': _marks(task.score_metric_fns, targets, scores), 'predictions': predictions}


def _marks(metrics: Sequence[Callable], targets: Sequence[Any], found: Sequence[Any]) -> Dict[str, float]:
  figures: Dict[str, float] = {}
  for metric in metrics:
    figures.update({name: float(value) for name, value in metric(targets, found).items()})
  return figures


def _ids(example: Mapping[str, Any], feature: str) -> List[int]:
  return [int(i) for i in example.get(feature, ())]


def _text(answerer: Answerer, example: Mapping[str, Any], feature: str) -> str:
  value = example.get(f'{feature}_pretokenized')
  if value is None:
    return answerer.model.vocabulary.decode(_ids(example, feature))
  return value.decode('utf-8') if isinstance(value, bytes) else str(value)


def _processed(task: Any, text: str, example: Mapping[str, Any], is_target: bool) -> Any:
  return task.postprocess_fn(text, example=example, is_target=is_target)


def _described(answerer: Answerer, example: Mapping[str, Any]) -> Dict[str, Any]:
  """What of an example goes into the file of predictions: its text, and the fields that a task keeps for its metric."""
  kept = {name: value for name, value in example.items()
          if name not in ('inputs', 'targets') and not name.endswith('_pretokenized')}
  return {'input': _text(answerer, example, 'inputs'), **{name: plain(value) for name, value in kept.items()}}


def plain(value: Any) -> Any:
  """A value of NumPy or TensorFlow as one of JSON."""
  if isinstance(value, bytes):
    return value.decode('utf-8', 'replace')
  if hasattr(value, 'to_list'):  # ragged
    return plain(value.to_list())
  if isinstance(value, np.ndarray):
    return plain(value.tolist())
  if isinstance(value, (list, tuple)):
    return [plain(item) for item in value]
  if isinstance(value, np.generic):
    return value.item()
  return value
