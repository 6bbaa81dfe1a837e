"""Attention by a TPU kernel that never writes the scores (splash attention, of JAX's Pallas kernels).

The kernel scales nothing, and so does OpenMoE: the usual 1/sqrt(head_dim) is in the query's initial values (SPEC 1.6).
"""

import functools

import jax
from jax.sharding import PartitionSpec
import jax.numpy as jnp

from openmoe_jax.config import require
from openmoe_jax.partitioning import BATCH_AXES, is_partitioned, num_shards

BLOCK = 512  # queries and keys that are multiplied at a time
LANES = 128  # a block is a multiple of it


def usable(length: int) -> bool:
  """Whether rows of this length can be cut into blocks."""
  return length % LANES == 0


def runs_on(device_kind: str) -> bool:
  """Whether such devices have what the kernel needs: matrix units before TPU v4 do not take its bfloat16 operands."""
  return device_kind.startswith('TPU') and device_kind not in ('TPU v2', 'TPU v3')


def block_size(length: int) -> int:
  """The largest block that divides a row whose length is `usable`."""
  return max(size for size in range(LANES, min(BLOCK, length) + 1, LANES) if length % size == 0)


def computed_keys(length: int) -> float:
  """Keys that a query is multiplied with on average: blocks up to the one on the diagonal."""
  return (length + block_size(length)) / 2


def attention(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, interpret: bool = False) -> jax.Array:
  """Causal softmax attention, unscaled: [B, L, H, K] each -> [B, L, H, K].

  Args:
    ids: int32 [B, L]; positions with the same number see each other.
    interpret: run the kernel step by step on any device.
  """
  local = functools.partial(_local, interpret=interpret)
  if not is_partitioned():
    return local(q, k, v, ids)
  batch, heads = num_shards('batch'), jax.sharding.get_abstract_mesh().shape['model']
  require(q.shape[0] % batch == 0 and q.shape[2] % heads == 0, "ModelConfig.attention = 'splash' needs rows to divide "
          f'over MeshConfig data x expert and heads over model: {q.shape[0]} over {batch}, {q.shape[2]} over {heads}')
  spec = PartitionSpec(BATCH_AXES, None, 'model')
  return jax.shard_map(local, in_specs=(spec, spec, spec, PartitionSpec(BATCH_AXES)), out_specs=spec, check_vma=False)(
      q, k, v, ids)


def _local(q, k, v, ids, interpret):
  from jax.experimental.pallas.ops.tpu import splash_attention  # takes a second, and few need it
  length, heads = q.shape[1:3]
  size = block_size(length)
  sizes = splash_attention.BlockSizes(
      block_q=size, block_kv=size, block_kv_compute=size, block_q_dkv=size, block_kv_dkv=size,
      block_kv_dkv_compute=size, use_fused_bwd_kernel=True)
  mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * heads)
  kernel = splash_attention.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
  run = lambda q, k, v, ids: kernel(q, k, v, splash_attention.SegmentIds(ids, ids))
  out = jax.vmap(run)(*(x.swapaxes(1, 2) for x in (q, k, v)), ids)
  return out.swapaxes(1, 2).astype(q.dtype)


def ids_of(is_target: jax.Array, segment_ids) -> jax.Array:
  """0 where a position's target is padding, which sees nothing but its like; elsewhere its segment, from 1 on."""
  segments = 0 if segment_ids is None else jnp.maximum(segment_ids, 0)
  return jnp.where(is_target, 1 + segments, 0).astype(jnp.int32)
