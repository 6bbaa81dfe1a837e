"""One Mixture-of-Experts layer, forward and backward: a case of `benchmark`.

All tokens are one routing group, and an expert has as many slots as there are tokens divided by experts: one slot a token on
average whatever the number of experts, so that the experts' work per token stays the same.
"""

from typing import Any, Dict, Iterator, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from openmoe_jax.analysis.flops import feed_forward_flops
from openmoe_jax.config import ModelConfig
from openmoe_jax.moe import MoE
from openmoe_jax.tools.bench_timing import MatrixProduct, compare, program_memory_gb, timed

ROW = 256  # tokens of a row; the number of tokens is a multiple of it
_MOST_ONE_HOT = 2**30  # numbers in the [T, E, C] array of 'einsum', beyond which its cases are left out


class Case(NamedTuple):
  """Attributes:
    experts, tokens: of the layer.
    dispatch: back end.
    dtype: of activations.
    emb_dim, mlp_dim: sizes.
  """
  experts: int = 16
  tokens: int = 4096
  dispatch: str = 'sort'
  dtype: str = 'float32'
  emb_dim: int = 256
  mlp_dim: int = 1024


def over_experts(backends: Sequence[str], experts: Sequence[int], tokens_per_expert: int, **more: Any) -> Iterator[Case]:
  """Cases with as many tokens an expert; of 'einsum' those whose [T, E, C] array can be afforded.

  Args:
    **more: other fields of the cases.
  """
  for backend in backends:
    for number in experts:
      tokens = number * tokens_per_expert
      if backend != 'einsum' or tokens ** 2 <= _MOST_ONE_HOT:  # E * C slots are as many as tokens
        yield Case(number, tokens, backend, **more)


def config_of(case: Case) -> ModelConfig:
  """The layer as a model's settings: two experts a token."""
  capacity = {'capacity_mode': 'none'} if case.dispatch == 'dropless' else {
      'capacity_mode': 'colossalai', 'train_capacity_factor': .5}  # 2 choices * 0.5 * tokens / experts
  return ModelConfig(vocab_size=8, emb_dim=case.emb_dim, mlp_dim=case.mlp_dim, num_heads=1, head_dim=2, num_layers=1,
                     moe_interval=1, num_experts=case.experts, dispatch=case.dispatch, dtype=case.dtype, **capacity)


def flops_of(case: Case) -> float:
  """Of the products of experts and router, forward and backward; dispatch by products is not counted."""
  config, rows = config_of(case), case.tokens * (2 if case.dispatch == 'dropless' else 1)
  return 3. * (rows * feed_forward_flops(config) + case.tokens * 2 * case.emb_dim * case.experts)


def make_step(case: Case) -> Any:
  """The jitted gradient with respect to parameters and input [B, L, D], as a function of (parameters, input, direction)."""
  layer, ids = MoE(config_of(case)), jnp.ones((case.tokens // ROW, ROW), jnp.int32)

  def loss(params, x, direction):
    y, record = layer.apply({'params': params}, x, True, ids)
    return jnp.sum(y * direction) + record.auxiliary_loss

  return jax.jit(jax.grad(loss, argnums=(0, 1)))


def init(case: Case, x: jax.Array) -> Any:
  """The layer's parameters for an input [B, L, D]."""
  return MoE(config_of(case)).init(jax.random.key(0), x, True, jnp.ones(x.shape[:2], jnp.int32))['params']


def run(case: Case, product: MatrixProduct, repeats: int, profiler: Any = None) -> Dict[str, Any]:
  """Times a case; the products before and after it count too."""
  shape, random = (case.tokens // ROW, ROW, case.emb_dim), np.random.RandomState(0)
  x = jnp.asarray(random.randn(*shape), case.dtype)
  direction = jnp.asarray(random.randn(*shape), jnp.float32)
  params = jax.jit(lambda x: init(case, x))(x[:1])
  step = make_step(case).lower(params, x, direction).compile()
  timer = timed(step, (params, x, direction), product, repeats, profiler)
  found = compare(timer, product, flops_of(case))
  return {**case._asdict(), **found, 'microseconds_per_token': 1e6 * found['seconds'] / case.tokens,
          'cpu_microseconds_per_token': 1e6 * found['cpu_seconds'] / case.tokens,
          'program_memory_gb': program_memory_gb(step)}
