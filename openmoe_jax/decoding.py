"""Generation with a key/value cache: one compiled prefill and one compiled loop of single-token steps.

A prompt of n tokens is the row [0, t_1 .. t_n]: id 0 starts every sequence (SPEC 12). Prompts of all lengths share one
rectangle of P positions. Generated tokens go to the slots P, P+1, .. of the cache, the same ones for all rows; since
keys are kept rotated, a slot need not be a position, and writing is one slice in place.

capacity_mode 'none' (default): no token is ever dropped. A row's result depends neither on its neighbours nor on
padding nor on the rectangle, so sizes are rounded up to few different ones and programs are compiled once for each.
capacity_mode 't5x': what the original does (SPEC 8), where they do depend on all of that: nothing is rounded up, the
prompt's last token is left out of the cache and fed first, and finished rows go on.
"""

import contextlib
import functools
from typing import Any, Iterator, NamedTuple, Optional, Sequence, Tuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import jax.numpy as jnp
import numpy as np

from openmoe_jax import sampling as sampling_lib
from openmoe_jax.attention import BlockContext, make_logit_mask
from openmoe_jax.config import CAPACITY_MODES, ModelConfig, require
from openmoe_jax.model import OpenMoE, variables
from openmoe_jax.partitioning import batch_sharding
from openmoe_jax.routers.groups import group_tokens

SMALLEST_BUCKET = 32
QUERY_BLOCK = 256  # queries of a prompt whose scores exist at one time


class Generated(NamedTuple):
  """What `generate` returns, as NumPy arrays; [B, num_samples, ..] if num_samples was given.

  Attributes:
    tokens: int32 [B, max_new_tokens], zero after the row's end; the EOS or stop sequence that ended it is included.
    lengths: int32 [B], tokens generated.
    log_probs: float32 [B, max_new_tokens], of the tokens under the model, whatever the sampling; 0 after the end.
  """
  tokens: np.ndarray
  lengths: np.ndarray
  log_probs: np.ndarray


