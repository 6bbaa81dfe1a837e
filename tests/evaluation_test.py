"""Validation: sums over batches and sources, and the entropy they are compared with."""

import jax
import numpy as np
import pytest

from openmoe_jax import evaluation
from openmoe_jax.config import MeshConfig
from openmoe_jax.partitioning import make_mesh
import tiny_run

TARGETS = {'a': [[[5, 5, 6, 0]], [[7, 0, 0, 0]]], 'b': [[[5, 8, 8, 8]]]}


def batch_of(targets):
  targets = np.asarray(targets, np.int32)
  return {'decoder_target_tokens': targets, 'decoder_loss_weights': (targets > 0).astype(np.int32)}


def eval_step(params, batch):
  """As if the loss of a token were its id, and every 5 were guessed."""
  targets, weights = np.asarray(batch['decoder_target_tokens']), np.asarray(batch['decoder_loss_weights'])
  return {'num_target_tokens': weights.sum(), 'cross_ent_loss': (weights * targets).sum(),
          'accuracy': (weights * (targets == 5)).sum()}


@pytest.fixture(name='evaluate')
def evaluator(monkeypatch):
  def make(sources):
    monkeypatch.setattr(evaluation.data_lib, 'eval_sources', lambda data: list(sources))
    monkeypatch.setattr(evaluation.data_lib, 'eval_batches', lambda data, name: map(batch_of, TARGETS[name]))
    run = tiny_run.tiny_run('unused', data=dict(mixture_or_task='the_mixture'))
    return evaluation.Evaluator(run, make_mesh(MeshConfig(), jax.devices()[:1]), eval_step)(None)
  return make


def test_each_source_and_all_together(evaluate):
  records = evaluate('ab')
  assert list(records) == ['a', 'b', 'the_mixture']
  assert [records[name]['num_target_tokens'] for name in records] == [4, 4, 8]
  np.testing.assert_allclose([records[name]['loss'] for name in records], [23 / 4, 29 / 4, 52 / 8])
  np.testing.assert_allclose([records[name]['accuracy'] for name in records], [2 / 4, 1 / 4, 3 / 8])
  entropy = lambda *p: -sum(x * np.log(x) for x in p)
  np.testing.assert_allclose([records[name]['unigram_entropy'] for name in records], [
      entropy(1 / 2, 1 / 4, 1 / 4), entropy(1 / 4, 3 / 4), entropy(3 / 8, 1 / 8, 1 / 8, 3 / 8)])
  np.testing.assert_allclose(records['a']['perplexity'], np.exp(23 / 4))


def test_one_source_is_reported_once(evaluate):
  assert list(evaluate('a')) == ['a']
