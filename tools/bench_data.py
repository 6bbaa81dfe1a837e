"""Tokens per second of the data path: tokenization alone, then full LM and UL2, the original's and corrected.

  python -m openmoe_jax.tools.bench_data            # or: make bench-data
  python -m openmoe_jax.tools.bench_data --data_set=mix --tfds_data_dir=DIR --vocabulary=FILE

Everything runs on one thread unless --streams says more, so a figure per second is one per core. CPU-seconds are those
of the whole process, and the steadier figure on shared machines. Objectives take turns, and medians over the turns are
printed. Tokens are those in rows, prompts, sentinels and ends included, padding not; useful ones are those with a loss.
Last comes how many cores a chip needs that trains at --tokens_per_second_per_chip.
"""

import json
import os
import statistics
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from openmoe_jax import command_line, data as data_lib, mixtures, vocabulary
from openmoe_jax.config import DataConfig, require
from openmoe_jax.tensorflow_setup import import_tensorflow
from openmoe_jax.tools.bench_timing import cpu_seconds

OBJECTIVES = ('full_lm', 'ul2', 'ul2_corrected')
TOKENIZERS = ('sentencepiece alone', 'tokenization in tf.data')
_TOKENIZED_BYTES = 4e6


class Turn(NamedTuple):
  """One measurement: tokens in rows, those with a loss, places in rows, seconds and CPU-seconds."""
  tokens: int
  useful: int
  places: int
  seconds: float
  cpu_seconds: float


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  parser = command_line.Parser(configured=False, prog='bench_data', description=__doc__)
  parser.add_argument('--data_set', default='demo', help='DATA_SET_OBJECTIVE is what is read (%(default)s)')
  parser.add_argument('--objectives', default=','.join(OBJECTIVES), help='%(default)s')
  parser.add_argument('--tfds_data_dir', default='', metavar='DIR', help='where TFDS data sets lie')
  parser.add_argument('--vocabulary', default='', metavar='FILE', help='default: the one in the package')
  parser.add_argument('--row_length', type=int, default=2048, help='tokens of a row (%(default)s)')
  parser.add_argument('--batch_size', type=int, default=8, help='rows of a batch (%(default)s)')
  parser.add_argument('--batches', type=int, default=40, help='in a turn (%(default)s)')
  parser.add_argument('--turns', type=int, default=5, help='(%(default)s)')
  parser.add_argument('--streams', type=int, default=1, help='logical streams, a thread each (%(default)s)')
  parser.add_argument('--open_rows', type=int, default=1, help='of packing, DataConfig.open_rows (%(default)s)')
  parser.add_argument('--tokens_per_second_per_chip', type=float, default=10000., metavar='N', help='of training; the '
                      'default is about what 40 %% of a TPU v5p gives to the 8B model (19.4 GFLOP a token)')
  parser.add_argument('--json', metavar='FILE', help='also write the figures there')
  args = parser.parse_args(argv)
  for name in ('row_length', 'batch_size', 'batches', 'turns', 'streams', 'open_rows', 'tokens_per_second_per_chip'):
    require(getattr(args, name) > 0, f'--{name}={getattr(args, name)} must be positive')
  require(args.row_length % 2 == 0, f'--row_length={args.row_length} must be even: half are inputs, half targets')
  figures = run(args)
  print('\n'.join(lines(args, figures)))
  if args.json:
    with open(args.json, 'w', encoding='utf-8') as file:
      json.dump(figures, file, indent=2)


def settings(args: Any, objective: str) -> DataConfig:
  """What is read for one objective."""
  data = DataConfig(mixture_or_task=f'{args.data_set}_{objective}', tfds_data_dir=args.tfds_data_dir,
                    vocabulary=args.vocabulary, batch_size=args.batch_size, num_streams=args.streams,
                    open_rows=args.open_rows)
  mixtures.load_tasks(data, data.mixture_or_task)
  features = mixtures.find_mixture(data.mixture_or_task, '--data_set and --objectives:').output_features
  half = args.row_length // 2
  lengths = {'inputs': half, 'targets': half} if 'inputs' in features else {'targets': args.row_length}
  return DataConfig(**{**data.__dict__, 'task_feature_lengths': lengths})


def run(args: Any) -> Dict[str, Dict[str, float]]:
  """{name: figures} of the tokenizers and of each objective."""
  chosen = {objective: settings(args, objective) for objective in args.objectives.split(',')}
  work: Dict[str, Callable[[], Turn]] = {}
  setup: Dict[str, float] = {}
  for objective, data in chosen.items():
    began = cpu_seconds()
    streams = data_lib.TrainStreams(data)
    next(streams)
    setup[objective] = cpu_seconds() - began
    work[objective] = lambda streams=streams: read(streams, args.batches)
  if args.data_set == 'demo':
    work = {**dict(zip(TOKENIZERS, tokenizers())), **work}
  turns: Dict[str, List[Turn]] = {name: [] for name in work}
  for _ in range(args.turns):
    for name, turn in work.items():
      settle()
      turns[name].append(turn())
  return {name: figures(turns[name], setup.get(name)) for name in work}


