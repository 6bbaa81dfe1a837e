"""Drops: by position and data set (figure 12), by rank, tokens left without any expert, over training, and their cost.

A policy is who shares an expert's slots and how many there are (`recording.policies`); every figure names its own.
"""

from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from openmoe_jax import paths
from openmoe_jax.analysis import drop_statistics, resampling
from openmoe_jax.analysis.drop_statistics import ByPosition, Drops
from openmoe_jax.analysis.figures import draw_lines
from openmoe_jax.analysis.figures.report import Report, mean_of, percent, points
from openmoe_jax.analysis.figures.selection import Selection, group_named
from openmoe_jax.config import require

# The paper's own policy comes first, unless it drops nothing.
_FOR_HEADLINE = ('colossalai', 't5x_eval', 't5x_train', 'colossalai_train')
RANKS = ('first', 'second', 'third', 'fourth')


class Found(NamedTuple):
  """Of a policy and layer at the last step.

  Attributes:
    drops: shares of all tokens.
    all, domains: share of choices dropped along the row, of all tokens and of each domain.
    without_expert: tokens none of whose choices was kept, along the row.
    in_group: share of choices dropped along the group, where groups are not rows.
  """
  drops: Drops
  all: ByPosition
  domains: Mapping[str, ByPosition]
  without_expert: ByPosition
  in_group: Optional[ByPosition]


def add(report: Report, chosen: Selection, others: Sequence[Selection] = ()) -> None:
  """All of this section; `others` are recordings that figure 12 compares with."""
  require_drops(chosen)
  found = {(policy, layer): _of(chosen, policy, layer) for policy in chosen.drop_policies for layer in chosen.layers}
  for policy in chosen.drop_policies:
    _findings(report, chosen, policy, {layer: found[policy, layer] for layer in chosen.layers})
    _draw_domains(report, chosen, policy, found)
    if others:
      _draw_compared(report, [chosen, *others], policy, found)
  _headline(report, chosen, found)
  _draw_ranks(report, chosen, found)
  _draw_without_expert(report, chosen, found)
  _draw_in_group(report, chosen, found)
  if len(chosen.steps) > 1:
    _draw_over_training(report, chosen)


def require_drops(chosen: Selection) -> None:
  require(bool(chosen.drop_policies), f'{chosen.folder} holds only the policy none, under which nobody is dropped; '
          'record with --policy=none,t5x_train,t5x_eval,colossalai')


def describe(chosen: Selection, policy: str) -> str:
  """'groups of 256 tokens, 40 slots an expert'."""
  sizes = chosen.finished(chosen.last, policy, chosen.all_domains[0])
  return f'groups of {sizes["group_size"]} tokens, {sizes["capacity"]} slots an expert'


def _of(chosen: Selection, policy: str, layer: int) -> Found:
  tokens = chosen.read(layer, ['kept', 'position', 'group_position'], policy=policy)
  dropped, row, position = (~tokens['kept']).mean(axis=1), tokens['row'], tokens['position']
  along = lambda inside: drop_statistics.by_position(dropped[inside], position[inside], row[inside], chosen.length)
  domains = {name: along(tokens['domain'] == i) for i, name in enumerate(chosen.all_domains)}
  size = chosen.finished(chosen.last, policy, chosen.all_domains[0])['group_size']
  in_group = None
  if size != chosen.length:
    in_group = drop_statistics.by_position(dropped, tokens['group_position'], row, size)
  return Found(drop_statistics.drops(tokens['kept'], row), along(slice(None)), domains,
               drop_statistics.by_position((~tokens['kept']).all(axis=1), position, row, chosen.length), in_group)


