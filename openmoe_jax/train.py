"""Trains a model.

  openmoe-train --gin_file=recipes/demo.gin --model_dir=DIR
  openmoe-train --gin_file=recipes/demo.gin --model_dir=DIR --gin.BATCH_SIZE=16 --print_config
  openmoe-train --gin_file=recipes/demo.gin --model_dir=DIR --replay_step=100

The same command starts a run, goes on with one that was stopped or killed, and extends one that is finished (with a
larger TRAIN_STEPS). Several processes share a run: on a TPU pod or under SLURM they find each other, anywhere else give
each --coordinator_address, --num_processes and --process_id.
"""

import contextlib
import functools
import sys
import time
from typing import Any, Callable, Dict, Mapping, NoReturn, Optional, Sequence, Tuple

import jax

from openmoe_jax import checkpoints, command_line, compiler_options, ending, launch, paths, pipeline, profiling, resume
from openmoe_jax.analysis.flops import train_flops_per_token
from openmoe_jax.config import ConfigError, RunConfig, require, to_dict
from openmoe_jax.evaluation import Evaluator
from openmoe_jax.optimizers import make_optimizer
from openmoe_jax.partitioning import make_mesh, validate_mesh
from openmoe_jax.progress import Progress, duration, peak_flops
from openmoe_jax.schedules import learning_rate_schedule
from openmoe_jax.train_state import TrainState, abstract_train_state, init_params, init_train_state, state_shardings
from openmoe_jax.train_step import make_eval_step, make_train_step
from openmoe_jax.training_loop import TrainingError, TrainingLoop
from openmoe_jax.writers import Writers, sparse_layers


def main(argv: Optional[Sequence[str]] = None) -> None:
  """The program openmoe-train. Exit status: 0 done or stopped and saved, 2 a mistake in the settings, 3 another process
  was lost or no step was done for too long (start again), 1 anything else."""
  launch.run_together(lambda: command_line.run_main(_main, argv))


def _main(argv: Optional[Sequence[str]]) -> None:
  parser = command_line.Parser(prog='openmoe-train', description=__doc__)
  parser.add_argument('--replay_step', type=int, metavar='N', help='show the batch, loss and routing of step N and stop')
  parser.add_argument('--profile_steps', metavar='FIRST:LAST', help='record these steps, into the folder profile of model_dir, '
                      'for TensorBoard and Perfetto; not the first, which compiles')
  parser.add_argument('--coordinator_address', metavar='HOST:PORT', help='where process 0 listens')
  parser.add_argument('--num_processes', type=int, help='how many processes share the run')
  parser.add_argument('--process_id', type=int, help='which of them this is, from 0')
  args = parser.parse_args(argv)
  run = command_line.run_config(args)
  if args.print_config:
    print(command_line.format_config(run))
    return
  profile_steps = profiling.parse_steps(args.profile_steps) if args.profile_steps is not None else None
  launch.initialize(args.coordinator_address, args.num_processes, args.process_id, run.train.lost_process_seconds)
  try:
    if args.replay_step is not None:
      from openmoe_jax.replay import replay
      print(replay(run, args.replay_step))
    else:
      train(run, profile_steps)
  except (checkpoints.CheckpointError, TrainingError) as error:
    _fail(str(error))
  except launch.ProcessError as error:
    _fail(str(error), ending.START_AGAIN)
  except Exception as error:
    if not paths.is_disk_full(error):
      if isinstance(error, OSError) and str(error.filename or '').startswith(str(paths.path(run.model_dir))):
        _fail(f'{error.strerror}: {error.filename}; is the disk still there, and was model_dir moved or removed?')
      raise
    kept = checkpoints.finished_steps(paths.path(run.model_dir) / checkpoints.CHECKPOINTS)
    _fail(f'the disk of model_dir = {run.model_dir!r} is full ({checkpoints.one_line(error, 120)}); ' +
          (f'checkpoint {kept[-1]} is complete. ' if kept else 'there is no checkpoint yet. ') +
          'Make room and start the same command again.')


def _fail(message: str, status: int = 1) -> NoReturn:
  print(f'openmoe-train: {message}', file=sys.stderr, flush=True)
  sys.exit(status)


