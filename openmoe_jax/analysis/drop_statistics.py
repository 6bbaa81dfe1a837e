"""Who is dropped: by position, by rank of the choice, and by those who come later.

Pure numpy on arrays of tokens: `kept`, `slot` and `token_slot` are [N, S] (see `recording.forward.Routing`).
"""

from typing import NamedTuple

import numpy as np

from openmoe_jax.analysis import resampling
from openmoe_jax.analysis.resampling import Estimate
from openmoe_jax.config import require

BINS = 16


class ByPosition(NamedTuple):
  """A figure along the row.

  Attributes:
    position: float [bins], middle of each bin.
    curve: Estimate of arrays [bins]; NaN where a bin is empty.
    slope: rise of the straight line of least squares over all tokens, from the first position of a row to the last.
    mean: over all tokens.
  """
  position: np.ndarray
  curve: Estimate
  slope: Estimate
  mean: Estimate


def by_position(values: np.ndarray, position: np.ndarray, rows: np.ndarray, length: int, bins: int = BINS) -> ByPosition:
  """Mean and trend of values [N] along positions 0 .. length - 1.

  Raises:
    ConfigError: as `resampling.blocks_of`, or positions beyond the length.
  """
  require(int(position.max()) < length, f'a position is {int(position.max())}, but rows have {length}')
  blocks, bins = resampling.blocks_of(rows), min(bins, length)
  values, at = np.asarray(values, np.float64), np.asarray(position, np.int64)
  index = at * bins // length
  sums = np.stack([np.bincount(blocks * bins + index, v, (int(blocks.max()) + 1) * bins).reshape(-1, bins)
                   for v in (values, np.ones_like(values))], axis=-1)
  flat = sums.reshape(len(sums), -1)
  curve = resampling.bootstrap(flat, lambda s: s[..., 0::2] / s[..., 1::2])
  x = at / max(length - 1, 1)
  moments = resampling.block_sums(np.stack([np.ones_like(x), x, x * x, values, x * values], axis=-1), blocks)
  slope = resampling.bootstrap(moments, lambda m: (m[..., 0] * m[..., 4] - m[..., 1] * m[..., 3])
                               / (m[..., 0] * m[..., 2] - m[..., 1] ** 2))
  centres = (np.arange(bins) + .5) * length / bins - .5
  return ByPosition(centres, curve, slope, resampling.mean(values, blocks))


class Drops(NamedTuple):
  """Shares, each an Estimate.

  Attributes:
    choices: of all choices, dropped.
    ranks: for each rank, of the choices of that rank, dropped.
    without_expert: of the tokens, those none of whose choices was kept.
  """
  choices: Estimate
  ranks: tuple
  without_expert: Estimate


def drops(kept: np.ndarray, rows: np.ndarray) -> Drops:
  """How much is dropped."""
  blocks, dropped = resampling.blocks_of(rows), ~np.asarray(kept)
  return Drops(resampling.mean(dropped.mean(axis=1), blocks),
               tuple(resampling.mean(column, blocks) for column in dropped.T),
               resampling.mean(dropped.all(axis=1), blocks))


class Evictions(NamedTuple):
  """What priority by rank before position does: first choices of later tokens come before second ones of earlier ones.

  Attributes:
    evicted: of the choices behind the first, those that were dropped but would have been kept, had no later token been
      there: the past depends on the future.
    of_dropped: the same among those that were dropped.
    tokens: of the tokens, those of which a choice was evicted.
    rescued: of the first choices, those that were kept but would not have been, had tokens queued one after another.
  """
  evicted: Estimate
  of_dropped: Estimate
  tokens: Estimate
  rescued: Estimate


def is_evicted(kept: np.ndarray, token_slot: np.ndarray, capacity: int) -> np.ndarray:
  """Choices that were dropped because of later tokens alone: bool [N, S]."""
  return ~np.asarray(kept) & (np.asarray(token_slot) < capacity)


def evictions(kept: np.ndarray, token_slot: np.ndarray, capacity: int, rows: np.ndarray) -> Evictions:
  """How often later tokens take the places of earlier ones; needs at least two choices a token."""
  kept = np.asarray(kept)
  require(kept.shape[1] >= 2, 'evictions: tokens of this model have one choice each, so that nobody is evicted')
  blocks = resampling.blocks_of(rows)
  evicted = is_evicted(kept, token_slot, capacity)[:, 1:]
  later = evicted.sum(axis=1)
  return Evictions(resampling.ratio(later, np.full(len(kept), kept.shape[1] - 1), blocks),
                   resampling.ratio(later, (~kept[:, 1:]).sum(axis=1), blocks),
                   resampling.mean(evicted.any(axis=1), blocks),
                   resampling.mean(kept[:, 0] & (np.asarray(token_slot)[:, 0] >= capacity), blocks))


def loss_difference(log_prob: np.ndarray, other: np.ndarray, rows: np.ndarray) -> Estimate:
  """Mean loss of one policy minus that of another, in nats per target, on the same tokens: log-probabilities [N]."""
  require(len(log_prob) == len(other), f'{len(log_prob)} and {len(other)} tokens: losses can be compared on the same '
          'tokens only')
  known = ~(np.isnan(log_prob) | np.isnan(other))
  return resampling.mean((other - log_prob)[known], resampling.blocks_of(rows[known]))
