"""Log-likelihoods of targets given their prefixes, without the logits of a whole batch ever existing."""

import functools
from typing import Any, NamedTuple, Optional

import jax
from jax.sharding import Mesh
import jax.numpy as jnp
import numpy as np

from openmoe_jax import decoding
from openmoe_jax.config import CAPACITY_MODES, ModelConfig, require
from openmoe_jax.model import OpenMoE, variables
from openmoe_jax.partitioning import constrain, num_shards
from openmoe_jax.sampling import argmax


class Scores(NamedTuple):
  """Per row, as NumPy arrays.

  Attributes:
    log_probs: float32 [B], natural logarithm of the probability of the targets, one after the other, given the prefix.
    num_targets: int32 [B].
    greedy: bool [B], whether greedy decoding of the prefix would give exactly the targets.
  """
  log_probs: np.ndarray
  num_targets: np.ndarray
  greedy: np.ndarray


def score(config: ModelConfig, params: Any, tokens: Any, lengths: Any, prefix_lengths: Any,
          capacity_mode: str = 'none', *, mesh: Optional[Mesh] = None) -> Scores:
  """Scores the tokens behind each row's prefix.

  Args:
    config, params: as for `decoding.generate`.
    tokens: int [B, L], prefix and targets, padded on the right, without the id 0 that starts a sequence.
    lengths: int [B], tokens of each row, at least 1.
    prefix_lengths: int [B], 0 to lengths: how many of these are given.
    capacity_mode: 'none': a row's score depends neither on its neighbours nor on padding, and sizes are rounded up to few
      different ones. 't5x': routing groups and capacities of the original's evaluation, over exactly these [B, L].
    mesh: devices, those of `params`.

  Raises:
    ConfigError: wrong shapes, a length out of range, an id that is no token.
  """
  require(capacity_mode in CAPACITY_MODES[:2], f'capacity_mode = {capacity_mode!r} is not known for scoring; valid: '
          f"{', '.join(map(repr, CAPACITY_MODES[:2]))}")
  tokens, lengths = decoding.check_tokens(config, tokens, lengths, least=1, name='row')
  prefix_lengths = np.asarray(prefix_lengths)
  require(prefix_lengths.shape == lengths.shape and np.issubdtype(prefix_lengths.dtype, np.integer),
          f'prefix_lengths must be {lengths.shape[0]} integers, one a row of tokens, not {prefix_lengths.dtype} of shape '
          f'{prefix_lengths.shape}')
  for row in np.flatnonzero((prefix_lengths < 0) | (prefix_lengths > lengths)):
    require(False, f'prefix_lengths[{row}] = {prefix_lengths[row]} must be 0 to the length of the row, {lengths[row]}')

  counts = (lengths - prefix_lengths).astype(np.int32)
  rows, length, most = *tokens.shape, max(int(counts.max()), 1)
  if capacity_mode == 't5x':
    config = decoding.t5x(config)
  else:
    config = decoding.dropless(config)
    rows = decoding.row_bucket(rows, decoding.batch_shards(mesh))
    length = decoding.bucket(int(lengths.max()))
    most = min(decoding.bucket(most), length)
  config = decoding.for_prompts(config, length)
  grid = np.zeros((rows, length), np.int32)
  tokens = tokens[:, :length]
  grid[:tokens.shape[0], :tokens.shape[1]] = tokens
  extra = lambda x: np.concatenate([x, np.zeros(rows - len(x), x.dtype)]).astype(np.int32)
  with decoding.mesh_scope(mesh):
    place = functools.partial(decoding.place, mesh)
    log_probs, greedy = run(config, most, params, place(grid), place(extra(prefix_lengths)), place(extra(counts)))
    fetch = lambda x: decoding.fetch(mesh, x)[:len(counts)]
    return Scores(fetch(log_probs), counts, fetch(greedy))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(config: ModelConfig, most: int, params: Any, tokens: jax.Array, prefix: jax.Array, counts: jax.Array):
  """Sum of log-probabilities and greedy match, [B] each, of `counts` tokens (at most `most`) from `prefix` on."""
  batch = {'decoder_input_tokens': jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1], 'decoder_target_tokens': tokens}
  if config.inputs_bidirectional_attention:
    batch['decoder_causal_attention'] = jnp.arange(tokens.shape[1]) <= prefix[:, None]
  hidden, kernel, _ = OpenMoE(config).apply(variables(params), batch, False, method='features')
  # Only the targets' positions meet the output matrix, which for short answers is most of the work saved.
  at = jnp.minimum(prefix[:, None] + jnp.arange(most), tokens.shape[1] - 1)
  hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
  targets = jnp.take_along_axis(tokens, at, axis=1)
  log_probs, matches = log_likelihoods(hidden, kernel, targets, config.loss_chunk_tokens)
  counted = jnp.arange(most) < counts[:, None]
  return jnp.sum(jnp.where(counted, log_probs, 0.), axis=1), jnp.all(matches | ~counted, axis=1)


def log_likelihoods(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, chunk_tokens: int):
  """Log-probability of each target under softmax(hidden @ kernel), and whether it is the argmax (lowest id of equals).

  Args:
    hidden: [B, L, D] in any float type; the product is taken in float32.
    kernel: float32 [D, V].
    targets: int32 [B, L].
    chunk_tokens: tokens per batch shard whose logits exist at one time.

  Returns:
    float32 [B, L] and bool [B, L].
  """
  batch, length, _ = hidden.shape
  columns = max(1, min(length, chunk_tokens * num_shards('batch') // batch))
  count = -(-length // columns)
  split = lambda x: jnp.pad(x, ((0, 0), (0, count * columns - length)) + ((0, 0),) * (x.ndim - 2)).reshape(
      batch, count, columns, *x.shape[2:]).swapaxes(0, 1)

  def chunk(args):
    hidden, targets = args
    logits = constrain(jnp.einsum('bld,dv->blv', hidden.astype(jnp.float32), kernel), 'batch', 'length', 'vocab')
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), argmax(logits) == targets

  join = lambda x: x.swapaxes(0, 1).reshape(batch, count * columns)[:, :length]
  log_probs, matches = jax.lax.map(chunk, (split(hidden), split(targets)))
  return join(log_probs), join(matches)
