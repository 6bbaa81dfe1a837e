"""Routing figures of the training step: counted by hand, the same for every way to cut a batch up, and how many curves
they become in TensorBoard."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from openmoe_jax.config import ModelConfig
from openmoe_jax.metrics import PER_LAYER, with_shares
from openmoe_jax.model import OpenMoE
from openmoe_jax.names import from_t5x_names
from openmoe_jax.recording import policies
from openmoe_jax.routers import online
from openmoe_jax.routers.groups import Grouping, group_tokens
from openmoe_jax.routers.slots import in_token_order
from openmoe_jax.routers.types import TokenAssignment
from openmoe_jax.train_state import init_train_state
from openmoe_jax.train_step import gradients, make_train_step, split_microbatches
from openmoe_jax.writers import DETAILS, Writers, scalars
from tests import numpy_reference

CONFIG = ModelConfig(vocab_size=32, emb_dim=8, mlp_dim=8, num_heads=1, head_dim=4, num_layers=2, moe_interval=1,
                     num_experts=4, group_size=8, min_expert_capacity=1, train_capacity_factor=1., dtype='float32',
                     scan_blocks=False, attention_query_blocks=1, loss_chunk_tokens=16)


def test_by_hand():
  """Four tokens and one of padding, three experts with a slot each.

  First choices: experts 0, 1 and 2 take tokens 0, 1 and 2, token 3 is dropped. No second choice finds a slot; but token 0
  came to expert 1 before token 1 did.
  """
  config = CONFIG.replace(num_experts=3)
  expert = np.asarray([[[0, 1], [1, 0], [2, 0], [0, 2], [0, 1]]])
  kept = np.asarray([[[1, 0], [1, 0], [1, 0], [0, 0], [0, 0]]], bool)
  logits = np.log(np.float32([[[.5, .25, .25], [.25, .5, .25], [.25, .25, .5], [1 / 3] * 3, [1 / 3] * 3]]))
  count = jax.jit(lambda *arrays: online.counts(config, *arrays, Grouping(1, 5, 1, 5, 1), 4))
  counts = count(TokenAssignment(expert, kept * .5, np.zeros_like(expert), kept), logits, np.arange(5)[None] < 4)
  got = dict(zip(online.names(config), np.asarray(counts)))
  entropy = 3 * (.5 * math.log(2) + .5 * math.log(4)) / math.log(3) + 1
  want = {'router_entropy': (entropy, 4), 'fraction_dropped_rank_0': (1, 4), 'fraction_dropped_rank_1': (4, 4),
          'fraction_dropped_first_quarter': (1, 2), 'fraction_dropped_last_quarter': (2, 2), 'fraction_evicted': (1, 4)}
  assert got.keys() == want.keys()
  for name, pair in want.items():
    np.testing.assert_allclose(got[name], pair, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize('changes, want', (
    (dict(capacity_mode='none'), ('router_entropy',)), (dict(router='hash', capacity_mode='none'), ()),
    (dict(router='expert_choice', allow_future_leak=True), ('router_entropy',)),
    (dict(router='switch', num_selected_experts=1), (
        'router_entropy', 'fraction_dropped_rank_0', 'fraction_dropped_first_quarter', 'fraction_dropped_last_quarter'))),
    ids=str)
def test_what_there_is_of_other_routers(changes, want):
  assert online.names(CONFIG.replace(**changes)) == want


@pytest.fixture(scope='module')
def params():
  return from_t5x_names(CONFIG, {n: jnp.asarray(x) for n, x in numpy_reference.random_params(CONFIG, 0).items()})


def make_batch(lengths=(8, 3, 8, 1)):
  target = np.random.RandomState(0).randint(1, CONFIG.vocab_size, (len(lengths), 8)).astype(np.int32)
  for row, length in zip(target, lengths):
    row[length:] = 0
  return {'decoder_input_tokens': np.pad(target[:, :-1], ((0, 0), (1, 0))), 'decoder_target_tokens': target}


def test_the_same_as_from_a_recording(params):
  """Rows of 7 and groups that hold padding besides: what the analysis finds in the recorded choices."""
  batch = {name: x[:, :7] for name, x in make_batch((7, 3, 7)).items()}
  config = policies.configure(CONFIG.replace(eval_capacity_factor=1.), 'none').replace(
      capacity_mode='t5x', dispatch='sort', ignore_padding_tokens=False)
  apply = jax.jit(lambda p: OpenMoE(config, record_routing=True).apply({'params': p}, batch, False, method='features'))
  record = apply(params)[2]
  grouping = group_tokens(config, 3, 7, train=False)
  assert grouping.batch * grouping.length > 21
  rows = lambda x: np.asarray(x).reshape(2, grouping.batch, grouping.length, -1)[:, :3, :7]
  kept, logits = rows(record.assignment.kept), rows(record.router_logits)
  token_slot = rows(jax.vmap(lambda e: in_token_order(e, 4))(record.assignment.expert_index))
  inside = batch['decoder_input_tokens'] > 0
  inside[:, 0] = True
  probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
  entropy = -(probs * np.log(probs)).sum(axis=-1) / np.log(4)
  place = np.broadcast_to(np.arange(7), inside.shape)
  evicted = ~kept & (token_slot < grouping.capacity)
  got = with_shares(config, {'routing_counts': record.counts})
  for layer in range(2):
    of = lambda x, which=inside: x[layer][which].mean()
    want = {'router_entropy': of(entropy), 'fraction_dropped_rank_0': of(~kept[..., 0]),
            'fraction_dropped_rank_1': of(~kept[..., 1]), 'fraction_evicted': of(evicted[..., 1]),
            'fraction_dropped_first_quarter': of(~kept, inside & (place < 7 / 4)),
            'fraction_dropped_last_quarter': of(~kept, inside & (place >= 7 * 3 / 4))}
    for name in online.names(config):
      np.testing.assert_allclose(got[name + PER_LAYER][layer], want[name], rtol=1e-5, err_msg=name)
  assert 0 < got['fraction_evicted'] < 1
  np.testing.assert_allclose(got['fraction_evicted'], np.mean(got['fraction_evicted_per_layer']), rtol=1e-6)


def test_microbatches_add_up(params):
  """A group is a row here, so that microbatches drop the same tokens; they differ in how many they have."""
  def metrics(num_microbatches):
    batch = split_microbatches(make_batch((8, 3, 8, 1, 5, 8, 8, 8)), num_microbatches)
    run = jax.jit(lambda params: with_shares(CONFIG, gradients(CONFIG, params, batch)[1]))
    return run(params)

  assert group_tokens(CONFIG, 8, 8, True)[2:] == (8, 8, 2) and group_tokens(CONFIG, 4, 8, True)[2:] == (4, 8, 2)
  whole, parts = metrics(1), metrics(2)
  assert 'routing_counts' not in whole and whole.keys() == parts.keys()
  for name in online.names(CONFIG):
    np.testing.assert_allclose(parts[name + PER_LAYER], whole[name + PER_LAYER], rtol=1e-6, err_msg=name)
    assert 0 < float(whole[name]) < 1


def test_left_out_if_not_wanted(params):
  optimizer = optax.sgd(0.)
  state, wanted = init_train_state(CONFIG, optimizer, params), {*online.names(CONFIG)}
  for routing_metrics in (True, False):
    step = make_train_step(CONFIG, optimizer, 2, routing_metrics=routing_metrics)
    names = jax.eval_shape(step, state, make_batch())[1]
    assert {name.removesuffix(PER_LAYER) for name in names} & {*wanted, 'routing_counts'} == (wanted if routing_metrics else set())


# Curves.


def metrics_of(layers, experts):
  load = np.ones((layers, experts))
  load[0, 0], load[0, 1] = 0., 2.
  return {'loss': 1., 'router_entropy': .5, 'router_entropy_per_layer': np.linspace(.25, .75, layers), 'expert_load': load}


def test_details_of_the_curves():
  model = CONFIG.replace(num_layers=3)
  metrics = metrics_of(3, 4)
  everything = scalars(metrics, model)
  assert len(everything) == 2 + 3 + 3 * (4 + 4)
  assert everything['expert_load/layer_00/dead_share'] == .25
  assert everything['expert_load/layer_00/cv'] == pytest.approx(math.sqrt(2 / 4))
  assert everything['router_entropy/layer_02'] == .75
  layers = scalars(metrics, model, 'layers')
  assert layers == {name: x for name, x in everything.items() if '/expert_' not in name}
  extremes = scalars(metrics, model, 'extremes')
  assert extremes == {'loss': 1., 'router_entropy': .5, 'router_entropy/min': .25, 'router_entropy/max': .75,
                      'expert_load/max': 2., 'expert_load/min': 0., 'expert_load/cv': pytest.approx(math.sqrt(.5) / 3),
                      'expert_load/dead_share': pytest.approx(1 / 12)}
  assert scalars(metrics, model, 'means').keys() == extremes.keys() - {'router_entropy/min', 'router_entropy/max'}


@pytest.mark.parametrize('max_keys, train, source', ((300, 'experts', 'experts'), (70, 'experts', 'layers'),
                                                     (60, 'layers', 'extremes'), (30, 'extremes', 'means'),
                                                     (0, 'means', 'means')))
def test_a_cap_on_the_number_of_curves(tmp_path, max_keys, train, source):
  """Of training: 2 + 3 + 3 * 8 curves and 3 histograms; two sources of validation have the former."""
  model, said, written = CONFIG.replace(num_layers=3), [], set()
  writers = Writers(tmp_path, model, tensorboard=False, max_keys=max_keys, num_sources=2, say=said.append)

  class Board:
    def write_scalars(self, step, values):
      written.update(values)

    def write_histograms(self, step, values):
      written.update(f'{name} histogram' for name in values)

  writers._board = Board()
  for step in (1, 2):
    writers.train(step, metrics_of(3, 4))
    for name in ('code', 'prose'):
      writers.evaluation(step, name, metrics_of(3, 4))
  want = {f'train/{name}' for name in scalars(metrics_of(3, 4), model, train)}
  want |= {f'expert_load/layer_{i:02d} histogram' for i in range(3)} if train in ('experts', 'layers') else set()
  want |= {f'eval/{s}/{name}' for s in ('code', 'prose') for name in scalars(metrics_of(3, 4), model, source)}
  assert written == want
  assert len(said) == (train != 'experts') + (source != 'experts')
  for line, detail in zip(said, [d for d in (train, source) if d != 'experts']):
    assert DETAILS[detail] in line and f'TrainConfig.max_metric_keys = {max_keys}' in line and '\n' not in line
  if max_keys in (70, 60):
    assert len(written) <= max_keys
