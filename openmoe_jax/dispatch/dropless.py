"""Dispatch without capacity: every choice is served, and only filled rows are computed (Gale et al. 2022, MegaBlocks).

Choices are laid out as one array of rows in the order of their experts. TPUs have an instruction for products of such
runs (`jax.lax.ragged_dot`), of which other devices make a product of all rows with all experts; there the runs are cut
into blocks of rows, each multiplied with its expert's kernels. Over the mesh axis `expert` rows travel: see rounds.py.
"""

import functools
from typing import Sequence, Tuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from openmoe_jax.dispatch import rounds, sort
from openmoe_jax.layers import gate
from openmoe_jax.partitioning import BATCH_AXES, is_partitioned, num_shards, pad_rows
from openmoe_jax.routers.slots import queue_positions
from openmoe_jax.routers.types import TokenAssignment

# Of a block: enough that copying an expert's kernels for it costs little beside the products.
MOST_ROWS = {'cpu': 128, 'gpu': 1024}
FEWEST_ROWS = 4


def block_rows(num_tokens: int, num_selected: int, num_experts: int, most: int = MOST_ROWS['cpu']) -> int:
  """Rows of a block: about twice an expert's mean share, as a power of two within limits, but never more than tokens."""
  share = max(2 * num_tokens * num_selected // num_experts, 1)
  return min(num_tokens, most, max(FEWEST_ROWS, 1 << (share - 1).bit_length()))


def apply_experts(x: jax.Array, assignment: TokenAssignment, wi: Sequence[jax.Array], wo: jax.Array,
                  activations: Tuple[str, ...]) -> jax.Array:
  """Sends tokens to their experts, runs these, and adds up the gated results; differentiable.

  Args:
    x: [G, T, D] tokens in the activation dtype.
    assignment: where each token goes; slots are not read. Choices that are not kept cost nothing.
    wi: kernels [E, D, F] or [E, D, 2F], one per activation.
    wo: kernel [E, F, D].
    activations: see `layers.gate`.

  Returns:
    float32 [G, T, D]; zero for a token none of whose choices was kept.

  Memory: rows, results and their gradients, [G * T * S, D] each, and the hidden layer of one block, or of all rows on a
  TPU. Nothing is padded to a worst case, however unequal the experts' shares. On a mesh these are rows of a device's own
  tokens, and there are those that come in one round, `rounds.SLACK` times as many.
  """
  groups, tokens, emb_dim = x.shape
  x = x.reshape(groups * tokens, emb_dim)
  index = jnp.where(assignment.kept, assignment.expert_index, wo.shape[0]).reshape(groups * tokens, -1)
  weight = assignment.gate.reshape(index.shape)
  run = _many_devices if is_partitioned() else _one_device
  return run(x, index, weight, (tuple(wi), wo), tuple(activations)).reshape(groups, tokens, emb_dim)


def _one_device(x, index, weight, kernels, activations):
  run = _feed_forward_runs(activations, *index.shape, kernels[1].shape[0])
  return _through_rows(x, index, weight, kernels[1].shape[0], lambda rows, sizes: run(rows, kernels, sizes))


def _many_devices(x, index, weight, kernels, activations):
  """Experts stay where they are, rows travel; hidden layers are split over the axis `model`."""
  count, num_experts = x.shape[0], kernels[1].shape[0]
  devices = num_shards('expert')
  rows, kernel_in = PartitionSpec(BATCH_AXES), PartitionSpec('expert', None, 'model')

  @functools.partial(jax.shard_map, in_specs=(rows, rows, rows, (kernel_in, PartitionSpec('expert', 'model', None))),
                     out_specs=rows, check_vma=False)
  def local(x, index, weight, kernels):
    run = _feed_forward_runs(activations, *index.shape, num_experts // devices)
    if devices > 1:
      most = rounds.most_rows(*index.shape, num_experts // devices, devices)
      run = functools.partial(rounds.in_rounds, run, most)
    y = _through_rows(x, index, weight, num_experts, lambda rows, sizes: run(rows, kernels, sizes))
    return jax.lax.psum(y, 'model')

  # 'swiglu' kernels hold two halves side by side, so an interval of columns is no interval of both.
  halves = tuple(2 if name == 'swiglu' else 1 for name in activations)
  wi = tuple(_interleave(w, n, num_shards('expert_mlp')) for w, n in zip(kernels[0], halves))
  return local(pad_rows(x), pad_rows(index, num_experts), pad_rows(weight), (wi, kernels[1]))[:count]


def _interleave(kernel: jax.Array, halves: int, parts: int) -> jax.Array:
  """Columns of [E, D, halves * F] so ordered that the p-th of `parts` intervals holds the p-th part of every half."""
  if halves == 1 or parts == 1:
    return kernel
  experts, emb_dim, width = kernel.shape
  kernel = kernel.reshape(experts, emb_dim, halves, parts, width // halves // parts)
  return kernel.swapaxes(2, 3).reshape(experts, emb_dim, width)


def _through_rows(x, index, weight, num_experts, run):
  """x [N, D], index and weight [N, S]; an index of E asks for nobody -> float32 [N, D].

  `run` takes rows [N * S, D] in the order of their experts, and how many each expert has, int32 [E].
  """
  count, selected = index.shape
  sizes = jnp.sum(jax.nn.one_hot(index, num_experts, dtype=jnp.int32), axis=(0, 1))
  first = jnp.cumsum(sizes) - sizes
  kept = index < num_experts
  row = first.at[index].get(mode='fill', fill_value=0) + queue_positions(index[None], num_experts)[0]
  # All rows as the slots of a single expert: moving tokens to rows and back is the same problem as ever.
  rows = TokenAssignment(jnp.zeros_like(index)[None], jnp.where(kept, weight, 0)[None], row[None], kept[None])
  return sort.apply_experts(x[None], rows, lambda slots: run(slots[0, 0], sizes)[None, None], 1, count * selected)[0]


def _feed_forward_runs(activations, num_tokens, num_selected, num_experts):
  """The function (rows, kernels, sizes) -> results of the platform; the numbers are what to expect on one device."""
  size = functools.partial(block_rows, num_tokens, num_selected, num_experts)
  blocks = lambda most: functools.partial(in_blocks, activations, size(most))
  cast = lambda kernels, dtype: (tuple(w.astype(dtype) for w in kernels[0]), kernels[1].astype(dtype))
  ragged = lambda rows, kernels, sizes: with_ragged_dot(activations, rows, cast(kernels, rows.dtype), sizes)
  return functools.partial(jax.lax.platform_dependent, tpu=ragged, cpu=blocks(MOST_ROWS['cpu']),
                           default=blocks(MOST_ROWS['gpu']))


def with_ragged_dot(activations, rows, kernels, sizes):
  """The experts' feed-forward networks on their runs: rows [M, D] sorted by expert, sizes int32 [E] -> [M, D].

  Rows past the last run are nobody's, and what comes out for them has no meaning.
  """
  wi, wo = kernels
  hidden = gate([jax.lax.ragged_dot(rows, w, sizes) for w in wi], activations)
  return jax.lax.ragged_dot(hidden, wo, sizes)


def _feed_forward(activations, rows, kernels):
  """One expert: rows [m, D] -> [m, D]."""
  wi, wo = kernels
  return gate([rows @ w.astype(rows.dtype) for w in wi], activations) @ wo.astype(rows.dtype)


def _blocks(sizes, size):
  """(number of blocks, function from a block's number to (expert, first row, first row of the next expert))."""
  counts = -(-sizes // size)
  ends, last = jnp.cumsum(counts), jnp.cumsum(sizes)

  def block(i):
    expert = jnp.sum(ends <= i)
    return expert, last[expert] - sizes[expert] + (i - ends[expert] + counts[expert]) * size, last[expert]

  return ends[-1], block


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_blocks(activations, size, rows, kernels, sizes):
  """As `with_ragged_dot`, in blocks of `size` rows, with a loop over as many blocks as there are.

  A block may reach into the next expert's run. Blocks are computed in order, so the right rows are written over it.
  """
  count, block = _blocks(sizes, size)
  padded = jnp.pad(rows, ((0, size), (0, 0)))

  def step(i, y):
    expert, start, _ = block(i)
    of_expert = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, expert, keepdims=False), kernels)
    result = _feed_forward(activations, jax.lax.dynamic_slice_in_dim(padded, start, size), of_expert)
    return jax.lax.dynamic_update_slice_in_dim(y, result, start, 0)

  return jax.lax.fori_loop(0, count, step, jnp.zeros_like(padded))[:rows.shape[0]]


def _in_blocks_fwd(activations, size, rows, kernels, sizes):
  return in_blocks(activations, size, rows, kernels, sizes), (rows, kernels, sizes)


def _in_blocks_bwd(activations, size, residuals, dy):
  """Hidden layers are computed again, block by block."""
  rows, kernels, sizes = residuals
  count, block = _blocks(sizes, size)
  padded, dy = (jnp.pad(a, ((0, size), (0, 0))) for a in (rows, dy))

  def step(i, carry):
    dx, dkernels = carry
    expert, start, end = block(i)
    of_expert = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, expert, keepdims=False), kernels)
    own = (start + jnp.arange(size) < end)[:, None]
    _, pull = jax.vjp(functools.partial(_feed_forward, activations), jax.lax.dynamic_slice_in_dim(padded, start, size),
                      of_expert)
    drows, dexpert = pull(jnp.where(own, jax.lax.dynamic_slice_in_dim(dy, start, size), 0))
    return (jax.lax.dynamic_update_slice_in_dim(dx, drows, start, 0),
            jax.tree.map(lambda total, d: total.at[expert].add(d), dkernels, dexpert))

  dx, dkernels = jax.lax.fori_loop(0, count, step, (jnp.zeros_like(padded), jax.tree.map(jnp.zeros_like, kernels)))
  return dx[:rows.shape[0]], dkernels, None


in_blocks.defvjp(_in_blocks_fwd, _in_blocks_bwd)
