"""Metrics of a batch as sums, so that microbatches, hosts and evaluation batches add up, and their means (SPEC 2.10, 3).

A metric dictionary in sums holds `num_target_tokens` and everything else multiplied by it; `to_means` divides. The counts of
`routers.online` add up as they are, and become shares when all is added up (`with_shares`).
"""

from typing import Dict, Optional

import jax
import jax.numpy as jnp

from openmoe_jax.config import ModelConfig
from openmoe_jax.losses import LossSums
from openmoe_jax.moe import RoutingRecord
from openmoe_jax.routers import online

Metrics = Dict[str, jax.Array]

# Averaged over sparse layers; each is reported per layer as well, under the name with this ending.
ROUTING_SCALARS = ('auxiliary_loss', 'router_z_loss', 'fraction_tokens_left_behind', 'expert_usage',
                   'router_confidence')
PER_LAYER = '_per_layer'
WEIGHT = 'num_target_tokens'
COUNTS = 'routing_counts'
_ADDITIVE = (WEIGHT, COUNTS)


def batch_means(sums: LossSums, num_target_tokens: jax.Array, total_loss: jax.Array,
                record: Optional[RoutingRecord]) -> Metrics:
  """Metrics of one microbatch, as means.

  `loss` is the total; `cross_ent_loss` and `z_loss` are per weighted target token; `auxiliary_loss` and `router_z_loss`
  are unscaled means over sparse layers. `expert_load` is [sparse layers, E], mean 1. `routing_counts` are sums, [sparse
  layers, names, 2], see `routers.online`.
  """
  weight = jnp.maximum(num_target_tokens, 1e-8)
  metrics = {'loss': total_loss, 'cross_ent_loss': sums.cross_entropy / weight, 'z_loss': sums.z_loss / weight,
             'accuracy': sums.correct / weight, WEIGHT: num_target_tokens}
  if record is not None:
    for name in ROUTING_SCALARS:
      per_layer = getattr(record, name)
      metrics[name] = jnp.mean(per_layer)
      metrics[name + PER_LAYER] = per_layer
    metrics['expert_load'] = record.expert_load
    metrics[COUNTS] = record.counts
  return metrics


def mean_record(records: RoutingRecord, shares: jax.Array) -> RoutingRecord:
  """The record of a batch from those of its microbatches, arrays [m, ..], each of which counts as its share [m] of the
  target tokens; counts are sums."""
  means = jax.tree.map(lambda x: jnp.tensordot(shares, x, 1), records._replace(counts=None))
  return means._replace(counts=jnp.sum(records.counts, 0))


def to_sums(means: Metrics) -> Metrics:
  """Multiplies every metric by the number of target tokens, which makes it additive."""
  return {name: x if name in _ADDITIVE else x * means[WEIGHT] for name, x in means.items()}


def to_means(sums: Metrics) -> Metrics:
  """The inverse of `to_sums`, for added-up sums too: means weighted by target tokens (SPEC 15.2)."""
  weight = jnp.maximum(sums[WEIGHT], 1e-8)
  return {name: x if name in _ADDITIVE else x / weight for name, x in sums.items()}


def with_shares(config: ModelConfig, metrics: Metrics, wanted: bool = True) -> Metrics:
  """Metrics of a whole step, in which shares take the place of the counts: of each of `routers.online.names` the mean over
  sparse layers, and every layer's. Not `wanted`, they are left out, and the compiler leaves out what they are made of."""
  metrics = dict(metrics)
  counts = metrics.pop(COUNTS, None)
  if counts is None or not wanted:
    return metrics
  shares = counts[..., 0] / jnp.maximum(counts[..., 1], 1)
  for i, name in enumerate(online.names(config)):
    metrics[name] = jnp.mean(shares[:, i])
    metrics[name + PER_LAYER] = shares[:, i]
  return metrics
