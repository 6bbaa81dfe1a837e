"""openmoe-inspect: what a model or a recipe is, without allocating it.

  openmoe-inspect --gin_file=models/openmoe_8b.gin
  openmoe-inspect --gin_file=recipes/openmoe_8b.gin --num_devices=256 --sharding
  openmoe-inspect --environment

Prints parameters, FLOPs per token and memory per device. Needs neither the devices nor the data of the recipe, and does
not import TensorFlow. Settings that a recipe leaves to its user (the model_dir, for instance) need not be given.
"""

import json
import math
import sys
from typing import Any, Dict, List, Mapping, Optional, Sequence

from openmoe_jax import command_line
from openmoe_jax.config import ConfigError, RunConfig, require, to_dict

DEFAULT_LENGTH = 2048  # of a row, where only a model is given: what the original trained with


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point; mistakes end in one line and exit status 2."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  args = _parser().parse_args(argv)
  if args.environment:
    from openmoe_jax import environment
    print(environment.report())
    return
  run = command_line.run_config(args, check_required=False)
  if args.print_config:
    print(command_line.format_config(run))
    return
  import jax
  jax.config.update('jax_platforms', 'cpu')  # shapes only: leave accelerators to whoever uses them
  report = inspect(run, length=args.length, num_devices=args.num_devices)
  if args.shapes:
    report['shapes'] = parameter_rows(run)
  if args.sharding:
    report['sharding'] = sharding_rows(run, report['mesh'])
  if args.json:
    print(json.dumps(report, indent=1))
  else:
    print_report(report)


def _parser() -> command_line.Parser:
  parser = command_line.Parser(prog='openmoe-inspect', description=__doc__)
  parser.add_argument('--shapes', action='store_true', help='list every parameter: T5X name and shape')
  parser.add_argument('--sharding', action='store_true', help='list every array of the train state: how it is split '
                      'over the mesh and what one device holds')
  parser.add_argument('--num_devices', type=int, default=0, help='devices of the mesh; default: as few as its axes '
                      'need')
  parser.add_argument('--length', type=int, default=0, help='tokens of a row; default: those of the recipe, or '
                      f'{DEFAULT_LENGTH}')
  parser.add_argument('--json', action='store_true', help='print JSON instead of tables')
  parser.add_argument('--environment', action='store_true', help='report versions, devices and what is missing, and '
                      'stop')
  return parser


def inspect(run: RunConfig, length: int = 0, num_devices: int = 0) -> Dict[str, Any]:
  """The figures of a run as plain data.

  Args:
    length: tokens of a row; 0 takes the run's own.
    num_devices: 0 takes as few as the mesh needs.

  Raises:
    ConfigError: the model cannot be split over the mesh.
  """
  from openmoe_jax import partitioning, pipeline
  from openmoe_jax.analysis import flops, memory
  from openmoe_jax.analysis.parameters import count_parameters
  require(length >= 0 and num_devices >= 0, f'--length={length} and --num_devices={num_devices} must not be negative')
  model = run.model
  length = length or run.data.row_length or DEFAULT_LENGTH
  microbatch = run.data.batch_size // run.train.num_microbatches
  rows = microbatch if run.data.task_feature_lengths else None  # a model alone has no batch yet
  mesh = memory.mesh_shape(run.mesh, num_devices)
  useful = flops.forward_flops_per_token(model, length, rows)
  computed = flops.computed_forward_flops_per_token(model, length, rows)
  report = {
      'model': to_dict(model),
      'mixture_or_task': run.data.mixture_or_task,
      'length': length,
      'batch_size': run.data.batch_size,
      'num_microbatches': run.train.num_microbatches,
      'train_steps': run.train.train_steps,
      'tokens_per_step': run.data.batch_size * length,
      'parameters': count_parameters(model)._asdict(),
      'flops_per_token': {
          'forward_useful': useful,
          'forward_computed': computed,
          'train_useful': flops.train_flops_per_token(model, length, rows),
          'train_computed': flops.computed_train_flops_per_token(model, length, rows),
          'train_dispatch': flops.dispatch_flops_per_token(model, length, rows),
      },
      'mesh': mesh,
      'memory': {name: {'all_devices': sizes[0], 'one_device': sizes[1]}
                 for name, sizes in memory.memory_table(run, length, mesh).items()},
      'warnings': [],
  }
  if model.num_experts and rows:
    from openmoe_jax.routers.groups import group_tokens
    report['routing'] = {'train': group_tokens(model, rows, length, True)._asdict(),
                         'eval': group_tokens(model, rows, length, False)._asdict()}
  if mesh['pipe'] > 1:
    report['pipeline'] = {'stages': mesh['pipe'], 'microbatches': run.train.num_microbatches,
                          'bubble': pipeline.bubble(mesh['pipe'], run.train.num_microbatches)}
  try:
    partitioning.validate_mesh(model, mesh, microbatch, run.mesh.optimizer_fsdp)
  except ConfigError as error:
    report['warnings'].append(f'cannot run on this mesh: {error}')
  return report


def parameter_rows(run: RunConfig) -> List[Dict[str, Any]]:
  """Name, shape and number of every parameter."""
  from openmoe_jax.analysis.parameters import parameter_shapes
  return [{'name': name, 'shape': list(shape), 'parameters': math.prod(shape)}
          for name, shape in sorted(parameter_shapes(run.model).items())]


def sharding_rows(run: RunConfig, mesh: Mapping[str, int]) -> List[Dict[str, Any]]:
  """Every array of the train state as it is held (blocks stacked where they are scanned), and its part per device."""
  from openmoe_jax.analysis import memory
  rows = []
  for kind, plans in zip(('parameter', 'optimizer'), memory.state_plan(run, mesh)[:2]):
    for plan in plans:
      rows.append({'kind': kind, 'name': plan.name, 'shape': list(plan.shape), 'dtype': plan.dtype,
                   'spec': [list(a) if isinstance(a, tuple) else a for a in plan.spec], 'bytes': plan.bytes,
                   'device_bytes': plan.device_bytes})
  return rows


