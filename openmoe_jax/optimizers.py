"""Adafactor as the original trained with (SPEC 4), and AdamW, as optax transformations.

Adafactor keeps row and column means of the squared gradient instead of the whole. What counts as one matrix follows
from the parameters' logical axes: stacked layers and experts are batch axes, so that statistics, update clipping and
the parameter's scale are per layer and per expert, and stacking blocks or not changes nothing.
"""

from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence, Tuple, Union

import jax
import jax.numpy as jnp
import optax

from openmoe_jax import partitioning
from openmoe_jax.config import ConfigError, OptimizerConfig, require
from openmoe_jax.schedules import learning_rate_schedule

LearningRate = Union[float, Callable[[jax.Array], jax.Array]]
LogicalAxes = Callable[[Sequence[str], int], Tuple[str, ...]]  # (name of a parameter, its ndim) -> its logical axes

_STACKED = 'layers'
_BATCH = ('layers', 'expert')
_ROW = ('embed', 'mlp_embed', 'expert_embed')
_COLUMN = ('mlp', 'expert_mlp', 'joined_kv', 'vocab')


class Factoring(NamedTuple):
  """How one parameter's second moment is kept.

  Attributes:
    batch: dimensions along which everything is separate.
    row, column: the dimensions that v_row and v_col keep; None where the whole second moment `v` is kept.
  """
  batch: Tuple[int, ...]
  row: Optional[int]
  column: Optional[int]

  @property
  def factored(self) -> bool:
    return self.row is not None


class AdafactorState(NamedTuple):
  """Adafactor's memory.

  Attributes:
    count: int32 scalar, updates done.
    stats: the parameters' tree with {'v_row', 'v_col'} or {'v'} in place of each array, float32. v_row has the
      parameter's shape without its column dimension, v_col without its row dimension.
  """
  count: jax.Array
  stats: Any


def factoring(axes: Sequence[str], shape: Sequence[int], min_dim_size_to_factor: int = 128) -> Factoring:
  """Which dimensions of a parameter are batch, row and column (SPEC 4).

  A matrix outside the experts is factored if both sides are at least `min_dim_size_to_factor`; its longer side is the
  column, of equal sides the second. Expert kernels are factored by the names of their axes, whatever their size.

  Args:
    axes: logical axes of the parameter.
    shape: its shape, of the same length.
    min_dim_size_to_factor: see above.
  """
  batch = tuple(d for d, name in enumerate(axes) if name in _BATCH)
  inner = tuple(d for d in range(len(shape)) if d not in batch)
  if len(shape) - axes.count(_STACKED) <= 2 and 'expert' not in axes:
    if len(inner) == 2 and min(shape[d] for d in inner) >= min_dim_size_to_factor:
      row, column = inner if shape[inner[0]] <= shape[inner[1]] else inner[::-1]
      return Factoring(batch, row, column)
  elif len(inner) == 2:
    rows = [d for d in inner if axes[d] in _ROW]
    columns = [d for d in inner if axes[d] in _COLUMN]
    if rows and columns:
      return Factoring(batch, rows[0], columns[0])
  return Factoring(batch, None, None)


def _without(values: Sequence[Any], dim: int) -> Tuple[Any, ...]:
  return tuple(values[:dim]) + tuple(values[dim + 1:])


