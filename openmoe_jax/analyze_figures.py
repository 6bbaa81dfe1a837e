"""`openmoe-analyze figures`: its flags, and the order in which figures, tables and findings are made."""

import argparse
import functools
from typing import Any, Callable, List, Sequence, Tuple

from openmoe_jax.bar import Bar
from openmoe_jax.command_line import names
from openmoe_jax.config import ConfigError, require

_DESCRIPTION = """Draws figures 5 to 14 and tables 9, 10 and 15 of the paper from recorded routing, and writes its
findings as sentences with numbers and intervals: OUTPUT/figures.json, OUTPUT/findings.json, and what they name.

  openmoe-analyze figures runs/demo/routing --output=runs/demo/figures
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of the command, and what runs it."""
  from openmoe_jax.analysis.figures import selection
  parser.description = _DESCRIPTION
  parser.set_defaults(run=run)
  parser.add_argument('recording', help='folder of `openmoe-analyze record`')
  parser.add_argument('--output', required=True, metavar='DIR', help='local or gs://')
  parser.add_argument('--compare', default='', metavar='DIR[,DIR]', help='recordings of the same text by other models, '
                      'such as after fine-tuning, for figure 12')
  parser.add_argument('--vocabulary', metavar='PATH', help="another vocabulary for table 10: a sentencepiece model, a "
                      "tokenizer.json or a folder with one; '' is the small one of the package")
  group = parser.add_argument_group('what is shown', 'everything that is recorded, unless these say otherwise')
  for name, what in (('layers', 'sparse layers'), ('steps', 'checkpoints'), ('policies', 'who may be dropped')):
    group.add_argument(f'--{name}', default='', metavar='VALUE[,VALUE]', help=what)
  for own in selection.GROUPS:
    default = ', '.join(own.patterns) or 'all that are in no other group'
    group.add_argument(f'--{own.name}', default='', metavar='TASK[,TASK]', help='tasks, with * and ?, that are '
                       f'compared as {own.what}s ({own.paper}); default: {default}')
  group.add_argument('--positions', default='', metavar='N[,N]', help='of figure 9; default: bins along the row')
  group.add_argument('--token_ids', default='', metavar='ID[,ID]',
                     help='of figures 10 and 11; default: the most frequent')


def run(args: argparse.Namespace) -> None:
  """Makes everything; a section that the recording does not suffice for is left out with a line that says why."""
  from openmoe_jax.analysis.figures import report as report_lib
  from openmoe_jax.analysis.figures import selection
  chosen = selection.Selection(args.recording, wanted(args))
  chosen.check_enough()
  others = [selection.compared(chosen, folder, wanted(args)) for folder in names(args.compare)]
  report = report_lib.Report(args.output, about(chosen, others))
  sections, skipped = _sections(args, chosen, others), []
  with Bar(len(sections), print, 'figures', lambda n: f'{n:.2g} sections') as bar:
    for name, add in sections:
      try:
        add(report, chosen)
      except ConfigError as error:
        skipped.append(f'{name}: {" ".join(str(error).split())}')
      bar.advance(1)
  require(bool(report.figures), f'nothing can be shown; {"; ".join(dict.fromkeys(skipped))}')
  report.finish(skipped)
  from openmoe_jax.analysis import routing_report
  routing_report.write(args.output)
  print('\n'.join([*(f'left out: {line}' for line in skipped),
                   f'wrote {len(report.figures)} figures and {len(report.findings)} findings into {args.output}']))


def _sections(args: argparse.Namespace, chosen: Any, others: Sequence[Any]) -> List[Tuple[str, Callable[..., Any]]]:
  """(name, what is called with the report and the selection), in the order of the report."""
  from openmoe_jax.analysis.figures import (context, drop_table, drops, early, eviction, load, pieces, specialisation,
                                            tables)
  tokenizer = pieces.recorded(chosen.recording.about)
  piece = pieces.namer(tokenizer)
  settings = context.Settings(numbers('--positions', args.positions), numbers('--token_ids', args.token_ids), piece)
  context.check(chosen, settings)
  found = [('specialisation', specialisation.add), ('context', functools.partial(context.add, settings=settings)),
           ('early', functools.partial(early.add, settings=settings)), ('load', load.add),
           ('drops', functools.partial(drops.add, others=others)), ('loss of drops', drop_table.add),
           ('eviction', eviction.add),
           ('tables', functools.partial(tables.top_tokens, piece=piece))]
  if args.vocabulary is not None:
    from openmoe_jax.analysis import token_counts
    first = chosen.recording.about['vocabulary']['path']
    both = dict(zip(token_counts.distinct_names(first, args.vocabulary),
                    (tokenizer, pieces.processor(args.vocabulary))))
    require(len(both) == 2, f'--vocabulary={args.vocabulary!r} is that of the recording; give another one')
    found.append(('vocabularies', functools.partial(tables.vocabularies, tokenizers=both,
                                                    count=token_counts.count)))
  return found


def wanted(args: argparse.Namespace) -> Any:
  """What the flags ask for."""
  from openmoe_jax.analysis.figures import selection
  groups = [own._replace(patterns=names(getattr(args, own.name)) or own.patterns) for own in selection.GROUPS]
  return selection.Wanted(numbers('--layers', args.layers), numbers('--steps', args.steps), names(args.policies),
                          groups)


def numbers(flag: str, text: str) -> Sequence[int]:
  """'1,2' -> [1, 2]."""
  for name in names(text):
    require(name.isdecimal(), f'{flag}={text}: {name!r} is no whole number; valid: {flag}=1,2')
  return [int(name) for name in names(text)]


def about(chosen: Any, others: Sequence[Any]) -> dict:
  """What figures.json says of the recording."""
  config = chosen.recording.config
  sizes = ('vocab_size', 'emb_dim', 'mlp_dim', 'num_layers', 'num_experts', 'num_selected_experts', 'router')
  return {'model': {**{name: getattr(config, name) for name in sizes}, 'sparse_layers': chosen.recording.layers},
          'recordings': [own.folder for own in (chosen, *others)],
          'checkpoint': chosen.recording.about.get('checkpoint', ''),
          'steps': chosen.steps, 'policies': chosen.policies, 'domains': chosen.all_domains, 'tokens': chosen.tokens(),
          'layers': chosen.layers, 'row_length': chosen.length}
