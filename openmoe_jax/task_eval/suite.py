"""Everything that a model can be evaluated on, by name."""

import dataclasses
import importlib
import time
from typing import Any, Callable, Dict, List, NamedTuple

import jax

from openmoe_jax import code_execution
from openmoe_jax import decoding
from openmoe_jax import partitioning
from openmoe_jax.bar import Bar
from openmoe_jax.config import DataConfig, EvalConfig, MeshConfig, RunConfig, from_dict, require
from openmoe_jax.progress import short_number
from openmoe_jax.task_eval import bigbench_lite, programs, seqio_tasks
from openmoe_jax.task_eval.answers import Answerer

PERPLEXITY = 'perplexity of '


class Result(NamedTuple):
  """What an evaluation found.

  Attributes:
    name: of the task, or 'perplexity of MIXTURE'.
    figures: by name; shares are in percent.
    predictions: a dictionary a question; [] for perplexity.
    num_examples: questions, or target tokens of a perplexity.
    num_cut: questions that were cut to fit the window.
    seconds: that it took, compilation included.
  """
  name: str
  figures: Dict[str, float]
  predictions: List[Dict[str, Any]]
  num_examples: int
  num_cut: int
  seconds: float


class Suite:
  """The tasks of the settings with their data, which are read once, when it is made.

  Args:
    settings: which tasks, and how answers are made.
    data: of the model's run: vocabulary, rows, where TFDS data sets lie.
    perplexity: False leaves EvalConfig.perplexity out.
    allow_code_execution: whether programs that a model writes may be run.
    say: prints a line.

  Raises:
    ConfigError: an unknown task, or one that cannot be evaluated; data that are missing or damaged.
  """

  def __init__(self, settings: EvalConfig, data: DataConfig, perplexity: bool = True,
               allow_code_execution: bool = False, say: Callable[[str], None] = print):
    self._settings = settings
    self._data = data
    self._run_programs = allow_code_execution
    from openmoe_jax import mixtures
    mixtures.load_tasks(data, '')
    importlib.import_module('openmoe_jax.tasks.evaluation').configure(settings.data_dir)
    repeated = {name for name in settings.tasks if settings.tasks.count(name) > 1}
    require(not repeated, f'EvalConfig.tasks names {", ".join(sorted(repeated))} twice')
    self._bigbench = bigbench_lite.read(settings) if bigbench_lite.NAME in settings.tasks else {}
    self._questions = {name: seqio_tasks.read(name, settings, data) for name in settings.tasks
                       if name != bigbench_lite.NAME}
    with_programs = [name for name, questions in self._questions.items() if programs.has_programs(questions.examples)]
    if with_programs and allow_code_execution:
      say(code_execution.isolation().sentence())
    elif with_programs:
      say(f'{", ".join(with_programs)}: without --allow_code_execution no program is run, so there is no pass@k')
    self._perplexity = {PERPLEXITY + name: name for name in settings.perplexity} if perplexity else {}
    for name in self._perplexity.values():
      mixtures.provider_for(data, name, data.eval_split, 'EvalConfig.perplexity')

  @property
  def names(self) -> List[str]:
    """What `evaluate` knows, in the order of the settings."""
    return [*self._settings.tasks, *self._perplexity]

  def evaluate(self, name: str, model: Any, say: Callable[[str], None] = print) -> Result:
    """Evaluates a model on one of `names`; every process of a run calls it and gets the same.

    Args:
      model: `loading.Model`; of a run with several processes, on its mesh.
      say: prints a line.

    Raises:
      ConfigError: a question that does not fit the window.
    """
    start = time.monotonic()
    if name in self._perplexity:
      figures = _perplexity(self._settings, self._data, self._perplexity[name], model)
      return Result(name, figures, [], int(figures.pop('num_target_tokens')), 0, time.monotonic() - start)
    if name == bigbench_lite.NAME:
      total = bigbench_lite.count(self._bigbench, self._settings)
    else:
      total = len(self._questions[name].examples)
    with Bar(total, say, name, lambda n: f'{short_number(n)} answers') as bar:
      bar.advance(0)
      answerer = Answerer(model, self._settings, bar.advance)
      if name == bigbench_lite.NAME:
        found = bigbench_lite.evaluate(self._bigbench, answerer)
        total = len(found['predictions'])
      else:
        found = seqio_tasks.evaluate(self._questions[name], answerer, self._run_programs)
        total = self._questions[name].count
    return Result(name, found['figures'], found['predictions'], total, answerer.cut, time.monotonic() - start)


def _perplexity(settings: EvalConfig, data: DataConfig, mixture: str, model: Any) -> Dict[str, float]:
  """Figures of the validation split of a mixture: `perplexity`, `loss` in nats per token, `accuracy` in percent."""
  from openmoe_jax.evaluation import Evaluator
  from openmoe_jax.train_step import make_eval_step
  config = decoding.dropless(model.config) if settings.capacity_mode == 'none' else decoding.t5x(model.config)
  mesh = model.mesh
  if mesh is None:
    mesh = partitioning.make_mesh(MeshConfig(), jax.local_devices()[:1])
  run = dataclasses.replace(from_dict(RunConfig, model.run), model=config,
                            data=dataclasses.replace(data, eval_mixture_or_task=mixture))
  records = Evaluator(run, mesh, make_eval_step(config, mesh=mesh))(model.variables)
  record = records[mixture] if mixture in records else next(iter(records.values()))  # a mixture of one task
  return {'perplexity': record['perplexity'], 'loss': record['loss'], 'accuracy': 100 * record['accuracy'],
          'num_target_tokens': record['num_target_tokens']}
