"""tf.train.Example messages and TFRecord files, written without TensorFlow.

TFDS reads both. TensorFlow would cost every process that writes them 840 MB and some seconds. The format is small: a
record is its length (8 bytes), a checksum of that, the bytes, a checksum of them; the checksum is CRC-32C, rotated and
shifted. CRC-32C is linear in its bits, so that numpy computes it for many records at once: a table lookup a byte.
"""

import functools
from typing import BinaryIO, List, Mapping, Sequence, Tuple, Union

import numpy as np

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), bits reversed
_CHUNK = 128  # bytes whose checksum is looked up at once
_SLAB = 1 << 21  # bytes that are looked up at a time, which bounds memory
_LONGEST = 64  # bits of a number of bytes

Value = Union[bytes, Sequence[bytes]]


# Examples.


def encode_example(features: Mapping[str, Value]) -> bytes:
  """A serialized tf.train.Example: bytes for a scalar feature, a sequence of them for a list; in the order of names."""
  entries = []
  for name, value in sorted(features.items()):
    values = [value] if isinstance(value, bytes) else value
    bytes_list = b''.join(part for item in values for part in (b'\x0a', _varint(len(item)), item))
    key = name.encode()
    entry = b''.join((b'\x0a', _varint(len(key)), key, _message(2, _message(1, bytes_list))))
    entries.append(_message(1, entry))
  return _message(1, b''.join(entries))


def _message(field: int, content: bytes) -> bytes:
  return b''.join((bytes([field << 3 | 2]), _varint(len(content)), content))


def _varint(number: int) -> bytes:
  out = bytearray()
  while number > 127:
    out.append(number & 127 | 128)
    number >>= 7
  out.append(number)
  return bytes(out)


# Files.


class Writer:
  """Collects records and writes about a megabyte of them at a time.

  Args:
    stream: a file that is open for writing bytes; it is not closed here.
  """
  _BATCH = 1 << 20

  def __init__(self, stream: BinaryIO):
    self._stream = stream
    self._waiting: List[bytes] = []
    self._waiting_bytes = 0
    self.written = 0

  def write(self, record: bytes) -> None:
    self._waiting.append(record)
    self._waiting_bytes += len(record)
    if self._waiting_bytes >= self._BATCH:
      self.flush()

  def flush(self) -> None:
    """Writes what is waiting."""
    if not self._waiting:
      return
    lengths = [len(record).to_bytes(8, 'little') for record in self._waiting]
    heads, bodies = (masked_checksums(part).astype('<u4') for part in (lengths, self._waiting))
    for length, head, record, body in zip(lengths, heads, self._waiting, bodies):
      self._stream.write(b''.join((length, head.tobytes())))
      self._stream.write(record)
      self._stream.write(body.tobytes())
      self.written += len(record) + 16
    self._waiting, self._waiting_bytes = [], 0


# Checksums.


@functools.lru_cache(maxsize=None)
def _tables() -> Tuple[np.ndarray, np.ndarray]:
  """[_CHUNK, 256]: what a byte at a place of a chunk adds; [64, 4, 256]: what 2^i bytes of zeros make of a checksum."""
  step = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    step = np.where(step & 1, (step >> 1) ^ np.uint32(_POLYNOMIAL), step >> 1)
  places = np.empty((_CHUNK, 256), np.uint32)
  places[-1] = step
  for i in reversed(range(_CHUNK - 1)):
    places[i] = step[places[i + 1] & 255] ^ (places[i + 1] >> 8)
  zeros = np.empty((_LONGEST, 4, 256), np.uint32)
  values = np.arange(256, dtype=np.uint32)[None] << np.array([0, 8, 16, 24], np.uint32)[:, None]
  zeros[0] = step[values & 255] ^ (values >> 8)
  for i in range(1, _LONGEST):
    zeros[i] = _looked_up(zeros[i - 1], zeros[i - 1])
  return places, zeros


def _looked_up(table: np.ndarray, checksums: np.ndarray) -> np.ndarray:
  return (table[0][checksums & 255] ^ table[1][checksums >> 8 & 255] ^ table[2][checksums >> 16 & 255]
          ^ table[3][checksums >> 24])


def _with_zeros(checksums: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Checksums [n] after `counts` [n] more bytes of zeros."""
  zeros = _tables()[1]
  checksums = checksums.copy()
  for bit in range(int(counts.max(initial=0)).bit_length()):
    chosen = np.flatnonzero(counts >> bit & 1)
    checksums[chosen] = _looked_up(zeros[bit], checksums[chosen])
  return checksums


def _of_chunks(chunks: np.ndarray) -> np.ndarray:
  """Checksums [n], begun with 0, of chunks [n, _CHUNK]."""
  places = _tables()[0]
  columns = np.ascontiguousarray(chunks.T)
  checksums = np.zeros(len(chunks), np.uint32)
  for place, column in zip(places, columns):
    checksums ^= place[column]
  return checksums


def masked_checksums(records: Sequence[bytes]) -> np.ndarray:
  """The checksums [n] (uint32) that TFRecord files have of n byte strings."""
  lengths = np.array([len(record) for record in records], np.int64)
  counts = np.maximum(-(-lengths // _CHUNK), 1)
  # Zeros in front of a record do not change a checksum that begins with 0; the real beginning is added at the end.
  ends = np.cumsum(counts) * _CHUNK
  checksums = np.empty(int(counts.sum()), np.uint32)
  slab = bytearray()
  done = 0

  def look_up(upto: int) -> None:
    nonlocal done
    chunks = np.frombuffer(memoryview(slab)[:upto], np.uint8).reshape(-1, _CHUNK)
    checksums[done:done + len(chunks)] = _of_chunks(chunks)
    done += len(chunks)

  for record, end in zip(records, ends):
    view = memoryview(record)
    slab += bytes(int(end) - done * _CHUNK - len(slab) - len(view))
    for start in range(0, len(view), _SLAB):
      slab += view[start:start + _SLAB]
      if len(slab) >= _SLAB:
        whole = len(slab) // _CHUNK * _CHUNK
        look_up(whole)
        slab = slab[whole:]
  look_up(len(slab))
  behind = np.repeat(np.cumsum(counts), counts) - 1 - np.arange(len(checksums))  # chunks of the same record
  begins = np.cumsum(counts) - counts
  whole = np.bitwise_xor.reduceat(_with_zeros(checksums, behind * _CHUNK), begins)
  whole ^= ~_with_zeros(np.full(len(records), 0xFFFFFFFF, np.uint32), lengths)
  return (whole >> 15 | whole << 17) + np.uint32(0xA282EAD8)
