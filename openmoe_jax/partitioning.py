"""Sharding as data: mesh axes, the rules from logical to mesh axes, and the logical axes of every parameter.

A parameter's logical axes follow from its name alone (`param_axes`), so that anything that holds a parameter tree (the
optimizer, a checkpoint, a converter) can find them without the model.

With `MeshConfig.fsdp` parameters are split more finely where they are kept than where they are used: `gather` brings
one together just before it is used, and takes its gradient apart again (ZeRO, Rajbhandari et al. 2020).
"""

import contextlib
import contextvars
import functools
import math
import os
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Sequence, Tuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import jax.numpy as jnp
import numpy as np

from openmoe_jax.config import FSDP, ConfigError, MeshConfig, ModelConfig, require

MESH_AXES = ('pipe', 'data', 'expert', 'model')  # the outermost needs the least bandwidth
BATCH_AXES = ('data', 'expert')


class Rule(NamedTuple):
  """What a dimension with some logical axis is split over.

  Attributes:
    used: mesh axis or axes, of an activation, or of a parameter where it is used.
    kept: mesh axes that may be added where a parameter is kept, or its optimizer state: those of them that
      `MeshConfig.fsdp` or `shard_optimizer` names are.
  """
  used: Any = None
  kept: Tuple[str, ...] = ()


# By logical axis. Unlisted names are errors, so that a typing mistake can't mean "not sharded".
RULES = {
    'batch': Rule(BATCH_AXES),
    'group': Rule(BATCH_AXES),       # routing groups while tokens are where their batch rows are
    'expert_group': Rule('data'),    # routing groups while tokens are with their experts
    'length': Rule(),
    'embed': Rule(kept=BATCH_AXES),
    'mlp_embed': Rule(kept=BATCH_AXES),
    'expert_embed': Rule(kept=('data',)),  # of experts' kernels, which are split over 'expert' anyway
    'norm': Rule(),                  # norm scales and the router's kernels: too small to be gathered every time
    'router_embed': Rule(),
    'heads': Rule('model'),
    'kv': Rule(),
    'joined_kv': Rule('model'),
    'mlp': Rule('model'),
    'vocab': Rule(('model', 'pipe')),  # what comes before and behind the blocks is computed by all stages together
    'expert': Rule('expert'),
    'expert_mlp': Rule('model'),
    'capacity': Rule(),
    'layers': Rule('pipe'),
    'stage': Rule('pipe'),
    'unmodeled': Rule(),
}

# End of a parameter's name -> its logical axes. The longest matching end wins.
_PARAM_AXES = {
    'token_embedder/embedding': ('vocab', 'embed'),
    'logits_dense/kernel': ('embed', 'vocab'),
    'scale': ('norm',),
    'query/kernel': ('embed', 'joined_kv'),
    'key/kernel': ('embed', 'joined_kv'),
    'value/kernel': ('embed', 'joined_kv'),
    'out/kernel': ('joined_kv', 'embed'),
    'wi_0/kernel': ('mlp_embed', 'mlp'),
    'wi_1/kernel': ('mlp_embed', 'mlp'),
    'wo/kernel': ('mlp', 'mlp_embed'),
    'expert/wi_0/kernel': ('expert', 'expert_embed', 'expert_mlp'),
    'expert/wi_1/kernel': ('expert', 'expert_embed', 'expert_mlp'),
    'expert/wo/kernel': ('expert', 'expert_mlp', 'expert_embed'),
    'router_weights/w/kernel': ('router_embed', 'unmodeled'),
    'noise_weights/w/kernel': ('router_embed', 'unmodeled'),
    'group_weights/w/kernel': ('router_embed', 'unmodeled'),
}

STACKED = 'blocks'  # the sub-tree whose leaves carry a leading axis of blocks


