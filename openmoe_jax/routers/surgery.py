"""Routing with something taken out or replaced, for ablations. What is done is data, so that one compiled program does all.

The edits of a layer are a dictionary of arrays, those of a model the same with a leading axis of sparse layers. They are
a collection beside 'params', and reach the layer among the arrays of its router state.
"""

from typing import Callable, Dict

import jax
import jax.numpy as jnp
import numpy as np

from openmoe_jax.config import ModelConfig
from openmoe_jax.routers import frozen, slots
from openmoe_jax.routers.report import report
from openmoe_jax.routers.types import RouterContext, RouterOutput

SURGERY = 'surgery'  # the collection, and the name among the arrays of the router state
ROUTER, TABLE, RANDOM = range(3)  # who chooses the experts
OWN, OF_CHOICES, EVEN = range(3)  # what their gates are
NEVER = -1e9  # a logit whose softmax is 0, and which times 0 (padding) is still a number

Edits = Dict[str, jax.Array]


def neutral(config: ModelConfig) -> Dict[str, np.ndarray]:
  """Edits that change nothing, to be filled in; arrays with a leading axis of sparse layers.

  * scale: float32 [N, E], a factor of each expert's output (of its gates).
  * allowed: bool [N, E]; an expert that is not gets no probability, so that the next best is chosen instead.
  * chooser: int32 [N], ROUTER, TABLE or RANDOM.
  * gates: int32 [N]: OWN, the router's, by rank: others than its choices get what these would have got; OF_CHOICES, the
    probabilities that the router gives to those chosen, as the router 'frozen' does; EVEN, for each choice the mean of
    what the router gives to all choices of the token.
  * experts: int32 [N, V, S], the table by token id.
  * seed: uint32 [N], of the random choices.
  """
  layers, experts = config.num_sparse_layers, config.num_experts
  return {'scale': np.ones((layers, experts), np.float32), 'allowed': np.ones((layers, experts), bool),
          'chooser': np.zeros(layers, np.int32), 'gates': np.zeros(layers, np.int32),
          'experts': np.zeros((layers, config.vocab_size, config.num_selected_experts), np.int32),
          'seed': np.arange(layers, dtype=np.uint32)}


def route(router: Callable[..., RouterOutput], config: ModelConfig, logits: jax.Array, is_token: jax.Array, capacity: int,
          context: RouterContext) -> RouterOutput:
  """Assigns tokens to expert slots, as the router would but for the edits; losses are 0.

  Args:
    router: the function that `config.router` names; one in which tokens choose.
    config, logits, is_token, capacity: as for `top_k.route`; logits are None of a router that has none.
    context: with the edits in its state.
  """
  state = dict(context.state)
  edits = state.pop(SURGERY)
  if logits is not None:
    logits = jnp.where(edits['allowed'], logits, NEVER)
  if 'bias' in state:
    state['bias'] = jnp.where(edits['allowed'], state['bias'], NEVER)
  context = context._replace(state=state)
  choose = lambda router, context: router(config, logits, is_token, is_token.shape[1], context).assignment  # all are kept
  own = choose(router, context)
  index, gate = own.expert_index, own.gate

  table = edits['experts'][context.token_ids]
  scores = jax.random.uniform(jax.random.key(edits['seed']), (*is_token.shape, config.num_experts))
  random = jax.lax.top_k(scores, config.num_selected_experts)[1]
  index = jnp.select([edits['chooser'] == TABLE, edits['chooser'] == RANDOM], [table, random], index)
  even = jnp.broadcast_to(jnp.mean(gate, axis=-1, keepdims=True), gate.shape)
  if logits is not None:
    by_table = choose(frozen.route, context._replace(state={'experts': edits['experts']})).gate
    gate = jnp.where(edits['gates'] == OF_CHOICES, by_table, gate)
  gate = jnp.where(edits['gates'] == EVEN, even, gate)
  assignment = slots.assign(config.replace(normalize_gates=False), index, gate, is_token, capacity, context.key)
  scale = edits['scale'].at[assignment.expert_index].get(mode='fill', fill_value=0)
  assignment = assignment._replace(gate=assignment.gate * scale)
  return report(config, assignment, is_token, capacity, jnp.zeros(()), jnp.zeros(()))
