"""How a train state lies on disk: always with stacked blocks, flat names, one chunk a layer, and a checksum an array.

The same run may be resumed with or without `scan_blocks`, so memory and disk differ: `to_disk` and `from_disk` turn one
into the other. On disk a tree is nested dictionaries, here flat ones with slash-separated names, e.g.
`decoder/blocks/layers_0/mlp/wi_0/kernel` [blocks, D, 2F] in the item `params` and
`stats/decoder/blocks/layers_0/mlp/wi_0/kernel/v_row` [blocks, D] in the item `opt_state`.
"""

import functools
import math
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import flax
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import orbax.checkpoint as ocp

from openmoe_jax import names
from openmoe_jax.config import ModelConfig
from openmoe_jax.partitioning import STACKED, key_names

Flat = Dict[str, Any]
ITEMS = ('params', 'opt_state', 'router_state')

# Experts get chunks of their own when one expert's part of one layer is at least this large; smaller ones would only
# make many tiny pieces.
EXPERT_CHUNK_BYTES = 1 << 20
# Largest chunk, so that a vocabulary matrix can be read in parts by many hosts.
CHUNK_BYTES = 128 << 20


def _is_model_tree(tree: Any) -> bool:
  return isinstance(tree, Mapping) and 'decoder' in tree


def _per_model_tree(function: Callable, model: ModelConfig, tree: Any) -> Any:
  """Applies `function(model, subtree)` to every subtree that has the parameters' structure."""
  if not _has_model_tree(tree):
    return tree
  return jax.tree.map(lambda t: function(model, t) if _is_model_tree(t) else t, tree, is_leaf=_is_model_tree)


def _has_model_tree(tree: Any) -> bool:
  return any(_is_model_tree(t) for t in jax.tree.leaves(tree, is_leaf=_is_model_tree))


def flatten(tree: Any, is_leaf: Optional[Callable[[Any], bool]] = None) -> Flat:
  """{'a/b/0': leaf}: a tree of dictionaries, tuples and dataclasses as one flat dictionary."""
  return {'/'.join(key_names(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf)}


def nest(flat: Flat) -> Dict[str, Any]:
  """{'a/b': leaf} as {'a': {'b': leaf}}."""
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def unflatten(template: Any, flat: Flat) -> Any:
  """The inverse of `flatten` for a tree of `template`'s structure."""
  paths, structure = jax.tree_util.tree_flatten_with_path(template)
  return jax.tree.unflatten(structure, [flat['/'.join(key_names(path))] for path, _ in paths])


def disk_shapes(model: ModelConfig, tree: Any) -> Flat:
  """What a tree of arrays or ShapeDtypeStructs looks like on disk, with the shardings its arrays have in memory."""
  plain = flatten(tree)
  if model.scan_blocks:
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None))
            for name, x in plain.items()}
  stacked = flatten(jax.eval_shape(lambda t: _per_model_tree(names.stack_blocks, model, t), _without_sharding(tree)))
  return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_stacked_sharding(name, plain))
          for name, x in stacked.items()}


def _without_sharding(tree: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _stacked_sharding(name: str, plain: Flat) -> Any:
  """The sharding of a stacked array: that of the same array in block 0, and the new axis not sharded."""
  if name in plain:
    return getattr(plain[name], 'sharding', None)
  sharding = getattr(plain[name.replace(f'/{STACKED}/', '/')], 'sharding', None)
  if isinstance(sharding, NamedSharding):
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
  return sharding


def to_disk(model: ModelConfig, tree: Any) -> Flat:
  """A tree of arrays as it is written. Nothing is copied when blocks are stacked in memory already."""
  if model.scan_blocks or not _has_model_tree(tree):
    return flatten(tree)
  shardings = tuple((name, x.sharding) for name, x in disk_shapes(model, tree).items())
  return _stack(model, shardings)(tree)


@functools.lru_cache(maxsize=16)  # one compilation for all saves of a run
def _stack(model: ModelConfig, shardings: Tuple[Tuple[str, Any], ...]) -> Callable[[Any], Flat]:
  return jax.jit(lambda tree: flatten(_per_model_tree(names.stack_blocks, model, tree)), out_shardings=dict(shardings))


def from_disk(model: ModelConfig, template: Any, flat: Flat) -> Any:
  """The inverse of `to_disk`, with the structure and shardings of `template` (a tree of ShapeDtypeStructs)."""
  if model.scan_blocks or not _has_model_tree(template):
    return unflatten(template, flat)
  stack = lambda t: _per_model_tree(names.stack_blocks, model, t)
  stacked = unflatten(jax.eval_shape(stack, _without_sharding(template)), flat)
  leaves, structure = jax.tree.flatten(template)
  return _unstack(model, structure, tuple(x.sharding for x in leaves))(stacked)


@functools.lru_cache(maxsize=16)
def _unstack(model: ModelConfig, structure: Any, shardings: Tuple[Any, ...]) -> Callable[[Any], Any]:
  return jax.jit(lambda tree: _per_model_tree(names.unstack_blocks, model, tree),
                 out_shardings=jax.tree.unflatten(structure, shardings))


def chunking(name: str, shape: Tuple[int, ...], dtype: Any) -> ocp.SaveArgs:
  """How one array is cut on disk: a chunk holds one layer of a stack, and one expert where experts are large."""
  axes: Tuple[int, ...] = ()
  parts = name.split('/')
  if STACKED in parts and shape:
    axes = (0,)
    if 'expert' in parts and len(shape) > 2 and math.prod(shape[2:]) * jnp.dtype(dtype).itemsize >= EXPERT_CHUNK_BYTES:
      axes = (0, 1)
  return ocp.SaveArgs(shard_axes=axes, chunk_byte_size=CHUNK_BYTES)


def _checksum(x: jax.Array) -> jax.Array:
  """uint32 []: the sum of an array's bits taken as integers; the same for every sharding and order of addition."""
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
  bits = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, unsigned)
  return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)


@jax.jit
def _checksums(flat: Flat) -> Flat:
  return {name: _checksum(x) for name, x in flat.items()}


def checksums(flat: Flat) -> Dict[str, int]:
  """A checksum for every array, so that damage which the file format does not notice is noticed on reading."""
  return {name: int(value) for name, value in jax.device_get(_checksums(flat)).items()}


def nbytes(tree: Any) -> int:
  """Bytes of a tree of arrays or ShapeDtypeStructs."""
  return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
