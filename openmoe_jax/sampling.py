"""The next token from logits: greedy, temperature, top-k, top-p; pure functions of [B, V] arrays."""

from typing import NamedTuple, Tuple

import jax
import jax.numpy as jnp

from openmoe_jax.config import require


class Sampling(NamedTuple):
  """How to choose.

  Attributes:
    temperature: logits are divided by it; 0 takes the likeliest token (of several, the lowest id).
    top_k: only the k likeliest tokens (of equal ones, the lowest ids); 0 for all.
    top_p: of these, only the fewest likeliest ones whose probabilities, after temperature and top-k, add up to at least
      this (Holtzman et al. 2020).
  """
  temperature: float = 0.
  top_k: int = 0
  top_p: float = 1.


def check(sampling: Sampling, vocab_size: int) -> Sampling:
  """The same with plain numbers.

  Raises:
    ConfigError: a value out of range, with its name.
  """
  temperature, top_k, top_p = sampling
  require(0 <= temperature < float('inf'), f'temperature = {temperature} must be 0 (greedy) or a positive number')
  require(0 <= top_k <= vocab_size and top_k == int(top_k), f'top_k = {top_k} must be 0 (off) or a number of tokens up to '
          f'the vocabulary\'s {vocab_size}')
  require(0 < top_p <= 1, f'top_p = {top_p} must be above 0 and at most 1 (off)')
  return Sampling(float(temperature), int(top_k), float(top_p))


def row_keys(seed: int, rows: jax.Array, num_samples: int) -> jax.Array:
  """One key for each sample of each row, [B * num_samples], from the row's own number and nothing else of the batch."""
  per_row = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)
  per_sample = jax.vmap(jax.random.fold_in, (0, None))
  return jax.vmap(per_sample, (None, 0), 1)(per_row, jnp.arange(num_samples)).reshape(-1)


def choose(logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array, *, greedy: bool, top_k: int,
           nucleus: bool) -> Tuple[jax.Array, jax.Array]:
  """Chooses a token a row.

  Args:
    logits: float32 [B, V].
    keys: [B], one random key a row.
    temperature, top_p: numbers, which may be traced; see `Sampling`.
    greedy, top_k, nucleus: static: temperature is 0; number of candidates; whether top_p is in use.

  Returns:
    int32 [B], and float32 [B], the token's log-probability under the model: before temperature, top-k and top-p.
  """
  if greedy:
    token = argmax(logits)
  else:
    scaled = logits / temperature
    candidates = None
    if top_k:
      scaled, candidates = jax.lax.top_k(scaled, top_k)
    if nucleus:
      scaled = jnp.where(in_nucleus(jax.nn.softmax(scaled, axis=-1), top_p), scaled, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scaled.shape[1:], jnp.float32))(keys)
    token = argmax(scaled + noise)  # a draw from softmax(scaled): Gumbel 1954; Maddison et al. 2014
    if top_k:
      token = jnp.take_along_axis(candidates, token[:, None], axis=-1)[:, 0]
  chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
  return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def argmax(x: jax.Array) -> jax.Array:
  """Lowest index of the largest of [B, V]: int32 [B]. Two plain reductions, on a CPU faster than one over pairs."""
  index = jnp.arange(x.shape[-1], dtype=jnp.int32)
  return jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), index, x.shape[-1] - 1), axis=-1)


def in_nucleus(probs: jax.Array, top_p: jax.Array) -> jax.Array:
  """The fewest likeliest tokens that together have at least `top_p`: bool [B, V] of probabilities [B, V].

  Equal probabilities go in together. Instead of a sort of the vocabulary, the least probability that stays is found by
  bisection over the bits of a float32, which order positive numbers as the numbers themselves do.
  """
  bits = jax.lax.bitcast_convert_type(probs.astype(jnp.float32), jnp.int32)

  def halve(_, bounds):
    low, high = bounds  # what is at least `low` has enough, what is at least `high` has not
    middle = low + (high - low) // 2
    enough = jnp.sum(jnp.where(bits >= middle[:, None], probs, 0.), axis=-1) >= top_p
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  # The likeliest token always stays, also where rounding leaves the sum of all below top_p.
  top = jnp.max(bits, axis=-1)
  low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(top), top + 1))
  return bits >= low[:, None]
