"""Tables, text and pictures of `analysis.surgery`: the change of loss beside the expert's load."""

import csv
import io
import json
from typing import Any, Dict, List

import numpy as np

from openmoe_jax import paths
from openmoe_jax.analysis.plots import COLOURS, styled_pyplot, write_figure
from openmoe_jax.analysis.surgery import EXPERT_KINDS, LAYER_KINDS, Ablations

TITLES = {'zero': 'its output zero', 'next': 'the next best in its place', 'no_experts': 'no experts',
          'random': 'random experts', 'uniform': 'even gates', 'hash': 'experts by hash of the token id',
          'same': 'always the same experts', 'table': "experts by the token id's table"}
_MOST_WRITTEN = 400  # cells of a heat map that have their number in them


def records(found: Ablations) -> List[Dict[str, Any]]:
  """A line for each ablation and domain: domain, kind, layer, expert (None of a whole layer), change with its interval
  (low, high), loss (of the model as it is), load and gate (of the expert, in the domain)."""
  lines = []
  for domain, of in found.domains.items():
    loss = found.loss(domain).value
    for ablation in found.ablations:
      change, single = found.change(ablation, domain), ablation.expert >= 0
      at = found.layer_index(ablation.layer), ablation.expert
      lines.append({'domain': domain, 'kind': ablation.kind, 'layer': ablation.layer,
                    'expert': ablation.expert if single else None, **_estimate('change', change), 'loss': loss,
                    'load': float(of.load[at]) if single else None, 'gate': float(of.gate[at]) if single else None})
  return lines


def columns(found: Ablations) -> Dict[str, np.ndarray]:
  """`records` as columns; expert is -1, load and gate are NaN of a whole layer."""
  lines = records(found)
  whole = {'expert': -1, 'load': np.nan, 'gate': np.nan}
  return {name: np.asarray([whole[name] if line[name] is None else line[name] for line in lines]) for name in lines[0]}


def _estimate(name: str, estimate) -> Dict[str, float]:
  return {name: estimate.value, 'low': estimate.low, 'high': estimate.high}


def grid(found: Ablations, kind: str, layer: int) -> np.ndarray:
  """Changes of loss with their intervals: float64 [E, domains, 3]; NaN where an expert was left alone."""
  cells = np.full((found.config.num_experts, len(found.domains), 3), np.nan)
  for ablation in found.ablations:
    if ablation.kind == kind and ablation.layer == layer:
      cells[ablation.expert] = [found.change(ablation, domain) for domain in found.domains]
  return cells


def follows_load(found: Ablations) -> List[Dict[str, Any]]:
  """For each kind, layer and domain: Spearman's rank correlation of the experts' change of loss and load, and its p-value.

  NaN with fewer than three experts.
  """
  from scipy import stats
  lines = []
  for kind in EXPERT_KINDS:
    for layer in _layers(found, kind):
      change = grid(found, kind, layer)[..., 0]
      for i, (domain, of) in enumerate(found.domains.items()):
        known = ~np.isnan(change[:, i])
        rho, p = (stats.spearmanr(change[known, i], of.load[found.layer_index(layer), known])
                  if known.sum() > 2 else (np.nan, np.nan))
        lines.append({'kind': kind, 'layer': layer, 'domain': domain, 'experts': int(known.sum()),
                      'correlation': float(rho), 'p_value': float(p)})
  return lines


def matters_most(found: Ablations) -> List[Dict[str, Any]]:
  """For each kind, layer and domain the expert whose ablation costs most, with its load and the load's rank (1: busiest)."""
  lines = []
  for kind in EXPERT_KINDS:
    for layer in _layers(found, kind):
      cells = grid(found, kind, layer)
      for i, (domain, of) in enumerate(found.domains.items()):
        expert, load = int(np.nanargmax(cells[:, i, 0])), of.load[found.layer_index(layer)]
        change, low, high = map(float, cells[expert, i])
        lines.append({'kind': kind, 'layer': layer, 'domain': domain, 'expert': expert, 'change': change, 'low': low,
                      'high': high, 'load': float(load[expert]), 'load_rank': int((load > load[expert]).sum()) + 1})
  return lines


