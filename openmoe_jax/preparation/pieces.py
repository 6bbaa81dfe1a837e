"""One piece of work: records become examples in shards, and each finished shard stays finished.

A piece writes shards one after the other; a shard has a TFRecord file for each split that has examples in it, and is
finished when its report, a small JSON file beside them, is there. A piece that is begun again passes over the records
of its finished shards. What is written depends on the plan alone: not on how often it was interrupted, nor on how many
processes there are.
"""

import collections
import contextlib
import json
import os
from typing import Any, BinaryIO, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

from openmoe_jax import paths
from openmoe_jax.config import ConfigError
from openmoe_jax.preparation import datasets, reading, tfrecord
from openmoe_jax.preparation.plan import Plan
from openmoe_jax.preparation.reading import Segment

# A shard is closed at this multiple of the plan's size: pieces have about that size, and shall not leave small rests.
_SLACK = 1.5
_PROGRESS_BYTES = 1 << 20


class Split(NamedTuple):
  """What a shard holds of a split.

  Attributes:
    examples: how many.
    example_bytes: of them.
    file_bytes: of the file.
  """
  examples: int
  example_bytes: int
  file_bytes: int


class Shard(NamedTuple):
  """A finished shard.

  Attributes:
    piece, number: which one.
    splits: {split: what it holds}, those with examples only.
    left_out: {why: how many}.
    malformed: (where, why) of each record that was skipped.
    segment, record: where its piece was left: a segment, and the number of the next record in that.
    done: input bytes of the piece that had been read then.
    last: of its piece.
  """
  piece: int
  number: int
  splits: Dict[str, Split]
  left_out: Dict[str, int]
  malformed: List[Tuple[str, str]]
  segment: int
  record: int
  done: int
  last: bool


def as_plain(shard: Shard) -> Dict[str, Any]:
  """A shard as JSON can hold it."""
  return shard._asdict()


def from_plain(values: Mapping[str, Any]) -> Shard:
  """A shard from what `as_plain` gave."""
  return Shard(**{**values, 'splits': {split: Split(*content) for split, content in values['splits'].items()},
                  'malformed': [(where, why) for where, why in values['malformed']]})


class TooManyMalformed(ConfigError):
  """More than the limit."""


def data_file(plan: Plan, piece: int, number: int, split: str) -> Any:
  """The path of a shard's records of a split, until the data set is finished."""
  return plan.work / f'{piece:06d}-{number:04d}.{split}.tfrecord'


def _report_file(plan: Plan, piece: int, number: int) -> Any:
  return plan.work / f'{piece:06d}-{number:04d}.json'


def finished_shards(plan: Plan, piece: int) -> List[Shard]:
  """The finished shards of a piece, in order; the files are there in the sizes that the reports say."""
  shards: List[Shard] = []
  while not shards or not shards[-1].last:
    report = _report_file(plan, piece, len(shards))
    if not report.exists():
      break
    shard = from_plain(json.loads(report.read_text()))
    for split, content in shard.splits.items():
      file = data_file(plan, piece, shard.number, split)
      if not file.exists() or file.stat().length != content.file_bytes:
        return shards
    shards.append(shard)
  return shards


def work(plan: Plan, piece: int, max_malformed: int, progress: Callable[[int], None] = lambda done: None,
         context: Any = None) -> List[Shard]:
  """Writes the shards of a piece that are not finished, and returns all of them.

  Args:
    plan: of the data set.
    piece: which one.
    max_malformed: records that may be skipped in it.
    progress: is told now and then how many input bytes of the piece have been read; may raise to stop.
    context: of `DataSet.context`.

  Raises:
    ConfigError: a file cannot be read, or has more malformed records than may be skipped.
  """
  builder = plan.builder
  shards = finished_shards(plan, piece)
  malformed = sum(len(shard.malformed) for shard in shards)
  source = _Source(plan, piece, builder, shards[-1] if shards else None, progress)
  while not shards or not shards[-1].last:
    with _Shard(plan, piece, len(shards)) as shard:
      for where, record in source:
        try:
          split, example = builder.example(reading.fields(record), context)
          shard.write(split, tfrecord.encode_example(example))
        except reading.LeftOut as reason:
          shard.left_out[str(reason)] += 1
        except reading.Malformed as reason:
          shard.malformed.append((reading.place(where, record.number), str(reason)))
          if malformed + len(shard.malformed) > max_malformed:
            raise too_many(shard.malformed[-1], max_malformed) from reason
        if shard.size >= plan.shard_bytes * _SLACK:
          break
      shards.append(shard.finish(source))
    malformed += len(shards[-1].malformed)
  return shards