def adafactor(learning_rate: LearningRate = 0.01, decay_exponent: float = 0.8, epsilon1: float = 1e-30,
              epsilon2: float = 1e-3, clipping_threshold: float = 1.0, min_dim_size_to_factor: int = 128,
              multiply_by_parameter_scale: bool = True,
              logical_axes: LogicalAxes = partitioning.param_axes) -> optax.GradientTransformation:
  """Adafactor without momentum, as in T5X (SPEC 4).

  Args:
    learning_rate: a number, or a function of the number of updates done.
    decay_exponent: update s = 0, 1, .. forgets with 1 - (s+1)^-decay_exponent.
    epsilon1: added to squared gradients.
    epsilon2: least scale of a parameter.
    clipping_threshold: largest root mean square of an update before the learning rate; 0 does not clip.
    min_dim_size_to_factor: smaller matrices outside the experts keep their whole second moment.
    multiply_by_parameter_scale: the learning rate is relative to the parameter's root mean square.
    logical_axes: from a parameter's name and number of dimensions to its logical axes.

  Returns:
    A transformation whose `update(grads, state, params)` gives what to ADD to the parameters.
  """

  def init(params) -> AdafactorState:
    def leaf(path, param) -> Dict[str, jax.Array]:
      how = factoring(logical_axes(partitioning.key_names(path), param.ndim), param.shape, min_dim_size_to_factor)
      if how.factored:
        return {'v_row': jnp.zeros(_without(param.shape, how.column), jnp.float32),
                'v_col': jnp.zeros(_without(param.shape, how.row), jnp.float32)}
      return {'v': jnp.zeros(param.shape, jnp.float32)}
    return AdafactorState(jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(leaf, params))

  def update(grads, state: AdafactorState, params=None):
    require(params is not None, 'adafactor needs the parameters: update(grads, state, params)')
    beta2 = 1.0 - (state.count.astype(jnp.float32) + 1.0) ** -decay_exponent
    rate = _rate(learning_rate, state.count)

    def leaf(path, param, grad, stats):
      how = factoring(logical_axes(partitioning.key_names(path), param.ndim), param.shape, min_dim_size_to_factor)
      grad = grad.astype(jnp.float32)
      moments = _factored_moments if how.factored else _full_moments
      stats, rms, scaled_grad = moments(grad, stats, how, beta2, epsilon1)
      step = -rate / jnp.maximum(1.0, rms / clipping_threshold) if clipping_threshold else -rate
      if multiply_by_parameter_scale:
        inner = tuple(d for d in range(param.ndim) if d not in how.batch)
        step = step * jnp.maximum(jnp.sqrt(_mean_square(param, inner)), epsilon2)
      return scaled_grad(step).astype(param.dtype), stats

    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    results = [leaf(path, param, grad, stats) for (path, param), grad, stats
               in zip(paths, treedef.flatten_up_to(grads), treedef.flatten_up_to(state.stats))]
    updates, stats = zip(*results) if results else ((), ())
    return treedef.unflatten(updates), AdafactorState(state.count + 1, treedef.unflatten(stats))

  return optax.GradientTransformation(init, update)


def _full_moments(grad, stats, how: Factoring, beta2, epsilon1):
  """As `_factored_moments`, for a parameter that keeps its whole second moment."""
  v = beta2 * stats['v'] + (1.0 - beta2) * (jnp.square(grad) + epsilon1)
  y = grad * jax.lax.rsqrt(v)
  inner = tuple(d for d in range(grad.ndim) if d not in how.batch)
  rms = jnp.sqrt(jnp.mean(jnp.square(y), inner, keepdims=True))
  return {'v': v}, rms, lambda step: y * step


