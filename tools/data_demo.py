"""From raw files to a trained model on this machine: the base recipe's mixture, at the size of the demo model.

  python -m openmoe_jax.tools.data_demo --work_dir=runs/data_demo

1. writes raw files in the layouts in which RedPajama and The Stack are published, with text that every Python
   installation has (the standard library's sources and documentation);
2. prepares each data set with openmoe_jax.tools.prepare_data, as one would the real ones;
3. trains on `mix_ul2`, the mixture of recipes/openmoe_base.gin, with openmoe-train, and compares the loss at the
   beginning and at the end.

Every command is printed before it runs. What is there already is used again, so the same command goes on after a stop.
Exit status 1 if the loss has not fallen.
"""

import json
import os
import pathlib
import re
import shlex
import statistics
import subprocess
import sys
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence

from openmoe_jax import command_line, history, paths
from openmoe_jax.config import require
from openmoe_jax.preparation import datasets
from openmoe_jax.tools.train_vocab import chunks

MIXTURE = 'mix_ul2'
CORPORA = (*(f'redpajama_{subset}' for subset in datasets.REDPAJAMA), 'the_stack_dedup')
# A task of C4 keeps the last 2,000 documents for validation.
_C4_DOCUMENTS = 5000
_PARQUET_ROWS = 200


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  parser = command_line.Parser(configured=False, prog='data_demo', description=__doc__)
  parser.add_argument('--work_dir', default='runs/data_demo', help='raw files, data sets and the run (%(default)s)')
  parser.add_argument('--steps', type=int, default=400, help='training steps of 2,048 tokens (%(default)s)')
  args = parser.parse_args(argv)
  require(args.steps >= 20, f'--steps={args.steps}: at least 20, to see a loss fall')
  work = pathlib.Path(args.work_dir)
  raw, prepared, run = work / 'raw', work / 'tfds', work / 'run'
  if not (raw / 'complete').exists():
    write_raw_files(raw, corpora())
    (raw / 'complete').write_text('')
  for name in CORPORA:
    _run(prepare_command(name, raw, prepared))
  _run(train_command(prepared, run, args.steps))
  first, last = losses(run)
  verdict = 'fell' if last < first - .5 else 'did not fall'
  print(f'\nThe training loss {verdict}: {first:.2f} in the first tenth of the steps, {last:.2f} in the last.')
  print(f'Look at the mixture: {_shown(inspect_command(prepared))}')
  if verdict != 'fell':
    sys.exit(1)


# The commands.


def prepare_command(name: str, raw: pathlib.Path, prepared: pathlib.Path) -> List[str]:
  """What prepares one data set from its raw files."""
  folder = raw / name.removeprefix('redpajama_')
  return [sys.executable, '-m', 'openmoe_jax.tools.prepare_data', name, f'--input={folder}', f'--output={prepared}']


def train_command(prepared: pathlib.Path, run: pathlib.Path, steps: int) -> List[str]:
  """What trains the demo model on the base recipe's mixture."""
  return [sys.executable, '-m', 'openmoe_jax.train', '--gin_file=recipes/demo_ul2.gin', f'--model_dir={run}',
          f'--tfds_data_dir={prepared}', f'--gin.MIXTURE_OR_TASK_NAME={MIXTURE}', f'--gin.TRAIN_STEPS={steps}',
          '--gin.BATCH_SIZE=8', '--gin.NUM_STREAMS=1', f'--gin.EVAL_PERIOD={steps}', f'--gin.CHECKPOINT_PERIOD={steps}',
          '--gin.OptimizerConfig.warmup_steps=20']


def inspect_command(prepared: pathlib.Path) -> List[str]:
  """What shows the mixture."""
  return [sys.executable, '-m', 'openmoe_jax.tools.inspect_mixture', MIXTURE, f'--tfds_data_dir={prepared}']


def _shown(command: Sequence[str]) -> str:
  return shlex.join(['python', *command[1:]])


def _run(command: Sequence[str]) -> None:
  print(f'\n$ {_shown(command)}', flush=True)
  status = subprocess.run(command, check=False).returncode
  if status:
    sys.exit(status)


def losses(run: pathlib.Path) -> List[float]:
  """Mean training losses of the first and of the last tenth of the logged steps."""
  records = [record for record in history.read(paths.path(run) / history.FILE) if record['kind'] == 'train']
  values = [float(record['loss']) for record in records]
  tenth = max(len(values) // 10, 1)
  return [statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])]