def too_many(one: Tuple[str, str], limit: int) -> TooManyMalformed:
  """The error for more than `limit` malformed records, of which `one` (where, why) is shown."""
  where, why = one
  return TooManyMalformed(f'{where}: malformed record: {why}; that is more than --max_malformed={limit} of them. Mend '
                          'the file, or allow more to be skipped; finished shards are kept')


class _Source:
  """The records of a piece that are not in finished shards yet; can be left and taken up again.

  Args:
    plan, piece, builder: of the work.
    after: the last finished shard.
    progress: as for `work`.
  """

  def __init__(self, plan: Plan, piece: int, builder: datasets.DataSet, after: Optional[Shard],
               progress: Callable[[int], None]):
    self.segment, self.record = (after.segment, after.record) if after else (0, 0)
    self.done = after.done if after else 0
    self.ended = False
    self._progress, self._told = progress, self.done
    self._records = self._read(plan, piece, builder)

  def __iter__(self) -> Iterator[Tuple[Segment, reading.Record]]:
    return self._records

  def _read(self, plan: Plan, piece: int, builder: datasets.DataSet) -> Iterator[Tuple[Segment, reading.Record]]:
    segments, sizes = plan.pieces[piece]
    first, skipped = self.segment, self.record
    for i in range(first, len(segments)):
      for record in reading.records(segments[i], plan.limits, builder.columns):
        if i > first or record.number >= skipped:
          self.segment, self.record = i, record.number + 1
          yield segments[i], record
        self._advance(sum(sizes[:i]) + min(record.done, sizes[i]))
    self._advance(sum(sizes), always=True)
    self.ended = True

  def _advance(self, done: int, always: bool = False) -> None:
    self.done = max(self.done, done)
    if always or self.done - self._told >= _PROGRESS_BYTES:
      self._progress(self.done)
      self._told = self.done


class _Shard:
  """A shard that is being written; left without `finish`, its files are removed."""

  def __init__(self, plan: Plan, piece: int, number: int):
    self._plan, self._piece, self._number = plan, piece, number
    self._outputs: Dict[str, _Output] = {}
    self.left_out: Dict[str, int] = collections.Counter()
    self.malformed: List[Tuple[str, str]] = []
    self.size = 0

  def __enter__(self) -> '_Shard':
    return self

  def __exit__(self, *error: Any) -> None:
    for output in self._outputs.values():
      output.discard()

  def write(self, split: str, example: bytes) -> None:
    if split not in self._outputs:
      self._outputs[split] = _Output(data_file(self._plan, self._piece, self._number, split))
    self._outputs[split].write(example)
    self.size += len(example)

  def finish(self, source: _Source) -> Shard:
    """Makes the files and their report be there."""
    splits = {split: output.finish() for split, output in sorted(self._outputs.items())}
    self._outputs = {}
    shard = Shard(self._piece, self._number, splits, dict(self.left_out), self.malformed, source.segment, source.record,
                  source.done, source.ended)
    paths.write_text(_report_file(self._plan, self._piece, self._number), json.dumps(as_plain(shard)))
    return shard


class _Output:
  """A file that is there only when it is whole."""

  def __init__(self, file: Any):
    # Processes of a preparation that was killed may live on for a moment: they write to files of their own. An object
    # store shows an object when it is whole.
    self._file = file
    self._open = file.parent / f'{file.name}.{os.getpid()}' if paths.is_local(file) else file
    self._opened = contextlib.ExitStack()  # What opens a gs:// path can only be entered.
    self._stream: BinaryIO = self._opened.enter_context(self._open.open('wb'))
    self._writer = tfrecord.Writer(self._stream)
    self._examples = self._bytes = 0

  def write(self, example: bytes) -> None:
    self._writer.write(example)
    self._examples += 1
    self._bytes += len(example)

  def finish(self) -> Split:
    self._writer.flush()
    if paths.is_local(self._file):
      self._stream.flush()
      os.fsync(self._stream.fileno())
    self._opened.close()
    if self._open != self._file:
      self._open.replace(self._file)
    return Split(self._examples, self._bytes, self._writer.written)

  def discard(self) -> None:
    with contextlib.suppress(OSError):  # An error is on its way already, perhaps that the disk is full.
      self._opened.close()
    with contextlib.suppress(OSError):
      self._open.unlink(missing_ok=True)