def _factored_moments(grad, stats, how: Factoring, beta2, epsilon1):
  """Advances v_row and v_col by one gradient, which is y = grad * (v_row / mean(v_row))^-1/2 * v_col^-1/2 normalised.

  The optimizer is bound by memory, so what counts is how often the gradient is read and that nothing of its size is
  written. Three reductions and the update read it once each: mean(y^2) comes out of one weighted reduction,
  mean_i(mean_j(g_ij^2 / b_j) / a_i), without forming y. XLA on CPU fuses a square into the reduction that uses it, but
  writes out one that different reductions share; hence the three spellings of g^2.

  Args:
    grad: float32 array.
    stats: {'v_row', 'v_col'} before the update.
    how: factored.
    beta2, epsilon1: decay of the statistics and what is added to squares; scalars.

  Returns:
    The new statistics; rms(y), of size 1 in all but batch dimensions; and the function step -> step * y.
  """
  first, second = sorted((how.row, how.column))  # the second is contiguous in memory
  mean_square = {first: -jnp.mean((-grad) * grad, second), second: jnp.mean(grad * grad, first)}

  def advance(old, kept):
    return beta2 * old + (1.0 - beta2) * (mean_square[kept] + epsilon1)

  v_row, v_col = advance(stats['v_row'], how.row), advance(stats['v_col'], how.column)
  rows, columns = jnp.expand_dims(v_row, how.column), jnp.expand_dims(v_col, how.row)
  divisor = {how.row: rows / jnp.mean(rows, how.row, keepdims=True), how.column: columns}
  weighted = jnp.mean((grad * (1.0 / divisor[second])) * grad, second, keepdims=True)
  rms = jnp.sqrt(jnp.mean(weighted / divisor[first], first, keepdims=True))

  def scaled_grad(step):
    return grad * (step * jax.lax.rsqrt(divisor[first])) * jax.lax.rsqrt(divisor[second])

  return {'v_row': v_row, 'v_col': v_col}, rms, scaled_grad


def adamw(learning_rate: LearningRate = 1e-3, b1: float = 0.9, b2: float = 0.95, epsilon: float = 1e-8,
          weight_decay: float = 0.0,
          logical_axes: LogicalAxes = partitioning.param_axes) -> optax.GradientTransformation:
  """Adam with decoupled weight decay on matrices; norm scales do not decay.

  The state is optax's `ScaleByAdamState(count, mu, nu)`; schedule and decay need no memory of their own.

  Args:
    learning_rate: a number, or a function of the number of updates done.
    b1, b2: decay of the first and second moment.
    epsilon: added to the root of the second moment.
    weight_decay: share of a parameter taken away by an update, times the learning rate.
    logical_axes: from a parameter's name and number of dimensions to its logical axes.
  """
  adam = optax.scale_by_adam(b1, b2, epsilon)

  def decays(path, param) -> bool:
    return param.ndim - logical_axes(partitioning.key_names(path), param.ndim).count(_STACKED) > 1

  def update(grads, state, params=None):
    require(params is not None, 'adamw needs the parameters: update(grads, state, params)')
    rate = _rate(learning_rate, state.count)
    directions, state = adam.update(grads, state, params)
    def leaf(path, param, direction):
      decay = weight_decay * param if weight_decay and decays(path, param) else 0.0
      return (-rate * (direction + decay)).astype(param.dtype)
    return jax.tree_util.tree_map_with_path(leaf, params, directions), state

  return optax.GradientTransformation(adam.init, update)


def _rate(learning_rate: LearningRate, count: jax.Array):
  return learning_rate(count) if callable(learning_rate) else learning_rate


def _mean_square(x: jax.Array, dims: Sequence[int]) -> jax.Array:
  """Mean of x^2 over `dims`, kept with size 1; over the last but one first, as the other users of the square do it.

  Two reductions of one square are the same to XLA if their dimensions are the same, and are then done once.
  """
  x = x.astype(jnp.float32)
  first = x.ndim - 2
  square = jnp.mean(x * x, first, keepdims=True) if first in dims else x * x
  return jnp.mean(square, tuple(d for d in dims if d != first), keepdims=True)


def global_norm(tree: Any) -> jax.Array:
  """Root of the sum of all squares of a tree, float32 scalar.

  Beside Adafactor it costs next to nothing: see `_mean_square`.
  """
  squares = [float(x.size) * jnp.sum(_mean_square(x, range(x.ndim))) for x in jax.tree.leaves(tree)]
  return jnp.sqrt(sum(squares, jnp.float32(0.0)))


