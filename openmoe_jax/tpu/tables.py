"""A compile report as tables for people."""

import io
from typing import Any, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from openmoe_jax.tpu.parts import UNITS
from openmoe_jax.tpu_slices import GIB


def report_tables(report: Mapping[str, Any]) -> str:
  """Everything that `report` says, as text."""
  parts = [_headline(report)]
  for name in ('train', 'decode'):
    if name in report:
      parts.append(_program(report, report[name]))
  return '\n\n'.join(parts)


def _headline(report: Mapping[str, Any]) -> str:
  mesh = ' x '.join(f'{name} {size}' for name, size in report['mesh'].items())
  split = f', parameters split over {" and ".join(report["fsdp"])} as well' if report['fsdp'] else ''
  return (f'{report["topology"]}: {report["chips"]} chips, {report["devices"]} devices of '
          f'{report["hbm_bytes_per_device"] / GIB:.0f} GiB ({report["libtpu_topology"]})\nmesh {mesh}{split}; '
          f'{report["batch_size"]:,} x {report["row_length"]:,} tokens a step in {report["num_microbatches"]} '
          f'microbatch(es); remat {report["remat"]}, dispatch {report["dispatch"]}, {report["dtype"]}')


def _program(report: Mapping[str, Any], program: Mapping[str, Any]) -> str:
  title = 'training step' if program['program'] == 'train' else (
      f'step of generation, {program["rows"]} rows, {program["positions"]:,} positions')
  if not program['fits']:
    needs = f' (needs {program["needed_bytes"] / GIB:.1f} GiB)' if program['needed_bytes'] else ''
    lines = [f'{title}: DOES NOT FIT{needs}: {program["error"]}']
    return '\n'.join(lines + [f'  {line}' for line in program.get('advice', ())])
  memory = _table('Memory of a device', 'GiB')
  for name, size in program['memory'].items():
    memory.add_row(name, f'{size / GIB:.2f}')
  memory.add_section()
  memory.add_row('sum', f'{program["memory_total"] / GIB:.2f}')
  memory.add_row('at the worst moment', f'{program["memory_peak"] / GIB:.2f}')
  memory.add_row('of', f'{report["hbm_bytes_per_device"] / GIB:.2f}')
  if program['host_memory']:
    memory.add_row('host memory', f'{program["host_memory"] / GIB:.2f}')

  flops = _table('FLOPs of all devices', 'TFLOPs', 'of the model')
  counts = program['flops']
  share = lambda value: f'{value / counts["model"]:.3f}' if counts['model'] else '-'
  flops.add_row('model', f'{counts["model"] / 1e12:,.2f}', share(counts['model']))
  for name, value in counts.get('waste', {}).items():
    flops.add_row(f'  {name}', f'{value / 1e12:,.2f}', share(value))
  flops.add_row('compiled', f'{counts["compiled"] / 1e12:,.2f}', share(counts['compiled']))
  if counts['kernels']:
    flops.add_row('  of which custom kernels', f'{counts["kernels"] / 1e12:,.2f}', share(counts['kernels']))

  moved = _table('Communication of a device', 'over', 'executions', 'GB sent', 'ms', 'hidden')
  for row in program['collectives']:
    moved.add_row(f'{row["network"]} {row["kind"]}', row['axes'], f'{row["executions"]:.0f}',
                  f'{row["bytes"] / 1e9:.3f}', f'{1e3 * row["seconds"]:.2f}', f'{1e3 * row["hidden_seconds"]:.2f}')

  spent = _table('Parts of the step, ms', *UNITS, 'of all')
  for row in program['parts']:
    spent.add_row(row['name'], *(f'{1e3 * row[unit]:.2f}' for unit in UNITS), f'{row["share"]:.3f}')

  bounds, roof = _table('Bounds', 'with overlap', 'without'), program['roofline']
  both = lambda name, scale, form: (form.format(roof[b][name] * scale) for b in ('overlap', 'no_overlap'))
  bounds.add_row('step, ms', *both('step_seconds', 1e3, '{:.1f}'))
  bounds.add_row('MFU', *both('mfu', 1, '{:.3f}'))
  bounds.add_row('tokens/s', *both('tokens_per_second', 1, '{:,.0f}'))
  if program['token_budget']:
    bounds.add_row('days', *both('days', 1, '{:.1f}'))
    bounds.add_row('chip-hours', *both('chip_hours', 1, '{:,.0f}'))
  terms = ', '.join(f'{name} {1e3 * seconds:.1f} ms' for name, seconds in roof['terms'].items())
  head = (f'{title}: fits; compiled in {program["compile_seconds"]:.0f} s\nat least {terms}; limited by '
          f'{roof["limited_by"]}')
  tail = []
  if program.get('advice'):
    tail += ['The compiler accepts it by what is alive at the worst moment; laid out as it says, it would have no place.',
             *(f'  {line}' for line in program['advice'])]
  if counts['unknown_kernels']:
    tail.append(f'kernels without a formula, not counted: {", ".join(counts["unknown_kernels"])}')
  if counts['unknown_loops']:
    tail.append('loops that run nobody knows how often, counted once: ' + ', '.join(counts['unknown_loops']))
  if counts['ratio'] < 0.9 and not tail:
    tail.append('LESS IS COMPILED THAN THE MODEL NEEDS: the program was not read correctly, and no figure but its memory '
                'holds. Please report it.')
  tables = [_text(t) for t in (memory, flops, moved, spent, bounds) if t.row_count]
  return '\n'.join([head, '', *tables, *tail])


def sweep_table(found: Sequence[Mapping[str, Any]]) -> str:
  """The tried settings, the best first."""
  table = _table(f'Mesh ({" x ".join(found[0]["mesh"] if found else ())})', 'microbatches', 'fits', 'GiB', 'step ms, overlap', 'without',
                 'MFU, overlap', 'without')
  for row in found:
    name, fits = ' x '.join(map(str, row['mesh'].values())), 'yes' if row['fits'] else 'no'
    if row['fits']:
      roof = row['roofline']
      both = lambda name, scale, form: (form.format(scale * roof[b][name]) for b in ('overlap', 'no_overlap'))
      figures = [f'{row["memory_total"] / GIB:.1f}', *both('step_seconds', 1e3, '{:.1f}'), *both('mfu', 1, '{:.3f}')]
    else:
      figures = [f'{row["needed_bytes"] / GIB:.1f}' if row['needed_bytes'] else '', '', '', '', '']
    table.add_row(name, str(row['num_microbatches']), fits, *figures)
  return _text(table)


def _table(title: str, *columns: str) -> Table:
  table = Table(box=box.SIMPLE)
  table.add_column(title, no_wrap=True)
  for column in columns:
    table.add_column(column, justify='right', no_wrap=True)
  return table


def _text(table: Table) -> str:
  out = io.StringIO()
  Console(file=out, width=160, highlight=False).print(table)
  return '\n'.join(line.rstrip() for line in out.getvalue().strip('\n').splitlines()) + '\n'
