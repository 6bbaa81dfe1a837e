"""The model against a numpy forward pass that was written from SPEC 1 and 2 alone, for many configurations."""

from hypothesis import given, settings, strategies as st
import jax
import numpy as np
import pytest

from openmoe_jax.config import ModelConfig
from openmoe_jax.model import OpenMoE
from openmoe_jax.names import from_t5x_names
from tests import golden, golden_model, numpy_reference

# Logits are of order 1; float32 rounds them to 1e-6 in a few layers. The original's numbers are held to 2e-5 as well.
LOGITS = 2e-5


def make_batch(seed, batch, length, vocab_size, packed=False, padding_rows=0):
  """Rows of various lengths, and rows of nothing but padding.

  All tokens differ: equal ones can meet as equal vectors, and which of two equal probabilities is larger is rounding,
  which batch-prioritised order would show.
  """
  rng = np.random.RandomState(seed)
  assert vocab_size > batch * length
  target = 1 + rng.permutation(vocab_size - 1)[:batch * length].reshape(batch, length)
  for row in range(batch):
    target[row, rng.randint(length // 3, length + 1):] = 0
  if padding_rows:
    target[-padding_rows:] = 0
  first = 1 + rng.permutation(vocab_size - 1)[:batch]
  tokens = np.concatenate([first[:, None], target[:, :-1]], axis=1)
  features = {'decoder_input_tokens': tokens, 'decoder_target_tokens': target,
              'decoder_causal_attention': (np.arange(length) < rng.randint(1, length, (batch, 1))).astype(np.int32)}
  if packed:
    starts = rng.rand(batch, length) < 0.15
    features['decoder_segment_ids'] = np.where(target > 0, 1 + np.cumsum(starts, axis=1), 0)
  return {name: np.asarray(x, np.int32) for name, x in features.items()}


def compare(config, batch, train, seed=0):
  params = numpy_reference.random_params(config, seed)
  want, want_routing = numpy_reference.forward(config, params, batch, train)

  @jax.jit
  def run(params):
    hidden, kernel, record = OpenMoE(config, record_routing=True).apply({'params': params}, batch, train,
                                                                         method='features')
    return hidden @ kernel, record

  got, record = run(from_t5x_names(config, params))
  for row, routed in enumerate(want_routing):
    kept = np.asarray(record.assignment.kept[row])
    np.testing.assert_array_equal(kept, routed.kept)
    np.testing.assert_array_equal(np.asarray(record.assignment.expert_index[row])[kept], routed.expert[kept])
    np.testing.assert_allclose(record.auxiliary_loss[row], routed.auxiliary_loss, rtol=1e-5)
    np.testing.assert_allclose(record.router_z_loss[row], routed.router_z_loss, rtol=1e-4)
  assert np.abs(want).max() > 1
  np.testing.assert_allclose(got, want, rtol=0, atol=LOGITS)
  return want_routing


def model(**changes) -> ModelConfig:
  values = dict(vocab_size=140, emb_dim=8, mlp_dim=10, num_heads=2, head_dim=6, num_layers=2, moe_interval=2,
                num_experts=4, group_size=16, dtype='float32', scan_blocks=False, train_capacity_factor=1.)
  return ModelConfig(**{**values, **changes})


@pytest.mark.parametrize('name', ('lm_train', 'packed_train', 'prefix_bidir_train', 'prefix_causal_eval'))
def test_reference_is_the_original(name):
  """What everything below is compared with agrees with the original's logits itself."""
  batch_name, train, bidirectional = golden_model.FORWARD[name]
  config = golden_model.config(inputs_bidirectional_attention=bidirectional)
  logits, _ = numpy_reference.forward(config, golden_model.flat_params(), golden_model.batch(batch_name), train)
  want = golden.load_arrays(f'fwd_{name}.npz')
  if 'logits' in want:
    np.testing.assert_allclose(logits, want['logits'], rtol=0, atol=1e-5)
  else:
    np.testing.assert_allclose(logits[:, ::4], want['logits_stride4'], rtol=0, atol=1e-5)


def test_odd_shape_with_sixteen_experts():
  """3 rows of 40: padded by columns, groups of 9 that begin in the middle of rows."""
  config = model(num_experts=16, num_selected_experts=2, group_size=4096, train_capacity_factor=1.25, extra_mlp=True)
  routing = compare(config, make_batch(0, 3, 40, 140), train=True)
  assert routing[0].expert.shape == (16, 9, 2)


def test_top_3_prioritized_ignoring_padding_rows():
  config = model(num_experts=6, num_selected_experts=3, batch_prioritized=True, ignore_padding_tokens=True,
                 scan_blocks=True, min_expert_capacity=1)
  routing = compare(config, make_batch(1, 5, 9, 140, padding_rows=2), train=True)
  asked = routing[0].slot >= 0
  assert not asked.all() and 0.1 < routing[0].kept.sum() / asked.sum() < 0.9


def test_top_1_packed_with_parallel_experts():
  config = model(num_selected_experts=1, parallel_moe=True, num_layers=3, moe_interval=3, attention_query_blocks=3)
  compare(config, make_batch(2, 4, 17, 140, packed=True), train=True)


def test_plain_swiglu_without_extra_mlp_both_ways():
  config = model(mlp_activations=('silu', 'linear'), extra_mlp=False, inputs_bidirectional_attention=True,
                 dispatch='einsum', capacity_mode='none')
  compare(config, make_batch(3, 2, 16, 140), train=False)


@pytest.mark.parametrize('changes', (
    dict(parallel_attention=True),
    dict(parallel_attention=True, extra_mlp=False, num_shared_experts=1, scan_blocks=True),
    dict(num_shared_experts=2, mlp_activations=('silu', 'linear'))), ids=str)
def test_experts_beside_attention_and_shared_experts(changes):
  compare(model(**changes), make_batch(4, 2, 16, 140), train=True)


CONFIGS = st.fixed_dictionaries(dict(
    num_experts=st.sampled_from((3, 4, 5, 8)), num_selected_experts=st.integers(1, 3),
    group_size=st.sampled_from((8, 16, 4096)), num_expert_replicas=st.integers(1, 2),
    batch_prioritized=st.booleans(), ignore_padding_tokens=st.booleans(), dispatch=st.sampled_from(('sort', 'einsum')),
    inputs_bidirectional_attention=st.booleans(), extra_mlp=st.booleans(), scan_blocks=st.booleans(),
    capacity_mode=st.sampled_from(('t5x', 't5x', 'none')), attention_query_blocks=st.integers(1, 4),
    mlp_activations=st.sampled_from((('swiglu', 'linear'), ('silu', 'linear'))),
    min_expert_capacity=st.integers(1, 4), head_dim=st.sampled_from((2, 6)), moe_interval=st.sampled_from((1, 2))))


@pytest.mark.slow
@settings(max_examples=20)
@given(changes=CONFIGS, batch=st.integers(1, 5), length=st.integers(3, 25), packed=st.booleans(),
       padding_rows=st.integers(0, 1), train=st.booleans(), seed=st.integers(0, 1000))
def test_any_configuration(changes, batch, length, packed, padding_rows, train, seed):
  config = model(**changes, parallel_moe=changes['extra_mlp'] and seed % 3 == 0)
  compare(config, make_batch(seed, batch, length, 140, packed, padding_rows if batch > 1 else 0), train, seed)
