"""Memory of a training step, worked out from shapes: per device of a mesh, nothing allocated.

Parameters, optimizer state and gradients are exact. Activations are an estimate of what the backward pass keeps; what
the compiler fuses, reuses or overlaps can move it by a third either way.
"""

import functools
import math
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

import jax
import jax.numpy as jnp

from openmoe_jax import optimizers, partitioning
from openmoe_jax.analysis.flops import slots_per_token
from openmoe_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, require
from openmoe_jax.layers import hidden_widths
from openmoe_jax.train_state import TrainState, abstract_train_state


class ArrayPlan(NamedTuple):
  """Where one array lies.

  Attributes:
    name: its path in the train state, joined by '/'.
    shape, dtype: of the whole array.
    spec: mesh axis of each dimension, None where it is not split.
    bytes, device_bytes: of the whole array, and of the part that one device holds.
  """
  name: str
  shape: Tuple[int, ...]
  dtype: str
  spec: Tuple[Any, ...]
  bytes: int
  device_bytes: int


def mesh_shape(mesh: MeshConfig, num_devices: int = 0) -> Dict[str, int]:
  """Sizes of the mesh axes; data = -1 takes what `num_devices` leaves (0: no more devices than are needed).

  Raises:
    ConfigError: the axes do not multiply to `num_devices`.
  """
  rest = mesh.pipe * mesh.expert * mesh.model
  data = mesh.data if mesh.data > 0 else max(num_devices // rest, 1)
  require(not num_devices or data * rest == num_devices, f'{num_devices} devices are not MeshConfig data x expert x '
          f'model x pipe = {data} x {mesh.expert} x {mesh.model} x {mesh.pipe}')
  return {'pipe': mesh.pipe, 'data': data, 'expert': mesh.expert, 'model': mesh.model}


def state_plan(run: RunConfig, mesh: Mapping[str, int]) -> Tuple[List[ArrayPlan], List[ArrayPlan], List[ArrayPlan]]:
  """Plans of the arrays of parameters, optimizer state and gradients, as the training step holds them."""
  state = _abstract_state(run.model, run.optimizer, run.train.train_steps)
  axes = partitioning.params_axes(state.params)
  return (_plans(state.params, axes, mesh, run.mesh.fsdp),
          _plans(state.opt_state, optimizers.state_axes(state.opt_state, state.params), mesh, run.mesh.optimizer_fsdp),
          _plans(state.params, axes, mesh, run.mesh.optimizer_fsdp))


@functools.cache  # a sweep asks for every mesh
def _abstract_state(model: ModelConfig, optimizer: OptimizerConfig, train_steps: int) -> TrainState:
  return abstract_train_state(model, optimizers.make_optimizer(optimizer, train_steps))


def _plans(tree: Any, axes: Any, mesh: Mapping[str, int], fsdp: Sequence[str]) -> List[ArrayPlan]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  names = jax.tree.leaves(axes, is_leaf=partitioning.is_axes)
  plans = []
  for (path, leaf), logical in zip(leaves, names, strict=True):
    spec = tuple(partitioning.mesh_axes(logical, fsdp))
    itemsize = jnp.dtype(leaf.dtype).itemsize
    plans.append(ArrayPlan('/'.join(partitioning.key_names(path)), tuple(leaf.shape), str(leaf.dtype), spec,
                           math.prod(leaf.shape) * itemsize, _device_size(leaf.shape, spec, mesh) * itemsize))
  return plans


def _device_size(shape: Sequence[int], spec: Sequence[Any], mesh: Mapping[str, int]) -> int:
  size = 1
  for dim, axes in zip(shape, spec, strict=True):
    names = (axes,) if isinstance(axes, str) else tuple(axes or ())
    size *= -(-dim // math.prod(mesh[name] for name in names))
  return size


def layer_activation_bytes(config: ModelConfig, length: int, rows: int, sparse: bool, model_axis: int = 1) -> float:
  """Bytes a token that one layer's backward pass reads, if nothing is computed again.

  Counted: the residual stream before each sub-layer and its normalised form in float32 and in the activation dtype; q,
  k, v, their blocks, and the result of attention (scores are computed again); each feed-forward network's hidden
  arrays; of experts the same for every slot. Arrays split over the mesh axis `model` count for their share. Compiled
  for a CPU, a dense layer takes within a tenth of this (tests/analysis_test.py).
  """
  act, residual = jnp.dtype(config.dtype).itemsize, jnp.dtype(config.residual_dtype).itemsize
  blocks = _query_blocks(config, length)
  emb = config.emb_dim
  hidden = sum(hidden_widths(config)) + config.mlp_dim
  norm = emb * (residual + act + 4)
  copies = 4 + (blocks if blocks > 1 else 0)  # q in blocks, and k and v up to the end of every block but the last
  attention = act * copies * config.num_heads * config.head_dim / model_axis
  feed_forward = act * hidden / model_axis
  if not sparse:
    return 2 * norm + attention + feed_forward
  slots = slots_per_token(config, length, rows)
  experts = slots * act * (hidden / model_axis + 2 * emb) + 4 * 3 * config.num_experts
  networks = config.extra_mlp + config.num_shared_experts
  norms = 1 if config.parallel_attention else 2 + config.extra_mlp
  return norms * norm + attention + experts + networks * feed_forward


def _query_blocks(config: ModelConfig, length: int) -> int:
  return 1 if config.inputs_bidirectional_attention else min(config.attention_query_blocks, length)


def kept_bytes(config: ModelConfig, sparse: bool, model_axis: int) -> float:
  """Bytes a token that one layer keeps on the device under a remat policy other than 'none'."""
  if config.remat == 'offload':
    return 0.
  act, residual = jnp.dtype(config.dtype).itemsize, jnp.dtype(config.residual_dtype).itemsize
  outputs = 3 if sparse and config.extra_mlp else 2
  size = config.emb_dim * residual
  if config.remat in ('minimal', 'dots'):
    size += outputs * config.emb_dim * act
  if config.remat == 'dots':
    networks = config.extra_mlp + config.num_shared_experts if sparse else 1
    size += act * (3 * config.num_heads * config.head_dim + networks * sum(hidden_widths(config))) / model_axis
  return size


def activation_bytes(run: RunConfig, length: int, mesh: Mapping[str, int]) -> float:
  """Estimated bytes on one device between a microbatch's forward and backward pass, the loss's logits included.

  With remat one layer's activations exist in full while it is differentiated (a scanned block is differentiated layer
  by layer too, since every layer is its own remat region). A stage of a pipeline keeps its own layers, for every
  microbatch and for the steps in which it waits.
  """
  config = run.model
  rows = run.data.batch_size // run.train.num_microbatches
  shards = mesh['data'] * mesh['expert']
  tokens = -(-rows // shards) * length
  full = [layer_activation_bytes(config, length, rows, config.is_sparse(i), mesh['model'])
          for i in range(config.num_layers)]
  passes = run.train.num_microbatches + mesh['pipe'] - 1 if mesh['pipe'] > 1 else 1
  if config.remat == 'none':
    layers = passes * sum(full) / mesh['pipe']
  else:
    kept = sum(kept_bytes(config, config.is_sparse(i), mesh['model']) for i in range(config.num_layers))
    layers = max(full) + passes * kept / mesh['pipe']
  # While they exist: one block's attention scores and their gradient; a chunk's logits and theirs.
  act = jnp.dtype(config.dtype).itemsize
  scores = 2 * act * config.num_heads * length / _query_blocks(config, length) * tokens / mesh['model']
  logits = 2 * 4 * min(config.loss_chunk_tokens, tokens) * config.vocab_size / mesh['model'] / mesh['pipe']
  return tokens * layers + max(scores, logits)


def gathered_bytes(run: RunConfig, mesh: Mapping[str, int]) -> float:
  """Estimated bytes on one device of parameters that are together while they are used; 0 without `MeshConfig.fsdp`.

  Either the output matrix and its gradient in the loss, or a layer's kernels and their gradients; the embedding is as
  large as the former.
  """
  config = run.model
  if not set(run.mesh.fsdp) - {name for name, size in mesh.items() if size == 1}:
    return 0.
  act = jnp.dtype(config.dtype).itemsize
  output = config.emb_dim * config.vocab_size * (4 + jnp.dtype(config.logits_matmul_dtype).itemsize)
  network = config.emb_dim * (sum(hidden_widths(config)) + config.mlp_dim)
  attention = 4 * config.emb_dim * config.num_heads * config.head_dim
  dense = attention + network * (1 + config.num_shared_experts * bool(config.num_experts))
  experts = network * config.num_experts / mesh['expert'] if 'data' in run.mesh.fsdp else 0
  return max(output, 2 * act * (dense + experts)) / mesh['model']


def memory_table(run: RunConfig, length: int, mesh: Mapping[str, int]) -> Dict[str, Tuple[int, int]]:
  """{what: (bytes over all devices, bytes on one device)}; 'activations' is an estimate.

  Gradients are float32; accumulating them over microbatches takes a second copy.
  """
  params, opt_state, gradients = state_plan(run, mesh)
  total = lambda plans: (sum(p.bytes for p in plans), sum(p.device_bytes for p in plans))
  copies = 1 if run.train.num_microbatches == 1 else 2
  devices = math.prod(mesh.values())
  activations = round(activation_bytes(run, length, mesh))
  gathered = round(gathered_bytes(run, mesh))
  table = {'parameters': total(params), 'optimizer state': total(opt_state),
           'gradients': tuple(copies * size for size in total(gradients)),
           'activations (estimate)': (activations * devices, activations)}
  if gathered:
    table['parameters in use (estimate)'] = (gathered * devices, gathered)
  table['sum'] = tuple(sum(sizes[i] for sizes in table.values()) for i in range(2))
  return table
