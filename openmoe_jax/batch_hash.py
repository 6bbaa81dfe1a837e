"""A short name of a batch, the same however many hosts and devices hold it: two runs with equal names saw equal data."""

from typing import Mapping

import jax
import jax.numpy as jnp


@jax.jit
def batch_hash(batch: Mapping[str, jax.Array]) -> jax.Array:
  """uint32 [] of a global batch of integer arrays.

  Every value is mixed with its place and feature, and the results are added up modulo 2**32, which no sharding changes.
  """
  total = jnp.uint32(0)
  for number, name in enumerate(sorted(batch)):
    values = batch[name].astype(jnp.uint32)
    places = jnp.arange(values.size, dtype=jnp.uint32).reshape(values.shape)
    total += jnp.sum(_mixed(values ^ _mixed(places + jnp.uint32(0x9e3779b9 * (number + 1) % 2**32))), dtype=jnp.uint32)
  return total


def _mixed(x: jax.Array) -> jax.Array:
  """A permutation of uint32 in which every bit of the input flips about half of the output's (MurmurHash3's last step,
  Appleby 2011)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85ebca6b)
  x = (x ^ (x >> 13)) * jnp.uint32(0xc2b2ae35)
  return x ^ (x >> 16)
