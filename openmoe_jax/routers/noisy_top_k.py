"""Noisy top-k gating with importance and load losses (Shazeer et al. 2017, arXiv 1701.06538, section 4 and appendix A).

A second kernel decides how much noise a token's logits get: h = x W + normal * softplus(x W_noise). Gates are the
softmax over the S largest of h, so they add up to 1. Nothing else balances the experts than two losses, on what each
expert is given in total (importance) and on how often it is likely to be chosen (load), which is smooth in the logits.
"""

import jax
import jax.numpy as jnp

from openmoe_jax.config import ModelConfig
from openmoe_jax.routers import slots
from openmoe_jax.routers.report import report, router_z_loss
from openmoe_jax.routers.types import RouterContext, RouterOutput

NOISE_FLOOR = 1e-2  # added to the noise's standard deviation, as in the authors' code, tensor2tensor


def route(config: ModelConfig, logits: jax.Array, is_token: jax.Array, capacity: int, context: RouterContext
          ) -> RouterOutput:
  """Assigns tokens to expert slots.

  Args:
    config, logits, is_token, capacity: as for `top_k.route`.
    context: more_logits [G, T, E], the product with W_noise; the key of the noise, without which there is none.

  Returns:
    As the others; the auxiliary loss is importance_loss + load_loss, over all groups of the microbatch together.
  """
  selected, noise_key, order_key = config.num_selected_experts, None, None
  if context.key is not None:
    noise_key, order_key = jax.random.split(context.key)
  logits = slots.without_padding(config, logits, is_token)
  scale = jax.nn.softplus(context.more_logits) + NOISE_FLOOR
  noisy = logits
  if noise_key is not None:
    noisy = logits + slots.without_padding(config, scale * jax.random.normal(noise_key, logits.shape), is_token)
  top, index = jax.lax.top_k(noisy, min(selected + 1, config.num_experts))
  expert_index, gate = index[..., :selected], jax.nn.softmax(top[..., :selected], axis=-1)
  assignment = slots.assign(config, expert_index, gate, is_token, capacity, order_key)

  counts = is_token if config.ignore_padding_tokens else jnp.ones_like(is_token)
  given = jnp.sum(jax.nn.one_hot(expert_index, config.num_experts) * gate[..., None], axis=2)
  balance = importance_loss(given * counts[..., None])
  if selected < config.num_experts:
    balance += load_loss(probability_of_choice(logits, noisy, scale, top) * counts[..., None])
  return report(config, assignment, is_token, capacity, balance, router_z_loss(logits))


def probability_of_choice(logits: jax.Array, noisy: jax.Array, scale: jax.Array, top: jax.Array) -> jax.Array:
  """P(x, i) of the paper's appendix A: that expert i is among the S chosen ones if its own noise is drawn again.

  Args:
    logits, noisy, scale: float32 [.., E]: without noise, with it, and the noise's standard deviation.
    top: float32 [.., S + 1], the largest of `noisy` in descending order.

  Returns:
    float32 [.., E]: the chance that expert i exceeds the S-th largest of the others.
  """
  last_in, first_out = top[..., -2:-1], top[..., -1:]
  others = jnp.where(noisy > first_out, first_out, last_in)
  return jax.scipy.stats.norm.cdf((logits - others) / scale)


def importance_loss(given: jax.Array) -> jax.Array:
  """Squared coefficient of variation of the experts' gates, summed over tokens: [G, T, E] -> float32 []."""
  return _squared_variation(jnp.sum(given, axis=(0, 1)))


def load_loss(probability: jax.Array) -> jax.Array:
  """Squared coefficient of variation of the experts' expected numbers of tokens: [G, T, E] -> float32 []."""
  return _squared_variation(jnp.sum(probability, axis=(0, 1)))


def _squared_variation(x: jax.Array) -> jax.Array:
  """Variance over squared mean; 0 where there is nothing."""
  return jnp.var(x) / (jnp.mean(x) ** 2 + 1e-10)
