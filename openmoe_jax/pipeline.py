"""Pipeline parallelism: the blocks in stages, one on each part of the mesh axis `pipe`, microbatches passing through.

GPipe's order (Huang et al. 2019): all stages compute at the same time, each another microbatch; then every stage hands
its result on to the next. Written as one computation over an axis of stages, which the compiler splits over `pipe`, so
that all other axes work within a stage as they do without one; automatic differentiation gives the way back.
"""

from typing import Any, Dict, Mapping, Optional, Tuple

from flax.core.scope import LazyRng
import jax
import jax.numpy as jnp

from openmoe_jax.attention import BlockContext
from openmoe_jax.config import ModelConfig
from openmoe_jax.model import Block, OpenMoE, random_keys
from openmoe_jax.moe import RoutingRecord
from openmoe_jax.partitioning import STACKED, constrain, num_shards

Batch = Mapping[str, jax.Array]


def bubble(stages: int, microbatches: int) -> float:
  """Share of its time in which a stage waits: at the beginning for the first microbatch, at the end for the others."""
  return (stages - 1) / (microbatches + stages - 1)


def features(config: ModelConfig, variables: Mapping[str, Any], batch: Batch, train: bool,
             keys: Optional[jax.Array] = None) -> Tuple[jax.Array, jax.Array, Optional[RoutingRecord]]:
  """What `OpenMoE.features` gives of every microbatch, on a mesh whose axis `pipe` splits the blocks.

  Args:
    variables: of `model.variables`, with stacked blocks.
    batch: arrays [m, B, L].
    keys: [m], of dropout and of what routers draw.

  Returns:
    Hidden [m, B, L, D], output kernel [D, V], RoutingRecord with arrays [m, sparse layers, ..] or None.

  Memory: every stage keeps what the backward pass needs of its blocks for m + stages - 1 microbatches.
  """
  model = OpenMoE(config)
  enter = lambda batch, key: model.apply(variables, batch, train, rngs=random_keys(key), method='enter')
  leave = lambda x, context, key: model.apply(variables, x, context, train, rngs=random_keys(key), method='leave')
  x, context = jax.vmap(enter)(batch, keys)
  x, records = _run_blocks(config, variables, x, context, train, keys)
  hidden, kernel = jax.vmap(leave, out_axes=(0, None))(x, context, keys)
  return hidden, kernel, records


def _run_blocks(config: ModelConfig, variables: Mapping[str, Any], x: jax.Array, context: BlockContext, train: bool,
                keys: Optional[jax.Array]) -> Tuple[jax.Array, Optional[RoutingRecord]]:
  """x [m, B, L, D] and its context through all blocks."""
  stages, microbatches = num_shards('layers'), x.shape[0]
  split = lambda tree, axis=0: jax.tree.map(
      lambda a: a.reshape(*a.shape[:axis], stages, -1, *a.shape[axis + 1:]), tree)
  weights = split((variables['params']['decoder'][STACKED], dict(variables.get('router_state', {}))))
  keys = split(_block_keys(config, keys), axis=1)
  stage = jnp.arange(stages)

  def step(state, time):
    # Where there is no microbatch yet, or none any more, a stage computes some other one, and nobody looks at it.
    number = jnp.clip(time - stage, 0, microbatches - 1)
    state = jnp.where((stage == 0)[:, None, None, None], x[number[0]], jnp.roll(state, 1, axis=0))
    state = constrain(state, 'stage', 'batch', 'length', 'embed')
    of_stage = jax.tree.map(lambda a: a[number], context), jax.tree.map(lambda a: a[number, stage], keys)
    run = lambda *args: _run_stage(config, train, *args)
    return jax.vmap(run, spmd_axis_name='pipe')(state, weights, *of_stage)

  def keep(state, time):
    state, record = step(state, time)
    return state, (state, record)

  empty = constrain(jnp.zeros((stages, *x.shape[1:]), x.dtype), 'stage', 'batch', 'length', 'embed')
  _, (states, records) = jax.lax.scan(keep, empty, jnp.arange(microbatches + stages - 1))
  # A sum, of which all terms but one are zero: the compiler makes one sum over devices of it.
  last = jnp.sum(jnp.where((stage == stages - 1)[:, None, None, None], states[stages - 1:], 0), axis=1)
  at = jnp.arange(microbatches)[:, None] + stage  # when a microbatch was at a stage
  records = jax.tree.map(lambda a: a[at, stage].reshape(microbatches, -1, *a.shape[3:]), records)
  return constrain(last, None, 'batch', 'length', 'embed'), records


def _run_stage(config: ModelConfig, train: bool, x: jax.Array, weights: Any, context: BlockContext,
               keys: Dict[str, jax.Array]) -> Tuple[jax.Array, Optional[RoutingRecord]]:
  """The blocks of one stage on one microbatch; `weights` and `keys` have a leading axis of blocks."""
  def block(x, of_block):
    (params, router_state), keys = of_block
    rngs = {name: LazyRng(key, ('decoder', STACKED)) for name, key in keys.items()}
    (x, _), (record, _) = Block(config).apply({'params': params}, (x, None), context, train, None, router_state, rngs=rngs)
    return x, record

  return jax.lax.scan(block, x, (weights, keys))


def _block_keys(config: ModelConfig, keys: Optional[jax.Array]) -> Dict[str, jax.Array]:
  """The keys that scanned blocks would have, of each kind [m, blocks]: what is drawn does not depend on the mesh."""
  if keys is None:
    return {}
  return jax.vmap(lambda key: {name: jax.random.split(k, config.num_blocks) for name, k in random_keys(key).items()})(keys)