def train(run: RunConfig, profile_steps: Optional[Tuple[int, int]] = None) -> None:
  """Runs training from where model_dir stands to `run.train.train_steps`.

  Args:
    profile_steps: first and last step of which a profile is recorded.

  Raises:
    ConfigError: a mistake in the settings, before anything is compiled or written.
    CheckpointError: a checkpoint cannot be written, or none can be read.
    TrainingError: loss, gradients or parameters are no longer finite.
  """
  started = time.monotonic()
  steps_there = resume.claim_model_dir(run)
  mesh = make_mesh(run.mesh)
  compiler_options.check(run.mesh, mesh)
  _check_rows(run, mesh)
  optimizer = make_optimizer(run.optimizer, run.train.train_steps)
  template, initialise = born_sharded(run, optimizer, mesh)
  notes, same_data = _compare_with_saved(run, steps_there)
  resume.check_room(run, template)

  from openmoe_jax import data, vocabulary  # TensorFlow is loaded when the settings above are known to be good
  vocabulary.configure(run.data.vocabulary, run.data.extra_ids)
  vocabulary.check_fits(run.model.vocab_size)
  streams = data.TrainStreams(run.data, run.train.num_microbatches, data.local_stream_ids(mesh, run.data))
  evaluator = Evaluator(run, mesh, make_eval_step(run.model, mesh=mesh, mesh_config=run.mesh))
  suite = _suite(run)

  primary = jax.process_index() == 0
  tokens_per_step = run.data.batch_size * run.data.row_length
  rows = run.data.batch_size // run.train.num_microbatches
  progress = Progress(run.train.train_steps, tokens_per_step,
                      train_flops_per_token(run.model, run.data.row_length, rows),
                      peak_flops(mesh.devices.flat[0].device_kind, mesh.size), show=primary)
  progress.say(f'model_dir {run.model_dir}; {launch.describe_devices(mesh)}; '
               f'{sum(x.size for x in jax.tree.leaves(template.params)):,} parameters')
  profiler = profiling.StepProfiler(paths.path(run.model_dir) / profiling.FOLDER, profile_steps, progress.say)
  if mesh.shape['pipe'] > 1:
    stages, microbatches = mesh.shape['pipe'], run.train.num_microbatches
    progress.say(f'pipeline of {stages} stages, {microbatches} microbatch(es) a step: stages wait for '
                 f'{pipeline.bubble(stages, microbatches):.1%} of the time')
  for note in notes:
    progress.say(f'changed since the last checkpoint: {note}')

  to_global = lambda batch: data.to_global(batch, mesh, stream_ids=streams.stream_ids, num_streams=run.data.num_streams)
  train_step = make_train_step(run.model, optimizer, run.train.num_microbatches, mesh=mesh, mesh_config=run.mesh,
                               seed=run.train.seed,
                               schedule=learning_rate_schedule(run.optimizer, run.train.train_steps),
                               routing_metrics=run.train.routing_metrics)
  with resume.hold_model_dir(run):
    checkpointer = checkpoints.Checkpointer(run)
    state, saved = _first_state(run, checkpointer, template, initialise, streams, same_data, progress.say)
    resume.write_config(run)
    writers = Writers(run.model_dir, run.model, write=primary, max_keys=run.train.max_metric_keys,
                      num_sources=evaluator.num_records, say=progress.say)
    writers.begin(int(state.step))
    writers.text(int(state.step), {'config': command_line.format_config(run)})
    loop = TrainingLoop(run, train_step, streams, to_global, evaluator, writers, checkpointer, progress,
                        suite and functools.partial(_evaluate_tasks, run, mesh, suite, progress.say), profiler)
    try:
      state = loop.run(state, saved)
    except BaseException:
      for part in (writers, checkpointer):  # what is under way is finished if it can be; the first error counts
        with contextlib.suppress(Exception):
          part.close()
      raise
    writers.close()
    checkpointer.close()

  if run.train.plots and primary:
    from openmoe_jax.analysis import plots
    for file in plots.write_plots(run.model_dir, sparse_layers(run.model)):
      progress.say(f'wrote {file}')
  verb = 'finished' if int(state.step) >= run.train.train_steps else 'stopped'
  progress.say(f'{verb} after {duration(time.monotonic() - started)}; everything is in {run.model_dir}')


def _suite(run: RunConfig) -> Any:
  """The evaluation tasks that are to run during training, with their data; None if there are none."""
  if not run.eval.tasks or not run.eval.period:
    return None
  require(run.model.router != 'expert_choice', f'EvalConfig.tasks = {run.eval.tasks} generate and score text, which '
          "ModelConfig.router = 'expert_choice' cannot; EvalConfig.tasks = () trains without them")
  from openmoe_jax.task_eval.suite import Suite
  return Suite(run.eval, run.data, perplexity=False)


def _evaluate_tasks(run: RunConfig, mesh: jax.sharding.Mesh, suite: Any, say: Callable[[str], None], step: int,
                    state: TrainState) -> Dict[str, Dict[str, float]]:
  """{task: figures} of the model after a step."""
  from openmoe_jax.loading import Model
  model = Model(run.model, state.params, step, to_dict(run), mesh, state.router_state)
  figures = {}
  for name in suite.names:
    figures[name] = suite.evaluate(name, model, say=lambda text: None).figures
    say(f'{name} at step {step}: ' + ', '.join(f'{figure} {value:.4g}' for figure, value in figures[name].items()))
  return figures


