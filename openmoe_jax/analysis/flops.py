"""Floating-point operations per token, counted as twice the multiply-adds of the matrix products.

Two figures are kept apart:

* useful: what the mathematics of the model asks for. Attention is causal, so a query meets (L + 1) / 2 keys on average;
  an expert slot counts as far as a token can sit in it, so that a token's experts count min(S, slots per token) times.
  This is the model-FLOPs convention of PaLM (Chowdhery et al. 2022, appendix B: a token of training costs 6 N + 12 *
  layers * heads * head_dim * L), written out for experts and a causal mask; like it, it leaves out recomputation,
  norms, softmax and the embedding's look-up. MFU is useful training FLOP/s over the device's peak.
* computed: what this implementation executes: the key blocks that attention really multiplies, empty expert slots,
  dispatch by one-hot products if `dispatch` is 'einsum', and what the backward pass computes again.

The backward pass of y = x W is two products of the same size (for x and for W), hence training = 3 * forward.
"""

from typing import Dict, Optional

from openmoe_jax import splash
from openmoe_jax.config import ModelConfig
from openmoe_jax.layers import hidden_widths
from openmoe_jax.routers.groups import expert_capacity, group_tokens


def feed_forward_flops(config: ModelConfig) -> int:
  """One feed-forward network on one token: 2 * D * (widths of wi_0, wi_1 and wo)."""
  return 2 * config.emb_dim * (sum(hidden_widths(config)) + config.mlp_dim)


def slots_per_token(config: ModelConfig, length: int, rows: Optional[int] = None, train: bool = True) -> float:
  """Expert slots of one sparse layer per token, empty ones included: E * C / T.

  Args:
    rows: rows of a microbatch, which decide on the groups; None assumes groups of `group_size`.
  """
  if not config.num_experts:
    return 0.
  if rows is None:
    return config.num_experts * expert_capacity(config, config.group_size, train) / config.group_size
  grouping = group_tokens(config, rows, length, train)
  return grouping.num_groups * config.num_experts * grouping.capacity / (rows * length)


def forward_flops_per_token(config: ModelConfig, length: int, rows: Optional[int] = None, train: bool = True
                            ) -> Dict[str, float]:
  """Useful FLOPs of one token's forward pass, by part.

  Args:
    length: tokens of a row.
    rows: as in `slots_per_token`.
    train: capacity of training, or of evaluation.
  """
  slots = slots_per_token(config, length, rows, train)
  if config.router != 'expert_choice':  # whose experts are always full
    slots = min(config.num_selected_experts, slots)
  return _forward(config, keys=(length + 1) / 2, slots=slots)


def computed_forward_flops_per_token(config: ModelConfig, length: int, rows: Optional[int] = None, train: bool = True
                                     ) -> Dict[str, float]:
  """What is executed for one token's forward pass, by part, with 'dispatch' where it is done by products.

  Attention in b blocks of queries computes (b + 1) / 2b of the square. What padded queries get
  (`attention._blind_attention`) costs as much as head_dim more keys.
  """
  keys = computed_keys(config, length) + config.head_dim
  parts = _forward(config, keys, slots_per_token(config, length, rows, train))
  if config.num_experts and config.dispatch == 'einsum':
    parts['dispatch'] = 2 * _one_hot_product(config, length, rows, train)
  return parts


def computed_keys(config: ModelConfig, length: int) -> float:
  """Keys that a query is multiplied with on average; blocks of queries see the keys up to their end.

  With attention = 'splash' as on the devices that run the kernel.
  """
  if config.attention == 'splash' and splash.usable(length):
    return splash.computed_keys(length)
  blocks = 1 if config.inputs_bidirectional_attention else min(config.attention_query_blocks, length)
  return length * (blocks + 1) / (2 * blocks)


