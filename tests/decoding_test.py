"""Generation: the original's numbers in mode 't5x'; steps against full forward passes and independence in mode 'none'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import decoding, partitioning
from openmoe_jax.attention import KeysValues, apply_rope, rope_tables
from openmoe_jax.config import ConfigError, MeshConfig, ModelConfig
from openmoe_jax.decoding import Generation, generate
from openmoe_jax.model import OpenMoE
from openmoe_jax.names import from_t5x_names
from tests import golden, golden_model, numpy_reference

GOLDEN = 'decode.npz'
LOGITS = 2e-5  # as in golden_forward_test
ROUNDING = 5e-6  # of log-probabilities of the small model: float32 sums in another order


def golden_generation(name, scan=False, max_new_tokens=24):
  """A generation from the original's prompts, in its window of 24 positions."""
  d = golden.load_arrays(GOLDEN)
  config = golden_model.config(inputs_bidirectional_attention=name == 'bidir', scan_blocks=scan)
  generation = Generation(config, golden_model.params(config), d['decoder_input_tokens'][:, 1:],
                          d[f'{name}_initial_index'], max_new_tokens, capacity_mode='t5x', window=24)
  return d, config, generation


@pytest.mark.parametrize('name, scan', (
    ('causal', False), pytest.param('causal', True, marks=pytest.mark.slow), ('bidir', False)))
def test_golden_tokens(name, scan):
  d, _, generation = golden_generation(name, scan)
  generation.advance(24)
  np.testing.assert_array_equal(generation.result().tokens[:, 0], d[f'{name}_predicted_suffix'])


@pytest.mark.parametrize('name', ('causal', 'bidir'))
def test_golden_step_logits(name):
  d, config, generation = golden_generation(name)
  params, state = golden_model.params(config), generation.state
  step = jax.jit(lambda params, state: decoding.step_logits(config, params, state, 24, t5x=True))
  inputs, want = d[f'{name}_step_input_tokens'], d[f'{name}_step_logits']
  np.testing.assert_array_equal(state.token, inputs[:, 0])
  for i in range(want.shape[1]):
    logits, state = step(params, state._replace(token=jnp.asarray(inputs[:, i])))
    np.testing.assert_allclose(logits, want[:, i], rtol=0, atol=LOGITS)


def test_golden_prefill_cache():
  """The original keeps unrotated keys [B, H, K, L] and zeros from the prompt's last token on."""
  d, config, generation = golden_generation('causal')
  np.testing.assert_array_equal(generation.state.prefilled, d['causal_initial_index'])
  kept = np.arange(24) < d['causal_initial_index'][:, None]
  tables = rope_tables(24, config.head_dim)
  for i, cache in enumerate(generation.state.cache):
    prefix = f'causal_prefill_cache/decoder/layers_{i}/self_attention/cached_'
    want_key, want_value = (d[prefix + name].transpose(0, 3, 1, 2) for name in ('key', 'value'))  # [B, L, H, K]
    want_key = apply_rope(jnp.asarray(want_key), *tables)
    for got, want in ((cache.key, want_key), (cache.value, want_value)):
      got = np.where(kept[..., None, None], got[:, :, :24].swapaxes(1, 2), 0)
      np.testing.assert_allclose(got, want, rtol=0, atol=LOGITS)


def empty_state(config, rows, slots):
  """A state before the first token: nothing in the cache, and the 0 that starts a sequence to be fed."""
  zeros = lambda *shape: jnp.zeros((rows, *shape), jnp.int32)
  cache = KeysValues(*(jnp.zeros((rows, config.num_heads, slots, config.head_dim)),) * 2)
  return decoding.State(cache=(cache,) * config.num_layers, prefilled=zeros(), fed=jnp.zeros((), jnp.int32),
                        count=jnp.zeros((), jnp.int32), token=zeros(), limits=zeros() + slots, done=zeros() > 0,
                        keys=jax.random.split(jax.random.key(0), rows), tokens=zeros(slots),
                        log_probs=jnp.zeros((rows, slots)), lengths=zeros())


