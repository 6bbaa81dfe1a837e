"""How much longer recording takes than evaluation, on the same batches, in pairs that take turns.

  python -m openmoe_jax.tools.bench_recording CHECKPOINT [--policy=none,t5x_eval] [--tokens=65536] [--pairs=9]

Evaluation is what the trainer and openmoe-eval do: loss and metrics of each batch, under the same policy. Recording is a
pass that also gives every choice, tables of them, and compressed files. Reading the data is in neither. The figures are
medians of the pairs' ratios with their least and largest; CPU-seconds of the whole process are the steadier ones on
shared machines.
"""

import os
import statistics
import tempfile
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import jax
import numpy as np

from openmoe_jax import command_line, loading, paths
from openmoe_jax import data as data_lib
from openmoe_jax.config import require
from openmoe_jax.recording import collect, files, policies, tables
from openmoe_jax.tools.bench_timing import cpu_seconds
from openmoe_jax.train_step import make_eval_step

_PART_TOKENS = 131072  # as openmoe-analyze record


class Cost(NamedTuple):
  """Seconds of a pass over all batches."""
  wall: float
  cpu: float


class Figures(NamedTuple):
  """Costs [pairs] of evaluation and recording, bytes that were written, and tokens of a pass."""
  evaluation: List[Cost]
  recording: List[Cost]
  size: int
  tokens: int


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  parser = command_line.Parser(configured=False, prog='bench_recording', description=__doc__)
  parser.add_argument('checkpoint', metavar='CHECKPOINT')
  parser.add_argument('--mixture', default='demo_code_full_lm', help='one task (%(default)s)')
  parser.add_argument('--policy', default=','.join(policies.POLICIES), metavar='NAME[,NAME]', help='default: all')
  parser.add_argument('--tokens', type=int, default=65536, help='positions of a pass (%(default)s)')
  parser.add_argument('--batch_size', type=int, default=16, help='rows (%(default)s)')
  parser.add_argument('--pairs', type=int, default=9, help='how often each is timed (%(default)s)')
  args = parser.parse_args(argv)
  require(args.pairs >= 1, f'--pairs={args.pairs} must be at least 1')
  settings = collect.Settings([args.mixture], args.policy.split(','), args.tokens, batch_size=args.batch_size)
  collect.check(settings)
  model = loading.load(args.checkpoint)
  data = collect.data_settings(model.run, settings)
  task, data = next(iter(collect.tasks(data, settings).items()))
  batches = list(data_lib.eval_batches(data, task))
  found = {name: measure(model, name, batches, args.pairs) for name in settings.policies}
  print('\n'.join(table(found)))


def measure(model: Any, policy: str, batches: Sequence[Dict[str, np.ndarray]], pairs: int) -> Figures:
  """Times both, turn by turn; programs are compiled before."""
  config = policies.configure(model.config, policy)
  together = policies.POLICIES[policy].rows_together
  step = make_eval_step(config)
  rows = together or len(batches[0]['decoder_input_tokens'])
  parts = [part for batch in batches for _, part in collect.parts_of(batch, rows)]

  def evaluate() -> None:
    for part in parts:
      jax.device_get(step(model.variables, part))

  key = files.Key(0, policy, 'bench')

  def record(folder: str) -> None:
    writer = files.KeyWriter(folder, key, tables.sparse_layers(config), _PART_TOKENS)
    for number, batch in enumerate(batches):
      collect.record_batch(model, config, policies.POLICIES[policy], number, batch, writer)
    writer.finish({})

  with tempfile.TemporaryDirectory() as scratch:
    evaluate()
    record(os.path.join(scratch, 'first'))
    written = files.part_files(paths.path(scratch) / 'first' / key.folder())
    size = sum(file.stat().length for file in written)
    costs: Dict[str, List[Cost]] = {'evaluate': [], 'record': []}
    for pair in range(pairs):
      turns = [('evaluate', evaluate), ('record', lambda: record(os.path.join(scratch, f'{policy}{pair}')))]
      for name, function in turns if pair % 2 else reversed(turns):
        costs[name].append(_timed(function))
  tokens = sum(int((batch['decoder_target_tokens'] > 0).sum()) for batch in batches)
  return Figures(costs['evaluate'], costs['record'], size, tokens)


def _timed(function: Callable[[], None]) -> Cost:
  wall, cpu = time.perf_counter(), cpu_seconds()
  function()
  return Cost(time.perf_counter() - wall, cpu_seconds() - cpu)


def table(found: Dict[str, Figures]) -> List[str]:
  """The figures as a Markdown table."""
  lines = ['| policy | evaluation, CPU-s | recording, CPU-s | more, by CPU-s | more, by wall clock | bytes a token |',
           '|---|---|---|---|---|---|']
  for policy, figures in found.items():
    medians = [statistics.median(cost.cpu for cost in own) for own in figures[:2]]
    more = [_more(*([getattr(cost, kind) for cost in own] for own in figures[:2])) for kind in ('cpu', 'wall')]
    lines.append(f'| {policy} | {medians[0]:.2f} | {medians[1]:.2f} | {more[0]} | {more[1]} | '
                 f'{figures.size / figures.tokens:.0f} |')
  return lines


def _more(before: Sequence[float], after: Sequence[float]) -> str:
  """'+12 % (9 to 15)': the median of the pairs' ratios, and the least and the largest."""
  ratios = sorted(100 * (b / a - 1) for a, b in zip(before, after))
  return f'{statistics.median(ratios):+.0f} % ({ratios[0]:.0f} to {ratios[-1]:.0f})'


if __name__ == '__main__':
  main()
