"""What the tests of lm-evaluation-harness share: a tiny model and its checkpoint; skips loudly without lm-eval."""

import functools
import types
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

try:
  import lm_eval
except ImportError as error:
  MESSAGE = f'{error}: openmoe-lm-eval is NOT tested here; `make install-eval` or `pip install lm-eval` makes it'
  warnings.warn(MESSAGE)
  pytest.skip(MESSAGE, allow_module_level=True)

from openmoe_jax import config as config_lib
from openmoe_jax.checkpoints import Checkpointer
from openmoe_jax.loading import Model
from openmoe_jax.names import from_t5x_names
from openmoe_jax.optimizers import make_optimizer
from openmoe_jax.partitioning import make_mesh
from openmoe_jax.train import born_sharded
import numpy_reference
import tiny_run

WINDOW = 32  # row length of the tiny run
MODEL = dict(emb_dim=16, mlp_dim=16, num_heads=4, head_dim=4)


def params_of(config: Any, seed: int = 0) -> Any:
  """Random parameters: every piece of the vocabulary is about as likely as any other, bytes included."""
  return jax.tree.map(jnp.asarray, from_t5x_names(config, numpy_reference.random_params(config, seed)))


@functools.lru_cache(maxsize=None)
def model() -> Model:
  run = tiny_run.tiny_run('', model=MODEL)
  return Model(run.model, params_of(run.model), 0, config_lib.to_dict(run))


def save(folder: Any, seed: int = 0) -> str:
  """A run of step 0 in a folder, which it returns; with seed 0 the model is `model()`."""
  run = tiny_run.tiny_run(folder, model=MODEL)
  shapes, _ = born_sharded(run, make_optimizer(run.optimizer, 100), make_mesh(run.mesh, jax.devices()[:1]))
  state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes)
  checkpointer = Checkpointer(run)
  checkpointer.save(state.replace(params=params_of(run.model, seed)), {i: b'' for i in range(4)}, wait=True)
  checkpointer.close()
  return str(folder)


def requests(*args: tuple) -> list:
  """Instances as far as models look at them."""
  return [types.SimpleNamespace(args=one) for one in args]
