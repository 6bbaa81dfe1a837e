"""One Mixture-of-Experts layer, forward and backward: a case of `benchmark`.

The size is that of the training benchmark: width 256, experts of 1024, two experts a token. Capacity is such that a token
has one slot on average whatever the number of experts, so that the work per token stays the same.
"""

from typing import Any, Dict, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from openmoe_jax.analysis.flops import feed_forward_flops
from openmoe_jax.config import ModelConfig
from openmoe_jax.moe import MoE
from openmoe_jax.routers.groups import group_tokens
from openmoe_jax.tools.bench_timing import MatrixProduct, Timer, compare, program_memory_gb

GROUP = 256  # tokens of a routing group


class Case(NamedTuple):
  """Attributes:
    experts, tokens: of the layer.
    dispatch: back end.
    dtype: of activations.
    emb_dim, mlp_dim: sizes.
  """
  experts: int = 16
  tokens: int = 65536
  dispatch: str = 'sort'
  dtype: str = 'float32'
  emb_dim: int = 256
  mlp_dim: int = 1024


def config_of(case: Case) -> ModelConfig:
  """The layer as a model's settings."""
  capacity = {'capacity_mode': 'none'} if case.dispatch == 'dropless' else {}
  return ModelConfig(vocab_size=8, emb_dim=case.emb_dim, mlp_dim=case.mlp_dim, num_heads=1, head_dim=2, num_layers=1,
                     moe_interval=1, num_experts=case.experts, group_size=GROUP, train_capacity_factor=1.,
                     min_expert_capacity=1, dispatch=case.dispatch, dtype=case.dtype, **capacity)


def flops_of(config: ModelConfig, tokens: int) -> float:
  """Of the products of experts and router, forward and backward; dispatch by products is not counted."""
  grouping = group_tokens(config, tokens // GROUP, GROUP, train=True)
  rows = config.num_selected_experts * tokens
  if config.dispatch != 'dropless':
    rows = min(rows, grouping.num_groups * config.num_experts * grouping.capacity)
  return 3. * (rows * feed_forward_flops(config) + tokens * 2 * config.emb_dim * config.num_experts)


def run(case: Case, product: MatrixProduct, repeats: int) -> Dict[str, Any]:
  """Times a case; the products before and after it count too."""
  config = config_of(case)
  layer, rows = MoE(config), case.tokens // GROUP
  random = np.random.RandomState(0)
  x = jnp.asarray(random.randn(rows, GROUP, case.emb_dim), case.dtype)
  ids = jnp.ones((rows, GROUP), jnp.int32)
  direction = jnp.asarray(random.randn(rows, GROUP, case.emb_dim), jnp.float32)
  params = jax.jit(lambda: layer.init(jax.random.key(0), x[:1], True, ids[:1]))()['params']

  def loss(params, x):
    y, record = layer.apply({'params': params}, x, True, ids)
    return jnp.sum(y * direction) + record.auxiliary_loss

  step = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()
  jax.block_until_ready(step(params, x))
  timer = Timer()
  product()
  for _ in range(repeats):
    timer(step, params, x)
  product()
  found = compare(timer, product, flops_of(config, case.tokens))
  return {**case._asdict(), **found, 'microseconds_per_token': 1e6 * found['seconds'] / case.tokens,
          'cpu_microseconds_per_token': 1e6 * found['cpu_seconds'] / case.tokens,
          'program_memory_gb': program_memory_gb(step)}
