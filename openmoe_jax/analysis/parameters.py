"""Parameter counts of a model, from the names and shapes of its parameters; nothing is allocated.

"Active" are the parameters that take part in one token's forward pass: all of them, but of the experts only the
`num_selected_experts` that the token chose (the router counts as active). The paper quotes active counts without the
input embedding, which is a look-up.
"""

import math
from typing import Dict, Mapping, NamedTuple, Tuple

from openmoe_jax.config import ModelConfig
from openmoe_jax.names import t5x_shapes

# What a parameter belongs to -> a part of its name; the first that occurs decides.
_PARTS = (('input embedding', '/token_embedder/'), ('output matrix', '/logits_dense/'), ('norms', 'norm/'),
          ('attention', '/self_attention/'), ('experts', '/mlp/expert/'), ('router', '/mlp/router/'),
          ('shared experts', '/mlp/shared_experts/'),
          ('extra feed-forward', '/extra_mlp/'), ('feed-forward', '/mlp/'))


class ParameterCounts(NamedTuple):
  """Numbers of parameters.

  Attributes:
    total: all of them.
    experts: those of all experts of all sparse layers.
    active: those that one token meets.
    active_without_input_embedding, active_without_embeddings: without one or both matrices of the vocabulary.
    total_without_input_embedding: as the paper counts.
    parts: {'attention': ..., 'experts': ...}, adding up to total.
  """
  total: int
  experts: int
  active: int
  active_without_input_embedding: int
  active_without_embeddings: int
  total_without_input_embedding: int
  parts: Mapping[str, int]


def parameter_shapes(config: ModelConfig) -> Dict[str, Tuple[int, ...]]:
  """{T5X name: shape} of every parameter, one entry a layer."""
  return dict(t5x_shapes(config))


def part_of(name: str) -> str:
  """Which part of the model the parameter of this T5X name belongs to."""
  return next(part for part, piece in _PARTS if piece in f'/{name}')


def count_parameters(config: ModelConfig) -> ParameterCounts:
  """Counts of `config`'s parameters."""
  parts = dict.fromkeys((part for part, _ in _PARTS), 0)
  for name, shape in parameter_shapes(config).items():
    parts[part_of(name)] += math.prod(shape)
  total, experts = sum(parts.values()), parts['experts']
  chosen = experts // config.num_experts * config.num_selected_experts if config.num_experts else 0
  active = total - experts + chosen
  without_input = active - parts['input embedding']
  return ParameterCounts(
      total=total, experts=experts, active=active, active_without_input_embedding=without_input,
      active_without_embeddings=without_input - parts['output matrix'],
      total_without_input_embedding=total - parts['input embedding'],
      parts={part: count for part, count in parts.items() if count})