# Text.


def corpora() -> Dict[str, List[str]]:
  """{data set: documents} from the standard library: its documentation as text, its sources as code.

  The documents are short: UL2 joins 128 of them for each of its six objectives before the first batch is there.
  """
  from openmoe_jax.tasks import standard_library
  prose, code = ([part for document in standard_library.documents(kind, 'train') for part in chunks(document.text)]
                 for kind in ('prose', 'code'))
  paragraphs = [part for text in prose for part in re.split(r'\n\s*\n', text) if len(part) > 40]
  require(len(paragraphs) > 2000, f'the standard library of {sys.executable} has only {len(paragraphs)} paragraphs of '
          'documentation; C4 needs more than 2,000 documents')
  return {
      'redpajama_c4': paragraphs[:_C4_DOCUMENTS],
      'redpajama_common_crawl': prose[0::2],
      'redpajama_wikipedia': prose[1::8],
      'redpajama_stackexchange': [f'Q: {part.strip()}\n\nA: {part}' for part in paragraphs[::9]],
      'redpajama_arxiv': prose[3::8],
      'redpajama_book': [''.join(prose[i:i + 3]) for i in range(0, len(prose), 12)],
      'redpajama_github': code[0::5],
      'the_stack_dedup': [text for i, text in enumerate(code) if i % 5],
  }


# Raw files, in the layouts in which the data sets are published.


def write_raw_files(folder: pathlib.Path, documents: Mapping[str, Sequence[str]]) -> None:
  """Writes the files of each data set into a folder of its own: RedPajama-1T's subsets and The Stack."""
  for name, texts in documents.items():
    target = folder / name.removeprefix('redpajama_')
    if name == 'the_stack_dedup':
      _write_parquet(target, texts)
    elif name == 'redpajama_common_crawl':
      _write_common_crawl(target, texts)
    else:
      files = {'c4': 'c4-train.{:05d}-of-01024.jsonl', 'arxiv': 'arxiv_{:08x}.jsonl',
               'github': 'filtered_{:08x}.sampled.jsonl', 'wikipedia': 'wiki.jsonl', 'book': 'book.jsonl',
               'stackexchange': 'stackexchange.jsonl'}
      pattern = files[target.name]
      parts = [texts[0::2], texts[1::2]] if '{' in pattern else [texts]
      for number, part in enumerate(parts):
        _write(target / pattern.format(number), _lines({'text': text, 'meta': {'source': target.name, 'number': i}}
                                                       for i, text in enumerate(part)))
    print(f'{target}: {len(texts):,} documents, {paths.human_bytes(sum(map(len, texts)))}')


def _lines(records: Iterator[Mapping[str, Any]]) -> bytes:
  return ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in records).encode('utf-8', 'replace')


def _write(path: pathlib.Path, content: bytes) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)


def _write_common_crawl(folder: pathlib.Path, texts: Sequence[str]) -> None:
  """Compressed, by crawl, and without `meta`: what is said about a page stands beside its text."""
  import pyarrow
  for crawl, part in (('2022-05', texts[0::2]), ('2023-06', texts[1::2])):
    content = _lines({'text': text, 'pred_label': '__label__wiki', 'pred_label_prob': .75, 'wiki_prob': .75,
                      'source': f'cc/{crawl}/en_head_0000.json.gz/line{i}'} for i, text in enumerate(part))
    path = folder / crawl / 'en_head_0000.json.gz.dedup.classifier.jsonl.zst'
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.output_stream(str(path), compression='zstd') as stream:
      stream.write(content)


def _write_parquet(folder: pathlib.Path, texts: Sequence[str]) -> None:
  """By language, with the text in `content` and what is known about the file beside it."""
  import pyarrow
  from pyarrow import parquet
  target = folder / 'data' / 'python'
  os.makedirs(target, exist_ok=True)
  for number, part in enumerate((texts[0::2], texts[1::2])):
    texts_part = [text.encode('utf-8', 'replace').decode() for text in part]
    columns = {'content': texts_part, 'size': list(map(len, part)), 'ext': ['py'] * len(part),
               'lang': ['Python'] * len(part), 'hexsha': [f'{number}{i:039x}' for i in range(len(part))],
               'max_stars_repo_name': ['python/cpython'] * len(part)}
    parquet.write_table(pyarrow.table(columns), target / f'train-{number:05d}-of-00002.parquet',
                        row_group_size=_PARQUET_ROWS)


if __name__ == '__main__':
  main()