def bucket(size: int) -> int:
  """`size` rounded up to one of at most four sizes an octave: few programs, at most a quarter of padding from 128 on."""
  step = max(SMALLEST_BUCKET, 1 << max(size.bit_length() - 3, 0))
  return -(-size // step) * step


def row_bucket(rows: int, shards: int = 1) -> int:
  """A number of rows rounded up to a power of two, and to a multiple of the mesh's batch shards."""
  rows = 1 << (rows - 1).bit_length()
  return -(-rows // shards) * shards


def batch_shards(mesh: Optional[Mesh]) -> int:
  """Into how many parts a mesh splits the rows of a batch."""
  return 1 if mesh is None else mesh.shape['data'] * mesh.shape['expert']


def dropless(config: ModelConfig) -> ModelConfig:
  """The same model, evaluated so that no token is ever dropped and padding reaches no expert."""
  return config.replace(capacity_mode='none', dispatch='dropless', ignore_padding_tokens=True, dropout_rate=0.)


def t5x(config: ModelConfig) -> ModelConfig:
  """The same model with the routing groups and capacities of the original's evaluation."""
  dispatch = 'auto' if config.dispatch == 'dropless' else config.dispatch
  return config.replace(capacity_mode='t5x', dispatch=dispatch, dropout_rate=0.)


def for_prompts(config: ModelConfig, length: int) -> ModelConfig:
  """The same model, with attention that holds the scores of few queries of a long row at a time."""
  blocks = max(config.attention_query_blocks, -(-length // QUERY_BLOCK))
  return config.replace(remat='none', attention='blocked', attention_query_blocks=min(blocks, length))


def check_tokens(config: ModelConfig, tokens: Any, lengths: Any, least: int, name: str = 'prompt'
                 ) -> Tuple[np.ndarray, np.ndarray]:
  """int32 [B, L] with zeros past each row's length, and the lengths.

  Raises:
    ConfigError: wrong shapes or types, a length outside [least, L], or an id that is no token.
  """
  tokens, lengths = np.asarray(tokens), np.asarray(lengths)
  require(tokens.ndim == 2 and tokens.shape[0] > 0 and np.issubdtype(tokens.dtype, np.integer), f'tokens must be '
          f'integers of shape [batch, length], not {tokens.dtype} of shape {tokens.shape}')
  require(lengths.shape == tokens.shape[:1] and np.issubdtype(lengths.dtype, np.integer), f'lengths must be integers of '
          f'shape [{tokens.shape[0]}], one a row of tokens, not {lengths.dtype} of shape {lengths.shape}')
  for row in np.flatnonzero((lengths < least) | (lengths > tokens.shape[1])):
    require(False, f'lengths[{row}] = {lengths[row]}: a {name} has {least} to {tokens.shape[1]} tokens')
  inside = np.arange(tokens.shape[1]) < lengths[:, None]
  tokens = np.where(inside, tokens, 0)
  for row, column in np.argwhere(inside & ((tokens < 1) | (tokens >= config.vocab_size))):
    require(False, f'tokens[{row}, {column}] = {tokens[row, column]} is no token of the vocabulary: ids are 1 to '
            f'{config.vocab_size - 1} (0 is padding, and the start that is put in front by itself)')
  return tokens.astype(np.int32), lengths.astype(np.int32)


class _Program(NamedTuple):
  """Everything that is compiled in."""
  config: ModelConfig
  prompt: int  # P
  new: int  # N, slots and columns for generated tokens
  num_samples: int
  t5x: bool
  greedy: bool
  top_k: int
  nucleus: bool


class _Options(NamedTuple):
  """Numbers that are not compiled in."""
  temperature: jax.Array
  top_p: jax.Array
  eos_id: jax.Array  # -1 for none
  stops: jax.Array  # int32 [M, W], -1 in front of shorter ones


class State(NamedTuple):
  """A generation between two steps. R rows: samples of a prompt stand side by side.

  Attributes:
    cache: a KeysValues [.., R, H, P + N, K] per layer, see `model.Decoder`.
    prefilled: int32 [R], positions that the prompt left in the cache.
    fed: int32 [], single-token steps done.
    count: int32 [], columns of `tokens` that are written.
    token: int32 [R], what the next step is fed.
    limits: int32 [R], most tokens of each row.
    done: bool [R].
    keys: [R] random keys.
    tokens, log_probs, lengths: as in `Generated`, N columns.
  """
  cache: Any
  prefilled: jax.Array
  fed: jax.Array
  count: jax.Array
  token: jax.Array
  limits: jax.Array
  done: jax.Array
  keys: jax.Array
  tokens: jax.Array
  log_probs: jax.Array
  lengths: jax.Array


def _logits(hidden, kernel):
  return hidden.astype(jnp.float32) @ kernel


@functools.partial(jax.jit, static_argnums=0)
def prefill(program: _Program, params: Any, tokens: jax.Array, lengths: jax.Array, keys: jax.Array, limits: jax.Array,
            done: jax.Array, options: _Options) -> State:
  """Runs the prompts, [B, P] with the starting 0 in front; in mode 'none' also chooses the first token.

  Args:
    lengths: int32 [B], tokens of each prompt without the 0.
    keys, limits, done: [B * num_samples], see `State`.
  """
  config = program.config
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
  is_prompt = positions <= lengths[:, None]
  context = BlockContext(tokens, positions, is_prompt, make_logit_mask(tokens),
                         bidirectional=is_prompt if config.inputs_bidirectional_attention else None)
  hidden, kernel, new = OpenMoE(config, decoding=True).apply(variables(params), context, method='cached')
  repeat = lambda x, axis=0: jnp.repeat(x, program.num_samples, axis)
  room = lambda x: jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, program.new), (0, 0)))
  rows = done.shape[0]
  state = State(
      cache=jax.tree.map(lambda x: room(repeat(x, -4)), new),
      prefilled=repeat(lengths if program.t5x else lengths + 1),
      fed=jnp.zeros((), jnp.int32), count=jnp.zeros((), jnp.int32),
      token=repeat(jnp.take_along_axis(tokens, lengths[:, None], axis=1)[:, 0]), limits=limits, done=done, keys=keys,
      tokens=jnp.zeros((rows, program.new), jnp.int32), log_probs=jnp.zeros((rows, program.new), jnp.float32),
      lengths=jnp.zeros(rows, jnp.int32))
  if program.t5x:
    return state
  last = jnp.take_along_axis(hidden, lengths[:, None, None], axis=1)[:, 0]
  return _append(program, state, repeat(_logits(last, kernel)), options)


def step_logits(config: ModelConfig, params: Any, state: State, prompt: int, t5x: bool = False
                ) -> Tuple[jax.Array, State]:
  """Feeds one token a row: float32 logits [R, V], and the state with the token's keys and values in its cache."""
  slots = jnp.arange(jax.tree.leaves(state.cache)[0].shape[-2])
  seen = (slots < state.prefilled[:, None]) | ((slots >= prompt) & (slots <= prompt + state.fed))
  # Zero vectors reach no expert; finished rows of the original go on and take capacity.
  active = jnp.ones_like(state.done) if t5x else ~state.done
  context = BlockContext(token_ids=state.token[:, None], positions=(state.prefilled + state.fed)[:, None],
                         is_target=jnp.ones_like(active)[:, None], logit_mask=active[:, None],
                         slot=prompt + state.fed, cached=seen)
  hidden, kernel, cache = OpenMoE(config, decoding=True).apply(variables(params), context, state.cache, method='cached')
  return _logits(hidden[:, 0], kernel), state._replace(cache=cache, fed=state.fed + 1)


def _append(program: _Program, state: State, logits: jax.Array, options: _Options) -> State:
  """Chooses the next token of every row that is not done and decides which rows it ends."""
  keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count)
  token, log_prob = sampling_lib.choose(logits, keys, options.temperature, options.top_p, greedy=program.greedy,
                                        top_k=program.top_k, nucleus=program.nucleus)
  token, log_prob = jnp.where(state.done, 0, token), jnp.where(state.done, 0., log_prob)
  write = lambda columns, x: jax.lax.dynamic_update_slice_in_dim(columns, x[:, None], state.count, 1)
  tokens, log_probs = write(state.tokens, token), write(state.log_probs, log_prob)
  lengths = state.lengths + ~state.done
  ended = (token == options.eos_id) | (lengths >= state.limits)
  width = options.stops.shape[1]
  if width:
    at = state.count + 1 - width + jnp.arange(width)
    recent = jnp.where(at >= 0, tokens[:, jnp.maximum(at, 0)], -2)
    ended |= jnp.any(jnp.all((options.stops == -1) | (options.stops == recent[:, None]), axis=-1), axis=-1)
  return state._replace(token=token, tokens=tokens, log_probs=log_probs, lengths=lengths, count=state.count + 1,
                        done=state.done | ended)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(program: _Program, params: Any, state: State, until: jax.Array, options: _Options) -> State:
  """Steps until `until` columns are written or every row is done."""
  config, rows = program.config, state.done.shape[0]
  if program.t5x:
    grouping = group_tokens(config, rows, 1, train=False)
    if config.num_experts and grouping.capacity >= grouping.group_size:  # then nothing can be dropped
      config = config.replace(capacity_mode='none', dispatch='dropless')

  def body(state):
    logits, state = step_logits(config, params, state, program.prompt, program.t5x)
    return _append(program, state, logits, options)

  return jax.lax.while_loop(lambda s: (s.count < until) & ~jnp.all(s.done), body, state)


