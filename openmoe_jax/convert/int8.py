"""int8 weights: symmetric, one scale for each output of a kernel (the weight-only scheme of LLM.int8 and of qwix).

In PyTorch's layout: a dense kernel [out, in] has scales [out, 1], the experts' [E, in, out] have [E, 1, out]. Norms,
the embedding, the router and the output matrix keep their type: they are small, or decide discretely.
"""

from typing import Tuple

import numpy as np

SCALE = '_scale'
_LARGEST = 127.


def is_quantized(name: str) -> bool:
  """Whether the parameter with this T5X name becomes int8: kernels of attention, of FFNs and of experts."""
  return name.startswith('decoder/layers_') and name.endswith('/kernel') and '/router/' not in name


def scale_shape(shape: Tuple[int, ...]) -> Tuple[int, ...]:
  return (shape[0], 1) if len(shape) == 2 else (shape[0], 1, shape[2])


def quantize(weight: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
  """[out, in] or [E, in, out] -> (int8 of that shape, float32 scales), whose product is within scale / 2 of it."""
  weight = weight.astype(np.float32)
  scale = np.max(np.abs(weight), axis=1, keepdims=True) / np.float32(_LARGEST)
  scale = np.where(scale > 0, scale, np.float32(1))
  return np.clip(np.rint(weight / scale), -_LARGEST, _LARGEST).astype(np.int8), scale.astype(np.float32)
