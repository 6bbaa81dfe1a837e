"""The Mixture-of-Experts layer: group, route, dispatch, run the experts, combine (SPEC 2)."""

from typing import Dict, NamedTuple, Optional, Tuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from openmoe_jax import routers
from openmoe_jax.config import ModelConfig
from openmoe_jax.dispatch import apply_experts, dropless
from openmoe_jax.layers import Dropout, GatedMLP, Kernel, gate, hidden_widths, linear, normal_init
from openmoe_jax.partitioning import constrain
from openmoe_jax.routers import online, switch
from openmoe_jax.routers.groups import group_tokens
from openmoe_jax.routers.types import RouterContext, SlotAssignment, TokenAssignment, tokens_from_slots


class RoutingRecord(NamedTuple):
  """What one sparse layer reports; with scanned blocks every array has a leading axis of sparse layers.

  The first six are `RouterOutput`'s, `counts` are those of `routers.online`. `assignment` and `router_logits` (float32 [G, T, E]) are None unless asked for, and
  the latter of routers that have none. Where experts choose, S is E, and what is not kept does not exist.
  """
  auxiliary_loss: jax.Array
  router_z_loss: jax.Array
  fraction_tokens_left_behind: jax.Array
  expert_usage: jax.Array
  router_confidence: jax.Array
  expert_load: jax.Array
  counts: jax.Array
  assignment: Optional[TokenAssignment] = None
  router_logits: Optional[jax.Array] = None


class RouterWeights(nn.Module):
  """Holds one of the router's kernels [D, width] under its T5X name."""
  shape: Tuple[int, int]

  @nn.compact
  def __call__(self) -> jax.Array:
    return Kernel(self.shape, nn.initializers.normal(0.02), name='w')()


class Router(nn.Module):
  """Router logits in float32: [G, T, D] -> [G, T, E], and the product with the second kernel of routers that have one.

  Both are None of routers without a kernel.
  `key` is that of the jitter, where there is one.
  """
  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array, key: Optional[jax.Array] = None) -> Tuple[jax.Array, Optional[jax.Array]]:
    x = x.astype(jnp.float32)
    if key is not None and self.config.router_jitter:
      x = switch.jitter(x, self.config.router_jitter, key)
    # Accelerators would round the factors to 10 or 7 bits by default; next to nothing is saved, and decisions flip.
    logits = [linear(x, RouterWeights((x.shape[-1], width), name=name)(), 'highest')
              for name, width in self.config.router_kernels.items()]
    return tuple(logits + [None, None])[:2]


class Experts(nn.Module):
  """E feed-forward networks side by side: [E, G, C, D] -> [E, G, C, D].

  With an `assignment` x is [G, T, D] and is sent to the experts and back without any capacity: float32 [G, T, D].
  """
  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array, train: bool, assignment: Optional[TokenAssignment] = None) -> jax.Array:
    config = self.config
    experts, emb_dim, mlp_dim = config.num_experts, config.emb_dim, config.mlp_dim
    init = normal_init(config.init_scale, emb_dim)
    dtype = x.dtype if assignment is None else None  # without capacity kernels are cast where a block of rows needs them
    wi = [Kernel((experts, emb_dim, width), init, name=f'wi_{i}')(dtype)
          for i, width in enumerate(hidden_widths(config))]
    wo = Kernel((experts, mlp_dim, emb_dim), normal_init(config.init_scale, mlp_dim), name='wo')(dtype)
    if assignment is not None:
      return dropless.apply_experts(x, assignment, wi, wo, config.mlp_activations)
    _, groups, capacity, _ = x.shape
    x = constrain(x, 'expert', 'expert_group', 'capacity', 'embed').reshape(experts, groups * capacity, emb_dim)
    hidden = [jnp.einsum('end,edf->enf', x, kernel) for kernel in wi]
    h = Dropout(config.dropout_rate)(gate(hidden, config.mlp_activations), train)
    y = jnp.einsum('enf,efd->end', h, wo).reshape(experts, groups, capacity, emb_dim)
    return constrain(y, 'expert', 'expert_group', 'capacity', 'embed')


class MoE(nn.Module):
  """Sparse feed-forward layer.

  x [B, L, D] in the activation dtype -> (float32 [B, L, D], RoutingRecord). A masked position is a zero vector: it is
  routed (unless `ignore_padding_tokens`) and comes back as zero. `token_ids` int32 [B, L] are those of x, `state` the
  layer's arrays of the router state.
  """
  config: ModelConfig
  record_routing: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool, token_ids: jax.Array, state: Optional[Dict[str, jax.Array]] = None
               ) -> Tuple[jax.Array, RoutingRecord]:
    config, inputs = self.config, x
    batch, length, emb_dim = x.shape
    grouping = group_tokens(config, batch, length, train)
    padding = ((0, grouping.batch - batch), (0, grouping.length - length))
    x = jnp.pad(x, (*padding, (0, 0)))
    x = constrain(x.reshape(grouping.num_groups, grouping.group_size, emb_dim), 'group', None, 'embed')
    token_ids = jnp.pad(token_ids, padding).reshape(x.shape[:2])
    jitter_key, key = jax.random.split(self.make_rng('router')) if train and config.router_draws else (None, None)
    logits, more_logits = Router(config, name='router')(x, jitter_key)
    is_token = jnp.any(x != 0, axis=-1)
    routed = routers.route(config, logits, is_token, grouping.capacity,
                           RouterContext(token_ids, more_logits, state, key))
    experts = Experts(config, name='expert')
    if config.dispatch == 'dropless':
      y = experts(x, train, routed.assignment)
    else:
      y = apply_experts(config.dispatch, x, routed.assignment, lambda slots: experts(slots, train),
                        config.num_experts, grouping.capacity)
    y = constrain(y, 'group', None, 'embed').reshape(grouping.batch, grouping.length, emb_dim)
    counts = online.counts(config, routed.assignment, logits, is_token, grouping, length)
    record = RoutingRecord(*routed[1:], counts)
    if self.record_routing:
      assignment = routed.assignment
      if isinstance(assignment, SlotAssignment):
        assignment = tokens_from_slots(assignment, grouping.group_size, config.num_experts)
      record = record._replace(assignment=assignment, router_logits=logits)
    y = constrain(y[:batch, :length], 'batch', 'length', 'embed')
    if config.num_shared_experts:  # DeepSeekMoE (Dai et al. 2024)
      wide = config.replace(mlp_dim=config.num_shared_experts * config.mlp_dim)
      y += GatedMLP(wide, name='shared_experts')(inputs, train).astype(y.dtype)
    return y, record
