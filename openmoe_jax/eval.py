"""openmoe-eval: scores of a trained model on tasks, beside those of the paper.

  openmoe-eval --gin_file=recipes/eval_boolq.gin --model_dir=runs/demo --gin.EvalConfig.data_dir=DATA
  openmoe-eval --model_dir=runs/demo --gin.EvalConfig.perplexity=demo_full_lm
  openmoe-eval --gin_file=recipes/eval_bigbench_lite.gin --model_dir=runs/mine --all_checkpoints

The model, its vocabulary and the length of its rows come from the checkpoint (--model_dir, or EvalConfig.checkpoint: also
one step, or a Hugging Face folder). Of the gin settings, EvalConfig, DataConfig, MeshConfig and ModelConfig.dtype count. A
task that is done is not done again; docs/evaluation.md has the tasks and where their data go.
"""

import argparse
import dataclasses
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence

from openmoe_jax import command_line
from openmoe_jax import config as config_lib
from openmoe_jax import gin_utils
from openmoe_jax import paths
from openmoe_jax.config import ConfigError, DataConfig, EvalConfig, MeshConfig, require

_MODEL_CHANGES = ('dtype', 'dispatch', 'attention_query_blocks', 'loss_chunk_tokens')
_OUTPUT = 'eval'


class Request(NamedTuple):
  """What the command asks for.

  Attributes:
    settings: tasks and how they are answered.
    data, mesh, model: settings that differ from those of the checkpoint's run; only what was given.
    all_checkpoints: every step of the model_dir, not the newest alone.
    int8: with int8 kernels.
    allow_code_execution: programs that the model writes are run.
  """
  settings: EvalConfig
  data: Mapping[str, Any] = {}
  mesh: Mapping[str, Any] = {}
  model: Mapping[str, Any] = {}
  all_checkpoints: bool = False
  int8: bool = False
  allow_code_execution: bool = False


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point; mistakes end in one line and exit status 2."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  args = _parser().parse_args(argv)
  request = _request(args)
  if args.print_config:
    print('\n'.join(f'EvalConfig.{name} = {command_line.literal(value)}'
                    for name, value in config_lib.to_dict(request.settings).items()))
    return
  from openmoe_jax import launch
  launch.initialize(args.coordinator_address, args.num_processes, args.process_id)
  launch.run_together(lambda: command_line.run_main(lambda _: evaluate(request)))


def _parser() -> command_line.Parser:
  parser = command_line.Parser(prog='openmoe-eval', description=__doc__)
  parser.add_argument('--all_checkpoints', action='store_true', help='evaluate every step in the model_dir')
  parser.add_argument('--int8', action='store_true', help='with kernels as int8')
  parser.add_argument('--allow_code_execution', action='store_true', help='run the programs that the model writes for '
                      'HumanEval; what holds them on this machine is printed beforehand')
  group = parser.add_argument_group('several processes')
  group.add_argument('--coordinator_address', help='host:port of process 0')
  group.add_argument('--num_processes', type=int)
  group.add_argument('--process_id', type=int)
  return parser


def _request(args: argparse.Namespace) -> Request:
  bindings = list(args.gin_bindings)
  if args.model_dir is not None:
    bindings.append(f'EvalConfig.checkpoint={args.model_dir}')
  if args.tfds_data_dir is not None:
    bindings.append(f'DataConfig.tfds_data_dir={args.tfds_data_dir}')
  given = gin_utils.load_settings(args.gin_file, bindings, [p for p in args.gin_search_paths.split(',') if p],
                                  check_required=not args.print_config)
  for section, cls in (('optimizer', 'OptimizerConfig'), ('checkpoint', 'CheckpointConfig'), ('train', 'TrainConfig'),
                       ('run', 'RunConfig')):
    require(not given[section], f'{cls}.{", ".join(given[section])} has no effect on an evaluation; give a file '
            'recipes/eval_*.gin, not the recipe of a training run')
  other = sorted(set(given['model']) - set(_MODEL_CHANGES))
  require(not other, f'ModelConfig.{", ".join(other)}: the model is that of the checkpoint; only '
          f'{", ".join(_MODEL_CHANGES)} may differ in an evaluation')
  settings = EvalConfig(**given['eval'])
  if not args.print_config:
    require(settings.checkpoint, 'no model: give --model_dir=DIR, or EvalConfig.checkpoint')
    require(settings.tasks or settings.perplexity, 'nothing to evaluate: give a file recipes/eval_*.gin, '
            '--gin.EvalConfig.tasks=NAME,NAME or --gin.EvalConfig.perplexity=MIXTURE')
  return Request(settings, given['data'], given['mesh'], given['model'], args.all_checkpoints, args.int8,
                 args.allow_code_execution)


