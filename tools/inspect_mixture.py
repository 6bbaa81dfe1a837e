"""What a mixture gives to a model: shares of its sources and objectives, fill of the rows, and examples as text.

  python -m openmoe_jax.tools.inspect_mixture mix_ul2 --tfds_data_dir=DIR --vocabulary=FILE
  python -m openmoe_jax.tools.inspect_mixture --gin_file=recipes/openmoe_base.gin --tfds_data_dir=DIR --examples=5000
  python -m openmoe_jax.tools.inspect_mixture demo_ul2 --lengths=inputs:256,targets:256

Reads the beginning of the training data as a run with these settings would, without a model.
"""

import argparse
import dataclasses
import json
import os
from typing import List, Mapping, Optional, Sequence

from rich.console import Console
from rich.progress import Progress

from openmoe_jax import command_line, mixtures
from openmoe_jax.analysis import mixture_report
from openmoe_jax.config import DataConfig, require

_LONGEST = 600  # characters of an example


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  parser = command_line.Parser(prog='inspect_mixture', description=__doc__)
  parser.add_argument('mixture', nargs='?', help='name of a task or mixture; default: that of the gin file')
  parser.add_argument('--vocabulary', help="sentencepiece model, tokenizer.json or folder; '' is the package's")
  parser.add_argument('--extra_ids', type=int, help='sentinels of the vocabulary (300)')
  parser.add_argument('--lengths', help='of the features, such as inputs:1024,targets:1024 (also the default)')
  parser.add_argument('--open_rows', type=int, help='of packing, DataConfig.open_rows (1: in order)')
  parser.add_argument('--examples', type=int, default=2000, help='how many to read (%(default)s)')
  parser.add_argument('--pages', type=int, default=12, help='how many to show (%(default)s)')
  parser.add_argument('--module_imports', metavar='MODULE[,MODULE]', help='modules that register tasks')
  parser.add_argument('--json', metavar='FILE', help='also write the numbers there')
  args = parser.parse_args(argv)
  require(args.examples > 0, f'--examples={args.examples} must be positive')
  data = settings(args)
  require(not args.json or os.path.isdir(os.path.dirname(os.path.abspath(args.json))), f'--json={args.json}: no such '
          'folder')
  console = Console()
  if data.mixture_schedule and not args.mixture:
    console.print('\n'.join(_schedule(data)), highlight=False, markup=False)
  with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
    bar = progress.add_task('examples', total=args.examples)
    report = mixture_report.measure(data, args.examples, args.pages, lambda: progress.advance(bar))
  print('\n'.join(lines(data, report)))
  if args.json:
    numbers = {**report._asdict(), 'pages': [page._asdict() for page in report.pages]}
    for kind in ('sources', 'objectives'):
      numbers[kind] = {name: share._asdict() for name, share in numbers[kind].items()}
    with open(args.json, 'w', encoding='utf-8') as file:
      json.dump(numbers, file, indent=2)
    print(f'wrote {args.json}')


def settings(args: argparse.Namespace) -> DataConfig:
  """The data settings that the flags describe."""
  data = command_line.run_config(args, check_required=False).data if args.gin_file else DataConfig(
      num_streams=1, tfds_data_dir=args.tfds_data_dir or '')
  require(bool(args.gin_file) or not args.gin_bindings, '--gin.NAME goes with a --gin_file')
  given = {'mixture_or_task': args.mixture, 'vocabulary': args.vocabulary, 'extra_ids': args.extra_ids,
           'open_rows': args.open_rows,
           'module_imports': args.module_imports and args.module_imports.split(',')}
  data = dataclasses.replace(data, **{name: value for name, value in given.items() if value is not None})
  require(bool(data.mixture_or_task), 'name a task or mixture, or a --gin_file that does')
  if args.lengths:
    return dataclasses.replace(data, task_feature_lengths=_lengths(args.lengths))
  if not data.task_feature_lengths or args.mixture:
    mixtures.load_tasks(data, data.mixture_or_task)
    features = mixtures.find_mixture(data.mixture_or_task).output_features
    if set(features) != set(data.task_feature_lengths):
      lengths = {name: 1024 for name in features} if 'inputs' in features else {'targets': 2048}
      data = dataclasses.replace(data, task_feature_lengths=lengths)
  return data


def _lengths(text: str) -> Mapping[str, int]:
  pairs = [part.partition(':') for part in text.split(',')]
  require(all(name.strip() and number.strip().isdecimal() for name, _, number in pairs),
          f'--lengths={text!r} must be like inputs:1024,targets:1024')
  return {name.strip(): int(number) for name, _, number in pairs}


def _schedule(data: DataConfig) -> List[str]:
  text = ['schedule (shares of the rows):']
  for phase in mixtures.schedule(data)[1]:
    text.append(f'  from batch {phase.first_batch:,}: ' + ', '.join(f'{n} {r:.2%}' for n, r in phase.rates.items()))
  return text + ['', f'{data.mixture_or_task}, the mixture that is evaluated, by itself:']


def lines(data: DataConfig, report: mixture_report.Report) -> List[str]:
  """The report as text."""
  lengths = ' + '.join(f'{name} {length:,}' for name, length in data.task_feature_lengths.items())
  total = report.tokens + report.tokens_cut
  text = [f'{data.mixture_or_task}: {report.examples:,} examples, {report.tokens:,} tokens, {lengths}, '
          f'{_packing(data)}', '']
  text += _table('source', report.sources) + [''] + _table('objective', report.objectives) + ['']
  text += [f'rows           {report.rows:,} of {data.row_length:,} tokens, {report.segments:.2f} examples each',
           f'fill           {report.fill:.2%}; padding {1 - report.fill:.2%}',
           f'scored         {report.scored:.2%} of all places, {report.scored / max(report.fill, 1e-9):.2%} of the tokens',
           f'cut off        {report.tokens_cut:,} tokens ({report.tokens_cut / max(total, 1):.3%}), in '
           f'{report.examples_cut:,} examples, because they did not fit into their feature',
           f'time           {report.seconds:.1f} s, {report.tokens / report.seconds:,.0f} tokens/s with setting up']
  for number, page in enumerate(report.pages, 1):
    text += ['', f'--- {number}. {page.source}: {page.objective}']
    if page.inputs is not None:
      text.append(f'inputs:  {_shorten(page.inputs)}')
    text.append(f'targets: {_shorten(page.targets)}')
  return text


def _packing(data: DataConfig) -> str:
  if not data.pack:
    return 'not packed'
  return 'packed' + (f' (best of {data.open_rows} open rows)' if data.open_rows > 1 else '')


def _table(title: str, shares: Mapping[str, mixture_report.Share]) -> List[str]:
  width = max(len(name) for name in [title, *shares])
  rows = [f'{title:{width}}  configured  examples    tokens     count']
  for name, share in shares.items():
    configured = '-' if share.configured is None else f'{share.configured:.2%}'
    rows.append(f'{name:{width}}  {configured:>10}  {share.examples:>8.2%}  {share.tokens:>8.2%}  {share.count:>8,}')
  return rows


def _shorten(text: str) -> str:
  """The beginning and the end of a long text, as it would be written in Python but for the quotes."""
  if len(text) > _LONGEST:
    text = f'{text[:_LONGEST // 2]} [... {len(text) - _LONGEST:,} characters ...] {text[-_LONGEST // 2:]}'
  return repr(text)[1:-1]


if __name__ == '__main__':
  main()
