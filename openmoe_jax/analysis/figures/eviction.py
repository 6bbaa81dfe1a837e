"""Eviction: first choices of later tokens take the places of second choices of earlier ones.

Priority goes by rank before position. What happens to a token then depends on tokens behind it, in training and
wherever there is a capacity.
"""

from typing import Dict, Mapping, NamedTuple, Sequence, Tuple

import numpy as np

from openmoe_jax.analysis import drop_statistics, resampling
from openmoe_jax.analysis.drop_statistics import ByPosition, Evictions
from openmoe_jax.analysis.figures import draw_lines
from openmoe_jax.analysis.figures.drops import describe, require_drops
from openmoe_jax.analysis.figures.report import Report, mean_of, percent
from openmoe_jax.analysis.figures.selection import Selection
from openmoe_jax.analysis.resampling import Estimate
from openmoe_jax.config import require

_FOR_HEADLINE = ('t5x_train', 'colossalai_train', 't5x_eval', 'colossalai')
FATES = ('nothing dropped', 'evicted only', 'otherwise dropped')


class Cost(NamedTuple):
  """Nats per token, each an Estimate.

  Attributes:
    fates: loss under the policy minus that without drops, of the tokens of each of `FATES` (over all sparse layers).
    excess: of tokens with an evicted choice only, minus that of tokens with nothing dropped: attention to others, which
      both have, is taken off.
    total: `excess` times the share of tokens with an evicted choice.
    shares: of the tokens, each of `FATES`.
  """
  fates: Sequence[Estimate]
  excess: Estimate
  total: Estimate
  shares: Sequence[float]


def add(report: Report, chosen: Selection) -> None:
  """All of this section."""
  require_drops(chosen)
  require(chosen.choices > 1, 'tokens of this model have one choice each, so that nobody is evicted')
  config = chosen.recording.config
  require(config.priority == 'position' and not config.batch_prioritized, 'slots go by the probability of tokens, not '
          'by position (ModelConfig.priority), so that later tokens evict earlier ones in another way than is '
          'counted here')
  found: Dict[Tuple[str, int], Evictions] = {}
  along: Dict[Tuple[str, int], Tuple[ByPosition, ByPosition]] = {}
  costs: Dict[str, Cost] = {}
  touched: Dict[str, Estimate] = {}
  for policy in chosen.drop_policies:
    capacity = chosen.capacity(chosen.last, policy)
    size = chosen.finished(chosen.last, policy, chosen.all_domains[0])['group_size']
    evicted_any = lost_any = False
    for layer in chosen.layers:
      tokens = chosen.read(layer, ['kept', 'token_slot', 'group_position'], policy=policy)
      kept, token_slot, row = tokens['kept'], tokens['token_slot'], tokens['row']
      found[policy, layer] = drop_statistics.evictions(kept, token_slot, capacity, row)
      evicted = drop_statistics.is_evicted(kept, token_slot, capacity)
      along[policy, layer] = tuple(
          drop_statistics.by_position(own[:, 1:].mean(axis=1), tokens['group_position'], row, size)
          for own in (~kept, evicted))
      evicted_any |= evicted.any(axis=1)
      lost_any |= (~kept & ~evicted).any(axis=1)
    touched[policy] = resampling.mean(evicted_any, resampling.blocks_of(row))
    if 'none' in chosen.policies:
      costs[policy] = _cost(chosen, policy, evicted_any, lost_any)
  _findings(report, chosen, found, costs, touched)
  _headline(report, chosen, found, costs, touched)
  _draw_shares(report, chosen, found, {key: dropped for key, (dropped, _) in along.items()})
  _draw_along(report, chosen, along)
  if costs:
    _draw_costs(report, chosen, costs)


def _cost(chosen: Selection, policy: str, evicted: np.ndarray, lost: np.ndarray) -> Cost:
  with_drops, without = (chosen.read(chosen.layers[0], ['log_prob'], policy=name) for name in (policy, 'none'))
  loss = without['log_prob'].astype(np.float64) - with_drops['log_prob']
  known = np.isfinite(loss)
  blocks = resampling.blocks_of(without['row'])
  masks = [~evicted & ~lost, evicted & ~lost, lost]
  columns = []
  for mask in masks:
    inside = mask & known
    columns += [np.where(inside, loss, 0.), inside]
  sums = resampling.block_sums(np.stack([*columns, evicted & known, known], axis=-1), blocks)
  mean = lambda s, i: s[..., 2 * i] / s[..., 2 * i + 1]
  excess = lambda s: mean(s, 1) - mean(s, 0)
  return Cost([resampling.bootstrap(sums, lambda s, i=i: mean(s, i)) for i in range(3)],
              resampling.bootstrap(sums, excess),
              resampling.bootstrap(sums, lambda s: excess(s) * s[..., 6] / s[..., 7]),
              [float(np.mean(mask)) for mask in masks])


def _nats(own: Estimate) -> str:
  return f'{own.value:.4f} [{own.low:.4f}, {own.high:.4f}] nats'


