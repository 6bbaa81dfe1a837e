"""Who may be dropped: the capacity policies under which routing is recorded.

The same model drops different tokens under different groups and capacities, and papers rarely say which they mean.
`t5x_train` and `t5x_eval` are the original's JAX groups (SPEC 2.2) with the capacity factors of training and evaluation.
`colossalai` is the PyTorch port with which the paper's own analysis ran (SPEC 9 a, b): one group, and a capacity that is
multiplied by the number of choices; `colossalai_train` is the same with the factor of training. `none` drops nobody.
"""

from typing import NamedTuple, Optional

from openmoe_jax import decoding
from openmoe_jax.config import ModelConfig, require


class Policy(NamedTuple):
  """Attributes:
    capacity_mode: of ModelConfig.
    train_factor: whether the capacity factor of training counts instead of that of evaluation.
    rows_together: rows of a batch that compete for slots, None for all; the PyTorch port's one group is taken to be
      one sequence, so that the position in the group is the position in the sequence.
  """
  capacity_mode: str
  train_factor: bool
  rows_together: Optional[int]


POLICIES = {
    'none': Policy('none', False, None),
    't5x_train': Policy('t5x', True, None),
    't5x_eval': Policy('t5x', False, None),
    'colossalai': Policy('colossalai', False, 1),
    'colossalai_train': Policy('colossalai', True, 1),
}


def configure(config: ModelConfig, name: str) -> ModelConfig:
  """The same model, whose passes without training follow the policy `name`.

  Raises:
    ConfigError: an unknown policy, or a model without sparse layers.
  """
  require(name in POLICIES, f'policy = {name!r} is not known; valid: {", ".join(map(repr, POLICIES))}')
  require(config.num_sparse_layers > 0, 'this model has no sparse layers (ModelConfig.num_experts = 0): there is no '
          'routing to record')
  policy = POLICIES[name]
  if policy.capacity_mode == 'none':
    return decoding.dropless(config)
  dispatch = 'auto' if config.dispatch == 'dropless' else config.dispatch
  factor = config.train_capacity_factor if policy.train_factor else config.eval_capacity_factor
  return config.replace(capacity_mode=policy.capacity_mode, dispatch=dispatch, eval_capacity_factor=factor,
                        dropout_rate=0.)
