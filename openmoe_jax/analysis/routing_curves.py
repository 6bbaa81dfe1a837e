"""The picture of routing over training, from metrics.jsonl: who is dropped, and how sure the routers are."""

from typing import Any, Dict, Optional, Sequence

import numpy as np

from openmoe_jax.analysis.plots import COLOURS, smooth, styled_pyplot, tokens_unit

_MOST_LAYERS = 8  # with a curve of their own; of more, least and most


def routing_figure(records: Sequence[Dict[str, Any]], sparse_layers: Optional[Sequence[int]] = None):
  """Dropped choices by rank, dropped choices at the beginning and end of rows, and the routers' entropy; None without any.

  Args:
    records: of metrics.jsonl.
    sparse_layers: their numbers among the decoder's layers, for the legend.
  """
  train = [r for r in records if r['kind'] == 'train']
  panels = []
  ranks = sorted({name for r in train for name in r if name.startswith('fraction_dropped_rank_') and 'per_layer' not in name})
  if ranks:
    names = [*ranks, 'fraction_evicted'] if len(ranks) > 1 else ranks
    labels = [f'choice {i + 1}' for i in range(len(ranks))] + ['evicted by later tokens']
    panels.append(('dropped, of the choices of a rank', [(label, _mean(train, name)) for label, name in zip(labels, names)]))
    panels.append(('dropped, by place in the row', [(f'{which} quarter', _mean(train, f'fraction_dropped_{which}_quarter'))
                                                     for which in ('first', 'last')]))
  if any('router_entropy' in r for r in train):
    panels.append(('entropy of the router / its maximum', _layers(train, 'router_entropy_per_layer', sparse_layers)))
  if not panels:
    return None
  pyplot = styled_pyplot()
  scale, unit = tokens_unit(train[-1]['tokens'])
  figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), squeeze=False, layout='constrained')
  for axis, (title, curves) in zip(axes[0], panels):
    for colour, (label, (tokens, values)) in zip(COLOURS * 8, curves):
      axis.plot(tokens / scale, values, color=colour, linewidth=.6, alpha=.35)
      axis.plot(tokens / scale, smooth(values, max(len(values) // 25, 1)), color=colour, linewidth=1.5, label=label)
    axis.set_title(title, fontsize=10)
    axis.set_ylim(0, None)
    axis.set_xlabel(f'{unit} trained on')
    axis.legend(fontsize=8)
  figure.suptitle('Routing over training (what is dropped: mean over sparse layers)', x=.01, ha='left', fontweight='bold')
  return figure


def _mean(train, name):
  """(tokens, values) of a figure's mean over layers."""
  known = [r for r in train if name in r]
  return np.asarray([r['tokens'] for r in known], float), np.asarray([r[name] for r in known], float)


def _layers(train, name, numbers):
  """[(label, (tokens, values))]: a curve a layer, or least and most of many."""
  tokens, values = _mean(train, name)
  if values.shape[1] > _MOST_LAYERS:
    return [('least of the layers', (tokens, values.min(axis=1))), ('most', (tokens, values.max(axis=1)))]
  numbers = range(values.shape[1]) if numbers is None else numbers
  return [(f'layer {number}', (tokens, values[:, i])) for i, number in enumerate(numbers)]
