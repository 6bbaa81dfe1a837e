"""What decides an expert: how much token id, previous token, position or domain say about it, and for how long.

Pure numpy on arrays [N] of tokens. `rows` are the rows of the tokens (`resampling.blocks_of`); `expert` is 0 .. E - 1.
"""

from typing import Dict, NamedTuple, Sequence

import numpy as np

from openmoe_jax.analysis import resampling
from openmoe_jax.analysis.resampling import Estimate
from openmoe_jax.config import require

MIN_COUNT = 10  # tokens of a value: with fewer, what it says about the expert cannot be told from chance
DEAD_LOAD = .1  # an expert with less than this part of its share counts as dead
_LEAST_TOKENS = 500


class Dependence(NamedTuple):
  """How much a variable says about the expert.

  Attributes:
    normalized: mutual information over the entropy of the expert, corrected for bias: 1 where the variable decides the
      expert, 0 where it says nothing.
    null: the same of shuffled experts, whose interval is about 0.
    p_value: share of shuffles with at least as much.
    tokens, values: how many went in, of how many different values.
  """
  normalized: Estimate
  null: Estimate
  p_value: float
  tokens: int
  values: int


def information(counts: np.ndarray) -> np.ndarray:
  """Mutual information of rows and columns of a table of counts, and entropy of the columns, in nats.

  Both are corrected by Miller and Madow's term, (values seen - 1) / 2N for each entropy. A row that was seen with one
  column only needs no correction and gets none: a variable that decides the column comes out as such.
  """
  total = counts.sum()
  entropy = lambda c: np.log(c.sum()) - np.sum(c * np.log(np.maximum(c, 1))) / c.sum()
  columns, rows = counts.sum(axis=0), counts.sum(axis=1)
  row_entropy = (np.sum(rows * np.log(np.maximum(rows, 1))) - np.sum(counts * np.log(np.maximum(counts, 1)))) / total
  seen = np.count_nonzero(counts, axis=1)
  of_columns = entropy(columns) + (np.count_nonzero(columns) - 1) / (2 * total)
  return np.asarray([of_columns - row_entropy - np.maximum(seen - 1, 0).sum() / (2 * total), of_columns])


def dependence(expert: np.ndarray, variable: np.ndarray, rows: np.ndarray, min_count: int = MIN_COUNT,
               permutations: int = 100, seed: int = 0) -> Dependence:
  """Normalised mutual information of expert and variable, over tokens whose value occurs at least `min_count` times.

  What chance gives is found by shuffling and taken off. Where the variable is the same throughout each row (a domain),
  whole rows are shuffled.

  Raises:
    ConfigError: too few tokens have a value that is frequent enough.
  """
  _, codes, counts = np.unique(variable, return_inverse=True, return_counts=True)
  frequent = counts[codes] >= min_count
  require(int(frequent.sum()) >= _LEAST_TOKENS, f'mutual information: only {int(frequent.sum())} tokens have a value that '
          f'occurs at least {min_count} times, {_LEAST_TOKENS} are needed; record more tokens')
  expert, codes, rows = np.asarray(expert)[frequent], codes[frequent], np.asarray(rows)[frequent]
  _, codes = np.unique(codes, return_inverse=True)
  values, experts = int(codes.max()) + 1, int(expert.max()) + 1
  table = lambda codes, expert: np.bincount(codes * experts + expert, minlength=values * experts).reshape(values, experts)
  counts = table(codes, expert)
  rng = np.random.default_rng(seed)
  shuffled = np.asarray([information(table(_shuffle(codes, rows, rng), expert))[0] for _ in range(permutations)])
  chance = shuffled.mean()

  def normalized(own):
    got, entropy = information(own)
    return (got - chance) / (entropy - chance) if entropy > chance else 0.

  entropy = information(counts)[1]
  scale = entropy - chance if entropy > chance else 1.
  null = (shuffled - chance) / scale
  whole = normalized(counts)
  leave_out = lambda left_out: normalized(counts - table(codes[left_out], expert[left_out]))
  return Dependence(resampling.jackknife(whole, leave_out, resampling.blocks_of(rows)),
                    Estimate(0., *(float(q) for q in np.quantile(null, (.025, .975)))),
                    float((1 + np.sum(null >= whole)) / (1 + permutations)), len(expert), values)


