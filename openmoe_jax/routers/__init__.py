"""Routers: pure functions from router logits to an assignment of tokens to expert slots, one file each."""

from openmoe_jax.config import ROUTERS
from openmoe_jax.routers import (expert_choice, frozen, hashing, hierarchical, noisy_top_k, sigmoid, surgery, switch,
                                  top_k)
from openmoe_jax.routers.types import NO_CONTEXT

_ROUTERS = {'top_k': top_k.route, 'switch': switch.route, 'sigmoid': sigmoid.route,
            'noisy_top_k': noisy_top_k.route, 'hash': hashing.route, 'frozen': frozen.route,
            'expert_choice': expert_choice.route, 'hierarchical': hierarchical.route}
assert set(_ROUTERS) == set(ROUTERS)


def route(config, logits, is_token, capacity, context=NO_CONTEXT):
  """Calls the router that `config.router` names; see `top_k.route` for the signature."""
  router = _ROUTERS[config.router]
  if context.state and surgery.SURGERY in context.state:
    return surgery.route(router, config, logits, is_token, capacity, context)
  return router(config, logits, is_token, capacity, context)
