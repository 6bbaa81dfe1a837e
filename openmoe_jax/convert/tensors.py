"""Tensors by name, read and written in parts: what every conversion is made of.

A format is a `Source` (how to read it) and a `Sink` (how to write it). Between them tensors have one set of names and
layouts, those of T5X, a layer at a time and never stacked:

    target/decoder/layers_3/mlp/wi_0/kernel                       parameters, `names.t5x_shapes` behind 'target/'
    state/param_states/decoder/layers_3/mlp/wi_0/kernel/v_row     Adafactor's slots v, v_row, v_col, where they are used
"""

import abc
from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple

from etils import epath
import numpy as np

from openmoe_jax.config import ConfigError, ModelConfig

PARAMS, SLOTS = 'target/', 'state/param_states/'
PART_BYTES = 64 << 20  # what is in memory of one tensor at a time
_MOST_DIFFERENCES = 20


class TensorInfo(NamedTuple):
  """Attributes:

    shape: of one tensor of one layer.
    dtype: of NumPy, or ml_dtypes.bfloat16.
    chunk: the smallest part that can be read at its own price, as long as `shape`; None where any part can.
  """
  shape: Tuple[int, ...]
  dtype: np.dtype
  chunk: Optional[Tuple[int, ...]] = None

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def part_rows(info: TensorInfo, axis: int = 0) -> int:
  """How many indices of one axis make a part, of at most PART_BYTES or one index."""
  if not info.shape:
    return 1
  row = info.nbytes // max(info.shape[axis], 1)
  return max(min(PART_BYTES // max(row, 1), info.shape[axis]), 1)


class Source(abc.ABC):
  """A checkpoint that is read.

  Attributes:
    where: its path, for messages.
    model: what the tensors are of.
    tensors: name -> TensorInfo, complete and checked against `model` before anything is read.
    step: training steps done.
    run: the configuration of the run it comes from, as the dictionary of config.json; {} where nobody knows.
    checksums: what `check` compares, in words.
    fingerprint: JSON values that change when the checkpoint does; an interrupted conversion goes on only if they agree.
  """
  where: str
  model: ModelConfig
  tensors: Dict[str, TensorInfo]
  step: int = 0
  run: Mapping[str, Any] = {}
  checksums: str = 'the format holds no checksums of its own'
  fingerprint: Any = None

  def axis(self, name: str) -> int:
    """The axis along which parts of this tensor are read at the least price."""
    del name
    return 0

  @abc.abstractmethod
  def read(self, name: str, axis: int = 0, start: int = 0, stop: Optional[int] = None) -> np.ndarray:
    """The part start..stop along one axis, whole along the others; called from several threads at once.

    Raises:
      ConfigError: the files are damaged; names the file and the tensor.
    """


  def check(self, sums: Mapping[str, int]) -> None:
    """Raises `ConfigError` if what was read differs from what was written once; `sums`: name -> `sum_bits` of all."""
    del sums


class Sink(abc.ABC):
  """A checkpoint that is written, into a folder that gets its final name when everything is in it."""

  def describe(self) -> Any:
    """JSON values that name the format and its options; an interrupted conversion goes on only if they agree."""
    return type(self).__name__

  def axis(self, name: str) -> Optional[int]:
    """The axis along which parts of this tensor must come; None if any will do."""
    del name
    return None

  @abc.abstractmethod
  def begin(self, directory: epath.Path, tensors: Mapping[str, TensorInfo], axes: Mapping[str, int],
            resumed: bool) -> None:
    """Lays out the files of all tensors.

    Args:
      directory: where; gets its final name later.
      tensors: as they will be written.
      axes: the axis along which the parts of each tensor will come, `part_rows` indices at a time.
      resumed: the files are there already, some with their content.
    """

  @abc.abstractmethod
  def write(self, name: str, start: int, part: np.ndarray) -> None:
    """Writes the part that begins at `start` of its axis; called from several threads, parts of one tensor in order."""

  def close(self, name: str) -> Dict[str, Any]:
    """All parts of the tensor are written; returns JSON values that `finish` gets back, whoever wrote the tensor."""
    del name
    return {}

  @abc.abstractmethod
  def finish(self, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes what makes the folder a complete checkpoint.

    Args:
      records: tensor name -> 'sum', the `sum_bits` of what was written, and what `close` returned.
    """


def sum_bits(part: np.ndarray) -> int:
  """The sum modulo 2**32 of the bits of an array's values as float32, which adds up over parts in any order.

  It is the checksum of `checkpoint_layout.checksums` for arrays that are float32 in memory.
  """
  part = part.T if part.flags.f_contiguous else part  # the order does not matter
  part = np.ascontiguousarray(part, dtype=part.dtype if part.dtype.itemsize == 4 else np.float32)
  return int(np.sum(part.view(np.uint32), dtype=np.uint32))


def require_same(where: str, found: Mapping[str, Tuple[int, ...]], wanted: Mapping[str, Tuple[int, ...]]) -> None:
  """Raises `ConfigError` with the difference between the shapes found and wanted, by name."""
  lines = []
  for name in sorted(set(found) | set(wanted)):
    if name not in found:
      lines.append(f'- {name} {list(wanted[name])} (missing)')
    elif name not in wanted:
      lines.append(f'+ {name} {list(found[name])} (unexpected)')
    elif tuple(found[name]) != tuple(wanted[name]):
      lines.append(f'! {name} {list(found[name])} instead of {list(wanted[name])}')
  if lines:
    more = [f'... and {len(lines) - _MOST_DIFFERENCES} more'] if len(lines) > _MOST_DIFFERENCES else []
    raise ConfigError(f'{where} does not hold the arrays of this model ({len(lines)} differences): ' +
                      '; '.join(lines[:_MOST_DIFFERENCES] + more))