def _findings(report: Report, chosen: Selection, found, costs: Mapping[str, Cost], touched) -> None:
  for (policy, layer), own in found.items():
    where = {'layer': layer, 'step': chosen.last, 'policy': policy}
    report.finding('evicted_choices', 'eviction', f'Under {policy}, {percent(own.evicted)} of the choices behind the '
                   f'first are evicted by later tokens in layer {layer}.', own.evicted, **where)
    if np.isfinite(own.of_dropped.value):
      report.finding('evicted_of_dropped', 'eviction', f'Under {policy}, {percent(own.of_dropped)} of the dropped '
                     f'choices behind the first are dropped only because of later tokens in layer {layer}.',
                     own.of_dropped, **where)
  for policy, own in touched.items():
    report.finding('evicted_tokens', 'eviction', f'Under {policy}, {percent(own)} of the tokens lose a choice to later '
                   'tokens in at least one sparse layer.', own, step=chosen.last, policy=policy)
  for policy, own in costs.items():
    if np.isfinite(own.excess.value):
      report.finding('eviction_loss', 'eviction', f'Under {policy}, a token that loses a choice to later tokens, and '
                     f'none otherwise, pays {_nats(own.excess)} of loss for it; over all tokens that is '
                     f'{_nats(own.total)}.',
                     own.excess, 'nats per token', chance=0., step=chosen.last, policy=policy)


def _headline(report: Report, chosen: Selection, found, costs: Mapping[str, Cost], touched) -> None:
  policy = next(name for name in _FOR_HEADLINE if name in chosen.drop_policies)
  evicted = mean_of([found[policy, layer].evicted for layer in chosen.layers])
  dropped = mean_of([found[policy, layer].of_dropped for layer in chosen.layers])
  cost = ''
  if policy in costs and np.isfinite(costs[policy].excess.value):
    own = costs[policy]
    cost = f'; it costs such a token {_nats(own.excess)} of loss, {_nats(own.total)} over all tokens'
  report.finding(
      'eviction', 'eviction', f'Eviction: under {policy} ({describe(chosen, policy)}) {percent(evicted)} of the '
      f'choices behind the first lose their place to first choices of later tokens, which is {100 * dropped.value:.0f} '
      f'% of those that are dropped (mean of the sparse layers), and {percent(touched[policy])} of the tokens lose one '
      f'in some layer: the past depends on the future{cost}.', evicted, step=chosen.last, policy=policy, headline=True)


def _draw_shares(report: Report, chosen: Selection, found: Mapping[Tuple[str, int], Evictions],
                 dropped: Mapping[Tuple[str, int], ByPosition]) -> None:
  panels, lines = [], []
  for policy in chosen.drop_policies:
    own = [found[policy, layer] for layer in chosen.layers]
    series = [('dropped', [dropped[policy, layer].mean for layer in chosen.layers]),
              ('dropped because of later tokens', [e.evicted for e in own])]
    panels.append((policy, [draw_lines.Dots(name, draw_lines.estimates(values)) for name, values in series]))
    lines += [(policy, chosen.last, layer, *e.evicted, *e.of_dropped, *e.tokens, *e.rescued)
              for layer, e in zip(chosen.layers, own)]
  names = [f'{name}{end}' for name in ('evicted', 'evicted_of_dropped', 'tokens', 'rescued')
           for end in ('', '_low', '_high')]
  report.figure(
      'evictions', '', 'eviction', 'Choices that later tokens decide about',
      'Of the choices behind the first, those that are dropped, and those that would be kept, were no later token '
      'there. For each of these a first choice of a later token is kept. Bars are 95 % bootstrap intervals.',
      lambda: draw_lines.dots(panels, chosen.layers, f'Second choices that are dropped, step {chosen.last}',
                              'sparse layer', 'second choices'),
      ['policy', 'step', 'layer', *names], lines)


def _draw_along(report: Report, chosen: Selection,
                along: Mapping[Tuple[str, int], Tuple[ByPosition, ByPosition]]) -> None:
  names = ('dropped', 'dropped because of later tokens')
  for policy in chosen.drop_policies:
    if not any(along[policy, layer][0].mean.value for layer in chosen.layers):
      continue
    panels, lines = [], []
    for layer in chosen.layers:
      pair = along[policy, layer]
      panels.append(draw_lines.Panel(f'layer {layer}', [draw_lines.Curve(name, own.position, own.curve)
                                                        for name, own in zip(names, pair)]))
      lines += [(policy, chosen.last, layer, name, position, *values) for name, own in zip(names, pair)
                for position, *values in zip(own.position, *own.curve)]
    report.figure(
        f'evictions_along_group_{policy}', '', 'eviction', f'Evictions along the routing group: {policy}',
        'Share of the choices behind the first that are dropped, and that are dropped only because of later tokens, '
        f'by place in the routing group ({policy}: {describe(chosen, policy)}). Early tokens lose theirs to later '
        'ones; late ones come too late.',
        lambda: draw_lines.curves(panels, f'Second choices dropped along the routing group: {policy}',
                                  'place in the group', 'second choices'),
        ['policy', 'step', 'layer', 'what', 'place', 'share', 'low', 'high'], lines)


def _draw_costs(report: Report, chosen: Selection, costs: Mapping[str, Cost]) -> None:
  series = [draw_lines.Dots(policy, draw_lines.estimates(own.fates)) for policy, own in costs.items()]
  report.figure(
      'eviction_loss', '', 'eviction', 'What dropped choices cost',
      f'Loss under each policy minus loss without drops, on the same tokens at step {chosen.last}, by what happened to '
      'the token over all sparse layers. Tokens with nothing dropped see the drops of others through attention.',
      lambda: draw_lines.dots([('', series)], FATES, f'What dropped choices cost, step {chosen.last}',
                              'fate of the token', 'extra loss (nats)', percent=False),
      ['policy', 'step', 'fate', 'share_of_tokens', 'loss', 'low', 'high'],
      [(policy, chosen.last, fate, own.shares[i], *own.fates[i]) for policy, own in costs.items()
       for i, fate in enumerate(FATES)])