def _check_rows(run: RunConfig, mesh: jax.sharding.Mesh) -> None:
  """Every batch must divide over the mesh."""
  validate_mesh(run.model, mesh.shape, run.data.batch_size // run.train.num_microbatches, run.mesh.optimizer_fsdp)
  shards = mesh.shape['data'] * mesh.shape['expert']
  eval_rows = run.data.eval_batch_size or run.data.batch_size
  tokens, replicas = run.data.batch_size // run.train.num_microbatches * run.data.row_length, run.model.num_expert_replicas
  require(replicas == 1 or replicas * run.model.num_experts <= tokens, f'ModelConfig.num_expert_replicas = {replicas} '
          f'asks for at least {replicas * run.model.num_experts} groups, more than a microbatch has tokens ({tokens})')
  require(eval_rows % shards == 0, f'DataConfig.eval_batch_size = {eval_rows} must be a multiple of MeshConfig data x '
          f'expert = {shards}')


def born_sharded(run: RunConfig, optimizer: Any, mesh: jax.sharding.Mesh) -> Tuple[TrainState, Callable[[], TrainState]]:
  """Shapes and shardings of the state, and a function that makes a random one, each array where it belongs."""
  shapes = abstract_train_state(run.model, optimizer)
  where = state_shardings(shapes, mesh, run.mesh)
  template = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)

  def initialise() -> TrainState:
    make = lambda: init_train_state(run.model, optimizer, init_params(run.model, run.train.seed))
    with jax.set_mesh(mesh):
      return jax.jit(make, out_shardings=where)()

  return template, initialise


def _compare_with_saved(run: RunConfig, steps_there: Sequence[int]) -> Tuple[Sequence[str], bool]:
  """What changed since the newest checkpoint whose configuration can be read, and whether its data position holds."""
  for step in reversed(steps_there):
    directory = paths.path(run.model_dir) / checkpoints.CHECKPOINTS / str(step)
    try:
      saved = checkpoints.read_config(directory)
    except Exception:  # damaged: `Checkpointer.restore` will find out and say so
      continue
    return resume.check_changes(saved, run, run.model_dir)
  return [], True


def _first_state(run: RunConfig, checkpointer: checkpoints.Checkpointer, template: TrainState,
                 initialise: Callable[[], TrainState], streams: Any, same_data: bool, say: Callable[[str], None]
                 ) -> Tuple[TrainState, Mapping[str, Any]]:
  """The state to go on from, and the checkpoint's progress record.

  A checkpoint in model_dir always wins; else the warm start that was asked for; else random parameters.
  """
  restored = checkpointer.restore(template, streams.stream_ids, with_data=same_data)
  if restored is not None:
    for step, reason in restored.damaged.items():
      say(f'checkpoint {step} is damaged and was moved to {run.model_dir}/{checkpoints.DAMAGED}: {reason}')
    say(f'resuming from checkpoint {restored.step}')
    if restored.damaged:  # the settings were compared with those of a newer one
      directory = paths.path(run.model_dir) / checkpoints.CHECKPOINTS / str(restored.step)
      _, same_data = resume.check_changes(checkpoints.read_config(directory), run, run.model_dir)
    if same_data:
      same_data = _restore_streams(run, streams, restored.data_state, say)
    if not same_data:
      say('the data changed: every data stream begins anew')
    return restored.state, restored.progress
  if run.checkpoint.initial_checkpoint_path:
    state, what = resume.warm_start(run, template, initialise)
    say(what)
    return state, {}
  require(run.model.router != 'frozen', f"ModelConfig.router = 'frozen' goes on from a checkpoint with a table of experts, "
          f'and model_dir = {run.model_dir!r} holds none; python -m openmoe_jax.tools.freeze_router CHECKPOINT OUT makes one')
  say('starting from random parameters')
  return initialise(), {}


def _restore_streams(run: RunConfig, streams: Any, data_state: Mapping[int, bytes], say: Callable[[str], None]) -> bool:
  """Whether the streams could go on from their saved positions."""
  try:
    streams.restore(data_state)
    return True
  except ConfigError as error:
    if not run.checkpoint.allow_setting_changes:
      raise ConfigError(f'{error}; --gin.CheckpointConfig.allow_setting_changes=True goes on with the same parameters '
                        'and data streams that begin anew') from error
    say(str(error))
    return False


if __name__ == '__main__':
  main()
