"""A model_dir with a tiny model of random numbers and the demo vocabulary: what it writes is nonsense, but varied."""

from typing import Any, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from openmoe_jax.checkpoints import Checkpointer
from openmoe_jax.config import OptimizerConfig
from openmoe_jax.names import from_t5x_names
from openmoe_jax.optimizers import make_optimizer
from openmoe_jax.train_state import init_train_state
from tests import numpy_reference, tiny_run


def write(folder: Any, steps: Sequence[int] = (3,), row_length: int = 64, **model) -> str:
  """The model_dir; parameters differ from step to step."""
  run = tiny_run.tiny_run(folder, model={'emb_dim': 16, 'mlp_dim': 16, 'head_dim': 4, **model},
                          data={'task_feature_lengths': {'targets': row_length}})
  checkpointer = Checkpointer(run)
  for step in steps:
    params = jax.tree.map(jnp.asarray, from_t5x_names(run.model, numpy_reference.random_params(run.model, step)))
    state = init_train_state(run.model, make_optimizer(OptimizerConfig(), 10), params)
    checkpointer.save(state.replace(step=jnp.int32(step)), {}, {'tokens': 1000 * step})
  checkpointer.close()
  return str(folder)
