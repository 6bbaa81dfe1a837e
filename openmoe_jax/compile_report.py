"""openmoe-compile-report: a recipe compiled for a TPU slice, without a TPU.

  openmoe-compile-report --gin_file=recipes/openmoe_8b.gin --gin_file=runs/one_pass.gin --topology=v4-128
  openmoe-compile-report --gin_file=recipes/openmoe_8b.gin --topology=v5e-256 --sweep
  openmoe-compile-report --topologies

Runs the TPU compiler on the exact training step and on a step of generation, and prints whether they fit, the memory
of a device by class, what is computed beside the model's own arithmetic, what goes over the links and between slices,
and bounds on the step time from the chip's published figures. Takes minutes for a large model; see docs/scaling.md.
"""

import argparse
import json
from typing import Any, Optional, Sequence

from openmoe_jax import command_line
from openmoe_jax.config import require


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point; mistakes end in one line and exit status 2."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  args = _parser().parse_args(argv)
  from openmoe_jax import tpu_slices
  if args.topologies:
    print('\n'.join(f'{name:12} {tpu_slices.parse(name).topology}' for name in tpu_slices.names()))
    return
  run = command_line.run_config(args, check_required=False)
  if args.print_config:
    print(command_line.format_config(run))
    return
  require(args.topology is not None, '--topology=NAME is needed, such as v4-128; --topologies lists them')
  slice_ = tpu_slices.parse(args.topology)
  require(run.data.task_feature_lengths, 'the gin file describes no run: DataConfig.task_feature_lengths is not set; a '
          'recipe sets it')
  from openmoe_jax import decoding
  from openmoe_jax.tpu import plot, programs, report, sweep, tables
  devices = programs.topology_devices(slice_)
  if args.sweep:
    found = sweep.sweep(run, slice_, devices, args.sweep_limit, say=print)
    report_ = {'topology': slice_.name, 'sweep': found}
    print(json.dumps(report_, indent=1) if args.json else tables.sweep_table(found))
  else:
    mesh = programs.make_mesh(run, devices)
    report_ = report.describe(run, slice_, mesh)
    train = programs.compile_train(run, mesh)
    _save_hlo(args, train)
    report_['train'] = report.train_report(run, slice_, mesh, train)
    if args.decode:
      rows = args.decode_rows or decoding.batch_shards(mesh)
      prompt, new = run.data.row_length // 2, run.data.row_length // 2
      decode = programs.compile_decode(run, mesh, rows, prompt, new)
      _save_hlo(args, decode)
      report_['decode'] = {**report.decode_report(run, slice_, mesh, decode, rows, prompt + new), 'rows': rows,
                           'positions': prompt + new}
    print(json.dumps(report_, indent=1) if args.json else tables.report_tables(report_))
    if args.plot:
      plot.write(report_, args.plot)
  if args.output:
    from openmoe_jax import paths
    paths.write_text(paths.path(args.output), json.dumps(report_, indent=1) + '\n')


def _parser() -> command_line.Parser:
  parser = command_line.Parser(prog='openmoe-compile-report', description=__doc__)
  parser.add_argument('--topology', metavar='NAME', help='a slice: v4-128, v5p:4x4x8 (chips along each dimension), '
                      '2*v5e-256 (two of them, joined by the data centre network)')
  parser.add_argument('--topologies', action='store_true', help='list the slices and stop')
  parser.add_argument('--no-decode', dest='decode', action='store_false', help='leave out the step of generation')
  parser.add_argument('--decode_rows', type=int, default=0, help='sequences that are generated at a time; default: one '
                      'for each part of the batch')
  parser.add_argument('--sweep', action='store_true', help='try mesh shapes and numbers of microbatches, print the best '
                      'few')
  parser.add_argument('--sweep_limit', type=int, default=6, help='how many of them to compile; default 6')
  parser.add_argument('--json', action='store_true', help='print JSON instead of tables')
  parser.add_argument('--output', metavar='FILE', help='write the JSON there, too')
  parser.add_argument('--plot', metavar='FILE', help='draw memory and step time there (PNG)')
  parser.add_argument('--save_hlo', metavar='DIR', help='write the compiled programs there as text')
  return parser


def _save_hlo(args: argparse.Namespace, program: Any) -> None:
  if args.save_hlo and program.fits:
    from openmoe_jax import paths
    paths.write_text(paths.path(args.save_hlo) / f'{program.name}.hlo', program.text)


if __name__ == '__main__':
  main()
