"""Validation: loss, accuracy and perplexity per source, and the unigram entropy of the same targets to compare with.

A model that only knew how frequent each token is would reach a loss equal to the unigram entropy; what it is below that
is what it has learned from context.
"""

from typing import Any, Callable, Dict, List, Mapping, NamedTuple

import jax
import numpy as np

from openmoe_jax import data as data_lib
from openmoe_jax import metrics as metrics_lib
from openmoe_jax.config import RunConfig

Record = Dict[str, Any]
# Of the training metrics, those that say something about a trained model's routing.
_ROUTING = ('fraction_tokens_left_behind', 'expert_usage', 'router_confidence', 'expert_load')


class _Source(NamedTuple):
  batches: List[Mapping[str, np.ndarray]]  # all rows, on every process
  target_counts: np.ndarray


def target_counts(batch: Mapping[str, np.ndarray], vocab_size: int) -> np.ndarray:
  """How often each id is a target that counts: int64 [V]."""
  targets = np.asarray(batch['decoder_target_tokens'])
  weights = np.asarray(batch.get('decoder_loss_weights', targets > 0))
  return np.bincount(targets[weights > 0].reshape(-1), minlength=vocab_size).astype(np.int64)


def entropy(counts: np.ndarray) -> float:
  """Entropy, in nats, of the distribution with these counts."""
  p = counts[counts > 0] / max(counts.sum(), 1)
  return float(-(p * np.log(p)).sum())


class Evaluator:
  """Evaluates parameters on the validation split of every source; batches are read once, when it is made, and kept.

  Args:
    run: `run.data` names the sources and how many batches.
    mesh: devices.
    eval_step: of `train_step.make_eval_step`.

  Raises:
    ConfigError: the validation data cannot be read, or there are none.
  """

  def __init__(self, run: RunConfig, mesh: jax.sharding.Mesh, eval_step: Callable[[Any, Any], Any]):
    self._run = run
    self._mesh = mesh
    self._eval_step = eval_step
    self._sources = {source: self._read(source) for source in data_lib.eval_sources(run.data)}

  @property
  def num_records(self) -> int:
    """How many records a call gives."""
    return len(self._sources) + (len(self._sources) > 1)

  def _read(self, source: str) -> _Source:
    batches = list(data_lib.eval_batches(self._run.data, source))
    return _Source(batches, sum(target_counts(batch, self._run.model.vocab_size) for batch in batches))

  def __call__(self, params: Any) -> Dict[str, Record]:
    """{source: {loss, accuracy, perplexity, unigram_entropy, num_target_tokens, ...}}; loss is cross-entropy in nats
    per target that is not padding, without auxiliary losses. Several sources are also reported together, under the name
    of their mixture, each counting with the tokens that were evaluated of it."""
    sums = {name: self._evaluate(params, source) for name, source in self._sources.items()}
    records = {name: _record(sums[name], source.target_counts) for name, source in self._sources.items()}
    if len(records) > 1:
      together = {name: sum(part[name] for part in sums.values()) for name in next(iter(sums.values()))}
      counts = sum(source.target_counts for source in self._sources.values())
      records[self._run.data.eval_mixture_or_task or self._run.data.mixture_or_task] = _record(together, counts)
    return records

  def _evaluate(self, params: Any, source: _Source) -> Dict[str, np.ndarray]:
    """A source's metrics as sums."""
    total: Dict[str, np.ndarray] = {}
    for batch in source.batches:
      sums = jax.device_get(self._eval_step(params, data_lib.to_global(batch, self._mesh, microbatched=False)))
      for name, value in sums.items():
        total[name] = total.get(name, 0.) + np.asarray(value, np.float64)
    return total


def _record(sums: Mapping[str, np.ndarray], counts: np.ndarray) -> Record:
  means = metrics_lib.to_means(sums)
  loss = float(means['cross_ent_loss'])
  record = {'loss': loss, 'accuracy': float(means['accuracy']), 'perplexity': float(np.exp(min(loss, 700.))),
            'unigram_entropy': entropy(counts), 'num_target_tokens': int(sums[metrics_lib.WEIGHT])}
  record.update({name: np.asarray(means[name]).tolist() for name in _ROUTING if name in means})
  return record