def evaluate(request: Request, say: Optional[Callable[[str], None]] = None) -> List[Dict[str, Any]]:
  """Evaluates what is asked for; writes results, tables and pictures after every task. Returns all records of the folder.

  Raises:
    ConfigError: no checkpoint, or as `suite.Suite` and `results.Results`.
  """
  import jax
  from openmoe_jax import launch, loading, partitioning
  from openmoe_jax.task_eval import results as results_lib
  from openmoe_jax.task_eval.suite import Suite
  primary = jax.process_index() == 0
  say = say or (print if primary else lambda text: None)
  settings = request.settings
  checkpoints = loading.checkpoints_of(settings.checkpoint, request.all_checkpoints)
  mesh = None
  if request.mesh or jax.process_count() > 1:
    mesh = partitioning.make_mesh(MeshConfig(**{'data': -1, **request.mesh}))
  run = loading.read_run(checkpoints[0])
  data = dataclasses.replace(config_lib.from_dict(DataConfig, run['data']), **request.data)
  suite = Suite(settings, data, allow_code_execution=request.allow_code_execution, say=say)
  folder = settings.output_dir or str(loading.home(settings.checkpoint) / _OUTPUT)
  store = results_lib.Results(folder, {'checkpoint': str(loading.home(settings.checkpoint)), 'model': run['model']})
  for checkpoint in checkpoints:
    model = None
    step, tokens = loading.read_position(checkpoint)
    for name in suite.names:
      what = results_lib.settings_of(settings, dtype=request.model.get('dtype', run['model']['dtype']), int8=request.int8,
                                     vocabulary=data.vocabulary, allow_code_execution=request.allow_code_execution)
      record = store.find(step, name, what)
      if launch.every_process(record is not None):
        say(f'step {step}, {_line(record)}: done before')
        continue
      if model is None:
        model = _load(checkpoint, mesh, request, data)
      record = store.add(step, tokens, suite.evaluate(name, model, say), what, primary)
      say(f'step {step}, {_line(record)}')
      if primary:
        _report(store, model, record)
  if primary:
    for file in _files(store, run):
      say(f'wrote {file}')
  return store.all()


def _load(checkpoint: Any, mesh: Any, request: Request, data: DataConfig) -> Any:
  from openmoe_jax import loading, quantization, vocabulary
  model = loading.load(checkpoint, mesh, **request.model)
  model.run = {**model.run, 'data': config_lib.to_dict(data)}
  try:
    vocabulary.check_fits(model.config.vocab_size)
  except ConfigError as error:
    raise ConfigError(f'{checkpoint}: {error}') from error
  return quantization.quantize_model(model) if request.int8 else model


def _line(record: Mapping[str, Any]) -> str:
  from openmoe_jax.task_eval import tables
  return tables.line(record)


def _report(store: Any, model: Any, record: Mapping[str, Any]) -> None:
  """What is brought up to date after every task."""
  from openmoe_jax.task_eval import tables
  from openmoe_jax.writers import Writers
  name = store.folder.parent.name if store.folder.name == _OUTPUT else store.folder.name
  paths.write_text(store.folder / 'results.md', tables.markdown(store.all(), name))
  writers = Writers(store.folder, model.config)
  writers.task(record['step'], record['task'].replace(' ', '_'), record['figures'])
  writers.close()


def _files(store: Any, run: Mapping[str, Any]) -> List[str]:
  """The results in one file, and the pictures; returns their paths."""
  import json
  from openmoe_jax.analysis import plots, score_plots
  from openmoe_jax.analysis.parameters import count_parameters
  from openmoe_jax.task_eval.published import PublishedModel
  records = store.all()
  paths.write_text(store.folder / 'results.json', json.dumps(records, indent=1) + '\n')
  files = [str(store.folder / name) for name in ('results.json', 'results.md')]
  steps = score_plots.steps_figure(records)
  if steps is not None:
    files += plots.write_figure(steps, store.folder / score_plots.STEPS_FILE)
  counts = count_parameters(config_lib.from_dict(config_lib.ModelConfig, run['model']))
  own = [PublishedModel(f'step {record["step"]:,}', record['figures']['normalised'], counts.active_without_embeddings,
                        counts.total, record['tokens'])
         for record in records if record['task'] == 'bigbench_lite' and record['tokens']]
  if own:
    files += plots.write_figure(score_plots.cost_figure(own), store.folder / score_plots.COST_FILE)
  return files


if __name__ == '__main__':
  main()
