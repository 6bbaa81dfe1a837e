"""Routers: pure functions from router logits to an assignment of tokens to expert slots, one file each."""

from openmoe_jax.config import ROUTERS
from openmoe_jax.routers import top_k

_ROUTERS = {'top_k': top_k.route}
assert set(_ROUTERS) == set(ROUTERS)


def route(config, logits, is_token, capacity):
  """Calls the router that `config.router` names; see `top_k.route` for the signature."""
  return _ROUTERS[config.router](config, logits, is_token, capacity)
