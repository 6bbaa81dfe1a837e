"""Sharding as data: mesh axes, the rules from logical to mesh axes, and the logical axes of every parameter.

A parameter's logical axes follow from its name alone (`param_axes`), so that anything that holds a parameter tree (the
optimizer, a checkpoint, a converter) can find them without the model.
"""

import math
import os
from typing import Any, Mapping, Optional, Sequence, Tuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from openmoe_jax.config import ConfigError, MeshConfig, ModelConfig, require

MESH_AXES = ('data', 'expert', 'model')
BATCH_AXES = ('data', 'expert')

# Logical axis -> mesh axis or axes. Unlisted names are errors, so that a typing mistake can't mean "not sharded".
RULES = {
    'batch': BATCH_AXES,
    'group': BATCH_AXES,       # routing groups while tokens are where their batch rows are
    'expert_group': 'data',    # routing groups while tokens are with their experts
    'length': None,
    'embed': None,
    'mlp_embed': None,
    'heads': 'model',
    'kv': None,
    'joined_kv': 'model',
    'mlp': 'model',
    'vocab': 'model',
    'expert': 'expert',
    'expert_mlp': 'model',
    'capacity': None,
    'layers': None,
    'unmodeled': None,
}

# End of a parameter's name -> its logical axes. The longest matching end wins.
_PARAM_AXES = {
    'token_embedder/embedding': ('vocab', 'embed'),
    'logits_dense/kernel': ('embed', 'vocab'),
    'scale': ('embed',),
    'query/kernel': ('embed', 'joined_kv'),
    'key/kernel': ('embed', 'joined_kv'),
    'value/kernel': ('embed', 'joined_kv'),
    'out/kernel': ('joined_kv', 'embed'),
    'wi_0/kernel': ('mlp_embed', 'mlp'),
    'wi_1/kernel': ('mlp_embed', 'mlp'),
    'wo/kernel': ('mlp', 'mlp_embed'),
    'expert/wi_0/kernel': ('expert', 'mlp_embed', 'expert_mlp'),
    'expert/wi_1/kernel': ('expert', 'mlp_embed', 'expert_mlp'),
    'expert/wo/kernel': ('expert', 'expert_mlp', 'mlp_embed'),
    'router_weights/w/kernel': ('embed', 'unmodeled'),
    'noise_weights/w/kernel': ('embed', 'unmodeled'),
    'group_weights/w/kernel': ('embed', 'unmodeled'),
}

STACKED = 'blocks'  # the sub-tree whose leaves carry a leading axis of blocks


