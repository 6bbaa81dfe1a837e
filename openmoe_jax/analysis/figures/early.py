"""Early routing learning: how soon routers decide as they will at the end (figure 11, and agreement in numbers)."""

from typing import Dict, List, Mapping, Tuple

import numpy as np

from openmoe_jax.analysis import resampling, routing_statistics
from openmoe_jax.analysis.figures import draw, draw_lines
from openmoe_jax.analysis.figures.context import Settings, shown_ids, token_maps
from openmoe_jax.analysis.figures.report import Report, mean_of, percent
from openmoe_jax.analysis.figures.selection import Selection
from openmoe_jax.analysis.routing_statistics import Agreement
from openmoe_jax.config import require

TOKENS = 8  # token ids of figure 11


def add(report: Report, chosen: Selection, settings: Settings) -> None:
  """All of this section; needs at least two steps, recorded over the same tokens."""
  require(len(chosen.steps) > 1, f'only step {chosen.last} is recorded; routing over training needs several '
          '(openmoe-analyze record --all_checkpoints --initialization)')
  _tokens(report, chosen, settings)
  found, to_last, information = {}, {}, {}
  for layer in chosen.layers:
    experts, token_id, row = _experts(chosen, layer)
    found[layer] = _matrix(experts, row)
    for step in chosen.steps[:-1]:
      to_last[layer, step] = routing_statistics.agreement(experts[step], experts[chosen.last], token_id, row)
    for step in chosen.steps:
      information[layer, step] = routing_statistics.dependence(experts[step], token_id, row, permutations=10).normalized
  losses = {step: _loss(chosen, step) for step in chosen.steps}
  _findings(report, chosen, to_last, losses)
  _draw_agreement(report, chosen, to_last)
  _draw_matrix(report, chosen, found)
  _draw_information(report, chosen, information)


def _experts(chosen: Selection, layer: int) -> Tuple[Dict[int, np.ndarray], np.ndarray, np.ndarray]:
  """{step: first expert of each token}, token ids, rows."""
  experts, first = {}, None
  for step in chosen.steps:
    tokens = chosen.read(layer, ['expert', 'token_id'], step=step)
    first = first or tokens
    require(np.array_equal(tokens['token_id'], first['token_id']), f'steps {chosen.steps[0]} and {step} of '
            f'{chosen.folder} were recorded over different tokens; record both with the same --tokens')
    experts[step] = tokens['expert'][:, 0]
  return experts, first['token_id'], first['row']


def _matrix(experts: Mapping[int, np.ndarray], rows: np.ndarray) -> np.ndarray:
  """Cohen's kappa of each pair of steps."""
  steps = list(experts)
  shares = {step: np.bincount(own, minlength=1 + max(int(e.max()) for e in experts.values())) / len(rows)
            for step, own in experts.items()}
  found = np.eye(len(steps))
  for i, one in enumerate(steps):
    for j, other in enumerate(steps[:i]):
      same, chance = float(np.mean(experts[one] == experts[other])), float(shares[one] @ shares[other])
      found[i, j] = found[j, i] = (same - chance) / max(1 - chance, 1e-12)
  return found


def _loss(chosen: Selection, step: int) -> float:
  """Mean loss of the recorded targets, in nats."""
  return -float(np.nanmean(chosen.read(chosen.layers[0], ['log_prob'], step=step)['log_prob']))


def _findings(report: Report, chosen: Selection, to_last: Mapping[Tuple[int, int], Agreement], losses) -> None:
  last = chosen.last
  for (layer, step), own in to_last.items():
    where = {'layer': layer, 'step': step, 'policy': chosen.choice_policy}
    report.finding(
        'agreement_with_last', 'early', f'In layer {layer} {percent(own.same)} of the tokens have the same first '
        f'expert at step {step} as at step {last} (chance {100 * own.chance:.1f} %; above chance, '
        f'kappa = {own.kappa}).', own.same,
        chance=own.chance, **where)
    report.finding(
        'token_id_agreement_with_last', 'early', f'In layer {layer} {percent(own.ids_same)} of {own.ids} token ids '
        f'have the same most frequent expert at step {step} as at step {last} (chance {100 * own.ids_chance:.1f} %).',
        own.ids_same, chance=own.ids_chance, **where)
  first = next((step for step in chosen.steps[:-1] if step > 0), None)
  if first is None:
    return
  of_layers = lambda pick: mean_of([pick(to_last[layer, first]) for layer in chosen.layers])
  same, ids = of_layers(lambda own: own.same), of_layers(lambda own: own.ids_same)
  chance, ids_chance = (float(np.mean([pick(to_last[layer, first]) for layer in chosen.layers]))
                        for pick in (lambda own: own.chance, lambda own: own.ids_chance))
  layers = f', mean of {len(chosen.layers)} sparse layers' if len(chosen.layers) > 1 else ''
  report.finding(
      'early_routing', 'early', f'Early routing learning: at step {first}, {100 * first / last:.0f} % of the way to '
      f'step {last}, {percent(same)} of the tokens already go to the first expert of step {last} (chance '
      f'{100 * chance:.1f} %), and {percent(ids)} of the token ids have their most frequent expert (chance '
      f'{100 * ids_chance:.1f} %{layers}); the loss is {losses[first]:.2f} nats then and {losses[last]:.2f} in '
      'the end.', same, chance=chance, step=first,
      policy=chosen.choice_policy, headline=True)