def print_report(report: Mapping[str, Any]) -> None:
  """Prints the report as tables."""
  from rich import box
  from rich.console import Console
  from rich.table import Table
  # Names must stay whole when the output goes to a file or a narrow terminal.
  console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)

  def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify='left', box=box.SIMPLE, title_style='bold')
    for i, column in enumerate(columns):
      made.add_column(column, justify='left' if i == 0 else 'right', no_wrap=True)
    return made

  console.print(_headline(report))
  parameters = report['parameters']
  counts = table('Parameters', '', 'number', 'of total')
  for part, count in parameters['parts'].items():
    counts.add_row(f'  {part}', f'{count:,}', f'{count / parameters["total"]:.1%}')
  counts.add_section()
  for name in ('total', 'experts', 'active', 'active_without_input_embedding', 'active_without_embeddings'):
    counts.add_row(name.replace('_', ' '), f'{parameters[name]:,}', f'{parameters[name] / parameters["total"]:.1%}')
  console.print(counts)

  flops = report['flops_per_token']
  costs = table(f'FLOPs per token, rows of {report["length"]:,} tokens', '', 'useful', 'computed')
  for part, computed in flops['forward_computed'].items():
    costs.add_row(f'  {part}', _si(flops['forward_useful'].get(part, 0)), _si(computed))
  costs.add_section()
  costs.add_row('forward', _si(sum(flops['forward_useful'].values())), _si(sum(flops['forward_computed'].values())))
  costs.add_row('training', _si(flops['train_useful']), _si(flops['train_computed']))
  if flops['train_dispatch']:
    costs.add_row('of which dispatch', '0', _si(flops['train_dispatch']))
  step = report['tokens_per_step']
  costs.add_row(f'step of {step:,} tokens', _si(flops['train_useful'] * step), _si(flops['train_computed'] * step))
  console.print(costs)

  mesh = report['mesh']
  sizes = ' x '.join(f'{name} {size}' for name, size in mesh.items())
  memory = table(f'Memory of training, {report["batch_size"]:,} rows in {report["num_microbatches"]} microbatch(es), '
                 f'mesh {sizes}', '', 'all devices', 'one device')
  for name, row in report['memory'].items():
    if name == 'sum':
      memory.add_section()
    memory.add_row(name, _bytes(row['all_devices']), _bytes(row['one_device']))
  console.print(memory)

  if 'shapes' in report:
    shapes = table('Parameters by T5X name', 'name', 'shape', 'number')
    for row in report['shapes']:
      shapes.add_row(row['name'], _shape(row['shape']), f'{row["parameters"]:,}')
    console.print(shapes)
  if 'sharding' in report:
    arrays = table('Arrays of the train state', 'name', 'shape', 'split over', 'one device')
    for row in report['sharding']:
      arrays.add_row(row['name'], _shape(row['shape']), _spec(row['spec']), _bytes(row['device_bytes']))
    console.print(arrays)
  for warning in report['warnings']:
    console.print(f'warning: {warning}')


def _headline(report: Mapping[str, Any]) -> str:
  model = report['model']
  kind = (f'{model["num_layers"]} layers, one in {model["moe_interval"]} with {model["num_experts"]} experts, top-'
          f'{model["num_selected_experts"]}' if model['num_experts'] else f'{model["num_layers"]} dense layers')
  lines = [f'{kind}; emb {model["emb_dim"]}, mlp {model["mlp_dim"]}, {model["num_heads"]} heads of '
           f'{model["head_dim"]}, vocabulary {model["vocab_size"]:,}']
  if report['mixture_or_task']:
    tokens = report['tokens_per_step'] * report['train_steps']
    lines.append(f'{report["mixture_or_task"]}: {report["train_steps"]:,} steps of {report["batch_size"]:,} x '
                 f'{report["length"]:,} tokens in {report["num_microbatches"]} microbatch(es); {_si(tokens)} tokens')
  if 'routing' in report:
    train, evaluation = report['routing']['train'], report['routing']['eval']
    lines.append(f'routing in {train["num_groups"]} groups of {train["group_size"]:,} tokens, expert capacity '
                 f'{train["capacity"]} in training, {evaluation["capacity"]} in evaluation')
  if 'pipeline' in report:
    lines.append('pipeline of {stages} stages, {microbatches} microbatch(es) a step: stages wait for {bubble:.1%} of the '
                 'time'.format(**report['pipeline']))
  return '\n'.join(lines)


def _si(number: float) -> str:
  """12.3 G"""
  for exponent, prefix in ((18, 'E'), (15, 'P'), (12, 'T'), (9, 'G'), (6, 'M'), (3, 'k')):
    if number >= 10 ** exponent:
      return f'{number / 10 ** exponent:.2f} {prefix}'
  return f'{number:.0f} '


def _bytes(number: float) -> str:
  """1.50 GiB"""
  for exponent, prefix in ((40, 'Ti'), (30, 'Gi'), (20, 'Mi'), (10, 'Ki')):
    if number >= 2 ** exponent:
      return f'{number / 2 ** exponent:.2f} {prefix}B'
  return f'{number:.0f} B'


def _shape(shape: Sequence[int]) -> str:
  return ' x '.join(map(str, shape)) or 'scalar'


def _spec(spec: Sequence[Any]) -> str:
  return ', '.join('-' if a is None else '+'.join(a) if isinstance(a, list) else a for a in spec)


if __name__ == '__main__':
  main()