def key_names(path: Sequence[Any]) -> Tuple[str, ...]:
  """Names along a jax key path (dictionary keys, attributes, indices)."""
  return tuple(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def param_axes(path: Sequence[str], ndim: int) -> Tuple[str, ...]:
  """Logical axes of the parameter with this name.

  Args:
    path: the parameter's name, one component an element: ('decoder', 'layers_0', 'mlp', 'wo', 'kernel').
    ndim: number of its dimensions, checked against the answer.

  Raises:
    ConfigError: no rule knows the name, or the rule has another number of dimensions.
  """
  for length in range(len(path), 0, -1):
    axes = _PARAM_AXES.get('/'.join(path[-length:]))
    if axes is not None:
      break
  else:
    raise ConfigError(f'parameter {"/".join(path)} has no logical axes; add its name to partitioning._PARAM_AXES')
  if STACKED in path:
    axes = ('layers',) + axes
  require(len(axes) == ndim, f'parameter {"/".join(path)} has {ndim} dimensions, its logical axes are {axes}')
  return axes


def mesh_axes(logical_axes: Sequence[Optional[str]]) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes (None: not sharded).

  Raises:
    ConfigError: an unknown logical axis, or one mesh axis for two dimensions of the array.
  """
  spec, used = [], set()
  for name in logical_axes:
    require(name is None or name in RULES, f'logical axis {name!r} is not known; known: {", ".join(RULES)}')
    axes = RULES[name] if name else None
    names = (axes,) if isinstance(axes, str) else tuple(axes or ())
    require(not used & set(names), f'logical axes {tuple(logical_axes)} put the mesh axis '
            f'{sorted(used & set(names))} on two dimensions of one array')
    used |= set(names)
    spec.append(axes)
  return PartitionSpec(*spec)


def constrain(x: jax.Array, *logical_axes: Optional[str]) -> jax.Array:
  """Pins the sharding of an activation to its logical axes; no effect without a mesh (`jax.set_mesh`).

  A dimension that its mesh axes do not divide is left to the compiler: results never depend on the mesh.
  """
  require(len(logical_axes) == x.ndim, f'array of shape {x.shape} has {x.ndim} dimensions, logical axes {logical_axes}')
  spec = mesh_axes(logical_axes)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  spec = [axes if axes is None or dim % _axes_size(mesh.shape, axes) == 0 else PartitionSpec.UNCONSTRAINED
          for dim, axes in zip(x.shape, spec)]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _axes_size(mesh_shape: Mapping[str, int], axes) -> int:
  return math.prod(mesh_shape[a] for a in ((axes,) if isinstance(axes, str) else axes))


def num_shards(logical_axis: str) -> int:
  """Into how many parts the mesh in force splits a dimension with this logical axis; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else _axes_size(mesh.shape, RULES[logical_axis])


def make_mesh(config: MeshConfig, devices: Optional[Sequence[Any]] = None) -> Mesh:
  """A mesh with the axes data, expert and model over the devices of all processes.

  Raises:
    ConfigError: the platform asked for is not there, or the sizes do not fit the number of devices.
  """
  if devices is None:
    try:
      devices = jax.devices(config.platform or None)
    except (RuntimeError, AssertionError) as error:  # the latter: JAX_PLATFORMS names a platform that is not there
      raise ConfigError(_no_devices(config.platform, error)) from error
  count, rest = len(devices), config.expert * config.model
  data = config.data if config.data > 0 else max(count // rest, 1)
  require(data * rest == count, f'MeshConfig data x expert x model = {data} x {config.expert} x {config.model} = '
          f'{data * rest} devices, but there are {count}' + _mesh_advice(count, rest))
  shape = (data, config.expert, config.model)
  if devices[0].platform == 'tpu':  # topology-aware order, so that neighbours in the mesh are neighbours in the torus
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
  return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _no_devices(platform: str, error: BaseException) -> str:
  reason = (str(error) or type(error).__name__).splitlines()[0]
  asked = f"MeshConfig.platform = '{platform}'" if platform else f'JAX_PLATFORMS = {os.environ.get("JAX_PLATFORMS", "")!r}'
  try:
    found = f"only '{jax.default_backend()}'"
  except (RuntimeError, AssertionError):
    found = 'no such device'
  return f'{asked} was asked for, but JAX finds {found} ({reason}); see openmoe-inspect --environment'


def _mesh_advice(count: int, rest: int) -> str:
  if count % rest:
    return f': expert x model must divide {count}'
  return f'; data = {count // rest} or -1 would fit'


def validate_mesh(model: ModelConfig, mesh_shape: Mapping[str, int], rows: int) -> None:
  """Checks that a model and a number of batch rows (of one microbatch) can be split over a mesh.

  Raises:
    ConfigError: naming the setting that does not divide.
  """
  model_axis, expert_axis = mesh_shape['model'], mesh_shape['expert']
  # Heads themselves need not divide (the original's 34B has 24 on 16): their features are split between them then.
  for name, size in (('num_heads * head_dim', model.num_heads * model.head_dim), ('mlp_dim', model.mlp_dim),
                     ('vocab_size', model.vocab_size)):
    require(size % model_axis == 0, f'ModelConfig.{name} = {size} must be a multiple of MeshConfig.model = {model_axis}')
  require(not model.num_experts or model.num_experts % expert_axis == 0, f'ModelConfig.num_experts = '
          f'{model.num_experts} must be a multiple of MeshConfig.expert = {expert_axis}')
  shards = _axes_size(mesh_shape, BATCH_AXES)
  require(rows % shards == 0, f'{rows} rows of a microbatch must be a multiple of MeshConfig data x expert = {shards}')


def params_axes(params: Any) -> Any:
  """The tree of logical axes of a parameter tree (arrays or ShapeDtypeStructs)."""
  return jax.tree_util.tree_map_with_path(lambda path, x: param_axes(key_names(path), len(x.shape)), params)


def shardings(axes: Any, mesh: Mesh) -> Any:
  """A tree of logical axes as a tree of NamedShardings."""
  return jax.tree.map(lambda names: NamedSharding(mesh, mesh_axes(names)), axes,
                      is_leaf=lambda x: type(x) is tuple and all(isinstance(n, (str, type(None))) for n in x))


def tree_shardings(params: Any, mesh: Mesh) -> Any:
  """NamedShardings of a parameter tree."""
  return shardings(params_axes(params), mesh)


def batch_sharding(mesh: Mesh, microbatched: bool = False) -> NamedSharding:
  """Sharding of a batch's arrays: [rows, length], or [microbatch, rows, length] when `microbatched`."""
  return NamedSharding(mesh, PartitionSpec(*((None, BATCH_AXES) if microbatched else (BATCH_AXES,))))
