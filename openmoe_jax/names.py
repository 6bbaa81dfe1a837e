"""Parameter names and shapes: stacked blocks in memory, flat T5X names outside, and the way between them.

Everything here is a pure function of the configuration and of trees whose leaves may be numpy arrays, jax arrays or
ShapeDtypeStructs. A flat tree is a dictionary from names such as 'decoder/layers_0/mlp/wo/kernel' to arrays.
"""

import dataclasses
import functools
import re
from typing import Any, Callable, Dict, List, Mapping, Tuple

import jax
import jax.numpy as jnp
import numpy as np

from openmoe_jax.config import ConfigError, ModelConfig, require
from openmoe_jax.layers import hidden_widths
from openmoe_jax.partitioning import STACKED

Shape = Tuple[int, ...]

_SLOTS = ('m', 'v', 'v_row', 'v_col')  # what T5X keeps of every parameter; unused ones are zeros of shape (1,)
_UNUSED: Shape = (1,)
_MOST_NAMES = 8  # of one kind in an error message


def t5x_shapes(config: ModelConfig) -> Dict[str, Shape]:
  """Every parameter of the model: its T5X name -> its shape."""
  emb, joined, experts = config.emb_dim, config.num_heads * config.head_dim, config.num_experts
  widths = hidden_widths(config)

  def feed_forward(prefix: str, *lead: int, times: int = 1) -> Dict[str, Shape]:
    shapes = {f'{prefix}/wi_{i}/kernel': (*lead, emb, times * width) for i, width in enumerate(widths)}
    return {**shapes, f'{prefix}/wo/kernel': (*lead, times * config.mlp_dim, emb)}

  shapes = {'token_embedder/embedding': (config.vocab_size, emb)}
  for i in range(config.num_layers):
    layer = f'decoder/layers_{i}'
    shapes[f'{layer}/pre_self_attention_layer_norm/scale'] = (emb,)
    parallel = config.parallel_attention and config.is_sparse(i)
    if not parallel:
      shapes[f'{layer}/pre_mlp_layer_norm/scale'] = (emb,)
    for name in ('query', 'key', 'value'):
      shapes[f'{layer}/self_attention/{name}/kernel'] = (emb, joined)
    shapes[f'{layer}/self_attention/out/kernel'] = (joined, emb)
    if not config.is_sparse(i):
      shapes.update(feed_forward(f'{layer}/mlp'))
      continue
    shapes.update(feed_forward(f'{layer}/mlp/expert', experts))
    for name, width in config.router_kernels.items():
      shapes[f'{layer}/mlp/router/{name}/w/kernel'] = (emb, width)
    if config.num_shared_experts:
      shapes.update(feed_forward(f'{layer}/mlp/shared_experts', times=config.num_shared_experts))
    if config.extra_mlp:
      shapes.update(feed_forward(f'{layer}/extra_mlp'))
      if not config.parallel_moe and not parallel:  # which read what the experts read
        shapes[f'{layer}/pre_extra_mlp_layer_norm/scale'] = (emb,)
  shapes['decoder/decoder_norm/scale'] = (emb,)
  shapes['decoder/logits_dense/kernel'] = (emb, config.vocab_size)
  return shapes