def _findings(report: Report, chosen: Selection, policy: str, found: Mapping[int, Found]) -> None:
  where = {'step': chosen.last, 'policy': policy}
  for layer, own in found.items():
    ranks = ', '.join(f'{RANKS[i]} choices {percent(rank)}' for i, rank in enumerate(own.drops.ranks[:len(RANKS)]))
    report.finding('dropped_choices', 'drops', f'Under {policy}, {percent(own.drops.choices)} of the choices are '
                   f'dropped in layer {layer} ({ranks}).', own.drops.choices, layer=layer, **where)
    report.finding('tokens_without_expert', 'drops', f'Under {policy}, {percent(own.drops.without_expert)} of the '
                   f'tokens are left without any expert in layer {layer}.', own.drops.without_expert, layer=layer,
                   **where)
    report.finding('drop_slope', 'drops', f'Under {policy}, the share of dropped choices changes by '
                   f'{points(own.all.slope)} from the first position of a row to the last in layer {layer}.',
                   own.all.slope, 'share per row', chance=0., layer=layer, **where)
    if own.in_group is not None:
      report.finding('drop_slope_in_group', 'drops', f'Under {policy}, the share of dropped choices changes by '
                     f'{points(own.in_group.slope)} from the first place of a routing group to the last in '
                     f'layer {layer}.',
                     own.in_group.slope, 'share per group', chance=0., layer=layer, **where)
  if len(chosen.all_domains) > 1:
    for name in chosen.all_domains:
      slope = mean_of([own.domains[name].slope for own in found.values()])
      report.finding('drop_slope', 'drops', f'Under {policy}, the share of dropped choices of {name} changes by '
                     f'{points(slope)} along the row (mean of the sparse layers).', slope, 'share per row', chance=0.,
                     domain=name, **where)
  if 'none' in chosen.policies:
    column = {name: chosen.read(chosen.layers[0], ['log_prob'], policy=name) for name in (policy, 'none')}
    cost = drop_statistics.loss_difference(column[policy]['log_prob'], column['none']['log_prob'],
                                           column['none']['row'])
    report.finding('loss_of_drops', 'drops', f'Dropping by {policy} costs {cost.value:.4f} [{cost.low:.4f}, '
                   f'{cost.high:.4f}] nats of loss per token, against a pass in which nobody is dropped.', cost,
                   'nats per token', chance=0., **where)


def _headline(report: Report, chosen: Selection, found: Mapping[Tuple[str, int], Found]) -> None:
  there = [name for name in _FOR_HEADLINE if name in chosen.drop_policies]
  loses = lambda name: any(found[name, layer].drops.choices.value for layer in chosen.layers)
  policy = next((name for name in there if loses(name)), there[0])
  of_layers = lambda name: mean_of([found[name, layer].all.slope for layer in chosen.layers])
  curves = [found[policy, layer].all.curve.value for layer in chosen.layers]
  start, end = (100 * float(np.nanmean([curve[i] for curve in curves])) for i in (0, -1))
  others = ' and '.join(f'{points(of_layers(name))} under {name} ({describe(chosen, name)})'
                        for name in chosen.drop_policies if name != policy)
  others = f'; it is {others}' if others else ''
  report.finding(
      'drop_towards_the_end', 'drops', f'Drop-towards-the-end: under {policy} ({describe(chosen, policy)}) the share '
      f'of dropped choices goes from {start:.1f} % at the beginning of the row to {end:.1f} % at its end, a slope of '
      f'{points(of_layers(policy))} (mean of the sparse layers){others}.', of_layers(policy), 'share per row',
      chance=0., step=chosen.last, policy=policy, headline=True)


def _curve(name: str, own: ByPosition) -> draw_lines.Curve:
  return draw_lines.Curve(name, own.position, own.curve)


def _lines(first: Sequence, own: ByPosition) -> List[Tuple]:
  return [(*first, position, *values) for position, *values in zip(own.position, *own.curve)]