def _layers(found: Ablations, kind: str) -> List[int]:
  return sorted({ablation.layer for ablation in found.ablations if ablation.kind == kind})


def summary(found: Ablations) -> List[str]:
  """What a terminal shows."""
  lines = [f'{domain}: loss {found.loss(domain)}' for domain in found.domains]
  for line in matters_most(found):
    lines.append(f'{line["kind"]}, layer {line["layer"]}, {line["domain"]}: expert {line["expert"]} matters most, '
                 f'{line["change"]:+.4f} [{line["low"]:+.4f}, {line["high"]:+.4f}]; its load {line["load"]:.2f} is number '
                 f'{line["load_rank"]} of {found.config.num_experts}')
  for ablation in found.ablations:
    if ablation.kind in LAYER_KINDS:
      changes = ', '.join(f'{domain} {found.change(ablation, domain).value:+.4f}' for domain in found.domains)
      lines.append(f'{ablation.kind}, layer {ablation.layer}: {changes}')
  if not np.isnan(found.unseen):
    lines.append(f'{found.unseen:.1%} of the tokens were not in the table of token ids, and went by hash')
  return lines


def write(found: Ablations, stem: paths.PathLike) -> List[str]:
  """Writes STEM.json, STEM.csv and pictures as STEM_experts and STEM_layers, .png and .svg; returns their names."""
  stem, lines = str(paths.path(stem)), records(found)
  tokens = {domain: float(of.targets.sum()) for domain, of in found.domains.items()}
  about = {'step': found.step, 'target_tokens': tokens, 'not_in_table': found.unseen, 'matters_most': matters_most(found),
           'follows_load': follows_load(found), 'ablations': lines}
  paths.write_text(f'{stem}.json', json.dumps(_without_nan(about), indent=1) + '\n')
  text = io.StringIO()
  table = csv.DictWriter(text, list(lines[0]))
  table.writeheader()
  table.writerows(lines)
  paths.write_text(f'{stem}.csv', text.getvalue())
  written = [f'{stem}.json', f'{stem}.csv']
  for name, figure in (('experts', experts_figure(found)), ('layers', layers_figure(found))):
    if figure is not None:
      written += write_figure(figure, f'{stem}_{name}.png', f'{stem}_{name}.svg')
  return written


def _without_nan(value: Any) -> Any:
  """JSON knows no NaN."""
  if isinstance(value, dict):
    return {name: _without_nan(x) for name, x in value.items()}
  if isinstance(value, list):
    return [_without_nan(x) for x in value]
  return None if isinstance(value, float) and np.isnan(value) else value