def fed_one_by_one(config, params, tokens):
  """float32 logits [B, L, V] of single-token steps from an empty cache."""
  state, logits = empty_state(config, *tokens.shape), []
  step = jax.jit(lambda params, state: decoding.step_logits(config, params, state, 0))
  for column in np.asarray(tokens).T:
    out, state = step(params, state._replace(token=jnp.asarray(column)))
    logits.append(out)
  return np.stack(logits, 1)


def test_golden_teacher_forcing():
  """Step by step from nothing; and the full forward pass in mode t5x, which drops tokens at some positions."""
  d = golden.load_arrays(GOLDEN)
  config = golden_model.config()
  params, tokens = golden_model.params(config), d['teacher_input_tokens']
  steps = fed_one_by_one(config, params, tokens)
  np.testing.assert_allclose(steps, d['teacher_step_logits'], rtol=0, atol=LOGITS)
  batch = {'decoder_input_tokens': tokens, 'decoder_target_tokens': d['teacher_target_tokens']}
  full = lambda config: jax.jit(lambda params: OpenMoE(config).apply({'params': params}, batch))(params)
  np.testing.assert_allclose(full(config), d['teacher_full_forward_logits'], rtol=0, atol=LOGITS)
  assert np.abs(full(config) - steps).max() > 0.01  # it did drop something
  np.testing.assert_allclose(full(decoding.dropless(config)), steps, rtol=0, atol=LOGITS)


def test_golden_scratch_sequences():
  """Without any prefill, forced along the prompt: the same tokens come out."""
  d, config, _ = golden_generation('causal')
  sequences = d['scratch_sequences']
  logits = fed_one_by_one(config, golden_model.params(config), np.pad(sequences, ((0, 0), (1, 0)))[:, :-1])
  for row, start in enumerate(d['causal_initial_index']):
    generated = sequences[row] > 0
    generated[:start] = False
    np.testing.assert_array_equal(logits[row].argmax(-1)[generated], sequences[row][generated])


def model(**changes) -> ModelConfig:
  values = dict(vocab_size=48, emb_dim=16, mlp_dim=16, num_heads=4, head_dim=4, num_layers=2, moe_interval=2,
                num_experts=8, group_size=16, dtype='float32', scan_blocks=False, attention_query_blocks=2)
  return ModelConfig(**{**values, **changes})


@functools.lru_cache(maxsize=None)
def params_of(config):
  return jax.tree.map(jnp.asarray, from_t5x_names(config, numpy_reference.random_params(config, 0)))


def prompts(rows, longest=20, seed=0):
  rng = np.random.RandomState(seed)
  lengths = rng.randint(1, longest + 1, rows)
  lengths[rng.randint(rows)] = longest
  tokens = rng.randint(1, 48, (rows, longest))
  return np.where(np.arange(longest) < lengths[:, None], tokens, 0), lengths


def run(config, tokens, lengths, new=12, **options):
  return generate(config, params_of(config), tokens, lengths, new, **{'eos_id': None, **options})


def assert_same(got, want, rounding=ROUNDING):
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_array_equal(got.lengths, want.lengths)
  np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=0, atol=rounding)


@pytest.mark.parametrize('changes', (
    {'num_layers': 4}, pytest.param({'num_layers': 4, 'scan_blocks': True}, marks=pytest.mark.slow),
    pytest.param({'num_experts': 0, 'moe_interval': 1}, marks=pytest.mark.slow), {'inputs_bidirectional_attention': True},
    pytest.param({'batch_prioritized': True}, marks=pytest.mark.slow)))