def _draw_domains(report: Report, chosen: Selection, policy: str, found: Mapping[Tuple[str, int], Found]) -> None:
  for name, domains in chosen.domains.items():
    group = group_named(name)
    panels = [draw_lines.Panel(f'layer {layer}', [_curve(chosen.labels[d], found[policy, layer].domains[d])
                                                  for d in domains]) for layer in chosen.layers]
    report.figure(
        f'fig12_{name}_{policy}', 'figure 12', 'drops', f'Dropped choices along the row by {group.what}: {policy}',
        f'Share of the choices that find their expert full, by position in the row; step {chosen.last}, policy '
        f'{policy}: {describe(chosen, policy)}. Bands are 95 % bootstrap intervals over blocks of rows. Where a row is '
        'a group, later tokens must find fuller experts; where it is cut into groups, or '
        'shares one with other rows, they need not.',
        lambda: draw_lines.curves(panels, f'Dropped choices along the row by {group.what}: {policy}',
                                  'position in the row', 'dropped choices', least_top=.05),
        ['policy', 'step', 'layer', 'domain', 'position', 'dropped', 'low', 'high'],
        [line for layer in chosen.layers for d in domains
         for line in _lines((policy, chosen.last, layer, d), found[policy, layer].domains[d])])


def _draw_compared(report: Report, recordings: Sequence[Selection], policy: str,
                   found: Mapping[Tuple[str, int], Found]) -> None:
  """Figure 12, second half: several models on the same text."""
  labels = recording_labels(recordings)
  of = {}
  for label, own in zip(labels, recordings):
    require(policy in own.policies, f'--compare: {own.folder} has no recording under the policy {policy}; record it, '
            'or choose by --policies')
    for layer in own.layers:
      of[label, layer] = (found[policy, layer] if own is recordings[0] else _of(own, policy, layer)).all
  layers = recordings[0].layers
  for label, own in zip(labels[1:], recordings[1:]):
    first, slope = (mean_of([of[name, layer].slope for layer in layers]) for name in (labels[0], label))
    report.finding('drop_slope_compared', 'drops', f'Under {policy}, the share of dropped choices changes by '
                   f'{points(slope)} along the row in {label}, and by {points(first)} in {labels[0]} (mean of '
                   'the sparse layers).', slope,
                   'share per row', chance=0., step=own.last, policy=policy)
  panels = [draw_lines.Panel(f'layer {layer}', [_curve(label, of[label, layer]) for label in labels])
            for layer in layers]
  report.figure(
      f'fig12_compared_{policy}', 'figure 12', 'drops', f'Dropped choices along the row, models compared: {policy}',
      f'Share of the choices that find their expert full, by position in the row, over all domains, for '
      f'{" and ".join(labels)}; policy {policy}: {describe(recordings[0], policy)}.',
      lambda: draw_lines.curves(panels, f'Dropped choices along the row: {policy}', 'position in the row',
                                'dropped choices'),
      ['policy', 'recording', 'layer', 'position', 'dropped', 'low', 'high'],
      [line for (label, layer), own in of.items() for line in _lines((policy, label, layer), own)])


def recording_labels(recordings: Sequence[Selection]) -> List[str]:
  """Short names that differ: the ends of the folders' paths, and steps."""
  parts = [str(paths.path(own.folder)).split('/') for own in recordings]
  differ = lambda n: len({'/'.join(own[-n:]) for own in parts}) == len(parts)
  depth = next((n for n in range(1, max(map(len, parts)) + 1) if differ(n)), 1)
  return [f'{"/".join(own[-depth:])} step {recording.last}' for own, recording in zip(parts, recordings)]


def _draw_ranks(report: Report, chosen: Selection, found: Mapping[Tuple[str, int], Found]) -> None:
  panels, lines = [], []
  for policy in chosen.drop_policies:
    own = [found[policy, layer].drops.ranks for layer in chosen.layers]
    panels.append((policy, [draw_lines.Dots(f'{RANKS[rank]} choices', draw_lines.estimates([d[rank] for d in own]))
                            for rank in range(min(chosen.choices, len(RANKS)))]))
    lines += [(policy, chosen.last, layer, rank + 1, *value) for layer, d in zip(chosen.layers, own)
              for rank, value in enumerate(d)]
  report.figure(
      'drops_by_rank', '', 'drops', 'Dropped choices by rank',
      f'Share of the first and of the second choices that are dropped, in each sparse layer at step {chosen.last}. '
      'First choices of a whole group are served before all second ones. Bars are 95 % bootstrap intervals.',
      lambda: draw_lines.dots(panels, chosen.layers, f'Dropped choices by rank, step {chosen.last}', 'sparse layer',
                              'dropped'),
      ['policy', 'step', 'layer', 'rank', 'dropped', 'low', 'high'], lines)