class Generation:
  """A batch being generated, for callers that look at tokens as they come: `advance`, `tokens`, `finish`.

  See `generate` for the arguments.
  """

  def __init__(self, config: ModelConfig, params: Any, tokens: Any, lengths: Any, max_new_tokens: int,
               temperature: float = 0., top_k: int = 0, top_p: float = 1., seed: int = 0, capacity_mode: str = 'none', *,
               num_samples: int = 1, eos_id: Optional[int] = 1, stop_ids: Sequence[Sequence[int]] = (),
               window: Optional[int] = None, row_ids: Optional[Sequence[int]] = None, mesh: Optional[Mesh] = None):
    require(capacity_mode in CAPACITY_MODES[:2], f"capacity_mode = {capacity_mode!r} is not known for decoding; valid: "
            f"{', '.join(map(repr, CAPACITY_MODES[:2]))}")
    require(config.router != 'expert_choice' or not config.num_experts, "ModelConfig.router = 'expert_choice' cannot "
            'generate: its experts choose among the tokens of a whole group, of which there is one at a time')
    require(max_new_tokens >= 1, f'max_new_tokens = {max_new_tokens} must be at least 1')
    require(num_samples >= 1, f'num_samples = {num_samples} must be at least 1')
    require(all(len(stop) for stop in stop_ids), 'stop_ids holds an empty sequence')
    sampling = sampling_lib.check(sampling_lib.Sampling(temperature, top_k, top_p), config.vocab_size)
    tokens, lengths = check_tokens(config, tokens, lengths, least=1)
    original = capacity_mode == 't5x'
    if window is None:
      window = tokens.shape[1] + max_new_tokens
    for row in np.flatnonzero(lengths >= window):
      require(False, f'prompt {row} has {lengths[row]} tokens: with the starting 0 it does not fit the window of {window} '
              'positions')
    self.batch, self.max_new_tokens, self.num_samples, self._mesh = len(lengths), max_new_tokens, num_samples, mesh
    if original:
      rows, prompt, new = self.batch, window, max_new_tokens
      config = t5x(config)
    else:
      rows, prompt = row_bucket(self.batch, batch_shards(mesh)), bucket(int(lengths.max()) + 1)
      new = bucket(max_new_tokens)
      config = dropless(config)
    self._program = _Program(for_prompts(config, prompt), prompt, new, num_samples, original, sampling.temperature == 0,
                             sampling.top_k, sampling.temperature > 0 and sampling.top_p < 1)
    width = max(map(len, stop_ids), default=0)
    stops = np.full((len(stop_ids), width), -1, np.int32)
    for row, stop in enumerate(stop_ids):
      stops[row, width - len(stop):] = stop
    self._options = _Options(np.float32(sampling.temperature), np.float32(sampling.top_p),
                             np.int32(-1 if eos_id is None else eos_id), stops)
    row_ids = np.arange(self.batch) if row_ids is None else np.asarray(row_ids)
    grid = np.zeros((rows, prompt), np.int32)
    tokens = tokens[:, :prompt - 1]
    grid[:self.batch, 1:1 + tokens.shape[1]] = tokens
    extra = lambda x: np.concatenate([x, np.zeros(rows - self.batch, x.dtype)])
    per_sample = lambda x: np.repeat(x, num_samples)
    limits = np.minimum(max_new_tokens, window - lengths)
    with mesh_scope(mesh):
      keys = sampling_lib.row_keys(seed, jnp.asarray(extra(row_ids.astype(np.uint32))), num_samples)
      put = functools.partial(place, mesh)
      self._params = params
      self.state = prefill(self._program, params, put(grid), put(extra(lengths)), replicated(mesh, keys),
                           put(per_sample(extra(limits.astype(np.int32)))),
                           put(per_sample(np.arange(rows) >= self.batch)), self._options)

  @property
  def running(self) -> bool:
    """Whether a row is left that has not ended."""
    return not self.done().all()

  @property
  def count(self) -> int:
    """Tokens generated so far by the rows that have not ended."""
    return int(self.state.count)

  def advance(self, num_tokens: int) -> None:
    """Generates up to `num_tokens` more tokens a row."""
    until = np.int32(min(self.count + num_tokens, self.max_new_tokens))
    with mesh_scope(self._mesh):
      self.state = advance(self._program, self._params, self.state, until, self._options)

  def finish(self, rows: np.ndarray) -> None:
    """Ends rows, bool [B, num_samples]."""
    ended = np.zeros(self.state.done.shape, bool)
    ended[:rows.size] = rows.reshape(-1)
    with mesh_scope(self._mesh):
      self.state = self.state._replace(done=self.state.done | place(self._mesh, ended))

  def result(self) -> Generated:
    """What there is so far: [B, num_samples, ..] arrays."""
    shape = (self.batch, self.num_samples)
    arrays = (self.state.tokens, self.state.lengths, self.state.log_probs)
    tokens, lengths, log_probs = (fetch(self._mesh, x)[:self.batch * self.num_samples] for x in arrays)
    columns = lambda x: np.pad(x, ((0, 0), (0, max(self.max_new_tokens - x.shape[1], 0))))[:, :self.max_new_tokens]
    return Generated(columns(tokens).reshape(*shape, -1), lengths.reshape(shape), columns(log_probs).reshape(*shape, -1))

  def done(self) -> np.ndarray:
    """Which rows have ended, bool [B, num_samples]."""
    return fetch(self._mesh, self.state.done)[:self.batch * self.num_samples].reshape(self.batch, self.num_samples)