def experts_figure(found: Ablations):
  """Experts down, domains across: change of loss for each kind, and the load beside it; a row of panels a layer."""
  kinds = [kind for kind in EXPERT_KINDS if _layers(found, kind)]
  if not kinds:
    return None
  layers, domains = sorted({layer for kind in kinds for layer in _layers(found, kind)}), list(found.domains)
  pyplot = styled_pyplot()
  wide, high = 1.6 + .85 * len(domains), .9 + .24 * found.config.num_experts
  figure, axes = pyplot.subplots(len(layers), len(kinds) + 1, figsize=((len(kinds) + 1) * wide + 1, len(layers) * high + 1.6),
                                 squeeze=False, sharex=True, layout='constrained')
  cells = {(layer, kind): grid(found, kind, layer) for layer in layers for kind in kinds}
  most = max(np.nanmax(np.abs(of[..., 0])) for of in cells.values() if not np.isnan(of).all())
  for row, layer in zip(axes, layers):
    for axis, kind in zip(row, kinds):
      of = cells[layer, kind]
      unsure = (of[..., 1] <= 0) & (of[..., 2] >= 0)
      changes = _heat_map(axis, of[..., 0], 'PuOr_r', -most, most, '{:+.4f}', unsure)
      axis.set_title(f'layer {layer}: {TITLES[kind]}', fontsize=9)
    load = np.stack([found.domains[domain].load[found.layer_index(layer)] for domain in domains], axis=1)
    loads = _heat_map(row[-1], load, 'Greens', 0, max(2., *(of.load.max() for of in found.domains.values())), '{:.2f}')
    row[-1].set_title(f'layer {layer}: load / mean load', fontsize=9)
    row[0].set_ylabel('expert')
  for axis in axes[-1]:
    axis.set_xticks(range(len(domains)), domains, rotation=40, ha='right', fontsize=8)
  figure.colorbar(changes, ax=axes[:, :-1].ravel().tolist(), location='bottom', shrink=.6, aspect=40,
                  label='change of loss, nats per target token (in brackets: its interval holds 0)')
  figure.colorbar(loads, ax=axes[:, -1].tolist(), location='bottom', shrink=.9)
  figure.suptitle('What one expert is worth', x=.01, ha='left', fontweight='bold')
  return figure


def _heat_map(axis, values: np.ndarray, colours: str, low: float, high: float, form: str, brackets=None):
  """values [experts, domains], with their numbers where there are not too many; returns the picture."""
  picture = axis.imshow(values, cmap=colours, vmin=low, vmax=high, aspect='auto')
  axis.grid(False)
  axis.set_yticks(np.arange(0, len(values), max(1, len(values) // 16)))
  if values.size <= _MOST_WRITTEN:
    for (i, j), value in np.ndenumerate(values):
      if not np.isnan(value):
        text = form.format(value)
        shade = picture.norm(value) if low == 0 else abs(value) / high
        axis.text(j, i, f'({text})' if brackets is not None and brackets[i, j] else text, ha='center', va='center',
                  fontsize=7, color='white' if shade > .7 else 'black')
  return picture


def layers_figure(found: Ablations):
  """What the routers' decisions are worth: change of loss of every kind of LAYER_KINDS, with intervals, by domain."""
  kinds = [kind for kind in LAYER_KINDS if _layers(found, kind)]
  if not kinds:
    return None
  layers = sorted({layer for kind in kinds for layer in _layers(found, kind)})
  pyplot = styled_pyplot()
  figure, axes = pyplot.subplots(1, len(layers), figsize=(2.4 + 3.2 * len(layers), 1.4 + .42 * len(kinds)), sharey=True,
                                 sharex=True, squeeze=False, layout='constrained')
  step = .7 / len(found.domains)
  for axis, layer in zip(axes[0], layers):
    for i, (domain, colour) in enumerate(zip(found.domains, COLOURS * 8)):
      own = [a for a in found.ablations if a.layer == layer and a.kind in kinds]
      places = [kinds.index(a.kind) + (i - (len(found.domains) - 1) / 2) * step for a in own]
      changes = np.array([found.change(a, domain) for a in own]).reshape(-1, 3)
      axis.errorbar(changes[:, 0], places, xerr=np.abs(changes[:, 1:] - changes[:, :1]).T, fmt='o', markersize=4,
                    linewidth=1.2, color=colour, label=domain)
    axis.axvline(0, color='#52606d', linewidth=.8)
    axis.set_title(f'layer {layer}', fontsize=10)
    axis.set_xlabel('change of loss (nats per target)')
    axis.locator_params(axis='x', nbins=5)
  axes[0, 0].set_yticks(range(len(kinds)), [TITLES[kind] for kind in kinds])
  axes[0, 0].invert_yaxis()
  axes[0, -1].legend(fontsize=7, loc='best')
  figure.suptitle("What a layer's experts, and its router's decisions, are worth", x=.01, ha='left', fontweight='bold')
  return figure
