"""Pictures of a run, made from its metrics.jsonl: loss over tokens, and every expert's load over training.

  python -m openmoe_jax.analysis.plots MODEL_DIR
"""

import io
import sys
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from openmoe_jax import history as history_lib
from openmoe_jax import paths

FILES = ('loss.png', 'expert_load.png', 'routing.png')
_TRAIN = '#9aa5b1'
COLOURS = ('#1f6fb4', '#d1495b', '#2f8f6b', '#b07aa1', '#c98a1b', '#3d5a80', '#8d6e63', '#557a46')
_MOST_TOP = 2.0  # the colour scale of loads ends at 2x and 1/2x the mean, on a logarithmic scale, or beyond if needed


def styled_pyplot():
  """matplotlib's pyplot, drawing to files, with the look that all pictures of this library have."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot
  pyplot.rcParams.update({
      'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True, 'grid.alpha': .25,
      'grid.linewidth': .6, 'figure.dpi': 150, 'savefig.bbox': 'tight', 'axes.titlelocation': 'left',
      'axes.titleweight': 'bold'})
  return pyplot


def write_figure(figure: Any, *files: paths.PathLike) -> List[str]:
  """Writes a figure into files, in the formats that their names end with (else .png, which is added), and closes it;
  returns the paths."""
  files = [file if paths.path(file).suffix else f'{file}.png' for file in files]
  for file in files:
    stream = io.BytesIO()
    figure.savefig(stream, format=str(file).rpartition('.')[2])
    paths.write_bytes(file, stream.getvalue())
  styled_pyplot().close(figure)
  return [str(file) for file in files]


def write_plots(model_dir: paths.PathLike, sparse_layers: Optional[Sequence[int]] = None) -> List[str]:
  """Writes loss.png and, for a sparse model, expert_load.png and routing.png into the run's folder; returns their paths.

  Args:
    sparse_layers: decoder layer of each row of `expert_load`, for the titles.
  """
  from openmoe_jax.analysis.routing_curves import routing_figure
  records = history_lib.read(paths.path(model_dir) / history_lib.FILE)
  folder, written = paths.path(model_dir), []
  figures = loss_figure(records), load_figure(records, sparse_layers), routing_figure(records, sparse_layers)
  for name, figure in zip(FILES, figures):
    if figure is not None:
      written += write_figure(figure, folder / name)
  return written


def tokens_unit(largest: float) -> Tuple[float, str]:
  """(1e6, 'million tokens') for numbers of tokens up to `largest`."""
  for size, unit in ((1e12, 'trillion'), (1e9, 'billion'), (1e6, 'million'), (1e3, 'thousand')):
    if largest >= size:
      return size, f'{unit} tokens'
  return 1., 'tokens'


def smooth(values: np.ndarray, width: int) -> np.ndarray:
  """Mean over `width` neighbours, fewer at the ends."""
  sums = np.concatenate([[0.], np.cumsum(values)])
  index = np.arange(len(values))
  low, high = np.maximum(index - width // 2, 0), np.minimum(index + width // 2 + 1, len(values))
  return (sums[high] - sums[low]) / (high - low)


def _by_source(records: Sequence[Dict[str, Any]]) -> Dict[str, List[Dict[str, Any]]]:
  sources: Dict[str, List[Dict[str, Any]]] = {}
  for record in records:
    if record['kind'] == 'eval':
      sources.setdefault(record['source'], []).append(record)
  return sources


def loss_figure(records: Sequence[Dict[str, Any]]):
  """Cross-entropy over tokens: training, and validation of every source against its unigram entropy; None if empty."""
  train = [r for r in records if r['kind'] == 'train' and 'cross_ent_loss' in r]
  sources = _by_source(records)
  if not train and not sources:
    return None
  scale, unit = tokens_unit(max(r['tokens'] for r in [*train, *sum(sources.values(), [])]))
  pyplot = styled_pyplot()
  figure, axes = pyplot.subplots(figsize=(8.5, 4.8), layout='constrained')
  labels = []  # (y, text, colour) at the right-hand end of each curve
  if train:
    x = np.array([r['tokens'] for r in train]) / scale
    y = np.array([r['cross_ent_loss'] for r in train])
    axes.plot(x, y, color=_TRAIN, linewidth=.8, alpha=.5)
    smoothed = smooth(y, max(len(y) // 25, 1))
    axes.plot(x, smoothed, color='#52606d', linewidth=1.6)
    labels.append((smoothed[-1], f'training  {smoothed[-1]:.2f}', '#52606d'))
  for colour, (source, points) in zip(COLOURS * 8, sorted(sources.items())):
    x, y = [r['tokens'] / scale for r in points], [r['loss'] for r in points]
    axes.plot(x, y, color=colour, linewidth=1.8, marker='o', markersize=3.5)
    labels.append((y[-1], f'{source}  {y[-1]:.2f}', colour))
    entropy = points[-1].get('unigram_entropy')
    if entropy:
      axes.axhline(entropy, color=colour, linewidth=1., linestyle=(0, (4, 3)), alpha=.8)
      labels.append((entropy, f'unigram entropy  {entropy:.2f}', colour))
  axes.set_xlim(0, max(line.get_xdata()[-1] for line in axes.lines if len(line.get_xdata()) and line.get_linestyle() == '-'))
  low, high = axes.get_ylim()
  axes.set_ylim(low, high)
  _label_ends(axes, labels)
  axes.set_title('Loss: training and validation')
  axes.set_xlabel(f'{unit} trained on')
  axes.set_ylabel('cross-entropy (nats per target token)')
  return figure


def _label_ends(axes, labels) -> None:
  """Names curves at their right-hand ends, pushed apart where they would overlap."""
  low, high = axes.get_ylim()
  gap = (high - low) * .05
  labels = sorted(labels)
  heights = []
  for y, _, _ in labels:
    heights.append(max(y, heights[-1] + gap) if heights else y)
  for i in range(len(heights) - 1, -1, -1):  # back down where the pushing went past the top
    limit = high if i == len(heights) - 1 else heights[i + 1] - gap
    heights[i] = min(heights[i], limit)
  for height, (y, text, colour) in zip(heights, labels):
    axes.annotate(text, (1., y), xytext=(1.02, height), xycoords=axes.get_yaxis_transform(),
                  textcoords=axes.get_yaxis_transform(), color=colour, fontsize=9, va='center', annotation_clip=False,
                  arrowprops={'arrowstyle': '-', 'color': colour, 'linewidth': .5, 'alpha': .6, 'shrinkA': 1,
                              'shrinkB': 0})


def load_figure(records: Sequence[Dict[str, Any]], sparse_layers: Optional[Sequence[int]] = None):
  """A heat map a sparse layer: experts down, training across, colour is load / mean load; None for a dense model."""
  train = [r for r in records if r['kind'] == 'train' and 'expert_load' in r]
  if not train:
    return None
  load = np.array([r['expert_load'] for r in train])  # [time, layer, expert]
  tokens = np.array([r['tokens'] for r in train], float)
  scale, unit = tokens_unit(tokens[-1])
  _, layers, experts = load.shape
  names = list(sparse_layers) if sparse_layers is not None else list(range(layers))
  pyplot = styled_pyplot()
  from matplotlib import colors
  height = min(max(experts * .11, 1.1), 3.2)
  figure, axes = pyplot.subplots(layers, 1, figsize=(8.5, layers * (height + .45) + .9), sharex=True, squeeze=False,
                                 layout='constrained')
  most = min(max(_MOST_TOP, float(np.quantile(load, .99)), 1 / max(float(np.quantile(load, .01)), .125)), 8.)
  norm = colors.LogNorm(vmin=1 / most, vmax=most)
  edges = np.concatenate([[0.], tokens]) / scale
  for layer, (axis, name) in enumerate(zip(axes[:, 0], names)):
    mesh = axis.pcolormesh(edges, np.arange(experts + 1) - .5, np.maximum(load[:, layer].T, 1 / most / 4), norm=norm,
                           cmap='RdBu_r', rasterized=True)
    axis.invert_yaxis()
    axis.grid(False)
    axis.set_ylabel('expert')
    axis.set_yticks(np.arange(0, experts, max(1, experts // 8)))
    recent = load[-max(len(load) // 10, 1):, layer].mean(0)
    axis.set_title(f'layer {name}', fontsize=10)
    axis.set_title(f'last tenth: least {recent.min():.2f}, most {recent.max():.2f}', loc='right', fontsize=9,
                   fontweight='normal', color='#52606d')
  axes[-1, 0].set_xlabel(f'{unit} trained on')
  bar = figure.colorbar(mesh, ax=axes[:, 0].tolist(), shrink=min(1., 2.6 / layers + .2), pad=.015, extend='both')
  ticks = [t for t in (.125, .25, .5, 1., 2., 4., 8.) if 1 / most - 1e-9 <= t <= most + 1e-9]
  bar.set_ticks(ticks, labels=[f'{t:g}x' for t in ticks])
  bar.minorticks_off()
  bar.set_label('load / mean load')
  figure.suptitle('Expert load over training: tokens that chose each expert', x=.01, ha='left', fontweight='bold')
  return figure


if __name__ == '__main__':
  print('\n'.join(write_plots(sys.argv[1])))
