"""Load over time, dead experts, and which experts are alike."""

from typing import Dict, Mapping, Tuple

import numpy as np

from openmoe_jax.analysis import resampling, routing_statistics
from openmoe_jax.analysis.figures import draw, draw_lines
from openmoe_jax.analysis.figures.report import Report
from openmoe_jax.analysis.figures.selection import Selection
from openmoe_jax.analysis.resampling import Estimate
from openmoe_jax.analysis.routing_statistics import DEAD_LOAD, Load


def add(report: Report, chosen: Selection) -> None:
  """All of this section."""
  found: Dict[Tuple[int, int], Load] = {}
  for layer in chosen.layers:
    for step in chosen.steps:
      tokens = chosen.read(layer, ['expert'], step=step)
      found[layer, step] = routing_statistics.load(tokens['expert'], chosen.experts, tokens['row'])
  for (layer, step), own in found.items():
    _findings(report, chosen, layer, step, own)
  _draw_load(report, chosen, found)
  if len(chosen.steps) > 1:
    _draw_balance(report, chosen, found)
  _draw_alike(report, chosen)


def _dead(own: Load) -> Estimate:
  """How many are dead; the interval counts those that are so at every end of their own intervals, or at one."""
  count = lambda values: float(np.sum(values < DEAD_LOAD))
  return Estimate(count(own.load.value), count(own.load.high), count(own.load.low))


def _findings(report: Report, chosen: Selection, layer: int, step: int, own: Load) -> None:
  where = {'layer': layer, 'step': step, 'policy': chosen.choice_policy}
  dead, most = _dead(own), int(np.argmax(own.load.value))
  names = f' ({", ".join(map(str, own.dead))})' if own.dead else ''
  report.finding(
      'dead_experts', 'load', f'In layer {layer} at step {step}, {dead.value:.0f} of {chosen.experts} experts{names} '
      f'get less than a tenth of an equal share (with the intervals of their loads between '
      f'{dead.low:.0f} and {dead.high:.0f}).',
      dead, 'experts', **where)
  busiest = Estimate(*(float(part[most]) for part in own.load))
  report.finding(
      'busiest_expert', 'load', f'In layer {layer} at step {step} the busiest expert, {most}, gets {busiest.value:.2f} '
      f'[{busiest.low:.2f}, {busiest.high:.2f}] times an equal share of the choices; the evenness of all loads is '
      f'{own.balance:.3f} (entropy over its maximum).', busiest, 'times an equal share', chance=1., **where)


def _draw_load(report: Report, chosen: Selection, found: Mapping[Tuple[int, int], Load]) -> None:
  experts = [str(e) for e in range(chosen.experts)]
  steps = list(chosen.steps)
  panels = [draw.Map(f'layer {layer}', np.stack([found[layer, step].load.value for step in steps]),
                     [str(step) for step in steps]) for layer in chosen.layers]
  report.figure(
      'load_over_training', '', 'load', 'Load of the experts over training',
      'Choices that each expert gets at each checkpoint, first and second together, over an equal share: white is '
      f'balanced, dark blue is dying (dead below {DEAD_LOAD:g}x).',
      lambda: draw.share_maps(panels, 'Load of the experts over training', 'step'),
      ['layer', 'step', 'expert', 'load', 'low', 'high', 'dead'],
      [(layer, step, int(e), *(part[int(e)] for part in own.load), int(int(e) in own.dead))
       for (layer, step), own in found.items() for e in experts])


