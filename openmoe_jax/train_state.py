"""What changes from step to step: parameters, optimizer state, router state, the step counter."""

from typing import Any

import flax
import jax
from jax.sharding import Mesh
import jax.numpy as jnp
import optax

from openmoe_jax import optimizers
from openmoe_jax import partitioning
from openmoe_jax.config import MeshConfig, ModelConfig
from openmoe_jax.model import OpenMoE, variables
from openmoe_jax.routers.state import init_state


@flax.struct.dataclass
class TrainState:
  """Attributes:

    step: int32 [], batches trained on so far; those whose step was skipped count.
    params: nested dictionary of float32 arrays.
    opt_state: the optax state.
    router_state: routers' own arrays (frozen tables, balancing biases): saved like parameters, not differentiated.
  """
  step: jax.Array
  params: Any
  opt_state: Any
  router_state: Any

  @property
  def variables(self) -> Any:
    """What evaluates the model: parameters and router state."""
    return variables(self.params, self.router_state)


def init_params(config: ModelConfig, seed: int) -> Any:
  """Random parameters with the distributions of SPEC 5; the same for every mesh and number of devices."""
  tokens = jnp.ones((1, 2), jnp.int32)
  batch = {'decoder_input_tokens': tokens, 'decoder_target_tokens': tokens, 'decoder_causal_attention': tokens}
  return OpenMoE(config).init(jax.random.key(seed), batch)['params']


def init_train_state(config: ModelConfig, optimizer: optax.GradientTransformation, params: Any) -> TrainState:
  """The state before the first step. It holds a copy of `params`: the training step donates its state, and the caller's
  arrays stay usable."""
  params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params),
                    router_state=init_state(config))


def abstract_train_state(config: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
  """Shapes and dtypes of a train state, nothing allocated."""
  return jax.eval_shape(lambda: init_train_state(config, optimizer, init_params(config, 0)))


def state_shardings(state: TrainState, mesh: Mesh, config: MeshConfig) -> TrainState:
  """A NamedSharding for every array of a train state (of arrays or ShapeDtypeStructs), as it is kept between steps."""
  whole = lambda tree: jax.tree.map(lambda x: (None,) * x.ndim, tree)
  split = lambda axes, fsdp: partitioning.shardings(axes, mesh, fsdp)
  return TrainState(step=split(whole(state.step), ()), params=partitioning.tree_shardings(state.params, mesh, config.fsdp),
                    opt_state=split(optimizers.state_axes(state.opt_state, state.params), config.optimizer_fsdp),
                    router_state=split(whole(state.router_state), ()))


def keep_sharded(state: TrainState, config: MeshConfig) -> TrainState:
  """A state that a step has computed, pinned to where `state_shardings` keeps it on the mesh in force."""
  return state.replace(
      params=partitioning.keep(state.params, partitioning.params_axes(state.params), config.fsdp),
      opt_state=partitioning.keep(state.opt_state, optimizers.state_axes(state.opt_state, state.params),
                                  config.optimizer_fsdp))