def key_names(path: Sequence[Any]) -> Tuple[str, ...]:
  """Names along a jax key path (dictionary keys, attributes, indices)."""
  return tuple(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def param_axes(path: Sequence[str], ndim: int, in_block: bool = False) -> Tuple[str, ...]:
  """Logical axes of the parameter with this name.

  Args:
    path: the parameter's name, one component an element: ('decoder', 'layers_0', 'mlp', 'wo', 'kernel').
    ndim: number of its dimensions, checked against the answer.
    in_block: seen from within a block, of which there may be a stack outside.

  Raises:
    ConfigError: no rule knows the name, or the rule has another number of dimensions.
  """
  for length in range(len(path), 0, -1):
    axes = _PARAM_AXES.get('/'.join(path[-length:]))
    if axes is not None:
      break
  else:
    raise ConfigError(f'parameter {"/".join(path)} has no logical axes; add its name to partitioning._PARAM_AXES')
  if STACKED in path and not in_block:
    axes = ('layers',) + axes
  require(len(axes) == ndim, f'parameter {"/".join(path)} has {ndim} dimensions, its logical axes are {axes}')
  return axes


def mesh_axes(logical_axes: Sequence[Optional[str]], fsdp: Sequence[str] = ()) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes (None: not sharded).

  Args:
    fsdp: mesh axes over which an array that is kept is split besides, see `Rule.kept`.

  Raises:
    ConfigError: an unknown logical axis, or one mesh axis for two dimensions of the array.
  """
  spec, used = [], set()
  for name in logical_axes:
    require(name is None or name in RULES, f'logical axis {name!r} is not known; known: {", ".join(RULES)}')
    rule = RULES[name] if name else Rule()
    names = _names(rule.used) + tuple(axis for axis in rule.kept if axis in fsdp)
    require(not used & set(names), f'logical axes {tuple(logical_axes)} put the mesh axis '
            f'{sorted(used & set(names))} on two dimensions of one array')
    used |= set(names)
    spec.append(names if len(names) > 1 else names[0] if names else None)
  return PartitionSpec(*spec)


def _names(axes: Any) -> Tuple[str, ...]:
  return (axes,) if isinstance(axes, str) else tuple(axes or ())


def constrain(x: jax.Array, *logical_axes: Optional[str]) -> jax.Array:
  """Pins the sharding of an activation to its logical axes; no effect without a mesh (`jax.set_mesh`), or within a
  `shard_map`, where every device sees its own part.

  A dimension that its mesh axes do not divide is left to the compiler: results never depend on the mesh.
  """
  require(len(logical_axes) == x.ndim, f'array of shape {x.shape} has {x.ndim} dimensions, logical axes {logical_axes}')
  spec = mesh_axes(logical_axes)
  if not is_partitioned():
    return x
  mesh = jax.sharding.get_abstract_mesh()
  spec = [axes if axes is None or dim % _axes_size(mesh.shape, axes) == 0 else PartitionSpec.UNCONSTRAINED
          for dim, axes in zip(x.shape, spec)]
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def is_partitioned() -> bool:
  """Whether there is a mesh of several devices, over which the compiler splits arrays."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and mesh.size > 1 and AxisType.Auto in mesh.axis_types


def _axes_size(mesh_shape: Mapping[str, int], axes) -> int:
  return math.prod(mesh_shape[a] for a in _names(axes))


def num_shards(logical_axis: str) -> int:
  """Into how many parts the mesh in force splits a dimension with this logical axis; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else _axes_size(mesh.shape, RULES[logical_axis].used)


def split_over(logical_axis: str, size: int) -> Tuple[str, ...]:
  """The mesh axes that split a dimension of this size in the mesh in force; none if they do not divide it."""
  axes = _names(RULES[logical_axis].used)
  return axes if size % _axes_size(jax.sharding.get_abstract_mesh().shape, axes) == 0 else ()


# How parameters and gradients are kept in the step that is being traced.
_KEPT = contextvars.ContextVar('kept', default=MeshConfig())


@contextlib.contextmanager
def use(mesh: Optional[Mesh], config: MeshConfig = MeshConfig()) -> Iterator[None]:
  """Within this context functions are traced for a mesh, whose parameters, gradients and optimizer state are kept as
  `config.fsdp` and `shard_optimizer` say.

  Only for functions that are jitted once and for these settings: jax does not know of the latter, and would take a
  trace of the same function made with others.
  """
  token = _KEPT.set(config)
  try:
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
      yield
  finally:
    _KEPT.reset(token)


def kept_over(logical_axis: str) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
  """Mesh axes over which a dimension is split besides where parameters, and where gradients are kept."""
  kept, config = RULES[logical_axis].kept, _KEPT.get()
  return (tuple(axis for axis in kept if axis in config.fsdp),
          tuple(axis for axis in kept if axis in config.optimizer_fsdp))


def pad_rows(x: jax.Array, fill: Any = 0) -> jax.Array:
  """As many more rows as make their number a multiple of the mesh's parts of a batch."""
  return jnp.pad(x, ((0, -x.shape[0] % num_shards('batch')),) + ((0, 0),) * (x.ndim - 1), constant_values=fill)


def add_up(gradient: jax.Array, kept: Sequence[str], dimension: int) -> jax.Array:
  """Within a `shard_map` over a whole mesh: a parameter's gradient of this device's rows, added up over those of all, and
  split over the axes `kept` (see `kept_over`) along a dimension."""
  if kept:
    gradient = jax.lax.psum_scatter(gradient, kept, scatter_dimension=dimension, tiled=True)
  rest = tuple(axis for axis in BATCH_AXES if axis not in kept)
  return jax.lax.psum(gradient, rest) if rest else gradient


def gather(x: jax.Array, *logical_axes: str) -> jax.Array:
  """A parameter as it is used, whatever it is split over where it is kept; its gradient is split as `use` says.

  It is for the caller to see that the result is not kept for the backward pass (`all_but_gathered`): over all layers it
  would be the whole model on every device.
  """
  if not is_partitioned() or not isinstance(x, jax.Array):
    return x
  return _gather(x, mesh_axes(logical_axes), mesh_axes(logical_axes, _KEPT.get().optimizer_fsdp))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x, used, kept):
  del kept
  return jax.lax.with_sharding_constraint(x, used)