def figures(turns: Sequence[Turn], setup: Optional[float]) -> Dict[str, float]:
  """Medians over turns of speeds, and shares over all of them."""
  total = Turn(*(sum(column) for column in zip(*turns)))
  return dict(
      tokens_per_second=statistics.median(turn.tokens / turn.seconds for turn in turns),
      tokens_per_cpu_second=statistics.median(turn.tokens / turn.cpu_seconds for turn in turns),
      useful_tokens_per_cpu_second=statistics.median(turn.useful / turn.cpu_seconds for turn in turns),
      fill=total.tokens / total.places, useful=total.useful / total.places, setup_cpu_seconds=setup or 0.,
      tokens=total.tokens)


def read(streams: Any, batches: int) -> Turn:
  """Reads that many batches."""
  began, cpu = time.perf_counter(), cpu_seconds()
  tokens = useful = places = 0
  for _ in range(batches):
    batch = next(streams)
    tokens += int(np.count_nonzero(batch['decoder_target_tokens']))
    useful += int(np.count_nonzero(batch['decoder_loss_weights']))
    places += batch['decoder_target_tokens'].size
  return Turn(tokens, useful, places, time.perf_counter() - began, cpu_seconds() - cpu)


def tokenizers() -> List[Callable[[], Turn]]:
  """Tokenization of the demo's texts by itself: sentencepiece's own, and as objectives call it."""
  from openmoe_jax.tasks import standard_library
  tf = import_tensorflow()
  texts: List[str] = []
  kinds = [standard_library.documents(kind, 'train') for kind in standard_library.KINDS]
  for pair in zip(*kinds):
    texts += [document.text for document in pair]
    if sum(map(len, texts)) > _TOKENIZED_BYTES:
      break
  chosen = vocabulary.get()
  dataset = tf.data.Dataset.from_tensor_slices(texts).map(lambda text: tf.size(chosen.encode_tf(text)))
  options = tf.data.Options()
  options.threading.private_threadpool_size = options.threading.max_intra_op_parallelism = 1
  options.autotune.enabled = False
  dataset = dataset.with_options(options)

  def timed(count):
    began, cpu = time.perf_counter(), cpu_seconds()
    tokens = count()
    return Turn(tokens, tokens, tokens, time.perf_counter() - began, cpu_seconds() - cpu)

  return [lambda: timed(lambda: sum(len(chosen.tokenizer.encode(text)) for text in texts)),
          lambda: timed(lambda: sum(map(int, dataset.as_numpy_iterator())))]


def settle(patience: float = 5.) -> None:
  """Waits until threads that prepare batches in advance have done so."""
  until = time.monotonic() + patience
  while time.monotonic() < until:
    cpu = cpu_seconds()
    time.sleep(.1)
    if cpu_seconds() - cpu < .01:
      return


def lines(args: Any, found: Dict[str, Dict[str, float]]) -> List[str]:
  """The figures as Markdown, and what follows from them."""
  text = [f'{args.data_set}, rows of {args.row_length:,}, {args.batch_size} a batch, {args.streams} stream(s), '
          f'{args.open_rows} open row(s), {os.cpu_count()} cores, medians of {args.turns} turns', '',
          '| | tokens/s | tokens per CPU-s | useful tokens per CPU-s | fill | useful of all places | set-up, CPU-s |',
          '|---|---|---|---|---|---|---|']
  for name, own in found.items():
    speeds = f'| {name} | {own["tokens_per_second"]:,.0f} | {own["tokens_per_cpu_second"]:,.0f} '
    text.append(speeds + ('| | | | |' if name in TOKENIZERS else
                          f'| {own["useful_tokens_per_cpu_second"]:,.0f} | {own["fill"]:.1%} | {own["useful"]:.1%} '
                          f'| {own["setup_cpu_seconds"]:.1f} |'))
  if {'ul2', 'ul2_corrected'} <= set(found):
    old, new = found['ul2'], found['ul2_corrected']
    speed_up = new['useful_tokens_per_cpu_second'] / old['useful_tokens_per_cpu_second']
    text += ['', f'corrected UL2 against the original: {new["useful"] / old["useful"]:.2f} times the useful tokens per '
             f'batch, {speed_up:.2f} times per CPU-second']
  text += ['', f'cores that one chip needs at {args.tokens_per_second_per_chip:,.0f} tokens/s, padding '
           'counted: ' + ', '.join(
               f'{name} {args.tokens_per_second_per_chip * own["fill"] / own["tokens_per_cpu_second"]:.3f}'
               for name, own in found.items() if name not in TOKENIZERS)]
  return text


if __name__ == '__main__':
  main()