def _forward(config: ModelConfig, keys: float, slots: float) -> Dict[str, float]:
  layers, sparse = config.num_layers, config.num_sparse_layers
  width = config.num_heads * config.head_dim
  dense = layers - sparse
  parts = {
      'attention projections': layers * 4 * 2 * config.emb_dim * width,
      'attention scores': layers * 2 * 2 * keys * width,
      'feed-forward': dense * feed_forward_flops(config),
      'extra feed-forward': sparse * feed_forward_flops(config) if config.extra_mlp else 0,
      'shared experts': sparse * config.num_shared_experts * feed_forward_flops(config),
      'experts': sparse * slots * feed_forward_flops(config),
      'router': sparse * 2 * config.emb_dim * sum(config.router_kernels.values()),
      'output matrix': 2 * config.emb_dim * config.vocab_size,
  }
  return {part: float(flops) for part, flops in parts.items() if flops}


def _one_hot_product(config: ModelConfig, length: int, rows: Optional[int], train: bool) -> float:
  """FLOPs a token of one product with the [T, E, C] one-hot array, over all sparse layers: 2 * E * C * D each."""
  if rows is None:
    capacity = expert_capacity(config, config.group_size, train)
  else:
    capacity = group_tokens(config, rows, length, train).capacity
  return 2. * config.num_sparse_layers * config.num_experts * capacity * config.emb_dim


def train_flops_per_token(config: ModelConfig, length: int, rows: Optional[int] = None) -> float:
  """Useful FLOPs of one token's forward and backward pass: the figure behind MFU."""
  return 3 * sum(forward_flops_per_token(config, length, rows).values())


def dispatch_flops_per_token(config: ModelConfig, length: int, rows: Optional[int] = None) -> float:
  """FLOPs a token of training that dispatch and combine by one-hot products cost (`dispatch` = 'einsum'; else 0).

  Forward two products; backward three: for the dispatched tokens, the experts' outputs and the gates (the one-hot array
  of the dispatch itself is not differentiated).
  """
  if not config.num_experts or config.dispatch != 'einsum':
    return 0.
  return 5 * _one_hot_product(config, length, rows, True)


def computed_train_flops_per_token(config: ModelConfig, length: int, rows: Optional[int] = None) -> float:
  """What is executed for one token's forward and backward pass, recomputation and dispatch included.

  Attention always multiplies queries and keys again in the backward pass; the values of `_blind_attention` have a
  constant factor that needs no gradient. The loss computes its gradient while it has the logits: nothing is repeated.
  """
  parts = computed_forward_flops_per_token(config, length, rows)
  parts.pop('dispatch', None)
  key = 2 * config.num_layers * config.num_heads * config.head_dim  # one product of every query with one key
  attention = key * (computed_keys(config, length) - config.head_dim)
  return 3 * sum(parts.values()) + attention + recomputed_flops_per_token(config, length, rows) + (
      dispatch_flops_per_token(config, length, rows))


def recomputed_flops_per_token(config: ModelConfig, length: int, rows: Optional[int]) -> float:
  """FLOPs a token of what `remat` computes again in the backward pass.

  'full' runs every layer again but for its last product, whose result only goes into a sum; 'minimal' keeps the results
  of attention and dense feed-forward networks and so saves their last products; 'dots' repeats only products with a
  batch dimension (attention scores, experts, dispatch); 'offload' as 'minimal'.
  """
  if config.remat == 'none':
    return 0.
  parts = computed_forward_flops_per_token(config, length, rows)
  if config.remat == 'dots':
    return sum(parts.get(name, 0.) for name in ('attention scores', 'experts', 'dispatch'))
  last = 2 * config.emb_dim * config.mlp_dim  # wo of one feed-forward network
  networks = config.num_layers if config.extra_mlp else config.num_layers - config.num_sparse_layers
  again = sum(flops for name, flops in parts.items() if name != 'output matrix') - networks * last
  if config.remat in ('minimal', 'offload'):
    again -= config.num_layers * 2 * config.num_heads * config.head_dim * config.emb_dim
  return again
