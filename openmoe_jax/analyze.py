"""openmoe-analyze: what a model's routers do.

  openmoe-analyze record runs/demo --mixture=demo_full_lm --output=runs/demo/routing
  openmoe-analyze record runs/demo --mixture=demo_code_full_lm,demo_prose_full_lm --output=runs/demo/routing \\
    --policy=none,t5x_train,t5x_eval,colossalai --tokens=1000000
  openmoe-analyze record runs/demo --mixture=demo_full_lm --output=runs/demo/routing --all_checkpoints --initialization
  openmoe-analyze figures runs/demo/routing --output=runs/demo/routing_figures
  openmoe-analyze report runs/demo/routing_figures
  openmoe-analyze ablate runs/demo --mixture=demo_full_lm --output=runs/demo/ablation

`record` writes parquet files with a line for every token and sparse layer: experts, gates, slots, what was dropped, where
the token stands, its loss. The same command after a stop goes on where it was. `figures` draws them, and
`report` makes one HTML file of that. docs/routing_analysis.md has the columns.
`ablate` takes out experts, or replaces a layer's router, and reports how much the loss of each domain changes.
"""

import argparse
import functools
from typing import Any, Iterator, Optional, Sequence

from openmoe_jax import analyze_figures, checkpoint_flags, command_line
from openmoe_jax.command_line import names
from openmoe_jax.config import RunConfig, from_dict, require


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point; mistakes end in one line and exit status 2."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  args = parser().parse_args(argv)
  require(not args.gin_bindings, f'--gin.{"".join(args.gin_bindings[:1])}: this program takes its configuration from '
          'the checkpoint')
  args.run(args)


def parser() -> command_line.Parser:
  """The program's flags."""
  flags = command_line.Parser(configured=False, prog='openmoe-analyze', description=__doc__)
  commands = flags.add_subparsers(required=True, metavar='record|figures|report|ablate', parser_class=functools.partial(
      command_line.Parser, configured=False))
  analyze_figures.add_flags(commands.add_parser('figures'))
  record = commands.add_parser('record', description='Writes the routing of a checkpoint over tasks as parquet files.')
  record.set_defaults(run=_record)
  _add_ablate(commands)
  checkpoint_flags.add_flags(record, capacity_mode=False)
  group = record.add_argument_group('what is recorded')
  _add_data_flags(group, tokens=65536)
  group.add_argument('--output', required=True, metavar='DIR', help='local or gs://')
  group.add_argument('--policy', default='none', metavar='NAME[,NAME]', help='who may be dropped: none (default), '
                     't5x_train, t5x_eval, colossalai, colossalai_train')
  group.add_argument('--all_checkpoints', action='store_true', help='every step in the model_dir')
  group.add_argument('--initialization', action='store_true', help='also the parameters before training, which the '
                     "run's seed gives, as step 0")
  group.add_argument('--part_tokens', type=int, default=131072, help='tokens of a file; default 131072')
  report = commands.add_parser('report', description='Writes report.html, one file with all findings and figures.')
  report.set_defaults(run=_report)
  report.add_argument('folder', metavar='DIR', help='what `openmoe-analyze figures` wrote; local or gs://')
  return flags


def _add_data_flags(group: Any, tokens: int) -> None:
  """The flags that say which text a checkpoint is looked at with; `tokens` is the default of --tokens."""
  group.add_argument('--mixture', required=True, metavar='NAME[,NAME]', help='tasks or mixtures; each task is a domain')
  group.add_argument('--tokens', type=int, default=tokens, help='positions of each task; default %(default)s')
  group.add_argument('--split', default='validation', metavar='NAME[,NAME]', help='of the tasks, of several the first '
                     'that each mixture has; default validation')
  group.add_argument('--length', type=int, default=0, help='positions of a row; default: as in training')
  group.add_argument('--tfds_data_dir', metavar='DIR', help='where TFDS data sets lie')
  group.add_argument('--module_imports', metavar='MODULE[,MODULE]', help='modules that register tasks')


def _report(args: argparse.Namespace) -> None:
  from openmoe_jax.analysis import routing_report
  print(f'wrote {routing_report.write(args.folder)}')