_gather.defvjp(lambda x, used, kept: (_gather(x, used, kept), None),
               lambda used, kept, _, dx: (jax.lax.with_sharding_constraint(dx, kept),))


def device_kind() -> str:
  """The devices that what is being traced is for, such as 'TPU v4': those of the mesh in force, or else the default ones."""
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  return jax.devices()[0].device_kind if device is None else device.device_kind


def is_finely_split() -> bool:
  """Whether the step that is being traced keeps parameters or optimizer state more finely split than it uses them."""
  return bool(_KEPT.get().optimizer_fsdp)


def all_but_gathered(primitive: Any, *unused_args, **unused_params) -> bool:
  """A policy of `jax.checkpoint`: keeps everything for the backward pass but what comes out of `gather`.

  Constrained activations aren't kept either, but what they were before they were constrained is.
  """
  return primitive.name != 'sharding_constraint'


def keep(tree: Any, axes: Any, fsdp: Sequence[str]) -> Any:
  """A tree of arrays, each pinned to where it is kept on the mesh in force.

  Args:
    axes: the tree of their logical axes.
    fsdp: see `mesh_axes`.
  """
  if not is_partitioned():
    return tree
  return jax.tree.map(lambda names, x: jax.lax.with_sharding_constraint(x, mesh_axes(names, fsdp)), axes, tree,
                      is_leaf=is_axes)


