"""Makes data sets in TFDS's format from raw files: those of the original's tasks, and your own text.

  python -m openmoe_jax.tools.prepare_data redpajama_c4 --input=/raw/redpajama/c4 --output=/data/tfds
  python -m openmoe_jax.tools.prepare_data the_stack_dedup --input=gs://bucket/the_stack --output=gs://bucket/tfds
  python -m openmoe_jax.tools.prepare_data text --name=my_texts --input=my_folder --output=/data/tfds

Reads and writes local folders and gs://, streaming, on several processes. The same command goes on after a stop;
finished shards are kept. Train on the result with --tfds_data_dir=OUTPUT and, for your own text,
--gin.MIXTURE_OR_TASK_NAME=my_texts_ul2 (or _full_lm, _prefix_lm).

data sets:
{known}
  text                      a folder of text, code, JSON lines or .parquet; split by a hash of each document's id
"""

import os
import time
from typing import Optional, Sequence

from openmoe_jax import command_line, paths
from openmoe_jax.config import require
from openmoe_jax.preparation import datasets, plan, prepare
from openmoe_jax.preparation.reading import Limits
from openmoe_jax.progress import duration

_TEXT_ONLY = ('version', 'validation', 'text_field', 'id_field')


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  known = '\n'.join(f'  {name:25} {data_set.layout}' for name, data_set in datasets.KNOWN.items())
  parser = command_line.Parser(configured=False, prog='prepare_data', description=__doc__.format(known=known))
  parser.add_argument('data_set', metavar='DATA_SET', help='NAME or NAME:VERSION of the list above, or text')
  parser.add_argument('--input', action='append', required=True, metavar='PATH', help='a raw file, a folder or a '
                      'pattern with wildcards; may be given several times')
  parser.add_argument('--output', required=True, metavar='DIR', help='the TFDS folder')
  parser.add_argument('--processes', type=int, default=os.cpu_count(), help='on this machine (default: one a core)')
  parser.add_argument('--max_malformed', type=int, default=0, metavar='N', help='malformed records that may be '
                      'skipped; they are listed in malformed_records.txt beside the shards (%(default)s)')
  parser.add_argument('--shard_mb', type=float, metavar='MB', help='about the size of a shard (default: 256, less '
                      'where there would be few of them)')
  parser.add_argument('--max_record_mb', type=float, default=64, metavar='MB', help='longer lines of JSON are '
                      'malformed; a process may need 13 times as much memory (%(default)s)')
  parser.add_argument('--beam', action='append', metavar='OPTION', help='do it under Apache Beam, with this option of '
                      'its pipeline, such as --beam=--runner=DataflowRunner; may be given several times')
  own = parser.add_argument_group('for text')
  own.add_argument('--name', help='of the data set')
  own.add_argument('--version', help='of the data set (1.0.0)')
  own.add_argument('--validation', type=float, metavar='SHARE', help='of the documents (0.01); 0: no such split')
  own.add_argument('--text_field', metavar='NAME', help='of records (text or content)')
  own.add_argument('--id_field', metavar='NAME', help='of records, by which they are split; dots lead into objects '
                   '(default: the text itself)')
  own.add_argument('--document_kb', type=float, metavar='KB', help='longer text files are cut at lines into so many '
                   'documents, since objectives use 65,536 tokens of one at a time (256)')
  args = parser.parse_args(argv)
  given = {name: getattr(args, name) for name in _TEXT_ONLY if getattr(args, name) is not None}
  if args.data_set == 'text':
    require(bool(args.name), '--name=NAME is needed, of your data set')
    data_set = {'name': args.name, 'validation': .01, **given}
  else:
    for name in ('name', *given, 'document_kb'):
      require(getattr(args, name) is None, f'--{name} is for text, not for {args.data_set}')
    data_set = {'name': args.data_set}
  for name in ('processes', 'shard_mb', 'max_record_mb', 'document_kb'):
    require(getattr(args, name) is None or getattr(args, name) > 0, f'--{name}={getattr(args, name)} must be positive')
  require(args.max_malformed >= 0, f'--max_malformed={args.max_malformed} must not be negative')
  limits = Limits(int(args.max_record_mb * 2**20), int((args.document_kb or 256) * 2**10))
  begin = time.monotonic()
  work = plan.make(data_set, args.input, args.output, limits, int(args.shard_mb * 2**20) if args.shard_mb else None)
  summary = prepare.prepare(work, args.processes, args.max_malformed, args.beam)
  for split, count in summary.examples.items():
    print(f'{split}: {count:,} documents, {paths.human_bytes(summary.example_bytes[split])}, '
          f'{summary.shards[split]:,} shards')
  for reason, count in summary.left_out.items():
    print(f'left out: {count:,} records: {reason}')
  if summary.malformed:
    print(f'skipped: {summary.malformed:,} malformed records, listed in {work.folder / "malformed_records.txt"}')
  print(f'{work.folder}: ready after {duration(time.monotonic() - begin)}')


if __name__ == '__main__':
  main()
