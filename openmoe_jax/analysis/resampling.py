"""Intervals for figures about tokens that come in rows: whole blocks of rows are drawn again, never single tokens.

Tokens of a row, and rows of a document, resemble one another; an interval that took them for independent would be too
narrow. A block is a run of consecutive rows, long enough to hold most of a document where there are many rows.
"""

from typing import Callable, NamedTuple
import warnings

import numpy as np

from openmoe_jax.config import require

BLOCKS = 40
FOLDS = 20
_RESAMPLES = 1000
_STUDENT_T = 2.093  # 97.5 % quantile with FOLDS - 1 degrees of freedom


class Estimate(NamedTuple):
  """A figure and its 95 % interval."""
  value: float
  low: float
  high: float

  def __str__(self) -> str:
    return f'{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]'


def blocks_of(rows: np.ndarray, count: int = BLOCKS) -> np.ndarray:
  """The block of each token: int [N] from 0; at most `count` runs of consecutive rows, of nearly the same number.

  Args:
    rows: int [N], the row of each token; rows are consecutive in the order of their numbers.

  Raises:
    ConfigError: fewer than 8 rows, from which no interval can be had.
  """
  numbers, index = np.unique(rows, return_inverse=True)
  require(len(numbers) >= 8, f'{len(numbers)} rows are too few for an interval; at least 8 are needed')
  return index * min(count, len(numbers)) // len(numbers)


def block_sums(values: np.ndarray, blocks: np.ndarray) -> np.ndarray:
  """Sums of values [N, ...] over the tokens of each block: float64 [blocks, ...]."""
  values = np.asarray(values, np.float64)
  count = int(blocks.max()) + 1
  if values.ndim == 1:
    return np.bincount(blocks, values, count)
  flat = values.reshape(len(values), -1)
  sums = np.stack([np.bincount(blocks, column, count) for column in flat.T], axis=-1)
  return sums.reshape(count, *values.shape[1:])


def histograms(codes: np.ndarray, size: int, blocks: np.ndarray) -> np.ndarray:
  """How often each code 0 .. size - 1 occurs in each block: float64 [blocks, size]."""
  count = int(blocks.max()) + 1
  return np.bincount(blocks * size + codes, minlength=count * size).reshape(count, size).astype(np.float64)


def bootstrap(sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> Estimate:
  """95 % percentile interval of a function of sums over all tokens.

  Args:
    sums: float [blocks, K], for each block.
    statistic: [..., K] -> [...]: the figure, from sums over any collection of blocks.

  Returns:
    Estimate; its fields are arrays where the statistic gives an array behind the leading axes.
  """
  count = len(sums)
  weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), _RESAMPLES)
  with np.errstate(divide='ignore', invalid='ignore'), warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'All-NaN slice')  # a share of nothing is NaN
    value, drawn = statistic(sums.sum(axis=0)), statistic(weights @ sums)
    low, high = np.nanquantile(drawn, (.025, .975), axis=0)
  if np.ndim(value):
    return Estimate(value, low, high)
  return Estimate(float(value), float(low), float(high))


def ratio(numerator: np.ndarray, denominator: np.ndarray, blocks: np.ndarray, seed: int = 0) -> Estimate:
  """Sum over sum, such as a mean (denominator of ones) or a share (of the tokens that could): arrays [N]."""
  sums = np.stack([block_sums(numerator, blocks), block_sums(denominator, blocks)], axis=-1)
  return bootstrap(sums, lambda s: s[..., 0] / s[..., 1], seed)


def mean(values: np.ndarray, blocks: np.ndarray, seed: int = 0) -> Estimate:
  """The mean of values [N]."""
  return ratio(values, np.ones(len(values)), blocks, seed)


def jackknife(whole: float, without: Callable[[np.ndarray], float], blocks: np.ndarray) -> Estimate:
  """Interval by leaving out a twentieth of the blocks at a time: for figures whose bias depends on repeated tokens.

  Drawing with repetition would make tokens meet themselves, which looks like dependence.

  Args:
    whole: the figure.
    without: bool [N], tokens left out -> the figure of the others.
    blocks: int [N].
  """
  folds = blocks * FOLDS // (int(blocks.max()) + 1)
  parts = np.asarray([without(folds == fold) for fold in np.unique(folds)])
  count = len(parts)
  error = np.sqrt((count - 1) / count * np.sum((parts - parts.mean()) ** 2))
  return Estimate(float(whole), float(whole - _STUDENT_T * error), float(whole + _STUDENT_T * error))
