"""int8 weights in memory: kernels of attention, of feed-forward networks and of experts, with a scale for each output.

  model = quantization.quantize_model(load('runs/demo'))     # a quarter of the memory of those kernels

Weight-only, symmetric, rounded to nearest (the scheme of LLM.int8, Dettmers et al. 2022, without its outliers), as
`openmoe-convert --int8` writes it. A kernel is multiplied out where it is used and as much of it as is used: one expert
at a time on a CPU, inside the product on an accelerator. Embedding, output matrix, router and norms keep their type.
A library that swaps products for quantized ones while the model runs (qwix) leaves a kernel that it does not recognise,
such as those of ragged products, in float32 without saying so; here a kernel is of another type, and stays it.
"""

import dataclasses
from typing import Any, Tuple

import jax
import jax.numpy as jnp

from openmoe_jax.config import require

_LARGEST = 127.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Kernel:
  """Stands in for a kernel [.., in, out] wherever it is cast before it is used.

  Attributes:
    values: int8 [.., in, out].
    scale: float32 [.., 1, out].
  """
  values: jax.Array
  scale: jax.Array

  @property
  def shape(self) -> Tuple[int, ...]:
    return self.values.shape

  def astype(self, dtype: Any) -> jax.Array:
    """The kernel, multiplied out in float32 and rounded once."""
    return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


@jax.jit
def quantize_kernel(kernel: jax.Array) -> Int8Kernel:
  """[.., in, out] of any float type; values * scale is within scale / 2 of it."""
  kernel = kernel.astype(jnp.float32)
  largest = jnp.max(jnp.abs(kernel), axis=-2, keepdims=True)
  scale = jnp.where(largest > 0, largest / _LARGEST, 1.)
  return Int8Kernel(jnp.clip(jnp.round(kernel / scale), -_LARGEST, _LARGEST).astype(jnp.int8), scale)


def is_quantized(path: Tuple[Any, ...]) -> bool:
  """Whether the parameter at this path of `jax.tree_util` becomes int8."""
  names = [key.key for key in path]
  return names[-1] == 'kernel' and 'router' not in names and 'logits_dense' not in names


def quantize(params: Any) -> Any:
  """The same parameters with an Int8Kernel for every kernel that becomes one; kernels keep their devices.

  Raises:
    ConfigError: they are quantized already.
  """
  known = any(isinstance(x, Int8Kernel) for x in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Int8Kernel)))
  require(not known, 'these parameters are int8 already')
  return jax.tree_util.tree_map_with_path(lambda path, x: quantize_kernel(x) if is_quantized(path) else x, params)


def quantize_model(model: Any) -> Any:
  """A loaded model (`loading.Model`) with int8 kernels, for `generate` and `score`.

  Raises:
    ConfigError: as `quantize`, or its mesh splits kernels over the axis 'model', of which scales have nothing to split.
  """
  require(model.mesh is None or model.mesh.shape['model'] == 1, 'int8 kernels are not split over the mesh axis '
          f"'model', which has {model.mesh.shape['model'] if model.mesh else 1} devices here; use the axis 'expert'")
  return type(model)(model.config, quantize(model.params), model.step, model.run, model.mesh,
                     model.router_state)
