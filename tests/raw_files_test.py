"""Raw files, record by record, and TFRecord files written without TensorFlow."""

import gzip
import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st
import pyarrow
from pyarrow import parquet
import pytest

from openmoe_jax.config import ConfigError
from openmoe_jax.preparation import reading, tfrecord
from openmoe_jax.preparation.reading import Limits, Malformed, Segment
from openmoe_jax.tensorflow_setup import import_tensorflow

LIMITS = Limits(record_bytes=1 << 16, text_bytes=40)
TEXTS = ['plain', '', ' \n', 'umlaut ü, 漢字, \U0001F600, \u2028 and "quotes"\\', 'x' * 5000, '\r\n\ttabs']


def compress(content, compression):
  sink = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(sink, compression) as stream:
    stream.write(content)
  return sink.getvalue().to_pybytes()


def lines_of(texts):
  return ''.join(json.dumps({'text': text, 'meta': {'i': i}}, ensure_ascii=bool(i % 2)) + '\n'
                 for i, text in enumerate(texts)).encode()


def read(file, start=0, stop=-1, limits=LIMITS, columns=None):
  return list(reading.records(Segment(str(file), file.name, start, stop), limits, columns))


def texts_of(records):
  return [reading.fields(record)['text'] for record in records]


@pytest.mark.parametrize('suffix, compression', [('.jsonl', None), ('.jsonl.zst', 'zstd'), ('.jsonl.gz', 'gzip'),
                                                 ('.json.gz', 'gzip'), ('.JSONL.ZST', 'zstd')])
def test_json_lines(tmp_path, suffix, compression):
  content = b'\xef\xbb\xbf' * (compression is None) + lines_of(TEXTS)[:-1]  # the last line has no end
  file = tmp_path / f'some{suffix}'
  file.write_bytes(compress(content, compression) if compression else content)
  records = read(file)
  assert texts_of(records) == TEXTS
  assert [record.number for record in records] == list(range(len(TEXTS)))
  assert records[-1].done == file.stat().st_size


def test_a_compressed_file_may_have_several_frames(tmp_path):
  for suffix, compression in (('.jsonl.zst', 'zstd'), ('.jsonl.gz', 'gzip')):
    file = tmp_path / f'two{suffix}'
    file.write_bytes(compress(lines_of(TEXTS[:3]), compression) + compress(lines_of(TEXTS[3:]), compression))
    assert texts_of(read(file)) == TEXTS


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(0, 300), max_size=20), bounds=st.lists(st.integers(0, 4000), max_size=5),
       end=st.booleans(), block=st.integers(1, 50))
def test_ranges_of_bytes_share_the_lines(tmp_path_factory, sizes, bounds, end, block):
  """However a file is cut, each line is read once, in order, with its number."""
  file = tmp_path_factory.mktemp('ranges') / 'lines.jsonl'
  lines = [b'%d' % i * size for i, size in enumerate(sizes)]
  content = b'\n'.join(lines) + b'\n' * end
  file.write_bytes(content)
  cuts = sorted({0, len(content), *(min(bound, len(content)) for bound in bounds)})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(reading, '_BLOCK', block)
    found = []
    for start, stop in zip(cuts, cuts[1:]):
      segment = Segment(str(file), file.name, start, stop)
      for record in reading.records(segment, LIMITS):
        found.append(record.value)
        number = int(reading.place(segment, record.number).rpartition(':')[2]) - 1
        assert lines[number] == record.value
  assert found == [line for line in lines if line]


def test_malformed_lines_do_not_hide_the_others(tmp_path):
  file = tmp_path / 'some.jsonl'
  bad = [b'{"text": "cut off', b'[1]', b'{"text": "\xff"}', b'x' * (1 << 17), b'9' * 5000, b'[' * 50_000]
  good = lines_of(['first', 'second']).splitlines()
  file.write_bytes(b'\n\n'.join([good[0], *bad, good[1]]))
  records = read(file)
  assert texts_of([records[0], records[-1]]) == ['first', 'second']
  reasons = []
  for record in records[1:-1]:
    with pytest.raises(Malformed) as error:
      reading.fields(record)
    reasons.append((reading.place(Segment(str(file), ''), record.number), str(error.value)))
  assert [where for where, _ in reasons] == [f'{file}:{line}' for line in (3, 5, 7, 9, 11, 13)]
  for (_, reason), part in zip(reasons, ('not JSON: Unterminated string', 'a JSON list, not', 'not UTF-8 at byte 10',
                                         'longer than 64.0 KB', 'not JSON: ', 'not JSON: ')):
    assert part in reason


@pytest.mark.parametrize('name, content, message', [
    ('cut.jsonl.zst', compress(lines_of(['a'] * 500), 'zstd')[:-7], 'it is truncated; copy or download it again'),
    ('cut.jsonl.gz', gzip.compress(lines_of(['a'] * 500))[:-7], 'it is truncated; copy or download it again'),
    ('not.jsonl.zst', lines_of(['a']), 'cannot be read as JSON lines .zstd.: ZSTD decompress failed'),
    ('cut.parquet', b'PAR1 and then nothing', 'cannot be read as parquet: '),
])
def test_files_that_are_not_whole_are_named(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ConfigError, match=message) as error:
    read(tmp_path / name)
  assert str(tmp_path / name) in str(error.value) and '\n' not in str(error.value)


