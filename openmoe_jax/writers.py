"""Where metrics go: TensorBoard, the history file, and (`openmoe_jax.progress`) the terminal. Process 0 writes."""

from typing import Any, Dict, Mapping

import numpy as np

from openmoe_jax import paths
from openmoe_jax.config import ModelConfig
from openmoe_jax.history import History

PER_LAYER = '_per_layer'
DEAD_LOAD = 0.1  # an expert that gets less than this share of the mean load counts as dead
# Written for every single expert up to this many; beyond, only each layer's extremes and distribution.
MOST_EXPERT_CURVES = 64


def sparse_layers(model: ModelConfig) -> list:
  """Indices of the decoder layers that hold experts."""
  return [layer for layer in range(model.num_layers) if model.is_sparse(layer)]


def scalars(metrics: Mapping[str, Any], model: ModelConfig) -> Dict[str, float]:
  """A metric dictionary as TensorBoard's flat names: per-layer values as NAME/layer_07, expert loads as extremes."""
  flat: Dict[str, float] = {}
  layers = sparse_layers(model)
  for name, value in metrics.items():
    value = np.asarray(value)
    if name == 'expert_load':
      for layer, load in zip(layers, value):
        prefix = f'expert_load/layer_{layer:02d}'
        flat.update({f'{prefix}/max': load.max(), f'{prefix}/min': load.min(),
                     f'{prefix}/dead': (load < DEAD_LOAD).sum()})
        if value.size <= MOST_EXPERT_CURVES:
          flat.update({f'{prefix}/expert_{e:02d}': x for e, x in enumerate(load)})
    elif name.endswith(PER_LAYER):
      flat.update({f'{name.removesuffix(PER_LAYER)}/layer_{layer:02d}': x for layer, x in zip(layers, value)})
    elif value.ndim == 0:
      flat[name] = value
  return {name: float(value) for name, value in flat.items()}


class Writers:
  """Takes records of training and evaluation to every place they belong.

  Args:
    model_dir: TensorBoard's files go to its folder `tensorboard`, records to metrics.jsonl.
    write: True on the one process that writes.
    tensorboard: needs TensorFlow.
  """

  def __init__(self, model_dir: paths.PathLike, model: ModelConfig, write: bool = True, tensorboard: bool = True):
    self.history = History(model_dir, write)
    self._model = model
    self._board = _tensorboard(paths.path(model_dir) / 'tensorboard') if write and tensorboard else None

  def begin(self, step: int) -> None:
    """The run goes on from `step`: records after it are dropped."""
    self.history.begin(step)

  def train(self, step: int, record: Mapping[str, Any]) -> None:
    self.history.append({'kind': 'train', 'step': step, **record})
    if self._board:
      self._board.write_scalars(step, {f'train/{name}': value for name, value in scalars(record, self._model).items()})
      if 'expert_load' in record:
        self._board.write_histograms(step, {
            f'expert_load/layer_{layer:02d}': np.asarray(load)
            for layer, load in zip(sparse_layers(self._model), record['expert_load'])})

  def evaluation(self, step: int, source: str, record: Mapping[str, Any]) -> None:
    self.history.append({'kind': 'eval', 'step': step, 'source': source, **record})
    if self._board:
      self._board.write_scalars(step, {f'eval/{source}/{name}': value
                                       for name, value in scalars(record, self._model).items()})

  def task(self, step: int, name: str, record: Mapping[str, Any]) -> None:
    """Figures of an evaluation task, which need not have a loss."""
    self.history.append({'kind': 'task', 'step': step, 'task': name, **record})
    if self._board:
      self._board.write_scalars(step, {f'eval/{name}/{figure}': value
                                       for figure, value in scalars(record, self._model).items()})

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