def _shuffle(codes: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  numbers, first, index = np.unique(rows, return_index=True, return_inverse=True)
  if len(numbers) < len(rows) and (codes[first][index] == codes).all():
    return rng.permutation(codes[first])[index]
  return rng.permutation(codes)


def added_dependence(expert: np.ndarray, variable: np.ndarray, given: np.ndarray, rows: np.ndarray,
                     min_count: int = MIN_COUNT, permutations: int = 30, seed: int = 0) -> Dependence:
  """What a variable says about the expert beyond what `given` (the token id) says already.

  It is the mutual information given that, over the entropy of the expert, so that 1 minus the dependence on the token id
  alone is the most there could be. Tokens count whose pair of values occurs at least `min_count` times; shuffled is among
  the tokens of the same `given`.
  """
  _, own = np.unique(variable, return_inverse=True)
  _, base = np.unique(given, return_inverse=True)
  _, pairs, counts = np.unique(base.astype(np.int64) * (int(own.max()) + 1) + own, return_inverse=True, return_counts=True)
  frequent = counts[pairs] >= min_count
  require(int(frequent.sum()) >= _LEAST_TOKENS, f'mutual information: only {int(frequent.sum())} tokens have a pair of '
          f'values that occurs at least {min_count} times, {_LEAST_TOKENS} are needed; record more tokens')
  expert, own, rows = np.asarray(expert)[frequent], own[frequent], np.asarray(rows)[frequent]
  _, base = np.unique(base[frequent], return_inverse=True)
  width, experts = int(own.max()) + 1, int(expert.max()) + 1

  def told_by(codes, of):
    _, codes = np.unique(codes[of], return_inverse=True)
    counts = np.bincount(codes * experts + expert[of], minlength=(int(codes.max()) + 1) * experts)
    return information(counts.reshape(-1, experts))

  def added(own, of=slice(None)):
    joint, entropy = told_by(base.astype(np.int64) * width + own, of)
    return (joint - told_by(base, of)[0]) / max(entropy, 1e-12)

  rng, order = np.random.default_rng(seed), np.argsort(base, kind='stable')
  shuffled = []
  for _ in range(permutations):
    moved = np.empty_like(own)
    moved[order] = own[np.lexsort((rng.random(len(base)), base))]
    shuffled.append(added(moved))
  chance = np.mean(shuffled)
  null, whole = np.asarray(shuffled) - chance, added(own) - chance
  found = resampling.jackknife(whole, lambda left_out: added(own, ~left_out) - chance, resampling.blocks_of(rows))
  return Dependence(found, Estimate(0., *(float(q) for q in np.quantile(null, (.025, .975)))),
                    float((1 + np.sum(null >= whole - 1e-12)) / (1 + permutations)), len(expert),
                    len(np.unique(base.astype(np.int64) * width + own)))


class Predictability(NamedTuple):
  """Attributes:
    accuracy: how often the expert that a token id had most often elsewhere is the expert; held out by blocks of rows.
    baseline: the same of the expert that is most frequent of all.
    unseen: share of the tokens whose id occurs nowhere else; the baseline's expert is their prediction.
  """
  accuracy: Estimate
  baseline: Estimate
  unseen: float


def predictability(expert: np.ndarray, token_id: np.ndarray, rows: np.ndarray, folds: int = 5) -> Predictability:
  """How well the token id alone predicts the expert of tokens in rows that were not looked at."""
  require(len(expert) >= _LEAST_TOKENS, f'predictability: {len(expert)} tokens are too few, {_LEAST_TOKENS} are needed')
  blocks = resampling.blocks_of(rows)
  _, codes = np.unique(token_id, return_inverse=True)
  values, experts = int(codes.max()) + 1, int(np.max(expert)) + 1
  fold_of = blocks * folds // (int(blocks.max()) + 1)
  right, base, unseen = (np.zeros(len(codes)) for _ in range(3))
  for fold in range(folds):
    held_out = fold_of == fold
    known = np.bincount(codes[~held_out] * experts + expert[~held_out], minlength=values * experts)
    known = known.reshape(values, experts)
    commonest = int(known.sum(axis=0).argmax())
    seen = known.any(axis=1)
    guess = np.where(seen, known.argmax(axis=1), commonest)
    right[held_out] = guess[codes[held_out]] == expert[held_out]
    base[held_out] = expert[held_out] == commonest
    unseen[held_out] = ~seen[codes[held_out]]
  return Predictability(resampling.mean(right, blocks), resampling.mean(base, blocks), float(unseen.mean()))


class Agreement(NamedTuple):
  """How alike two routers decide on the same tokens.

  Attributes:
    same: share of the tokens whose first expert is the same.
    chance: what independent routers with these loads would have.
    kappa: (same - chance) / (1 - chance): 0 is chance, 1 the same router.
    ids_same, ids_chance: share of the token ids, with at least `MIN_COUNT` tokens, whose most frequent expert is the same,
      and what chance would give.
    ids: how many these are.
  """
  same: Estimate
  chance: float
  kappa: Estimate
  ids_same: Estimate
  ids_chance: float
  ids: int


def agreement(first: np.ndarray, second: np.ndarray, token_id: np.ndarray, rows: np.ndarray,
              min_count: int = MIN_COUNT) -> Agreement:
  """Agreement of two checkpoints on the same tokens: experts [N] of each.

  Raises:
    ConfigError: different numbers of tokens, or too few.
  """
  require(len(first) == len(second), f'agreement: {len(first)} tokens of one checkpoint and {len(second)} of the other; '
          'both must be recorded over the same tokens')
  require(len(first) >= _LEAST_TOKENS, f'agreement: {len(first)} tokens are too few, {_LEAST_TOKENS} are needed')
  first, second = np.asarray(first, np.int64), np.asarray(second, np.int64)
  blocks, experts = resampling.blocks_of(rows), int(max(first.max(), second.max())) + 1
  sums = np.concatenate([resampling.block_sums(first == second, blocks)[:, None],
                         resampling.histograms(first, experts, blocks), resampling.histograms(second, experts, blocks)],
                        axis=1)

  def parts(s):
    one, other = s[..., 1:experts + 1], s[..., experts + 1:]
    total = one.sum(axis=-1)
    return s[..., 0] / total, (one * other).sum(axis=-1) / total ** 2

  def kappa(s):
    same, chance = parts(s)
    return (same - chance) / np.maximum(1 - chance, 1e-12)

  _, codes, counts = np.unique(token_id, return_inverse=True, return_counts=True)
  frequent = counts >= min_count
  require(bool(frequent.any()), f'agreement: no token id occurs {min_count} times; record more tokens')
  majority = [np.bincount(codes * experts + expert, minlength=len(counts) * experts).reshape(-1, experts)
              .argmax(axis=1)[frequent] for expert in (first, second)]
  shares = [np.bincount(m, minlength=experts) / len(m) for m in majority]
  ids = len(majority[0])
  same_ids = (majority[0] == majority[1]).astype(float)
  return Agreement(resampling.bootstrap(sums, lambda s: parts(s)[0]), float(parts(sums.sum(axis=0))[1]),
                   resampling.bootstrap(sums, kappa), resampling.mean(same_ids, np.arange(ids)),
                   float(np.sum(shares[0] * shares[1])), ids)


class Load(NamedTuple):
  """Attributes:
    load: Estimate of arrays [E]: share of all choices that asked for each expert, times E; 1 when balanced.
    dead: experts with less than a tenth of their share.
    balance: entropy of the shares over its maximum: 1 when balanced.
  """
  load: Estimate
  dead: Sequence[int]
  balance: float


def load(choices: np.ndarray, num_experts: int, rows: np.ndarray) -> Load:
  """How evenly experts are asked for; `choices` is int [N, S]."""
  blocks = resampling.blocks_of(rows)
  sums = sum(resampling.histograms(column.astype(np.int64), num_experts, blocks) for column in np.asarray(choices).T)
  found = resampling.bootstrap(sums, lambda s: num_experts * s / s.sum(axis=-1, keepdims=True))
  share = found.value / num_experts
  balance = -np.sum(share * np.log(np.maximum(share, 1e-300))) / np.log(num_experts) if num_experts > 1 else 1.
  return Load(found, [int(e) for e in np.flatnonzero(found.value < DEAD_LOAD)], float(balance))


def shares(variable: np.ndarray, choices: np.ndarray, num_experts: int, min_count: int = 1) -> Dict[int, np.ndarray]:
  """{value: share of the choices of its tokens that each expert gets, float [E]}, for values with enough tokens.

  Args:
    variable: int [N].
    choices: int [N, S].
    min_count: tokens.
  """
  values, codes, counts = np.unique(variable, return_inverse=True, return_counts=True)
  table = sum(np.bincount(codes * num_experts + column, minlength=len(values) * num_experts)
              for column in np.asarray(choices, np.int64).T).reshape(-1, num_experts)
  return {int(v): row / row.sum() for v, row, n in zip(values, table, counts) if n >= min_count}


def similarity(choices: np.ndarray, token_id: np.ndarray, num_experts: int) -> np.ndarray:
  """Cosine of the numbers of tokens of each id that two experts are asked by: float [E, E]; 0 for an expert nobody asks."""
  _, codes = np.unique(token_id, return_inverse=True)
  values = int(codes.max()) + 1
  table = sum(np.bincount(column * values + codes, minlength=num_experts * values)
              for column in np.asarray(choices, np.int64).T).reshape(num_experts, values).astype(float)
  unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
  return unit @ unit.T


def together(choices: np.ndarray, num_experts: int) -> np.ndarray:
  """How often two experts are chosen by one token, over what their loads alone would give: float [E, E], NaN on the
  diagonal and where nobody asks for an expert."""
  first, second = np.asarray(choices, np.int64)[:, :2].T
  pairs = np.bincount(first * num_experts + second, minlength=num_experts ** 2).reshape(num_experts, -1).astype(float)
  pairs = pairs + pairs.T
  asked = pairs.sum(axis=0) / pairs.sum()
  expected = np.outer(asked, asked)
  np.fill_diagonal(expected, 0)
  expected *= pairs.sum() / max(expected.sum(), 1e-12)
  with np.errstate(invalid='ignore', divide='ignore'):
    found = pairs / expected
  np.fill_diagonal(found, np.nan)
  return found
