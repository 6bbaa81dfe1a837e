"""Statistics of routing on routers whose answers are known, and intervals that hold the truth as often as they say."""

import numpy as np
import pytest

from openmoe_jax.analysis import drop_statistics, resampling, routing_statistics
from openmoe_jax.config import ConfigError

ROWS, LENGTH, IDS, EXPERTS = 80, 64, 40, 8


def tokens(seed=0, rows=ROWS):
  """row, position and id of each token; ids have Zipf's frequencies."""
  rng = np.random.default_rng(seed)
  share = 1 / np.arange(1, IDS + 1)
  ids = rng.choice(IDS, rows * LENGTH, p=share / share.sum())
  return np.repeat(np.arange(rows), LENGTH), np.tile(np.arange(LENGTH), rows), ids, rng


def router(kind, seed=0):
  """(expert, row, position, id, domain) of a router that looks at one thing only."""
  row, position, ids, rng = tokens(seed)
  domain = row % 4
  table = rng.permutation(np.arange(IDS) % EXPERTS)
  expert = {'token': table[ids], 'position': position % EXPERTS, 'random': rng.integers(0, EXPERTS, len(ids)),
            'previous': table[np.roll(ids, 1)], 'domain': 2 * domain}[kind]
  return expert, row, {'token': ids, 'position': position, 'previous': np.roll(ids, 1), 'domain': domain}


@pytest.mark.parametrize('kind', ['token', 'position', 'previous', 'domain', 'random'])
def test_mutual_information_finds_what_decides(kind):
  expert, row, variables = router(kind)
  for name, variable in variables.items():
    found = routing_statistics.dependence(expert, variable, row, permutations=50)
    if name == kind:
      assert found.normalized.value == pytest.approx(1., abs=1e-9) and found.p_value == 1 / 51
      assert found.normalized.low == pytest.approx(1., abs=1e-9)
    else:
      assert found.normalized.value == pytest.approx(0., abs=.02)
    assert found.null.low <= 0 <= found.null.high and found.null.high < .03 + .1 * (name == 'domain')


def test_mutual_information_in_between():
  """With probability q the id decides, else chance does: the truth is known, and 95 % intervals hold it."""
  q, held, values = .5, 0, []
  share = 1 / np.arange(1, IDS + 1)
  share /= share.sum()
  for seed in range(40):
    row, _, ids, rng = tokens(seed)
    expert = np.where(rng.random(len(ids)) < q, ids % EXPERTS, rng.integers(0, EXPERTS, len(ids)))
    joint = share[:, None] * (q * np.eye(EXPERTS)[np.arange(IDS) % EXPERTS] + (1 - q) / EXPERTS)
    marginal = joint.sum(axis=0)
    entropy = -np.sum(marginal * np.log(marginal))
    truth = np.sum(joint * np.log(joint / np.outer(share, marginal))) / entropy
    found = routing_statistics.dependence(expert, ids, row, permutations=20, seed=seed).normalized
    held += found.low <= truth <= found.high
    values.append(found.value)
  assert np.mean(values) == pytest.approx(truth, abs=.004)  # the bias is small
  assert held >= 34  # of 40: fewer happen once in 200 times where it is 38 on average


def test_permutations_of_a_random_router_are_uniform():
  """p-values of a router that looks at nothing: below 0.2 about a fifth of the times."""
  small = 0
  for seed in range(60):
    expert, row, variables = router('random', seed)
    small += routing_statistics.dependence(expert, variables['token'], row, permutations=39, seed=seed).p_value <= .2
  assert 4 <= small <= 22


def test_a_domain_is_shuffled_by_rows():
  """Rows that prefer an expert each look like domains if tokens are shuffled; by rows they do not."""
  rng = np.random.default_rng(3)
  row = np.repeat(np.arange(ROWS), LENGTH)
  expert = np.where(rng.random(len(row)) < .7, rng.integers(0, EXPERTS, ROWS)[row], rng.integers(0, EXPERTS, len(row)))
  found = routing_statistics.dependence(expert, row % 2, row, permutations=99)
  assert found.p_value > .02 and found.null.low < found.normalized.value < 2 * found.null.high


