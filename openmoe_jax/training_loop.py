"""The loop: steps, and after some of them a log record, an evaluation, a checkpoint, or the end."""

import functools
import time
from typing import Any, Callable, Dict, Mapping, Optional, Sequence

import jax
import jax.numpy as jnp

from openmoe_jax import ending, launch
from openmoe_jax.alarms import DeadExperts, LossSpikes
from openmoe_jax.batch_hash import batch_hash
from openmoe_jax.checkpoints import Checkpointer
from openmoe_jax.config import RunConfig
from openmoe_jax.evaluation import Evaluator
from openmoe_jax.hang_detector import HangDetector
from openmoe_jax.metric_window import MetricWindow, not_finite
from openmoe_jax.profiling import StepProfiler
from openmoe_jax.progress import Progress
from openmoe_jax.train_state import TrainState
from openmoe_jax.writers import Writers, sparse_layers


class TrainingError(RuntimeError):
  """Training cannot go on; the message says why and what is kept."""


class TrainingLoop:
  """Trains a state to `run.train.train_steps`.

  Args:
    run: the settings.
    train_step: (state, global batch) -> (state, metrics); donates the state.
    streams: iterator of host batches with `state()`, the position after the batches handed out.
    to_global: host batch -> sharded global arrays.
    evaluator, writers, checkpointer, progress: where results go.
    tasks: (step, state) -> {task: figures}, called every `run.eval.period` steps and at the end; None: no tasks.
    profiler: of some steps.
  """

  def __init__(self, run: RunConfig, train_step: Callable, streams: Any, to_global: Callable, evaluator: Evaluator,
               writers: Writers, checkpointer: Checkpointer, progress: Progress,
               tasks: Optional[Callable[[int, Any], Mapping[str, Mapping[str, float]]]] = None,
               profiler: Optional[StepProfiler] = None):
    self._run = run
    self._train_step = train_step
    self._streams = streams
    self._to_global = to_global
    self._evaluator = evaluator
    self._writers = writers
    self._checkpointer = checkpointer
    self._progress = progress
    self._tasks = tasks
    self._profiler = profiler or StepProfiler('', None)
    self._hang = HangDetector(run.train.hang_minutes, functools.partial(ending.end_process, linger=launch.linger()))
    self._window = MetricWindow()
    self._set_alarms({})
    self._evaluated = -1  # the last step after which there was an evaluation
    self._tasks_done = -1  # the same of tasks
    self._finite = jax.jit(lambda tree: jnp.all(jnp.asarray([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])))

  def run(self, state: TrainState, saved: Mapping[str, Any]) -> TrainState:
    """Trains until the last step or until asked to stop; the final state is saved either way.

    Args:
      state: donated.
      saved: the `progress` of the checkpoint that `state` comes from; {} for a new run.

    Raises:
      TrainingError: loss or gradients were not finite in too many steps in a row, or parameters are not.
      CheckpointError: a checkpoint cannot be written.
    """
    step, end = int(state.step), self._run.train.train_steps
    self._window = MetricWindow(saved.get('window', {}))
    self._set_alarms(saved)
    self._evaluated = saved.get('evaluated', -1)
    self._tasks_done = saved.get('tasks_done', -1)
    if step >= end:
      self._progress.say(f'step {step} is reached and train_steps = {end}: nothing to train; a larger TRAIN_STEPS goes on')
      return state
    with self._progress, self._hang, launch.StopRequest() as stop:
      if saved and self._due(self._run.train.eval_period, step) and self._evaluated != step:
        self._evaluate(step, state)  # the last process was told to stop when this was due
      if saved and self._tasks_due(step):
        self._evaluate_tasks(step, state)
      state, step = self._steps(state, step, end, stop)
      self._hang.pause()
      if step < end:
        self._save(step, state, wait=True)
        self._progress.say(f'{stop.signal}: stopped, checkpoint {step} is saved; the same command goes on from here')
        return state
      if len(self._window):  # not emptied: a run that is extended later logs what one long run would
        self._log(end)
      if self._evaluated != end:
        self._evaluate(end, state)
      if self._tasks and self._tasks_done != end:
        self._evaluate_tasks(end, state)
      self._save(end, state, wait=True)
    return state

  def _steps(self, state: TrainState, step: int, end: int, stop: launch.StopRequest):
    """Steps until `end` or a request to stop; returns the state, accounted for, and its step."""
    under_way: Optional[tuple] = None
    first = time.monotonic()
    self._progress.say('compiling the training step ...')
    while step < end:
      batch = self._to_global(next(self._streams))  # on its way to the devices while they compute the step before
      name = batch_hash(batch)
      self._profiler.before(step + 1)
      state, metrics = self._train_step(state, batch)
      step += 1
      if under_way:  # the metrics of one step are fetched while the next one is computed
        self._account(*under_way)
      under_way = (step, metrics, name)
      stopping = stop.after(step)
      evaluate = self._due(self._run.train.eval_period, step)
      evaluate_tasks = self._tasks_due(step)
      save = self._due(self._run.checkpoint.period, step)
      profiled = self._profiler.due(step)
      if not (evaluate or evaluate_tasks or save or stopping or step == end or first or profiled):
        continue
      self._account(*under_way)
      under_way = None
      self._profiler.after(step)
      if first:
        self._progress.say(f'first step: {time.monotonic() - first:.1f} s with compilation')
        first = 0.
      if stopping or step == end:
        break
      self._hang.pause()
      if evaluate:
        self._evaluate(step, state)
      if evaluate_tasks:
        self._evaluate_tasks(step, state)
      if save and not self._window.skipped_in_a_row:  # the last checkpoint before trouble is not rotated away by it
        self._save(step, state)
      if evaluate or evaluate_tasks or save or profiled:
        self._progress.clock.pause()
      self._hang.alive(step)
    self._profiler.stop()
    return state, step

  def _set_alarms(self, saved: Mapping[str, Any]) -> None:
    train = self._run.train
    self._loss_spikes = LossSpikes(train.loss_spike_sigmas, saved.get('loss_spikes', {}))
    self._dead_experts = DeadExperts(train.dead_expert_load, sparse_layers(self._run.model), saved.get('dead_experts', {}))

  def _due(self, period: int, step: int) -> bool:
    return period > 0 and step % period == 0

  def _tasks_due(self, step: int) -> bool:
    return self._tasks is not None and self._due(self._run.eval.period, step) and self._tasks_done != step

  def _account(self, step: int, metrics: Mapping[str, jax.Array], name: jax.Array) -> None:
    """Waits for a step's metrics and its batch's name, checks and adds them up, and logs if it is time."""
    values, name = jax.device_get((metrics, name))
    self._checkpointer.check()
    self._progress.clock.tick()
    self._hang.alive(step)
    skipped_before = self._window.skipped_in_a_row
    self._window.add(values, name)
    self._look_at(step, values, skipped_before)
    if not values['skipped']:
      self._warn(step, self._loss_spikes.after_step(float(values['loss'])))
    logged = self._due(self._run.train.log_period, step)
    if logged:
      means = self._log(step)
      if 'expert_load' in means:
        self._warn(step, self._dead_experts.after_window(means['expert_load'], self._run.train.log_period))
      self._window.restart()
    self._progress.update(step, values, logged)

  def _look_at(self, step: int, values: Mapping[str, Any], skipped_before: int) -> None:
    """Says that steps are skipped, once for those in a row, and stops where training broke down."""
    broken, row = not_finite(values), self._window.skipped_in_a_row
    what = f'{broken} is {float(values[broken])}' if broken else ''
    if broken == 'param_norm':
      self._stop(step, what)
    if self._run.train.stop_on_nan and row >= self._run.train.max_skipped_steps:
      self._stop(step, what, f' (skipped; {row} such in a row)')
    if row == 1:
      self._warn(step, [f'{what}; the step is skipped, parameters and optimizer stay as they are'])
    elif skipped_before and not row:
      self._warn(step, [f'finite again after {skipped_before} skipped steps; {self._window.skipped_steps} since the run '
                        'began'])

  def _warn(self, step: int, lines: Sequence[str]) -> None:
    for line in lines:
      self._progress.say(f'step {step}: {line}')
      self._writers.warning(step, line)

  def _stop(self, step: int, what: str, note: str = '') -> None:
    """Raises `TrainingError`: training broke down at this step, in the way that `what` says."""
    kept = self._checkpointer.steps()
    self._writers.flush()
    raise TrainingError(
        f'{what} at step {step}{note}: training stopped. ' +
        (f'Checkpoint {kept[-1]} is kept. ' if kept else 'There is no checkpoint yet. ') +
        f'--replay_step={step} shows the batch of that step; a lower learning rate, OptimizerConfig.max_grad_norm or '
        "dtype 'float32' may help; --gin.TrainConfig.max_skipped_steps=N skips more steps in a row.")

  def _tokens(self, step: int) -> int:
    return step * self._run.data.batch_size * self._run.data.row_length

  def _log(self, step: int) -> Mapping[str, Any]:
    means = self._window.means()
    self._writers.train(step, {'tokens': self._tokens(step), **means, **self._progress.rates()})
    return means

  def _evaluate(self, step: int, state: TrainState) -> None:
    try:
      evaluation = self._evaluator(state.variables)
    except Exception:
      self._save(step, state, wait=True)  # the steps since the last checkpoint are not lost with it
      raise
    for source, record in evaluation.items():
      self._writers.evaluation(step, source, {'tokens': self._tokens(step), **record})
      self._progress.say(f'validation at step {step}: {describe_evaluation(source, record)}')
    self._evaluated = step

  def _evaluate_tasks(self, step: int, state: TrainState) -> None:
    try:
      figures = self._tasks(step, state)
    except Exception:
      self._save(step, state, wait=True)
      raise
    for task, record in figures.items():
      self._writers.task(step, task, {'tokens': self._tokens(step), **record})
    self._tasks_done = step

  def _save(self, step: int, state: TrainState, wait: bool = False) -> None:
    self._writers.flush()  # no checkpoint is ahead of its history
    # A step is skipped for its gradients. An update of finite ones that broke down would show after it was saved.
    if not self._finite((state.params, state.opt_state, state.router_state)):
      self._stop(step, 'an update of the parameters or the optimizer state is not finite')
    progress = {'window': self._window.state(), 'evaluated': self._evaluated, 'tasks_done': self._tasks_done,
                'loss_spikes': self._loss_spikes.state(), 'dead_experts': self._dead_experts.state()}
    self._checkpointer.save(state, self._streams.state(), progress, wait)


def describe_evaluation(source: str, record: Dict[str, Any]) -> str:
  """'demo_code_full_lm loss 4.1 (unigram entropy 6.2), perplexity 60.3, accuracy 24.1%'."""
  return (f'{source} loss {record["loss"]:.4f} (unigram entropy {record["unigram_entropy"]:.4f}), perplexity '
          f'{record["perplexity"]:.1f}, accuracy {100 * record["accuracy"]:.1f}%')