def clip_global_norm(optimizer: optax.GradientTransformation, max_norm: float) -> optax.GradientTransformation:
  """`optimizer` on gradients scaled down so that their global norm is at most `max_norm`; its state is unchanged."""

  def update(grads, state, params=None):
    factor = jnp.minimum(1.0, max_norm / jnp.maximum(global_norm(grads), jnp.finfo(jnp.float32).tiny))
    return optimizer.update(jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads), state, params)

  return optax.GradientTransformation(optimizer.init, update)


def make_optimizer(config: OptimizerConfig, train_steps: int,
                   logical_axes: LogicalAxes = partitioning.param_axes) -> optax.GradientTransformation:
  """The optimizer that `config` describes, for a run of `train_steps` steps.

  Raises:
    ConfigError: an unknown name or schedule, or weight decay asked of Adafactor, which has none.
  """
  schedule = learning_rate_schedule(config, train_steps)
  if config.name == 'adafactor':
    require(not config.weight_decay, f'OptimizerConfig.weight_decay = {config.weight_decay} has no effect on '
            "'adafactor'; set it to 0 or OptimizerConfig.name to 'adamw'")
    optimizer = adafactor(schedule, config.decay_exponent, config.epsilon1, config.epsilon2, config.clipping_threshold,
                          config.min_dim_size_to_factor, config.multiply_by_parameter_scale, logical_axes)
  elif config.name == 'adamw':
    optimizer = adamw(schedule, config.adam_b1, config.adam_b2, config.adam_epsilon, config.weight_decay, logical_axes)
  else:
    raise ConfigError(f"OptimizerConfig.name = {config.name!r} is not known; valid: 'adafactor', 'adamw'")
  return clip_global_norm(optimizer, config.max_grad_norm) if config.max_grad_norm else optimizer


def _is_count(path: Any) -> bool:
  return partitioning.key_names(path)[-1:] == ('count',)


def with_count(state: Any, count: int) -> Any:
  """The optimizer state with its number of updates set: what decides learning rate and decay of a warm start."""
  return jax.tree_util.tree_map_with_path(lambda path, x: jnp.full_like(x, count) if _is_count(path) else x, state)


def updates_done(state: Any, default: jax.Array) -> jax.Array:
  """The number of updates that an optimizer state counts: fewer than steps where some were skipped; `default` where it
  counts none."""
  return next((x for path, x in jax.tree_util.tree_flatten_with_path(state)[0] if _is_count(path)), default)


def state_axes(state: Any, params: Any, logical_axes: LogicalAxes = partitioning.param_axes) -> Any:
  """Logical axes of every array of an optimizer state, so that it is sharded as its parameter is.

  Args:
    state: optimizer state of `params`, arrays or ShapeDtypeStructs. Scalars have no axes; any other array must lie
      under its parameter's name, with the parameter's shape or as Adafactor's v_row or v_col.
    params: the parameters, arrays or ShapeDtypeStructs.
    logical_axes: from a parameter's name and number of dimensions to its logical axes.

  Returns:
    The state's tree with a tuple of axis names in place of each array.

  Raises:
    ConfigError: an array that belongs to no parameter.
  """
  shapes = {partitioning.key_names(path): tuple(param.shape)
            for path, param in jax.tree_util.tree_flatten_with_path(params)[0]}

  def leaf(path, x) -> Tuple[str, ...]:
    if not x.shape:
      return ()
    names = partitioning.key_names(path)
    for start in range(len(names)):
      for stop in (len(names), len(names) - 1):
        shape = shapes.get(names[start:stop])
        if shape is None:
          continue
        axes = logical_axes(names[start:stop], len(shape))
        if tuple(x.shape) == shape:
          return axes
        how = factoring(axes, shape, min_dim_size_to_factor=1)
        if how.factored and names[-1] in ('v_row', 'v_col'):
          return _without(axes, how.column if names[-1] == 'v_row' else how.row)
    raise ConfigError(f'optimizer state {"/".join(names)} with shape {tuple(x.shape)} belongs to no parameter')

  return jax.tree_util.tree_map_with_path(leaf, state)