def test_what_is_added_to_the_token_id():
  """Where the id decides half of the time and the domain the other half, the domain adds what the id lacks; what follows
  the id's own frequencies adds nothing."""
  row, position, ids, rng = tokens(3)
  domain = row % 2
  expert = np.where(domain == 0, ids % EXPERTS, (ids + 1) % EXPERTS)  # both together decide
  alone = routing_statistics.dependence(expert, ids, row, permutations=20).normalized.value
  added = routing_statistics.added_dependence(expert, domain, ids, row).normalized
  assert alone + added.value == pytest.approx(1., abs=.03) and added.low > .15
  nothing = routing_statistics.added_dependence(ids % EXPERTS, ids // 3, ids, row)
  np.testing.assert_allclose(nothing.normalized, 0., atol=1e-12)
  assert nothing.p_value == 1.
  chance = routing_statistics.added_dependence(rng.integers(0, EXPERTS, len(row)), position // 8, ids, row)
  assert chance.normalized.value == pytest.approx(0., abs=.02) and chance.normalized.low < 0 < chance.null.high


def test_predictability():
  expert, row, variables = router('token')
  found = routing_statistics.predictability(expert, variables['token'], row)
  assert found.accuracy.value == 1. and found.unseen == 0. and found.baseline.value < .5
  expert, row, variables = router('random')
  found = routing_statistics.predictability(expert, variables['token'], row)
  assert found.accuracy.low < 1 / EXPERTS < found.accuracy.high
  fresh = np.arange(len(row))  # ids that occur once can say nothing
  found = routing_statistics.predictability(expert, fresh, row)
  assert found.unseen == 1. and found.accuracy == found.baseline


def test_agreement():
  expert, row, variables = router('token')
  ids = variables['token']
  same = routing_statistics.agreement(expert, expert, ids, row)
  assert same.same.value == same.kappa.value == same.ids_same.value == 1. and same.ids == len(np.unique(ids))
  chance = np.sum((np.bincount(expert) / len(expert)) ** 2)
  assert same.chance == pytest.approx(chance, abs=1e-12)
  rng = np.random.default_rng(5)
  none = routing_statistics.agreement(rng.integers(0, EXPERTS, len(row)), rng.integers(0, EXPERTS, len(row)), ids, row)
  assert none.kappa.low < 0 < none.kappa.high and none.same.value == pytest.approx(none.chance, abs=.02)
  changed = np.where(rng.random(len(row)) < .2, (expert + 1) % EXPERTS, expert)
  part = routing_statistics.agreement(expert, changed, ids, row)
  assert part.same.low < .8 < part.same.high and part.ids_same.value == 1.  # most tokens of each id still agree


def test_bootstrap_intervals_hold_the_truth():
  """A mean whose tokens are alike within rows: 95 % intervals by blocks hold it, intervals by tokens would not."""
  held = naive = 0
  for seed in range(100):
    rng = np.random.default_rng(seed)
    row = np.repeat(np.arange(ROWS), LENGTH)
    values = rng.random(len(row)) < np.clip(.3 + .2 * rng.standard_normal(ROWS), 0, 1)[row]
    truth = np.mean(np.clip(.3 + .2 * np.random.default_rng(999).standard_normal(200000), 0, 1))
    found = resampling.mean(values, resampling.blocks_of(row))
    held += found.low <= truth <= found.high
    naive += abs(values.mean() - truth) < 1.96 * values.std() / np.sqrt(len(values))
  assert held >= 88 and naive < 70


def test_blocks_are_runs_of_rows():
  row = np.repeat([3, 4, 7, 8, 9, 11, 12, 13, 20, 21], 2)
  assert resampling.blocks_of(row, 5).tolist() == np.repeat(np.arange(5), 4).tolist()
  with pytest.raises(ConfigError, match='3 rows are too few for an interval; at least 8 are needed'):
    resampling.blocks_of(np.asarray([1, 1, 2, 3]))


def test_drops_along_the_row():
  row, position, _, rng = tokens(1)
  flat = drop_statistics.by_position(rng.random(len(row)) < .25, position, row, LENGTH)
  assert flat.slope.low < 0 < flat.slope.high and flat.mean.low < .25 < flat.mean.high
  rising = drop_statistics.by_position(rng.random(len(row)) < .1 + .4 * position / (LENGTH - 1), position, row, LENGTH)
  assert rising.slope.low < .4 < rising.slope.high and rising.slope.low > .3
  assert rising.curve.value.shape == (16,) and rising.position[0] == 1.5 and rising.position[-1] == 61.5
  exact = drop_statistics.by_position(position / (LENGTH - 1), position, row, LENGTH, bins=LENGTH)
  np.testing.assert_allclose(exact.curve.value, np.arange(LENGTH) / (LENGTH - 1), rtol=1e-12)
  assert exact.slope.value == pytest.approx(1., abs=1e-9) and exact.position.tolist() == list(range(LENGTH))


def test_drops_and_evictions_by_hand():
  """One group of four tokens, capacity 2. In the order of ranks the first choices of tokens 0, 2 and 3 ask expert 0:
  token 3 finds it full, and so does the second choice of token 1, which in token order would have been second."""
  kept = np.asarray([[1, 1], [1, 0], [1, 1], [0, 0]], bool)
  token_slot = np.asarray([[0, 0], [1, 1], [2, 2], [3, 0]])  # the last choice was dropped by first choices of its own time
  row = np.repeat(np.arange(8), 4)
  kept, token_slot = np.tile(kept, (8, 1)), np.tile(token_slot, (8, 1))
  found = drop_statistics.drops(kept, row)
  assert found.choices.value == 3 / 8 and [r.value for r in found.ranks] == [1 / 4, 2 / 4]
  assert found.without_expert == (1 / 4, 1 / 4, 1 / 4)
  got = drop_statistics.evictions(kept, token_slot, 2, row)
  assert got.evicted.value == 2 / 4 and got.of_dropped.value == 1. and got.tokens.value == 2 / 4
  assert got.rescued.value == 1 / 4  # token 2 was kept, although two choices stood before it in token order
  with pytest.raises(ConfigError, match='one choice each'):
    drop_statistics.evictions(kept[:, :1], token_slot[:, :1], 2, row)


def test_loss_difference():
  row, _, _, rng = tokens(2)
  log_prob = -rng.random(len(row))
  log_prob[::LENGTH] = np.nan
  found = drop_statistics.loss_difference(log_prob, log_prob + .5, row)
  assert found.value == pytest.approx(.5, abs=1e-12) and found.high - found.low < 1e-9


def test_load_similarity_and_company():
  row = np.repeat(np.arange(8), 100)
  choices = np.stack([np.tile([0, 0, 1, 1], 200), np.tile([1, 2, 0, 2], 200)], axis=1)
  found = routing_statistics.load(choices, 4, row)
  np.testing.assert_allclose(found.load.value, [1.5, 1.5, 1., 0.])
  assert found.dead == [3] and found.balance == pytest.approx(-(2 * .375 * np.log(.375) + .25 * np.log(.25)) / np.log(4))
  ids = np.tile([5, 6, 7, 8], 200)
  alike = routing_statistics.similarity(choices, ids, 4)
  # Ids of expert 0: 5, 6, 7; of expert 1: 5, 7, 8; of expert 2: 6, 8.
  np.testing.assert_allclose(alike[:3, :3], [[1, 2 / 3, 6 ** -.5], [2 / 3, 1, 6 ** -.5], [6 ** -.5, 6 ** -.5, 1]], rtol=1e-9)
  company = routing_statistics.together(choices, 4)
  assert company[0, 1] == pytest.approx(company[1, 0]) and np.isnan(company[0, 0]) and np.isnan(company[0, 3])
  assert company[0, 1] > company[0, 2]
  share = routing_statistics.shares(ids, choices, 4, min_count=200)
  assert share[5].tolist() == [.5, .5, 0, 0] and sorted(share) == [5, 6, 7, 8]
  assert routing_statistics.shares(ids, choices, 4, min_count=201) == {}


def test_too_few_tokens():
  row = np.repeat(np.arange(10), 30)
  for call in (lambda x: routing_statistics.dependence(x, x, row), lambda x: routing_statistics.predictability(x, x, row),
               lambda x: routing_statistics.agreement(x, x, x, row)):
    with pytest.raises(ConfigError, match='500 are needed'):
      call(np.zeros(300, np.int64))
  with pytest.raises(ConfigError, match='5 tokens of one checkpoint and 6 of the other'):
    routing_statistics.agreement(np.zeros(5), np.zeros(6), np.zeros(5), row)