def test_steps_equal_the_full_forward_pass(changes):
  """Every generated token is the argmax, and has the log-probability, of one pass over prompt and continuation."""
  config = model(**changes)
  tokens, lengths = prompts(5)
  got = run(config, tokens, lengths)
  whole = np.zeros((5, 33), np.int32)
  for row, n in enumerate(lengths):
    whole[row, 1:1 + n], whole[row, 1 + n:13 + n] = tokens[row, :n], got.tokens[row]
  positions = np.arange(33)
  batch = {'decoder_input_tokens': whole, 'decoder_target_tokens': (positions <= 12 + lengths[:, None]).astype(np.int32),
           'decoder_causal_attention': (positions <= lengths[:, None]).astype(np.int32)}
  logits = jax.jit(lambda p: OpenMoE(config.replace(capacity_mode='none')).apply({'params': p}, batch))(params_of(config))
  log_probs = np.asarray(jax.nn.log_softmax(logits))
  for row, n in enumerate(lengths):
    at = np.arange(n, n + 12)
    np.testing.assert_array_equal(log_probs[row, at].argmax(-1), got.tokens[row])
    np.testing.assert_allclose(log_probs[row, at, got.tokens[row]], got.log_probs[row], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize('options', (pytest.param({}, marks=pytest.mark.exhaustive),
                                     {'temperature': 1., 'top_k': 20, 'top_p': 0.9, 'seed': 3}))
@pytest.mark.slow
def test_rows_know_nothing_of_their_neighbours(options):
  """16 prompts of mixed lengths together, alone without padding, and some of them in a wider rectangle."""
  config = model()
  tokens, lengths = prompts(16)
  together = run(config, tokens, lengths, **options)
  for row in range(0, 16, 3):
    alone = run(config, tokens[row:row + 1, :lengths[row]], lengths[row:row + 1], row_ids=[row], **options)
    assert_same(alone, decoding.Generated(*(x[row:row + 1] for x in together)))
  wider = run(config, np.pad(tokens[:5], ((0, 0), (0, 40))), lengths[:5], **options)
  assert_same(wider, decoding.Generated(*(x[:5] for x in together)))
  longer = np.vstack([tokens[:5], np.zeros((1, 20), int)])
  longer = run(config, np.pad(longer, ((0, 0), (0, 40))) + (np.arange(6) == 5)[:, None], [*lengths[:5], 60], **options)
  assert_same(decoding.Generated(*(x[:5] for x in longer)), decoding.Generated(*(x[:5] for x in together)))


@pytest.mark.slow
def test_samples():
  """Several samples of a prompt: the same as one at a time, different from each other, the same for the same seed."""
  config = model()
  tokens, lengths = prompts(3)
  options = dict(temperature=1.)
  five = run(config, tokens, lengths, num_samples=5, **options)
  assert five.tokens.shape == (3, 5, 12) and five.lengths.shape == (3, 5) and five.log_probs.shape == (3, 5, 12)
  assert len({row.tobytes() for row in five.tokens.reshape(15, 12)}) == 15
  assert_same(run(config, tokens, lengths, **options), decoding.Generated(*(x[:, 0] for x in five)))
  assert_same(run(config, tokens, lengths, num_samples=5, **options), five)
  assert (run(config, tokens, lengths, seed=1, **options).tokens != five.tokens[:, 0]).any()


def first_at(row, id_):
  return int(np.argmax(row == id_)) if (row == id_).any() else len(row)


def test_eos_ends_a_row_and_only_that():
  config = model()
  tokens, lengths = prompts(6)
  free = run(config, tokens, lengths)
  eos = int(free.tokens[2, 4])
  got = run(config, tokens, lengths, eos_id=eos)
  for row in range(6):
    end = min(first_at(free.tokens[row], eos) + 1, 12)
    assert got.lengths[row] == end
    np.testing.assert_array_equal(got.tokens[row, :end], free.tokens[row, :end])
    np.testing.assert_allclose(got.log_probs[row, :end], free.log_probs[row, :end], rtol=0, atol=ROUNDING)
    assert not got.tokens[row, end:].any() and not got.log_probs[row, end:].any()
  assert got.lengths.min() < 12


@pytest.mark.slow
def test_stop_ids():
  """A sequence of ids ends a row once all of it has been generated; the prompt does not count."""
  config = model()
  tokens, lengths = prompts(4)
  free = run(config, tokens, lengths)
  stop = [int(t) for t in free.tokens[1, 3:6]]
  got = run(config, tokens, lengths, stop_ids=(stop, [47, 47, 47, 47, 47]))
  end = next(i for i in range(3, 13) if free.tokens[1, i - 3:i].tolist() == stop)
  assert got.lengths[1] == end and not got.tokens[1, end:].any()
  one = run(config, tokens, lengths, stop_ids=([int(free.tokens[0, 0])],))
  assert one.lengths[0] == 1
  last, first = int(tokens[1, lengths[1] - 1]), int(free.tokens[1, 0])
  across = run(config, tokens, lengths, stop_ids=([last, first],))
  assert across.lengths[1] > 1


def test_window_ends_rows():
  config = model()
  tokens, lengths = prompts(4)
  got = run(config, tokens, lengths, window=24)
  np.testing.assert_array_equal(got.lengths, np.minimum(12, 24 - lengths))


def test_stream_gives_the_same_tokens_as_they_come():
  config = model()
  tokens, lengths = prompts(3)
  want = run(config, tokens, lengths)
  for chunk in (1, 5):
    counts = []
    for got in decoding.stream(config, params_of(config), tokens, lengths, 12, chunk=chunk, eos_id=None):
      counts.append(int(got.lengths[0, 0]))
      np.testing.assert_array_equal(got.tokens[:, 0, :counts[-1]], want.tokens[:, :counts[-1]])
    assert counts == sorted({*range(chunk, 12, chunk), 12})


def test_finish_ends_rows_from_outside():
  config = model()
  generation = Generation(config, params_of(config), *prompts(3), 12, eos_id=None)
  generation.advance(4)
  generation.finish(np.asarray([[False], [True], [False]]))
  generation.advance(12)
  assert generation.result().lengths[:, 0].tolist() == [12, 5, 12] and not generation.running


@pytest.mark.slow
def test_one_compile_for_a_bucket():
  """All prompt lengths, batch sizes and numbers of new tokens within their buckets share two programs."""
  config = model(vocab_size=49)  # that no other test has compiled
  before = decoding.prefill._cache_size(), decoding.advance._cache_size()
  for longest in range(1, 32, 6):
    for rows in (3, 4):
      for new in (7, 12):
        for options in ({}, {'stop_ids': ()}, {'eos_id': 3}):
          run(config, *prompts(rows, longest), new=new, **options)
  assert (decoding.prefill._cache_size() - before[0], decoding.advance._cache_size() - before[1]) == (1, 1)
  run(config, *prompts(5, 31))
  run(config, *prompts(4, 32))
  assert (decoding.prefill._cache_size() - before[0], decoding.advance._cache_size() - before[1]) == (3, 3)


def test_buckets():
  assert [decoding.bucket(n) for n in (1, 32, 33, 129, 257, 1000, 2049)] == [32, 32, 64, 160, 320, 1024, 2560]
  assert all(decoding.bucket(n) <= n * 1.25 for n in range(128, 5000))
  assert len({decoding.bucket(n) for n in range(1, 4097)}) == 24
  assert [decoding.row_bucket(n, 4) for n in (1, 3, 4, 5, 9)] == [4, 4, 4, 8, 16]


@pytest.mark.slow
@pytest.mark.parametrize('shape, scan', (pytest.param((2, 4, 1), False, marks=pytest.mark.exhaustive), ((2, 2, 2), True)))
def test_mesh_equals_one_device(shape, scan):
  config = model(scan_blocks=scan, num_layers=4 if scan else 2)
  tokens, lengths = prompts(5)
  mesh = partitioning.make_mesh(MeshConfig(*shape))
  params = jax.device_put(params_of(config), partitioning.tree_shardings(params_of(config), mesh))
  for options in ({}, {'temperature': 1., 'top_k': 10, 'num_samples': 2}):
    got = generate(config, params, tokens, lengths, 12, eos_id=None, mesh=mesh, **options)
    assert_same(got, run(config, tokens, lengths, **options))


@pytest.mark.slow
def test_mesh_in_mode_t5x():
  """Four rows on eight devices are not filled up: that would change the routing groups."""
  d, config, generation = golden_generation('causal')
  mesh = partitioning.make_mesh(MeshConfig(2, 4, 1))
  params = golden_model.params(config)
  got = generate(config, jax.device_put(params, partitioning.tree_shardings(params, mesh)),
                 d['decoder_input_tokens'][:, 1:], d['causal_initial_index'], 24, capacity_mode='t5x', window=24, mesh=mesh)
  np.testing.assert_array_equal(got.tokens, d['causal_predicted_suffix'])


@pytest.mark.slow
def test_bfloat16_steps():
  """Runs, and stays near the full forward pass; routing decisions may flip, so only the first tokens are compared."""
  config = model(dtype='bfloat16')
  tokens, lengths = prompts(4)
  got = run(config, tokens, lengths)
  want = run(model(), tokens, lengths)
  np.testing.assert_allclose(got.log_probs[:, 0], want.log_probs[:, 0], rtol=0, atol=0.5)
  assert np.isfinite(got.log_probs).all()


def test_cache_is_written_in_place():
  """No copy of the cache in the loop, which would cost more than everything else of a step."""
  config = model()
  generation = Generation(config, params_of(config), *prompts(4), 12)
  program = generation._program
  text = decoding.advance.lower(program, params_of(config), generation.state, np.int32(5), generation._options
                                ).compile().as_text()
  shape = 'f32[' + ','.join(map(str, generation.state.cache[0].key.shape)) + ']'
  assert shape in text
  assert not [line for line in text.splitlines() if ' copy(' in line and line.split('= ')[-1].startswith(shape)]


@pytest.mark.parametrize('change, message', (
    ({'lengths': [0, 3]}, r'lengths\[0\] = 0: a prompt has 1 to 3 tokens'),
    ({'lengths': [1, 4]}, r'lengths\[1\] = 4'),
    ({'lengths': [1]}, r'lengths must be integers of shape \[2\]'),
    ({'lengths': [1., 2.]}, 'not float64'),
    ({'tokens': [[5, 6, 7]] * 2 + [[1, 48, 2]], 'lengths': [3, 3, 2]}, r'tokens\[2, 1\] = 48 is no token .* 1 to 47'),
    ({'tokens': [[5, 0, 7], [1, 2, 3]]}, r'tokens\[0, 1\] = 0 is no token'),
    ({'tokens': [5, 6]}, r'not int64 of shape \(2,\)'),
    ({'tokens': [[1.5]], 'lengths': [1]}, 'not float64'),
    ({'max_new_tokens': 0}, 'max_new_tokens = 0'),
    ({'num_samples': 0}, 'num_samples = 0'),
    ({'window': 3}, r'prompt 0 has 3 tokens.* window of 3'),
    ({'capacity_mode': 'colossalai'}, "capacity_mode = 'colossalai' .* valid: 't5x', 'none'"),
    ({'temperature': -1}, 'temperature = -1'),
    ({'stop_ids': [[]]}, 'empty sequence')))
def test_mistakes_are_named(change, message):
  config = model()
  values = {'tokens': [[5, 6, 7], [1, 2, 3]], 'lengths': [3, 2], 'max_new_tokens': 4, **change}
  with pytest.raises(ConfigError, match=message):
    generate(config, params_of(config), **values)
