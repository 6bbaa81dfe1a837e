"""Who goes where: share of choices per expert by domain, programming and natural language, task (figures 5 to 8)."""

from typing import Dict

import numpy as np

from openmoe_jax.analysis import routing_statistics
from openmoe_jax.analysis.figures import draw
from openmoe_jax.analysis.figures.report import Report, percent
from openmoe_jax.analysis.figures.selection import Group, Selection, group_named

UNIT = 'x equal share'


def add(report: Report, chosen: Selection) -> None:
  """Figures 5 to 8 as far as there are such domains, and how much a domain says about the expert."""
  for name, domains in chosen.domains.items():
    group = group_named(name)
    labels = [chosen.labels[domain] for domain in domains]
    found = {}
    for layer in chosen.layers:
      tokens = chosen.read(layer, ['expert'], domains=domains)
      found[layer] = relative_shares(tokens['domain'], tokens['expert'], chosen.experts)
      if len(domains) > 1:
        _finding(report, chosen, group, layer, tokens)
    _figures(report, chosen, group, labels, found)


def relative_shares(variable: np.ndarray, expert: np.ndarray, experts: int, least: int = 1) -> Dict[int, np.ndarray]:
  """As `routing_statistics.shares`, times the number of experts: 1 is an equal share."""
  return {value: own * experts for value, own in routing_statistics.shares(variable, expert, experts, least).items()}


def _figures(report, chosen, group, labels, found) -> None:
  number = int(group.paper.split()[-1])
  what = f'{group.what}s' if len(labels) > 1 else group.what
  header = ['step', 'layer', group.what, 'expert', 'relative_share']
  lines = lambda layer: [(chosen.last, layer, labels[i], e, share) for i, own in found[layer].items()
                         for e, share in enumerate(own)]
  panels = [draw.Map(f'layer {layer}', np.stack(list(own.values())), labels) for layer, own in found.items()]
  report.figure(
      f'fig{number:02d}_{group.name}', group.paper, 'specialisation', f'Experts by {group.what}',
      f'Which experts the tokens of each {group.what} choose, first and second choices together, in every sparse layer '
      f'at step {chosen.last}. White is an equal share of 1/{chosen.experts}, red is more, blue is less. Rows that '
      f'look alike mean that experts do not divide the {what} among themselves.',
      lambda: draw.share_maps(panels, f'Experts chosen by {group.what}, step {chosen.last}', '', UNIT),
      header, [line for layer in found for line in lines(layer)])
  for layer, own in found.items():
    report.figure(
        f'fig{number:02d}_{group.name}_layer{layer}', group.paper, 'specialisation',
        f'Experts by {group.what}, layer {layer}',
        f'The same as radars for layer {layer}: each spoke is an expert, the dashed ring an equal share. All {what} '
        'have the same scale.', lambda: draw.radars([(labels[i], shares) for i, shares in own.items()],
                    f'Layer {layer}: experts by {group.what}, step {chosen.last}', f'spokes: experts; radius: {UNIT}'),
        header, lines(layer))


def _finding(report: Report, chosen: Selection, group: Group, layer: int, tokens) -> None:
  found = routing_statistics.dependence(tokens['expert'][:, 0], tokens['domain'], tokens['row'])
  report.finding(
      f'{group.name}_information', 'specialisation',
      f'In layer {layer} the {group.what} tells {percent(found.normalized)} of what decides the first expert (0 % is '
      f'nothing, 100 % all of it; with rows shuffled between them at most {100 * found.null.high:.1f} %, p = '
      f'{found.p_value:.2g}).', found.normalized, chance=0., layer=layer, step=chosen.last,
      policy=chosen.choice_policy)
