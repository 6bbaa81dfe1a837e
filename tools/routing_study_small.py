"""What the demo's routers do, from its checkpoints to a report, in a few minutes; trains nothing.

  python -m openmoe_jax.tools.routing_study_small --model_dir=runs/demo     # or: make routing-study-small

1. records the routing of every checkpoint and of the parameters before training, under four policies of who may be
   dropped, over the demo's own code and prose and over text of other kinds that this machine has;
2. draws all figures and tables, and writes findings and the report.

Both commands are printed before they run. What is recorded already is used again, so the same command goes on after a
stop.
"""

import json
import shlex
import time
from typing import Any, List, Mapping, Optional, Sequence

from openmoe_jax import analyze, command_line, loading, paths
from openmoe_jax.analysis.figures.report import FINDINGS
from openmoe_jax.checkpoints import CHECKPOINTS
from openmoe_jax.config import require
from openmoe_jax.progress import duration

POLICIES = ('none', 't5x_train', 't5x_eval', 'colossalai')
# Kinds of text beside the demo's own (tasks/domains.py): programming languages, natural languages, parts of sources.
# part_docstrings is left out: it is the demo's prose.
OTHERS = ('language_cpp', 'language_javascript', 'language_markdown', 'manual_de', 'manual_ja', 'part_comments',
          'part_headings')
_PREFIX = 'demo_'


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  args = parser().parse_args(argv)
  require(args.tokens >= 1, f'--tokens={args.tokens} must be at least 1')
  model_dir = paths.path(args.model_dir)
  require(bool(paths.entries(model_dir / CHECKPOINTS)), f'--model_dir={args.model_dir} holds no checkpoint of the '
          'demo: `make demo` trains it, in a few minutes')
  begin = time.monotonic()
  output = paths.path(args.output or model_dir / 'routing_study')
  mixtures = args.mixture or ','.join(default_mixtures(loading.read_run(model_dir), args.model_dir))
  recording, figures = str(output / 'recording'), str(output / 'figures')
  _run(['record', str(model_dir), f'--mixture={mixtures}', '--split=validation,all', f'--policy={",".join(POLICIES)}',
        f'--tokens={args.tokens}', '--all_checkpoints', '--initialization', f'--output={recording}'])
  _run(['figures', recording, f'--output={figures}'])
  findings = json.loads((output / 'figures' / FINDINGS).read_text())['findings']
  print('\n'.join(['', *(f'* {finding["statement"]}' for finding in findings if finding['headline']), '',
                   f'After {duration(time.monotonic() - begin)}: {figures}/report.html']))


def parser() -> command_line.Parser:
  """The program's flags."""
  flags = command_line.Parser(configured=False, prog='routing_study_small', description=__doc__)
  flags.add_argument('--model_dir', default='runs/demo', help='of the demo (%(default)s)')
  flags.add_argument('--output', metavar='DIR', help='default: routing_study in the model_dir')
  flags.add_argument('--tokens', type=int, default=8192, help='positions of each kind of text (%(default)s)')
  flags.add_argument('--mixture', metavar='NAME[,NAME]', help="tasks or mixtures; default: the run's own, and "
                     'programming languages, natural languages and parts of sources that this machine has')
  return flags


def default_mixtures(run: Mapping[str, Any], model_dir: str) -> List[str]:
  """The run's own mixture, and tasks of other kinds of text with its objective."""
  from openmoe_jax.tasks import domains
  own = run['data']['mixture_or_task']
  require(own.startswith(_PREFIX), f'--model_dir={model_dir} was trained on {own!r}, which is none of the mixtures '
          'demo_*; give --mixture=NAME,NAME')
  others = [name for name in OTHERS if name in domains.available(name)]
  return [own, *(f'{name}_{own.removeprefix(_PREFIX)}' for name in others)]


def _run(arguments: List[str]) -> None:
  print(f'\n$ {shlex.join(["openmoe-analyze", *arguments])}', flush=True)
  analyze.main(arguments)


if __name__ == '__main__':
  main()