def make_mesh(config: MeshConfig, devices: Optional[Sequence[Any]] = None) -> Mesh:
  """A mesh with the axes pipe, data, expert and model over the devices of all processes.

  Raises:
    ConfigError: the platform asked for is not there, or the sizes do not fit the number of devices.
  """
  if devices is None:
    try:
      devices = jax.devices(config.platform or None)
    except (RuntimeError, AssertionError) as error:  # the latter: JAX_PLATFORMS names a platform that is not there
      raise ConfigError(_no_devices(config.platform, error)) from error
  count, rest = len(devices), config.pipe * config.expert * config.model
  data = config.data if config.data > 0 else max(count // rest, 1)
  pipe = (' x pipe', f' x {config.pipe}') if config.pipe > 1 else ('', '')
  require(data * rest == count, f'MeshConfig data x expert x model{pipe[0]} = {data} x {config.expert} x {config.model}'
          f'{pipe[1]} = {data * rest} devices, but there are {count}' + _mesh_advice(count, config))
  shape = (config.pipe, data, config.expert, config.model)
  # On a TPU neighbours in the mesh are to be neighbours in the torus.
  ordered = _in_torus(shape, devices) if devices[0].platform == 'tpu' else np.asarray(devices).reshape(shape)
  return Mesh(ordered, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def _in_torus(shape: Tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
  """TPUs so ordered that an axis of the mesh lies along dimensions of the torus. Slices are rows of the axis `data`, whose
  gradients cross between them once a step, or else stages of `pipe`."""
  pipe, data, *within = shape
  slices = len({getattr(device, 'slice_index', None) or 0 for device in devices})
  require(data % slices == 0 or pipe % slices == 0, f'MeshConfig.data = {data} or pipe = {pipe} must be a multiple of the '
          f'{slices} slices: only they cross between them')
  across = (1, slices) if data % slices == 0 else (slices, 1)

  def order(split_axes: bool) -> np.ndarray:
    if slices == 1:
      return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split_axes)
    return mesh_utils.create_hybrid_device_mesh((pipe // across[0], data // across[1], *within), (*across, 1, 1), devices,
                                                allow_split_physical_axes=split_axes)

  try:
    return order(False)
  except (NotImplementedError, ValueError, AssertionError):  # no product of whole dimensions: an axis shares one
    return order(True)


def _no_devices(platform: str, error: BaseException) -> str:
  reason = (str(error) or type(error).__name__).splitlines()[0]
  asked = f"MeshConfig.platform = '{platform}'" if platform else f'JAX_PLATFORMS = {os.environ.get("JAX_PLATFORMS", "")!r}'
  try:
    found = f"only '{jax.default_backend()}'"
  except (RuntimeError, AssertionError):
    found = 'no such device'
  return f'{asked} was asked for, but JAX finds {found} ({reason}); see openmoe-inspect --environment'


def _mesh_advice(count: int, config: MeshConfig) -> str:
  sizes = {'expert': config.expert, 'model': config.model, **({'pipe': config.pipe} if config.pipe > 1 else {})}
  rest = math.prod(sizes.values())
  if count % rest == 0:
    return f'; data = {count // rest} or -1 would fit'
  choices = [f'{name} = {_nearest(size, count * size // rest)}' for name, size in sizes.items() if count * size % rest == 0]
  return f': {" x ".join(sizes)} must divide {count}' + (f'; {" or ".join(choices)} would' if choices else '')


def validate_mesh(model: ModelConfig, mesh_shape: Mapping[str, int], rows: int, fsdp: Sequence[str] = ()) -> None:
  """Checks that a model and a number of batch rows (of one microbatch) can be split over a mesh.

  Args:
    fsdp: mesh axes over which parameters or their optimizer state are split besides.

  Raises:
    ConfigError: naming the setting that does not divide.
  """
  model_axis, expert_axis, stages = mesh_shape['model'], mesh_shape['expert'], mesh_shape['pipe']
  # Heads themselves need not divide (the original's 34B has 24 on 16): their features are split between them then.
  for name, size in (('num_heads * head_dim', model.num_heads * model.head_dim), ('mlp_dim', model.mlp_dim),
                     ('vocab_size', model.vocab_size)):
    require(size % model_axis == 0, f'ModelConfig.{name} = {size} must be a multiple of MeshConfig.model = {model_axis}'
            f'; {_nearest(model_axis, size)} would fit')
  require(stages == 1 or model.scan_blocks, f'MeshConfig.pipe = {stages} splits stacked blocks: it needs '
          'ModelConfig.scan_blocks = True')
  require(model.num_blocks % stages == 0, f'MeshConfig.pipe = {stages} must divide the number of blocks of the model, '
          f'{model.num_blocks} (ModelConfig.num_layers / moe_interval); {_nearest(stages, model.num_blocks)} would fit')
  require(model.vocab_size % (model_axis * stages) == 0, f'ModelConfig.vocab_size = {model.vocab_size} must be a multiple '
          f'of MeshConfig model x pipe = {model_axis * stages}')
  require(not model.num_experts or model.num_experts % expert_axis == 0, f'ModelConfig.num_experts = '
          f'{model.num_experts} must be a multiple of MeshConfig.expert = {expert_axis}'
          f'; {_nearest(expert_axis, model.num_experts)} would fit')
  shards = _axes_size(mesh_shape, BATCH_AXES)
  require(rows % shards == 0, f'{rows} rows of a microbatch must be a multiple of MeshConfig data x expert = {shards}'
          f'; {_nearest(shards, rows)} would fit')
  split = _axes_size(mesh_shape, fsdp)
  fits = [axes for axes in FSDP if model.emb_dim % _axes_size(mesh_shape, axes) == 0]
  require(model.emb_dim % split == 0, f'MeshConfig.fsdp or shard_optimizer = {tuple(fsdp)} splits '
          f'ModelConfig.emb_dim = {model.emb_dim} into {split} parts, which do not divide it; '
          f'{" or ".join(map(str, fits))} would fit')


def _nearest(wanted: int, size: int) -> int:
  """The divisor of `size` next to `wanted`."""
  return min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - wanted))


def params_axes(params: Any) -> Any:
  """The tree of logical axes of a parameter tree (arrays or ShapeDtypeStructs)."""
  return jax.tree_util.tree_map_with_path(lambda path, x: param_axes(key_names(path), len(x.shape)), params)


def is_axes(x: Any) -> bool:
  """Whether this is the tuple of one array's logical axes, a leaf of a tree of them."""
  return type(x) is tuple and all(isinstance(n, (str, type(None))) for n in x)


def shardings(axes: Any, mesh: Mesh, fsdp: Sequence[str] = ()) -> Any:
  """A tree of logical axes as a tree of NamedShardings of what is kept."""
  return jax.tree.map(lambda names: NamedSharding(mesh, mesh_axes(names, fsdp)), axes, is_leaf=is_axes)


def tree_shardings(params: Any, mesh: Mesh, fsdp: Sequence[str] = ()) -> Any:
  """NamedShardings of a parameter tree as it is kept."""
  return shardings(params_axes(params), mesh, fsdp)


def batch_sharding(mesh: Mesh, microbatched: bool = False) -> NamedSharding:
  """Sharding of a batch's arrays: [rows, length], or [microbatch, rows, length] when `microbatched`."""
  return NamedSharding(mesh, PartitionSpec(*((None, BATCH_AXES) if microbatched else (BATCH_AXES,))))