def _draw_agreement(report: Report, chosen: Selection, to_last: Mapping[Tuple[int, int], Agreement]) -> None:
  steps = chosen.steps[:-1]
  x, panels = np.asarray(steps), []
  for title, pick, chance in (('tokens: same first expert', lambda own: own.same, lambda own: own.chance),
                              ('token ids: same most frequent expert', lambda own: own.ids_same,
                               lambda own: own.ids_chance)):
    curves = [draw_lines.Curve(f'layer {layer}', x, draw_lines.estimates([pick(to_last[layer, s]) for s in steps]))
              for layer in chosen.layers]
    level = np.mean([[chance(to_last[layer, s]) for s in steps] for layer in chosen.layers], axis=0)
    curves.append(draw_lines.Curve('chance', x, resampling.Estimate(level, level, level), True))
    panels.append(draw_lines.Panel(title, curves))
  report.figure(
      'agreement_with_last', '', 'early', f'How soon routing is as at step {chosen.last}',
      f'Share of tokens whose first expert is that of step {chosen.last}, and share of token ids (with at least '
      f'{routing_statistics.MIN_COUNT} tokens) whose most frequent expert is; bands are 95 % bootstrap intervals, '
      'dashed is what independent routers with the same loads would have.',
      lambda: draw_lines.curves(panels, f'Routing decisions that are already those of step {chosen.last}',
                                'training step', 'same as at the end', ordered=True, markers=True, least_top=1.),
      ['layer', 'step', 'last_step', 'same', 'low', 'high', 'chance', 'kappa', 'kappa_low', 'kappa_high', 'ids_same',
       'ids_low', 'ids_high', 'ids_chance', 'ids'],
      [(layer, step, chosen.last, *own.same, own.chance, *own.kappa, *own.ids_same, own.ids_chance, own.ids)
       for (layer, step), own in to_last.items()])


def _draw_matrix(report: Report, chosen: Selection, found: Mapping[int, np.ndarray]) -> None:
  names = [str(step) for step in chosen.steps]
  report.figure(
      'agreement_matrix', '', 'early', 'Agreement of routing between all checkpoints',
      "Share of tokens with the same first expert at two checkpoints, beyond what their loads would give (Cohen's "
      'kappa, in percent): 0 is chance, 100 the same routing. A bright square in the lower right is routing that '
      'has settled.',
      lambda: draw.maps([draw.Map(f'layer {layer}', own, names) for layer, own in found.items()],
                        'Agreement of first experts between checkpoints', 'training step', 'training step', 'kappa',
                        (0., 1.), names, numbers=len(names) <= 12),
      ['layer', 'step', 'other_step', 'kappa'],
      [(layer, chosen.steps[i], chosen.steps[j], value) for layer, own in found.items()
       for (i, j), value in np.ndenumerate(own)])


def _draw_information(report: Report, chosen: Selection, information) -> None:
  x = np.asarray(chosen.steps)
  curves = [draw_lines.Curve(f'layer {layer}', x, draw_lines.estimates([information[layer, s] for s in chosen.steps]))
            for layer in chosen.layers]
  report.figure(
      'token_id_information_over_training', '', 'early', 'How much the token id decides, over training',
      'Mutual information of the first expert with the token id, over the entropy of the expert, at each checkpoint: '
      '100 % is a router that looks at the token id alone.',
      lambda: draw_lines.curves([draw_lines.Panel('', curves)],
                                'What the token id says about the expert, over training', 'training step',
                                'mutual information', ordered=True, markers=True, least_top=1.),
      ['layer', 'step', 'normalized_information', 'low', 'high'],
      [(layer, step, *own) for (layer, step), own in information.items()])


def _tokens(report: Report, chosen: Selection, settings: Settings) -> None:
  """Figure 11: the same token ids at all checkpoints."""
  ids = shown_ids(chosen, settings, TOKENS)
  for layer in chosen.layers:
    shares = {}
    for step in chosen.steps:
      tokens = chosen.read(layer, ['expert', 'token_id'], step=step)
      shares[step] = routing_statistics.shares(tokens['token_id'], tokens['expert'], chosen.experts)
    panels: List[draw.Map] = []
    for i in ids:
      panels.append(draw.Map(settings.piece(i), np.stack([shares[step][i] for step in chosen.steps]),
                             [str(step) for step in chosen.steps]))
    report.figure(
        f'fig11_token_ids_over_training_layer{layer}', 'figure 11', 'early', f'Token ids over training, layer {layer}',
        f'Which experts a token chooses at each checkpoint, in layer {layer}; an equal share is '
        f'{100 / chosen.experts:.3g} %. Columns that are dark from early on are experts that were learned early.',
        lambda: token_maps(panels, f'Layer {layer}: experts of token ids over training', 'step', chosen.choices),
        ['layer', 'step', 'token_id', 'token', 'expert', 'share'],
        [(layer, step, i, settings.piece(i), e, share) for i in ids for step in chosen.steps
         for e, share in enumerate(shares[step][i])])