def write_rows(file, rows, row_group_size):
  parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=row_group_size)


def test_parquet(tmp_path):
  rows = [{'content': text, 'size': len(text), 'lang': None if i % 2 else 'Python', 'names': ['a', 'b']}
          for i, text in enumerate(TEXTS * 10)]
  file = tmp_path / 'some.parquet'
  write_rows(file, rows, row_group_size=7)
  records = read(file)
  assert [record.value for record in records] == rows
  sizes = reading.row_groups(str(file))
  assert len(sizes) == 9 and records[-1].done == sum(size.compressed for size in sizes)
  parts = [record.value for start in range(0, 9, 4) for record in read(file, start, min(start + 4, 9))]
  assert parts == rows
  assert reading.place(Segment(str(file), '', 4, 8), 2) == f'{file}, row 31'
  assert read(file, columns=('size', 'not there'))[3].value == {'size': len(TEXTS[3])}


@settings(max_examples=60)
@given(text=st.text(alphabet='ab\nü漢\U0001F600', max_size=300))
def test_long_texts_are_cut_and_nothing_is_lost(tmp_path_factory, text):
  file = tmp_path_factory.mktemp('texts') / 'some.py'
  file.write_bytes(text.encode())
  records = read(file)
  assert ''.join(texts_of(records)) == text
  assert all(len(part.encode()) <= LIMITS.text_bytes for part in texts_of(records))
  names = [reading.fields(record)['path'] for record in records]
  assert names == (['some.py'] if len(records) == 1 else [f'some.py:{i}' for i in range(len(records))])
  assert records[-1].done == len(text.encode())
  for part in texts_of(records[:-1]):
    assert part.endswith('\n') or '\n' not in part


@pytest.mark.parametrize('content', [b'\x89PNG\0\0', 'latin-1: ü'.encode('latin-1')])
def test_what_is_not_text_is_left_out(tmp_path, content):
  (tmp_path / 'file').write_bytes(content)
  record, = read(tmp_path / 'file')
  with pytest.raises(reading.LeftOut, match='not UTF-8 text'):
    reading.fields(record)


def test_files_of_tensorflow_are_read_as_well(tmp_path, monkeypatch):
  """gs:// goes through tf.io.gfile, whose files are not Python's."""
  tf = import_tensorflow()
  rows = [{'text': text, 'n': i} for i, text in enumerate(TEXTS)]
  (tmp_path / 'a.jsonl').write_bytes(lines_of(TEXTS))
  (tmp_path / 'a.jsonl.zst').write_bytes(compress(lines_of(TEXTS), 'zstd'))
  write_rows(tmp_path / 'a.parquet', rows, 2)

  part = texts_of(read(tmp_path / 'a.jsonl', 30, 200))

  class Path:
    def __init__(self, name):
      self._name = name

    def open(self, mode):
      return tf.io.gfile.GFile(self._name, mode)

  monkeypatch.setattr(reading.paths, 'path', Path)
  for name in ('a.jsonl', 'a.jsonl.zst', 'a.parquet'):
    assert texts_of(read(tmp_path / name)) == TEXTS, name
  assert texts_of(read(tmp_path / 'a.jsonl', 30, 200)) == part


# TFRecord files.


def tfrecords(path, records):
  with open(path, 'wb') as stream:
    writer = tfrecord.Writer(stream)
    for record in records:
      writer.write(record)
    writer.flush()
    assert writer.written == stream.tell() == sum(len(record) + 16 for record in records)
  return list(import_tensorflow().data.TFRecordDataset(str(path)).as_numpy_iterator())


@settings(max_examples=40)
@given(st.lists(st.binary(max_size=600), max_size=12))
def test_tensorflow_reads_records(tmp_path_factory, records):
  """It checks both checksums of each."""
  assert tfrecords(tmp_path_factory.mktemp('records') / 'some', records) == records


def test_records_around_the_sizes_of_chunks_and_slabs(tmp_path, monkeypatch):
  monkeypatch.setattr(tfrecord, '_SLAB', 1 << 12)
  monkeypatch.setattr(tfrecord.Writer, '_BATCH', 1 << 14)
  random.seed(0)
  chunk, slab = tfrecord._CHUNK, 1 << 12
  sizes = [n + d for n in (0, chunk, 2 * chunk, slab, 3 * slab, 1 << 15) for d in (-1, 0, 1) if n + d >= 0] * 2
  records = [random.randbytes(size) for size in sizes]
  assert tfrecords(tmp_path / 'some', records) == records


def test_the_checksum_of_the_standard():
  crc = 0xE3069283  # of '123456789', RFC 3720
  masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
  assert tfrecord.masked_checksums([b'', b'123456789']).tolist()[1] == masked


@settings(max_examples=60)
@given(st.dictionaries(st.text(min_size=1, max_size=5),
                       st.one_of(st.binary(max_size=300), st.lists(st.binary(max_size=9)))))
def test_tensorflow_reads_examples(features):
  tf = import_tensorflow()
  encoded = tfrecord.encode_example(features)
  read_back = tf.train.Example.FromString(encoded)
  assert {name: list(feature.bytes_list.value) for name, feature in read_back.features.feature.items()} == {
      name: [value] if isinstance(value, bytes) else value for name, value in features.items()}
  assert all(feature.WhichOneof('kind') == 'bytes_list' for feature in read_back.features.feature.values())
