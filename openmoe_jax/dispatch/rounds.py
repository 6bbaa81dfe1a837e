"""Dropless expert parallelism: rows travel to the devices of their experts and back, in rounds of bounded size.

All rows of all devices may ask for the experts of one device. A buffer for that would be as many times larger than needed
as there are devices; sending pieces of the right size takes an instruction that CPUs do not have, and a buffer of the same
size to receive them. Here a device sends up to `most` rows to each other one, experts run on what has arrived, results go
back, and that is repeated until nobody has rows left: once if no device is asked for more than `SLACK` times its share.
"""

import functools
from typing import Any, Callable, NamedTuple, Tuple

import jax
import jax.numpy as jnp

from openmoe_jax.partitioning import BATCH_AXES

SLACK = 1.5

# (rows [M, D] in the order of experts, kernels, rows of each expert int32 [E]) -> [M, D]
FeedForward = Callable[[jax.Array, Any, jax.Array], jax.Array]


def most_rows(num_tokens: int, num_selected: int, num_experts: int, num_devices: int) -> int:
  """Rows from one device to another in one round: `SLACK` times the mean, but never more than can be asked for.

  Args:
    num_tokens, num_selected: of a device's tokens, each of which asks for so many different experts.
    num_experts: of one device.
  """
  mean = SLACK * num_tokens * num_selected / num_devices
  return max(1, min(num_tokens * min(num_selected, num_experts), round(mean)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_rounds(feed_forward: FeedForward, most: int, rows: jax.Array, kernels: Any, sizes: jax.Array) -> jax.Array:
  """`feed_forward` with experts split over the mesh axis `expert`; for use inside of `jax.shard_map` over all of a mesh.

  Args:
    feed_forward: of this device's experts.
    most: rows to one device and round, the same everywhere.
    rows: [M, D], this device's rows in the order of their experts, of which those past the last run are nobody's.
    kernels: of this device's experts.
    sizes: int32 [E], how many of the rows ask for each expert of all devices.

  Returns:
    [M, D]; zero for nobody's rows.

  Memory: besides rows and results, `most` rows from each device and their results, whatever the sizes are. The backward
  pass sends the rows again and computes hidden layers again.
  """
  return _forward(feed_forward, most, rows, kernels, sizes)[0]


def _forward(feed_forward, most, rows, kernels, sizes):
  routes = _routes(sizes, rows.shape[0], most)

  def step(carry):
    number, y = carry
    now = _round(routes, number, most)
    result = feed_forward(_send(now, rows), kernels, now.sizes)
    return number + 1, _fetch(routes, now, result, y)

  y = jax.lax.while_loop(lambda carry: carry[0] < routes.count, step, (0, jnp.zeros_like(rows)))[1]
  return y, (rows, kernels, sizes)


def _backward(feed_forward, most, residuals, dy):
  rows, kernels, sizes = residuals
  routes = _routes(sizes, rows.shape[0], most)

  def step(carry):
    number, drows, dkernels = carry
    now = _round(routes, number, most)
    _, pull = jax.vjp(lambda rows, kernels: feed_forward(rows, kernels, now.sizes), _send(now, rows), kernels)
    dsent, more = pull(_send(now, dy))
    return number + 1, _fetch(routes, now, dsent, drows), jax.tree.map(jnp.add, dkernels, more)

  start = (0, jnp.zeros_like(rows), jax.tree.map(jnp.zeros_like, kernels))
  _, drows, dkernels = jax.lax.while_loop(lambda carry: carry[0] < routes.count, step, start)
  return drows, dkernels, None


in_rounds.defvjp(_forward, _backward)


class _Routes(NamedTuple):
  """Where each row goes.

  Attributes:
    count: int32 [], rounds; the same on all devices.
    first, last: int32 [devices], the run of rows for a device.
    starts: int32 [E + 1], the first row of each expert, and the end of the last one.
    device: int32 [M], the number of devices for nobody's rows.
    offset: int32 [M], place in the run of the device.
  """
  count: jax.Array
  first: jax.Array
  last: jax.Array
  starts: jax.Array
  device: jax.Array
  offset: jax.Array


def _routes(sizes: jax.Array, num_rows: int, most: int) -> _Routes:
  devices = jax.lax.axis_size('expert')
  starts = jnp.pad(jnp.cumsum(sizes), (1, 0))
  bounds = starts[::sizes.shape[0] // devices]
  first, last, row = bounds[:-1], bounds[1:], jnp.arange(num_rows)
  device = jnp.sum(last <= row[:, None], axis=1)
  count = jax.lax.pmax(jnp.max(-(-(last - first) // most)), BATCH_AXES)
  return _Routes(count, first, last, starts, device, row - first.at[device].get(mode='clip'))


class _Round(NamedTuple):
  """What one round moves.

  Attributes:
    number: int32 [].
    sent: int32 [devices, most], rows of this device; M for none.
    place: int32 [devices, most], where a row that comes from a device stands among all that come, in the order of this
      device's experts; devices * most for none.
    sizes: int32 [experts of this device], rows that come for each.
  """
  number: jax.Array
  sent: jax.Array
  place: jax.Array
  sizes: jax.Array


def _round(routes: _Routes, number: jax.Array, most: int) -> _Round:
  devices, num_rows = routes.first.shape[0], routes.device.shape[0]
  begin = routes.first + number * most
  end = jnp.minimum(begin + most, routes.last)
  index = begin[:, None] + jnp.arange(most)
  sent = jnp.where(index < end[:, None], index, num_rows)
  of_experts = lambda edges: edges.reshape(devices, -1)
  sizes = jnp.minimum(of_experts(routes.starts[1:]), end[:, None]) - jnp.maximum(
      of_experts(routes.starts[:-1]), begin[:, None])
  sizes = _exchange(jnp.maximum(sizes, 0))  # [device, expert of this one]
  # Rows that come from one device are in the order of experts already; those of all devices are to be.
  own_ends = jnp.cumsum(sizes, axis=1)
  expert = jnp.sum(own_ends[:, None, :] <= jnp.arange(most)[:, None], axis=2)  # [device, most]
  total = jnp.sum(sizes, axis=0)
  before = jnp.cumsum(total) - total + jnp.cumsum(sizes, axis=0) - sizes  # of the expert's rows from the device
  shift = jnp.take_along_axis(before - (own_ends - sizes), jnp.minimum(expert, sizes.shape[1] - 1), axis=1)
  place = jnp.where(expert < sizes.shape[1], shift + jnp.arange(most), devices * most)
  return _Round(number, sent, place, total)


def _exchange(x: jax.Array) -> jax.Array:
  """[devices, ..]: what stands at d goes to device d, what comes from it stands there."""
  return jax.lax.all_to_all(x, 'expert', split_axis=0, concat_axis=0, tiled=True)


def _send(now: _Round, rows: jax.Array) -> jax.Array:
  """What the round brings this device of `rows` [M, D]: [devices * most, D] in the order of experts, then zeros."""
  come = _exchange(rows.at[now.sent].get(mode='fill', fill_value=0)).reshape(-1, rows.shape[1])
  inverse = jnp.full(come.shape[0], come.shape[0]).at[now.place.reshape(-1)].set(
      jnp.arange(come.shape[0]), mode='drop')
  return come.at[inverse].get(mode='fill', fill_value=0)


def _fetch(routes: _Routes, now: _Round, results: jax.Array, y: jax.Array) -> jax.Array:
  """`y` [M, D] with the results of the round's rows, which are sent back to where they came from."""
  back = _exchange(results.at[now.place].get(mode='fill', fill_value=0))
  devices, most = now.sent.shape
  place = routes.offset - now.number * most
  own = (routes.device < devices) & (place >= 0) & (place < most)
  return jnp.where(own[:, None], back[routes.device, place], y)
