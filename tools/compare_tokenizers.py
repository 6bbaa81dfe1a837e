"""Two vocabularies on the same texts: tokens, how much of the vocabulary is used, and their ratio (the paper's table 10).

  python -m openmoe_jax.tools.compare_tokenizers umt5.model llama/tokenizer.model english=en.txt chinese=zh/ code=src/
  python -m openmoe_jax.tools.compare_tokenizers umt5.model '' --output=tokenizers

A vocabulary is a sentencepiece model, a tokenizer.json or a folder with one, local or gs://; '' is the small one of the
package. A text is NAME=FILE or NAME=FOLDER (UTF-8; files of a folder that are something else are skipped); without any,
the standard library's code and prose. Prints a table, and with --output also writes OUTPUT.png and OUTPUT.json.
"""

import itertools
import json
import os
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence

from rich.console import Console
from rich.progress import Progress

from openmoe_jax import command_line, vocabulary
from openmoe_jax.analysis.token_counts import Counts, count, distinct_names
from openmoe_jax.config import require
from openmoe_jax.tools.train_vocab import read_texts

_COLOURS = ('#1f6fb4', '#d1495b')


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  parser = command_line.Parser(configured=False, prog='compare_tokenizers', description=__doc__)
  parser.add_argument('first', help='a vocabulary')
  parser.add_argument('second', help='another one')
  parser.add_argument('texts', nargs='*', metavar='NAME=PATH')
  parser.add_argument('--names', metavar='FIRST,SECOND', help='what to call them; default: their files')
  parser.add_argument('--output', metavar='PATH', help='write PATH.png and PATH.json')
  args = parser.parse_args(argv)
  models = [load(path) for path in (args.first, args.second)]
  names = args.names.split(',') if args.names else distinct_names(args.first, args.second)
  require(len(names) == 2, f'--names={args.names!r} must be two names with a comma between them')
  folder = os.path.dirname(os.path.abspath(args.output)) if args.output else ''
  require(not args.output or os.path.isdir(folder), f'--output={args.output}: there is no folder {folder}')
  groups = _groups(args.texts)
  counts: Dict[str, List[Counts]] = {}
  console = Console()
  with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
    for name, texts in progress.track(groups.items(), description='texts'):
      counts[name] = count(texts, models)
      require(counts[name][0].tokens > 0, f'{name} holds no text')
  print('\n'.join(table(counts, names)))
  if args.output:
    with open(f'{args.output}.json', 'w', encoding='utf-8') as file:
      json.dump({name: dict(zip(names, (c._asdict() for c in pair))) for name, pair in counts.items()}, file, indent=2)
    plot(counts, names, f'{args.output}.png')
    print(f'wrote {args.output}.png and {args.output}.json')


def load(path: str) -> Any:
  """The sentencepiece processor of a vocabulary, without sentinels."""
  vocabulary.configure(path, 0)
  try:
    return vocabulary.get().tokenizer
  finally:
    vocabulary.configure()


def _groups(arguments: Sequence[str]) -> Mapping[str, Iterable[str]]:
  """{name: texts}, read when they are iterated."""
  groups: Dict[str, Iterable[str]] = {}
  for argument in arguments:
    name, equals, path = argument.partition('=')
    require(bool(name and equals and path), f'{argument!r} must be NAME=FILE or NAME=FOLDER')
    require(name not in groups, f'{name!r} is named twice')
    require(os.path.exists(path), f'{path}: no such file or folder')
    groups[name] = read_texts([path])
  if not groups:
    from openmoe_jax.tasks import standard_library
    for kind in standard_library.KINDS:
      groups[kind] = (document.text for document in standard_library.documents(kind, 'train'))
  return groups


def table(counts: Mapping[str, Sequence[Counts]], names: Sequence[str]) -> List[str]:
  """The report as a Markdown table; the ratios are first / second."""
  rows = [['text', 'characters', *itertools.chain.from_iterable(
      (f'tokens, {name}', f'vocabulary used, {name}', f'bytes a token, {name}') for name in names),
           'ratio of tokens', 'ratio of vocabulary used']]
  for group, pair in counts.items():
    cells = itertools.chain.from_iterable(
        (f'{c.tokens:,}', f'{c.used:,}', f'{c.utf8_bytes / c.tokens:.2f}') for c in pair)
    rows.append([group, f'{pair[0].characters:,}', *cells, f'{pair[0].tokens / pair[1].tokens:.3f}',
                 f'{pair[0].used / pair[1].used:.3f}'])
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |' for row in rows]
  return [lines[0], '|' + '|'.join('-' * (width + 2) for width in widths) + '|', *lines[1:]]


def plot(counts: Mapping[str, Sequence[Counts]], names: Sequence[str], path: str) -> None:
  """Two panels of bars: bytes a token (more is better), and pieces that are used."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot
  groups = list(counts)
  panels = (('UTF-8 bytes a token', lambda c: c.utf8_bytes / c.tokens, '{:.2f}'),
            ('Pieces of the vocabulary used', lambda c: c.used, '{:,.0f}'))
  figure, axes = pyplot.subplots(1, 2, figsize=(10, 1.4 + .62 * len(groups)), sharey=True, layout='constrained')
  for axis, (title, value, style) in zip(axes, panels):
    for i, name in enumerate(names):
      places = [row + (i - .5) * .36 for row in range(len(groups))]
      bars = axis.barh(places, [value(counts[group][i]) for group in groups], .34, color=_COLOURS[i], label=name)
      axis.bar_label(bars, labels=[style.format(value(counts[group][i])) for group in groups], padding=3, fontsize=8)
    axis.set_title(title, loc='left', fontweight='bold', fontsize=10)
    axis.margins(x=.16)
    axis.spines[['top', 'right']].set_visible(False)
    axis.set_yticks(range(len(groups)), groups)
  axes[0].invert_yaxis()  # The first text on top; both panels share the axis.
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=2, frameon=False)
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


if __name__ == '__main__':
  main()
