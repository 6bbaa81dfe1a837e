"""What of a step is spent on which part of the model: by hand, and by the names in a real training step."""

import re

import jax
import jax.numpy as jnp
import pytest

from openmoe_jax import tpu_slices
from openmoe_jax.attention import FEATURES
from openmoe_jax.config import ModelConfig, OptimizerConfig
from openmoe_jax.optimizers import make_optimizer
from openmoe_jax.tpu import hlo, operations, parts
from openmoe_jax.tpu.collectives import Collective
from openmoe_jax.train_state import abstract_train_state
from openmoe_jax.train_step import make_train_step

PARTS = {'optimizer', 'loss', 'attention', 'always-on FFN', 'experts and routing', 'dense FFN', 'embedding',
         'norms and residuals', 'other'}


def model(**changes) -> ModelConfig:
  return ModelConfig(**{**dict(vocab_size=64, emb_dim=8, mlp_dim=8, num_heads=2, head_dim=4, num_layers=4, moe_interval=2,
                               num_experts=4, group_size=16), **changes})


@pytest.mark.parametrize('changes', ({}, pytest.param(dict(scan_blocks=False), marks=pytest.mark.slow)))
def test_a_training_step_has_these_parts(changes):
  """A module or a scope that is renamed is found here. (What the loss computes in its loop gets its whole name only when
  it is compiled: compile_report_test looks at that.)"""
  config = model(**changes)
  optimizer = make_optimizer(OptimizerConfig(), 10)
  batch = {name: jax.ShapeDtypeStruct((2, 16), jnp.int32) for name in (*FEATURES, 'decoder_positions')}
  lowered = make_train_step(config, optimizer).lower(abstract_train_state(config, optimizer), batch)
  text, part = lowered.as_text(debug_info=True), parts.part_of(config)
  names = dict(re.findall(r'^(#loc\d+) = loc\("([^"]*)"', text, re.MULTILINE))
  assert {part(name) for name in names.values()} == PARTS
  products = [names[place] for place in re.findall(r'stablehlo\.dot_general .* loc\((#loc\d+)\)', text)]
  assert len(products) > 100 and sum(part(name) == 'other' for name in products) == 3  # of the loss: forward, two backward


def test_parts_add_up():
  slice_ = tpu_slices.parse('v5e-8')
  chip = slice_.chip
  done = operations.Work({'loss': 1e12, 'attention': 2e12}, {'loss': 3e9, 'optimizer': 1e9}, 0., {})
  moved = [Collective('all-gather', 'data', 'ici', 5., .001, 7, 'jit(step)/optimizer/add')]
  found = {p.name: p for p in parts.parts(done, moved, parts.part_of(model()), slice_)}
  assert found['loss'][1:4] == (1e12 / chip.peak_flops, 3e9 / chip.hbm_bandwidth, 0.)
  assert found['optimizer'][1:4] == (0., 1e9 / chip.hbm_bandwidth, pytest.approx(.007))
  assert sum(p.share for p in found.values()) == pytest.approx(1.)
  assert list(found) == sorted(found, key=lambda name: -found[name].share)


def test_work_is_told_apart():
  product = jax.jit(lambda x, y: jax.named_scope('loss')(jnp.dot)(x, y))
  text = product.lower(jnp.ones((8, 8)), jnp.ones((8, 4))).compile().as_text()
  done = operations.work(hlo.parse(text), parts.part_of(model()))
  assert done.flops_of == {'loss': done.flops} and done.flops == 2 * 8 * 8 * 4
  assert done.bytes_of == {'loss': done.bytes} and done.bytes == 4 * (8 * 8 + 8 * 4 + 8 * 4)