def _by_policy(chosen: Selection, found: Mapping[Tuple[str, int], Found], pick) -> Dict[str, draw_lines.Panel]:
  """A panel a policy, a curve a layer."""
  panels = {}
  for policy in chosen.drop_policies:
    curves = [_curve(f'layer {layer}', pick(found[policy, layer])) for layer in chosen.layers
              if pick(found[policy, layer]) is not None]
    if curves:
      panels[policy] = draw_lines.Panel(policy, curves)
  return panels


def _draw_without_expert(report: Report, chosen: Selection, found: Mapping[Tuple[str, int], Found]) -> None:
  panels = _by_policy(chosen, found, lambda own: own.without_expert)
  report.figure(
      'tokens_without_expert', '', 'drops', 'Tokens left without any expert',
      'Share of the tokens none of whose choices is kept, so that the sparse layer adds nothing to them, by position '
      f'in the row at step {chosen.last}. Dropped choices (figure 12) are more: most of these '
      'tokens still have another expert.',
      lambda: draw_lines.curves(list(panels.values()), f'Tokens left without any expert, step {chosen.last}',
                                'position in the row', 'tokens', ordered=True),
      ['policy', 'step', 'layer', 'position', 'without_expert', 'low', 'high'],
      [line for (policy, layer), own in found.items()
       for line in _lines((policy, chosen.last, layer), own.without_expert)])


def _draw_in_group(report: Report, chosen: Selection, found: Mapping[Tuple[str, int], Found]) -> None:
  panels = _by_policy(chosen, found, lambda own: own.in_group)
  if not panels:
    return
  report.figure(
      'drops_in_group', '', 'drops', 'Dropped choices along the routing group',
      'The same by place in the routing group, under the policies whose groups are no rows: this is where drops '
      f'towards the end are in training. {"; ".join(f"{policy}: {describe(chosen, policy)}" for policy in panels)}.',
      lambda: draw_lines.curves(list(panels.values()), f'Dropped choices along the routing group, step {chosen.last}',
                                'place in the group', 'dropped choices', ordered=True),
      ['policy', 'step', 'layer', 'place', 'dropped', 'low', 'high'],
      [line for (policy, layer), own in found.items() if own.in_group is not None
       for line in _lines((policy, chosen.last, layer), own.in_group)])


def _draw_over_training(report: Report, chosen: Selection) -> None:
  panels, lines, x = [], [], np.asarray(chosen.steps)
  for policy in chosen.drop_policies:
    curves = []
    for layer in chosen.layers:
      own = []
      for step in chosen.steps:
        tokens = chosen.read(layer, ['kept'], step=step, policy=policy)
        own.append(resampling.mean((~tokens['kept']).mean(axis=1), resampling.blocks_of(tokens['row'])))
      curves.append(draw_lines.Curve(f'layer {layer}', x, draw_lines.estimates(own)))
      lines += [(policy, layer, step, *value) for step, value in zip(chosen.steps, own)]
    panels.append(draw_lines.Panel(policy, curves))
  report.figure(
      'drops_over_training', '', 'drops', 'Dropped choices over training',
      'Share of the choices that are dropped at each checkpoint, on the same text, under each policy.',
      lambda: draw_lines.curves(panels, 'Dropped choices over training', 'training step', 'dropped choices',
                                ordered=True, markers=True),
      ['policy', 'layer', 'step', 'dropped', 'low', 'high'], lines)