def generate(config: ModelConfig, params: Any, tokens: Any, lengths: Any, max_new_tokens: int, temperature: float = 0.,
             top_k: int = 0, top_p: float = 1., seed: int = 0, capacity_mode: str = 'none', *,
             num_samples: Optional[int] = None, **options) -> Generated:
  """Continues prompts.

  Args:
    config: of the model; its capacity_mode and dispatch are those of training and are not read.
    params: in the layout of `config.scan_blocks`, or `Model.variables`; on a mesh, sharded as in training.
    tokens: int [B, L] prompts, padded on the right, without the id 0 that starts a sequence.
    lengths: int [B], tokens of each prompt, at least 1.
    max_new_tokens: a row ends there, or earlier.
    temperature, top_k, top_p: see `sampling.Sampling`; 0, the default, is greedy.
    seed: of the samples. A sample depends on the seed, its row's number, its own number, and on the prompt.
    capacity_mode: 'none' or 't5x', see the module.
    num_samples: continuations of each prompt, which is run once; adds an axis to the result, also if it is 1.
    **options:
      eos_id: id that ends a row; None: nothing does. Default 1.
      stop_ids: sequences of ids that end a row once it has generated them.
      window: most positions that the model sees, the starting 0 included; a row ends with the token behind them. By
        default L + max_new_tokens, which ends none. In mode 't5x' it decides about the prompts' routing groups.
      row_ids: int [B], numbers of the rows for the random keys; 0 .. B-1 by default.
      mesh: devices, those of `params`; rows are split over 'data' and 'expert'.

  Raises:
    ConfigError: a setting out of range, an empty or too long prompt, an id that is no token.
  """
  generation = Generation(config, params, tokens, lengths, max_new_tokens, temperature, top_k, top_p, seed, capacity_mode,
                          num_samples=1 if num_samples is None else num_samples, **options)
  generation.advance(max_new_tokens)
  result = generation.result()
  return result if num_samples is not None else Generated(*(x[:, 0] for x in result))


