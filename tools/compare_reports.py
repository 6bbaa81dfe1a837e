"""Compile reports side by side: a Markdown table of what `openmoe-compile-report --output=FILE` has written.

  python -m openmoe_jax.tools.compare_reports reports/8b_v4-128.json reports/8b_v5e-256.json
  python -m openmoe_jax.tools.compare_reports reports/8b_grow_*.json --plot=reports/growth.png

The picture shows what a chip computes, moves through its memory and sends over its links in a step, over the number of
chips, each relative to the fewest: flat lines are perfect weak scaling, if the reports have as many tokens a chip.
"""

import argparse
import json
from typing import Any, Dict, List, Optional, Sequence

from openmoe_jax import paths
from openmoe_jax.command_line import run_main
from openmoe_jax.config import ConfigError, require
from openmoe_jax.tools import benchmark_plots
from openmoe_jax.tpu_slices import GIB

_HEAD = ('slice', 'chips', 'mesh', 'tokens a step', 'microbatches', 'remat', 'GiB of a device', 'laid out',
         'FLOPs / model FLOPs', 'step ms, overlap', 'without', 'MFU, overlap', 'without', 'limited by', 'days, overlap',
         'without')


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('reports', nargs='+', metavar='FILE', help='JSON of openmoe-compile-report --output')
  parser.add_argument('--plot', metavar='FILE', help='draw costs of a chip over numbers of chips there (PNG)')
  args = parser.parse_args(argv)
  reports = [read(file) for file in args.reports]
  print(table(reports))
  if args.plot:
    print(f'wrote {plot(reports, args.plot)}')


def read(file: str) -> Dict[str, Any]:
  """Raises ConfigError unless the file is the report of one mesh."""
  path = paths.path(file)
  require(path.exists(), f'{file}: no such file')
  try:
    report = json.loads(path.read_text())
  except ValueError as error:
    raise ConfigError(f'{file} is no JSON: {error}') from error
  require(isinstance(report, dict) and 'train' in report, f'{file} is not the report of one mesh: '
          'openmoe-compile-report --output writes it, without --sweep')
  require(not report['train']['fits'] or 'memory_peak' in report['train'], f'{file} was written by an older version, which '
          'did not say what is alive at the worst moment; make it anew')
  return report


def table(reports: Sequence[Dict[str, Any]]) -> str:
  """Training steps as Markdown, in the order given."""
  lines = ['| ' + ' | '.join(_HEAD) + ' |', '|' + '---|' * len(_HEAD)]
  for report in reports:
    lines.append('| ' + ' | '.join(_row(report)) + ' |')
  return '\n'.join(lines)


def _row(report: Dict[str, Any]) -> List[str]:
  train, limit = report['train'], report['hbm_bytes_per_device'] / GIB
  mesh = ' x '.join(f'{name} {size}' for name, size in report['mesh'].items() if size > 1)
  row = [report['topology'], str(report['chips']), mesh, f'{report["batch_size"] * report["row_length"]:,}',
         str(report['num_microbatches']), report['remat']]
  if not train['fits']:
    needed = f'needs {train["needed_bytes"] / GIB:.1f}' if train['needed_bytes'] else 'does not fit'
    return row + [f'{needed} of {limit:.0f}'] + [''] * (len(_HEAD) - 7)
  overlap, none = train['roofline']['overlap'], train['roofline']['no_overlap']
  return row + [f'{train["memory_peak"] / GIB:.1f} of {limit:.0f}', f'{train["memory_total"] / GIB:.1f}',
                f'{train["flops"]["ratio"]:.3f}',
                f'{1e3 * overlap["step_seconds"]:,.0f}', f'{1e3 * none["step_seconds"]:,.0f}', f'{overlap["mfu"]:.3f}',
                f'{none["mfu"]:.3f}', train['roofline']['limited_by'], f'{overlap["days"]:.1f}', f'{none["days"]:.1f}']


def costs(report: Dict[str, Any]) -> Dict[str, float]:
  """What one chip does in a training step."""
  train, devices = report['train'], report['devices'] / report['chips']
  sent = lambda network: sum(c['bytes'] for c in train['collectives'] if c['network'] == network)
  return {'FLOPs': train['flops']['compiled'] / report['chips'], 'bytes of main memory': train['main_memory_bytes'] * devices,
          'bytes over links': sent('ici') * devices, 'bytes between slices': sent('dcn') * devices,
          'memory': train['memory_peak'] * devices}


def growth(reports: Sequence[Dict[str, Any]]) -> Dict[str, List[tuple]]:
  """{what: [(chips, a chip's cost over that with the fewest chips)]}; what costs nothing with the fewest is left out."""
  reports = sorted((r for r in reports if r['train']['fits']), key=lambda report: report['chips'])
  require(len(reports) >= 2, '--plot needs two reports or more that fit')
  points = [(report['chips'], costs(report)) for report in reports]
  return {name: [(chips, cost[name] / value) for chips, cost in points] for name, value in points[0][1].items() if value}


def plot(reports: Sequence[Dict[str, Any]], file: str) -> str:
  """Draws `growth`; returns the file."""
  return benchmark_plots.draw_picture(file, growth(reports), 'chips', 'of a chip, relative to the fewest chips',
                                      'What a chip does in a training step')


if __name__ == '__main__':
  run_main(main)