def flatten_names(tree: Mapping[str, Any]) -> Dict[str, Any]:
  """Nested dictionaries as a flat one; names are joined by '/'."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat.update({f'{key}/{name}': leaf for name, leaf in flatten_names(value).items()})
    else:
      flat[key] = value
  return flat


def unflatten_names(flat: Mapping[str, Any]) -> Dict[str, Any]:
  """The inverse of `flatten_names`."""
  tree: Dict[str, Any] = {}
  for name, leaf in flat.items():
    *parents, last = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def stack_blocks(config: ModelConfig, tree: Any) -> Any:
  """Layers layers_0 .. layers_{N-1} -> blocks with a leading axis on every leaf; layer i is row i // moe_interval of
  blocks/layers_{i % moe_interval}.

  Args:
    config: of the model.
    tree: parameters, an optimizer state or anything else that holds trees with the parameters' names, in dictionaries,
      tuples, named tuples, dataclasses or lists. What is stacked already and what is no layer stays as it is.

  Raises:
    ConfigError: layers are missing, too many, or differ between blocks.
  """
  def decoder(node: Mapping[str, Any]) -> Dict[str, Any]:
    layers = [name for name in node if re.fullmatch(r'layers_\d+', name)]
    if not layers:
      return dict(node)
    expected = [f'layers_{i}' for i in range(config.num_layers)]
    _require_same_names(expected, layers, f'decoder with num_layers = {config.num_layers}')
    blocks = [{f'layers_{j}': node[f'layers_{b * config.moe_interval + j}'] for j in range(config.moe_interval)}
              for b in range(config.num_blocks)]
    for number, block in enumerate(blocks):
      require(jax.tree.structure(block) == jax.tree.structure(blocks[0]), f'block {number} (layers of moe_interval = '
              f'{config.moe_interval}) has other parameters than block 0: is moe_interval right?')
    rest = {name: value for name, value in node.items() if name not in expected}
    return {STACKED: jax.tree.map(lambda *leaves: _stack(leaves), *blocks), **rest}

  return _map_decoders(decoder, tree)


def unstack_blocks(config: ModelConfig, tree: Any) -> Any:
  """The inverse of `stack_blocks`: every layer gets leaves of its own, numpy ones being views."""
  def decoder(node: Mapping[str, Any]) -> Dict[str, Any]:
    if STACKED not in node:
      return dict(node)
    _require_same_names([f'layers_{j}' for j in range(config.moe_interval)], list(node[STACKED]),
                        f'a block with moe_interval = {config.moe_interval}')
    for leaf in jax.tree.leaves(node[STACKED]):
      require(len(leaf.shape) > 0 and leaf.shape[0] == config.num_blocks, f'a leaf of {STACKED} has shape '
              f'{tuple(leaf.shape)}: the first dimension must be num_layers / moe_interval = {config.num_blocks}')
    layers = {f'layers_{b * config.moe_interval + j}': jax.tree.map(functools.partial(_row, b),
                                                                    node[STACKED][f'layers_{j}'])
              for b in range(config.num_blocks) for j in range(config.moe_interval)}
    return {**layers, **{name: value for name, value in node.items() if name != STACKED}}

  return _map_decoders(decoder, tree)


def _map_decoders(function: Callable[[Mapping[str, Any]], Dict[str, Any]], tree: Any) -> Any:
  """Rebuilds a tree with `function` applied to every dictionary that is found under the key 'decoder'."""
  if isinstance(tree, Mapping):
    return {key: function(value) if key == 'decoder' and isinstance(value, Mapping) else _map_decoders(function, value)
            for key, value in tree.items()}
  if isinstance(tree, tuple) and hasattr(tree, '_fields'):
    return type(tree)(*(_map_decoders(function, value) for value in tree))
  if dataclasses.is_dataclass(tree):
    return dataclasses.replace(tree, **{field.name: _map_decoders(function, getattr(tree, field.name))
                                        for field in dataclasses.fields(tree)})
  if isinstance(tree, (tuple, list)):
    return type(tree)(_map_decoders(function, value) for value in tree)
  return tree


def _stack(leaves: Tuple[Any, ...]) -> Any:
  first = leaves[0]
  shapes = {tuple(leaf.shape) for leaf in leaves}
  require(len(shapes) == 1, f'one parameter has different shapes in different blocks: {sorted(shapes)}')
  if isinstance(first, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype)
  if any(isinstance(leaf, jax.Array) for leaf in leaves):
    return jnp.stack(leaves)
  return np.stack(leaves)


def _row(index: int, leaf: Any) -> Any:
  return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf[index]


def _some(lines: List[str]) -> str:
  more = [f'... and {len(lines) - _MOST_NAMES} more'] if len(lines) > _MOST_NAMES else []
  return ''.join(f'\n  {line}' for line in lines[:_MOST_NAMES] + more)


def _require_same_names(expected, given, what: str) -> None:
  missing, extra = [n for n in expected if n not in given], [n for n in given if n not in expected]
  require(not missing and not extra, f'names do not fit {what}:' + _some([f'- {n} (missing)' for n in missing]) +
          _some([f'+ {n} (unexpected)' for n in extra]))


def from_t5x_names(config: ModelConfig, arrays: Mapping[str, Any]) -> Dict[str, Any]:
  """T5X names -> the parameter tree of the model, stacked if `config.scan_blocks`.

  Args:
    config: of the model.
    arrays: name -> array of the shape in `t5x_shapes(config)`; other float types become float32.

  Raises:
    ConfigError: the difference between the names and shapes expected and given.
  """
  expected = t5x_shapes(config)
  missing = [f'- {name} {shape}' for name, shape in expected.items() if name not in arrays]
  extra = [f'+ {name} {_shape(array)}' for name, array in arrays.items() if name not in expected]
  shaped = [f'! {name} {_shape(arrays[name])} instead of {shape}' for name, shape in expected.items()
            if name in arrays and _shape(arrays[name]) != shape]
  if missing or extra or shaped:
    raise ConfigError(f'the arrays do not fit the model: {len(missing)} of {len(expected)} names missing (-), '
                      f'{len(extra)} unexpected (+), {len(shaped)} with another shape (!)' +
                      _some(missing) + _some(extra) + _some(shaped))
  tree = unflatten_names({name: _float32(name, arrays[name]) for name in expected})
  return stack_blocks(config, tree) if config.scan_blocks else tree


def to_t5x_names(config: ModelConfig, params: Mapping[str, Any]) -> Dict[str, Any]:
  """The inverse of `from_t5x_names`, for parameters stacked or not.

  Raises:
    ConfigError: they are not the parameters of this configuration.
  """
  flat, expected = flatten_names(unstack_blocks(config, params)), t5x_shapes(config)
  _require_same_names(expected, flat, 'the model')
  for name, shape in expected.items():
    require(_shape(flat[name]) == shape, f'parameter {name} has shape {_shape(flat[name])} instead of {shape}')
  return {name: flat[name] for name in expected}


def _shape(array: Any) -> Shape:
  return tuple(np.shape(array)) if not hasattr(array, 'shape') else tuple(array.shape)


def _float32(name: str, array: Any) -> Any:
  array = array if hasattr(array, 'dtype') else np.asarray(array)
  require(jnp.issubdtype(array.dtype, jnp.floating), f'parameter {name} has dtype {array.dtype}; floats are expected')
  if array.dtype == jnp.float32:
    return array
  if isinstance(array, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(array.shape, jnp.float32)
  return array.astype(jnp.float32)


def adafactor_to_t5x(config: ModelConfig, count: Any, stats: Mapping[str, Any]) -> Tuple[Any, Dict[str, Any]]:
  """Adafactor's memory as T5X keeps it.

  Args:
    config: of the model.
    count, stats: the fields of `optimizers.AdafactorState`, stacked or not.

  Returns:
    The step, and a flat dictionary with <parameter>/m, /v, /v_row and /v_col for every parameter; m and the unused
    ones are float32 zeros of shape (1,).
  """
  flat = flatten_names(unstack_blocks(config, stats))
  expected = t5x_shapes(config)
  _require_same_names(expected, {name.rpartition('/')[0] for name in flat}, 'the statistics of the model')
  zeros = lambda: np.zeros(_UNUSED, np.float32)
  return count, {f'{name}/{slot}': flat.get(f'{name}/{slot}', zeros()) for name in expected for slot in _SLOTS}


def adafactor_from_t5x(config: ModelConfig, step: Any, arrays: Mapping[str, Any]) -> Tuple[Any, Dict[str, Any]]:
  """The inverse of `adafactor_to_t5x`: `AdafactorState(*adafactor_from_t5x(...))`, stacked if `config.scan_blocks`.

  Slots of shape (1,) may be left out.

  Raises:
    ConfigError: statistics are missing, belong to no parameter, or have shapes that do not fit their parameter; or
      there is momentum (a slot m), which we do not keep.
  """
  expected = t5x_shapes(config)
  extra = [name for name in arrays if name.rpartition('/')[0] not in expected or name.rpartition('/')[2] not in _SLOTS]
  require(not extra, f'{len(extra)} optimizer arrays belong to no parameter of the model:' +
          _some([f'+ {name} {_shape(arrays[name])}' for name in extra]))
  flat, wrong = {}, []
  for name, shape in expected.items():
    slots = {slot: arrays[f'{name}/{slot}'] for slot in _SLOTS if f'{name}/{slot}' in arrays
             and (_shape(arrays[f'{name}/{slot}']) != _UNUSED or (slot == 'v' and shape == _UNUSED))}
    shapes = {slot: _shape(array) for slot, array in slots.items()}
    factored = {shape[:-2] + shape[-1:], shape[:-1]} if len(shape) > 1 else None
    if shapes != {'v': shape} and not (set(shapes) == {'v_row', 'v_col'} and set(shapes.values()) == factored):
      wrong.append(f'! {name} {shape}: {shapes or "nothing"}')
    flat.update({f'{name}/{slot}': _float32(f'{name}/{slot}', array) for slot, array in slots.items()})
  require(not wrong, f'{len(wrong)} of {len(expected)} parameters lack a v, or v_row and v_col, that fits:' +
          _some(wrong))
  tree = unflatten_names(flat)
  return step, stack_blocks(config, tree) if config.scan_blocks else tree