def stream(config: ModelConfig, params: Any, tokens: Any, lengths: Any, max_new_tokens: int, *args, chunk: int = 1,
           **options) -> Iterator[Generated]:
  """As `generate`, giving the results so far, [B, num_samples, ..], whenever `chunk` more tokens are there."""
  generation = Generation(config, params, tokens, lengths, max_new_tokens, *args, **options)
  generation.advance(chunk - generation.count)
  yield generation.result()
  while generation.running:
    generation.advance(chunk)
    yield generation.result()


def mesh_scope(mesh: Optional[Mesh]):
  """The mesh in force within a `with` block, if there is one."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def place(mesh: Optional[Mesh], x: np.ndarray) -> jax.Array:
  """Rows of an array that every process holds, over the mesh."""
  if mesh is None:
    return jnp.asarray(x)
  even = x.shape[0] % batch_shards(mesh) == 0  # in mode 't5x' rows are what they are
  sharding = batch_sharding(mesh) if even else NamedSharding(mesh, PartitionSpec())
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def replicated(mesh: Optional[Mesh], x: jax.Array) -> jax.Array:
  """The whole array on every device."""
  return x if mesh is None else jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(x)


def fetch(mesh: Optional[Mesh], x: jax.Array) -> np.ndarray:
  """The whole array, on every process."""
  return np.asarray(replicated(mesh, x))