def _draw_balance(report: Report, chosen: Selection, found: Mapping[Tuple[int, int], Load]) -> None:
  x = np.asarray(chosen.steps)
  plain = lambda values: Estimate(*(np.asarray(values, float),) * 3)
  of_layer = lambda name, y: draw_lines.Curve(name, x, y)
  busiest, idlest = [], []
  for layer in chosen.layers:
    loads = [found[layer, step].load for step in chosen.steps]
    pick = lambda which: draw_lines.estimates([Estimate(*(float(part[which(load.value)]) for part in load))
                                               for load in loads])
    busiest.append(of_layer(f'layer {layer}', pick(np.argmax)))
    idlest.append(of_layer(f'layer {layer}', pick(np.argmin)))
  even = draw_lines.Curve('equal share', x, plain(np.ones(len(x))), True)
  report.figure(
      'load_extremes', '', 'load', 'The busiest and the idlest expert over training',
      'Load of the busiest and of the idlest expert of each layer over an equal share, with 95 % bootstrap intervals. '
      f'An expert below {DEAD_LOAD:g} is counted as dead.',
      lambda: draw_lines.curves([draw_lines.Panel('busiest expert', [*busiest, even]),
                                 draw_lines.Panel('idlest expert', [*idlest, even])],
                                'The busiest and the idlest expert over training', 'training step', 'x equal share',
                                percent=False, ordered=True, markers=True),
      ['layer', 'step', 'busiest', 'busiest_low', 'busiest_high', 'idlest', 'idlest_low', 'idlest_high', 'balance',
       'dead'],
      [(chosen.layers[i], step, *(part[j] for part in busiest[i].y), *(part[j] for part in idlest[i].y),
        found[chosen.layers[i], step].balance, len(found[chosen.layers[i], step].dead))
       for i in range(len(chosen.layers)) for j, step in enumerate(chosen.steps)])


def _draw_alike(report: Report, chosen: Selection) -> None:
  alike, company, lines = [], [], []
  for layer in chosen.layers:
    tokens = chosen.read(layer, ['expert', 'token_id'])
    similarity = routing_statistics.similarity(tokens['expert'], tokens['token_id'], chosen.experts)
    pairs = (routing_statistics.together(tokens['expert'], chosen.experts) if chosen.choices > 1 else
             np.full_like(similarity, np.nan))
    np.fill_diagonal(similarity, np.nan)
    names = [str(e) for e in range(chosen.experts)]
    alike.append(draw.Map(f'layer {layer}', similarity, names))
    company.append(draw.Map(f'layer {layer}', pairs, names))
    lines += [(chosen.last, layer, i, j, value, pairs[i, j]) for (i, j), value in np.ndenumerate(similarity) if i < j]
    _alike_finding(report, chosen, layer, similarity, tokens)
  header = ['step', 'layer', 'expert', 'other_expert', 'similarity', 'together']
  report.figure(
      'expert_similarity', '', 'load', 'Experts that serve the same tokens',
      'Cosine of the token ids that two experts are chosen by: 1 where both serve the same ids in the same '
      f'proportions, 0 where they share none; step {chosen.last}.',
      lambda: draw.maps(alike, f'Similarity of experts, step {chosen.last}', 'expert', 'expert', 'cosine', (0., 1.),
                        square=True),
      header, lines)
  if chosen.choices > 1:
    report.figure(
        'experts_together', '', 'load', 'Experts that are chosen together',
        'How often the first two choices of a token are these two experts, over what their loads alone would give: red '
        f'pairs are chosen together, blue pairs are alternatives; step {chosen.last}.',
        lambda: draw.share_maps(company, f'Experts chosen by the same token, step {chosen.last}', 'expert',
                                'x by chance', square=True),
        header, lines)


def _alike_finding(report: Report, chosen: Selection, layer: int, similarity: np.ndarray,
                   tokens: Mapping[str, np.ndarray]) -> None:
  """Mean similarity of two experts, with the interval of the jackknife."""
  expert, token_id = tokens['expert'], tokens['token_id']
  pairs = np.triu_indices(chosen.experts, 1)
  mean = lambda of: float(routing_statistics.similarity(expert[of], token_id[of], chosen.experts)[pairs].mean())
  value = resampling.jackknife(float(similarity[pairs].mean()), lambda left_out: mean(~left_out),
                               resampling.blocks_of(tokens['row']))
  shuffled = np.random.default_rng(0).permutation(token_id)
  chance = float(routing_statistics.similarity(expert, shuffled, chosen.experts)[pairs].mean())
  i, j = np.unravel_index(np.nanargmax(similarity), similarity.shape)
  report.finding(
      'expert_similarity', 'load', f'In layer {layer} two experts serve the same token ids with a cosine of {value} on '
      f'average (with token ids shuffled {chance:.3f}); the most alike are {min(i, j)} and {max(i, j)} with '
      f'{similarity[i, j]:.2f}.', value, 'cosine', chance=chance, layer=layer, step=chosen.last,
      policy=chosen.choice_policy)