def _record(args: argparse.Namespace) -> None:
  from openmoe_jax import loading
  from openmoe_jax.recording import collect
  settings = collect.Settings(names(args.mixture), names(args.policy), args.tokens, args.split, args.length,
                              args.batch_size, args.part_tokens)
  collect.check(settings)
  for model in _models(args):
    _set_data(args, model)
    collect.record(model, args.output, settings, str(loading.home(args.checkpoint)))
  print(f'wrote {args.output}')


def _set_data(args: argparse.Namespace, model: Any) -> None:
  """Where the model's data come from, as the flags say."""
  data = dict(model.run['data'])
  if args.tfds_data_dir is not None:
    data['tfds_data_dir'] = args.tfds_data_dir
  data['module_imports'] = [*data['module_imports'], *names(args.module_imports or '')]
  model.run = {**model.run, 'data': data}


def _add_ablate(commands: Any) -> None:
  """The flags of `ablate`."""
  ablate = commands.add_parser('ablate', description='Takes out experts of a checkpoint, or replaces the router of a '
                               'layer, and reports how much the loss of each task changes.')
  ablate.set_defaults(run=_ablate)
  checkpoint_flags.add_flags(ablate, capacity_mode=False)
  group = ablate.add_argument_group('what is ablated, and on what')
  _add_data_flags(group, tokens=8192)
  group.add_argument('--output', required=True, metavar='FILE', help='FILE.json, FILE.csv, pictures, and FILE.npz, from '
                     'which the same command goes on; local or gs://')
  group.add_argument('--ablations', default='', metavar='KIND[,KIND]', help='zero, next (of experts), no_experts, random, '
                     'uniform, hash, same, table (of layers); default: all that make sense for the router')
  group.add_argument('--experts', default='', metavar='LAYER:EXPERT[,..]', help='default: all of the layers')
  group.add_argument('--layers', default='', metavar='LAYER[,LAYER]', help='numbers of sparse layers; default: all, or with '
                     '--experts none')


def _ablate(args: argparse.Namespace) -> None:
  from openmoe_jax.analysis import surgery, surgery_report
  from openmoe_jax.recording import collect
  data = collect.Settings(names(args.mixture), tokens=args.tokens, split=args.split, length=args.length,
                          batch_size=args.batch_size)
  collect.check(data)
  experts = [tuple(_integers('--experts', pair, ':', 2)) for pair in names(args.experts)]
  layers = _integers('--layers', args.layers, ',') if args.layers else []
  stem = args.output.removesuffix('.json')
  model = checkpoint_flags.load_model(args)
  _set_data(args, model)
  found = surgery.ablate(model, data, names(args.ablations), experts, layers, f'{stem}.npz')
  print('\n'.join([*surgery_report.summary(found), *(f'wrote {file}' for file in surgery_report.write(found, stem))]))


def _integers(flag: str, text: str, separator: str, count: int = 0) -> Sequence[int]:
  """The numbers in a flag's value; `count` of them if that is not 0."""
  parts = text.split(separator)
  require(all(part.strip().isdigit() for part in parts) and len(parts) == (count or len(parts)), f'{flag}: {text!r} must '
          f'be {count or ""} numbers with {separator!r} between them'.replace('  ', ' '))
  return [int(part) for part in parts]


def _models(args: argparse.Namespace) -> Iterator[Any]:
  """The models to record, one in memory at a time."""
  from openmoe_jax import loading
  checkpoints = loading.checkpoints_of(args.checkpoint, args.all_checkpoints)
  for i, checkpoint in enumerate(checkpoints):
    model = checkpoint_flags.load_model(argparse.Namespace(**{**vars(args), 'checkpoint': str(checkpoint)}))
    if i == 0 and args.initialization:
      yield _initial(args, model)
    yield model


def _initial(args: argparse.Namespace, model: Any) -> Any:
  """The model before its first training step."""
  import jax
  from openmoe_jax import loading
  from openmoe_jax.train_state import init_params
  require(not loading.is_hugging_face(args.checkpoint) and not args.int8 and model.mesh is None,
          '--initialization makes the parameters of a run of ours on one device, without --int8')
  run = from_dict(RunConfig, model.run)
  require(not run.checkpoint.initial_checkpoint_path, '--initialization: the run did not begin with random parameters, but '
          f'from {run.checkpoint.initial_checkpoint_path}')
  params = jax.jit(init_params, static_argnums=(0, 1))(model.config, run.train.seed)
  params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, model.params))  # one compiled pass for all steps
  return loading.Model(model.config, params, 0, model.run)


if __name__ == '__main__':
  main()
