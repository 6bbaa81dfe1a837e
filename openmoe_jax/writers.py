"""Where metrics go: TensorBoard, the history file, and (`openmoe_jax.progress`) the terminal. Process 0 writes."""

from typing import Any, Callable, Dict, Mapping

import numpy as np

from openmoe_jax import paths
from openmoe_jax.config import ModelConfig, TrainConfig
from openmoe_jax.history import History

PER_LAYER = '_per_layer'
DEAD_LOAD = 0.1  # an expert that gets less than this share of the mean load counts as dead
# How much TensorBoard shows, from all that there is to what has neither experts nor layers.
DETAILS = {'experts': '', 'layers': 'those of single experts are left out', 'extremes': 'least and most of the sparse '
           'layers stand for each layer', 'means': 'means over sparse layers stand for each layer'}


def sparse_layers(model: ModelConfig) -> list:
  """Indices of the decoder layers that hold experts."""
  return [layer for layer in range(model.num_layers) if model.is_sparse(layer)]


def scalars(metrics: Mapping[str, Any], model: ModelConfig, detail: str = 'experts') -> Dict[str, float]:
  """A metric dictionary as TensorBoard's flat names: per-layer values as NAME/layer_07.

  Expert loads, whose mean is 1, are max, min, cv (standard deviation) and dead_share (of the experts, those with less than
  a tenth of the mean), and every expert's.

  Args:
    detail: one of DETAILS; from 'extremes' on there are no single layers.
  """
  flat: Dict[str, float] = {}
  layers = sparse_layers(model)
  for name, value in metrics.items():
    value = np.asarray(value)
    if name == 'expert_load':
      figures = {'max': value.max(axis=1), 'min': value.min(axis=1), 'cv': value.std(axis=1),
                 'dead_share': (value < DEAD_LOAD).mean(axis=1)}
      if detail in ('extremes', 'means'):
        flat.update({'expert_load/max': figures['max'].max(), 'expert_load/min': figures['min'].min(),
                     'expert_load/cv': figures['cv'].mean(), 'expert_load/dead_share': figures['dead_share'].mean()})
        continue
      for i, layer in enumerate(layers):
        flat.update({f'expert_load/layer_{layer:02d}/{figure}': x[i] for figure, x in figures.items()})
        if detail == 'experts':
          flat.update({f'expert_load/layer_{layer:02d}/expert_{e:02d}': x for e, x in enumerate(value[i])})
    elif name.endswith(PER_LAYER):
      name = name.removesuffix(PER_LAYER)
      if detail == 'extremes':
        flat.update({f'{name}/min': value.min(), f'{name}/max': value.max()})
      elif detail != 'means':
        flat.update({f'{name}/layer_{layer:02d}': x for layer, x in zip(layers, value)})
    elif value.ndim == 0:
      flat[name] = value
  return {name: float(value) for name, value in flat.items()}


def _histograms(metrics: Mapping[str, Any], model: ModelConfig, detail: str) -> Dict[str, np.ndarray]:
  """Distributions of expert loads, one a layer."""
  if 'expert_load' not in metrics or detail not in ('experts', 'layers'):
    return {}
  return {f'expert_load/layer_{layer:02d}': np.asarray(load)
          for layer, load in zip(sparse_layers(model), metrics['expert_load'])}


class Writers:
  """Takes records of training and evaluation to every place they belong.

  Args:
    model_dir: TensorBoard's files go to its folder `tensorboard`, records to metrics.jsonl.
    write: True on the one process that writes.
    tensorboard: needs TensorFlow.
    max_keys: most curves in TensorBoard: half of them for training, the others for `num_sources` of validation together.
      What has neither layers nor experts is always written.
    say: prints a line, once for training and once for validation, if something gives way.
  """

  def __init__(self, model_dir: paths.PathLike, model: ModelConfig, write: bool = True, tensorboard: bool = True,
               max_keys: int = TrainConfig.max_metric_keys, num_sources: int = 1,
               say: Callable[[str], None] = lambda text: None):
    self.history = History(model_dir, write)
    self._model, self._say = model, say
    self._max_keys, self._most = max_keys, {'train': max_keys // 2, 'eval': max_keys // 2 // max(num_sources, 1)}
    self._details: Dict[str, str] = {}  # of training and validation, from their first records on
    self._board = _tensorboard(paths.path(model_dir) / 'tensorboard') if write and tensorboard else None

  def begin(self, step: int) -> None:
    """The run goes on from `step`: records after it are dropped."""
    self.history.begin(step)

  def train(self, step: int, record: Mapping[str, Any]) -> None:
    self.history.append({'kind': 'train', 'step': step, **record})
    if self._board:
      detail = self._detail('train', record)
      flat = scalars(record, self._model, detail)
      self._board.write_scalars(step, {f'train/{name}': value for name, value in flat.items()})
      histograms = _histograms(record, self._model, detail)
      if histograms:
        self._board.write_histograms(step, histograms)

  def _detail(self, kind: str, record: Mapping[str, Any]) -> str:
    """How much of records of 'train' or 'eval' is shown: as much as their share of the keys allows."""
    if kind not in self._details:
      most = self._most[kind]
      count = lambda detail: (len(scalars(record, self._model, detail)) +
                              (len(_histograms(record, self._model, detail)) if kind == 'train' else 0))
      detail = next((d for d in DETAILS if count(d) <= most), 'means')
      self._details[kind] = detail
      if detail != 'experts':
        self._say(f'TensorBoard shows {count(detail)} curves of {"training" if kind == "train" else "each source"} instead '
                  f'of {count("experts")}: {DETAILS[detail]}; TrainConfig.max_metric_keys = {self._max_keys}, and '
                  'metrics.jsonl has everything')
    return self._details[kind]

  def evaluation(self, step: int, source: str, record: Mapping[str, Any]) -> None:
    self.history.append({'kind': 'eval', 'step': step, 'source': source, **record})
    if self._board:
      flat = scalars(record, self._model, self._detail('eval', record))
      self._board.write_scalars(step, {f'eval/{source}/{name}': value for name, value in flat.items()})

  def task(self, step: int, name: str, record: Mapping[str, Any]) -> None:
    """Figures of an evaluation task, which need not have a loss."""
    self.history.append({'kind': 'task', 'step': step, 'task': name, **record})
    if self._board:
      self._board.write_scalars(step, {f'eval/{name}/{figure}': value
                                       for figure, value in scalars(record, self._model).items()})

  def warning(self, step: int, text: str) -> None:
    self.history.append({'kind': 'warning', 'step': step, 'text': text})
    self.text(step, {'warnings': text})

  def text(self, step: int, texts: Mapping[str, str]) -> None:
    if self._board:
      self._board.write_texts(step, dict(texts))

  def flush(self) -> None:
    self.history.flush()
    if self._board:
      self._board.flush()

  def close(self) -> None:
    self.history.flush()
    if self._board:
      self._board.close()


def _tensorboard(directory):
  from openmoe_jax.data import import_tensorflow
  import_tensorflow()  # tells TensorFlow to leave accelerators alone, before anything else uses it
  from clu import metric_writers
  return metric_writers.SummaryWriter(str(directory))
