"""Settings are refused when they are made, in one line that names them; what is accepted becomes plain numbers."""

import dataclasses
import json
import math

import numpy as np
import pytest

from openmoe_jax.config import (CheckpointConfig, ConfigError, DataConfig, MeshConfig, ModelConfig, OptimizerConfig,
                                RunConfig, TrainConfig, from_dict, to_dict)

NAN, INF = math.nan, math.inf


def model(**changes) -> ModelConfig:
  values = dict(vocab_size=48, emb_dim=8, mlp_dim=10, num_heads=2, head_dim=4, num_layers=2, num_experts=4)
  return ModelConfig(**{**values, **changes})


def refused(make, name, value):
  with pytest.raises(ConfigError, match=rf'\.{name} = .* must be') as error:
    make(**{name: value})
  assert '\n' not in str(error.value)


def test_numpy_numbers_become_plain_ones():
  """Else config.json could not be written, and static arguments that are alike would compile twice."""
  plain = model(dropout_rate=0.5, train_capacity_factor=1.)
  config = model(vocab_size=np.int64(48), num_experts=np.uint8(4), head_dim=np.int32(4), dropout_rate=np.float32(0.5),
                 train_capacity_factor=np.int64(1))
  assert config == plain and hash(config) == hash(plain)
  for name in ('vocab_size', 'num_experts', 'head_dim'):
    assert type(getattr(config, name)) is int
  for name in ('dropout_rate', 'train_capacity_factor'):
    assert type(getattr(config, name)) is float
  assert json.dumps(to_dict(config)) == json.dumps(to_dict(plain))
  sections = (OptimizerConfig(warmup_steps=np.int64(3), adam_b1=np.float64(0.5)), MeshConfig(data=np.int32(-1)),
              DataConfig(seed=np.int64(1)), CheckpointConfig(period=np.int64(5)), TrainConfig(seed=np.int64(7)))
  for section in sections:
    json.dumps(to_dict(section))


@pytest.mark.parametrize('name', ('vocab_size', 'num_layers', 'num_heads', 'num_selected_experts', 'group_size',
                                  'attention_query_blocks', 'loss_chunk_tokens'))
def test_positive_integers(name):
  for value in (0, -1, 4., np.float32(4), '4', True, None, NAN):
    refused(model, name, value)


def test_number_of_experts():
  assert model(num_experts=0).num_sparse_layers == 0
  for value in (4., -1, True, '4', None, np.float64(4)):
    refused(model, 'num_experts', value)


@pytest.mark.parametrize('name', ('dropout_rate', 'label_smoothing', 'z_loss', 'aux_loss_factor', 'layer_norm_epsilon',
                                  'eval_capacity_factor', 'init_scale'))
def test_numbers_of_the_model(name):
  for value in (NAN, INF, -0.1, '0.1', None, True):
    refused(model, name, value)


@pytest.mark.parametrize('name', [f.name for f in dataclasses.fields(OptimizerConfig) if f.type in (float, 'float')])
def test_numbers_of_the_optimizer(name):
  for value in (NAN, INF, -INF, -1e-3, '0.1', None, True):
    refused(OptimizerConfig, name, value)


@pytest.mark.parametrize('name, value', (
    ('adam_b1', 1.5), ('adam_b1', 1), ('adam_b2', 1), ('adam_b2', 1.), ('warmup_steps', 10.), ('warmup_steps', -1),
    ('decay_steps', 0.5), ('min_dim_size_to_factor', 0)))
def test_other_ranges_of_the_optimizer(name, value):
  refused(OptimizerConfig, name, value)


@pytest.mark.parametrize('section, name, values', (
    (TrainConfig, 'num_microbatches', (0, -1, 2.)), (TrainConfig, 'train_steps', (0, 1.5)),
    (TrainConfig, 'seed', (-1, 0.5)), (TrainConfig, 'eval_period', (-1, 2.)), (MeshConfig, 'expert', (0, 2.)),
    (MeshConfig, 'data', (0, -2, 1.)), (DataConfig, 'batch_size', (0, 8.)), (DataConfig, 'extra_ids', (-1, 0.)),
    (CheckpointConfig, 'period', (-1, 0.5))), ids=lambda x: getattr(x, '__name__', None))
def test_numbers_of_a_run(section, name, values):
  for value in values:
    refused(section, name, value)


def test_a_run_survives_json():
  run = RunConfig(model(), DataConfig(task_feature_lengths={'inputs': 8, 'targets': 8}), optimizer=OptimizerConfig(
      learning_rate=0.1), train=TrainConfig(num_microbatches=2))
  assert from_dict(RunConfig, json.loads(json.dumps(to_dict(run)))) == run
