"""Every activation whose place on the mesh is pinned, and every name that a remat policy knows.

A tag that is renamed or lost changes no number: it costs time and memory, up to a factor of two or more. So the list is
held here; whoever changes it on purpose changes it here as well.
"""

import collections

import jax
import jax.numpy as jnp
import pytest

from openmoe_jax import model as model_lib
from openmoe_jax import partitioning
from openmoe_jax.config import MeshConfig, ModelConfig
from openmoe_jax.train_step import loss_and_metrics
from openmoe_jax.train_state import init_params

# No two sizes are equal, so that a shape says what it is.
SIZES = {'B': 16, 'L': 12, 'D': 10, 'F': 14, 'H': 2, 'K': 22, 'J': 44, 'W': 28, 'E': 4, 'G': 8, 'T': 24, 'C': 9, 'V': 96}
CONFIG = ModelConfig(vocab_size=96, emb_dim=10, mlp_dim=14, num_heads=2, head_dim=22, num_layers=4, moe_interval=2,
                     num_experts=4, group_size=24, train_capacity_factor=1.5, loss_chunk_tokens=10**6)


def equations(jaxpr):
  """All equations of a jaxpr and of those inside of it, once each."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, 'jaxpr', inner)
        if isinstance(inner, jax.extend.core.Jaxpr):
          yield from equations(inner)


def letters(shape):
  names = {size: letter for letter, size in SIZES.items()}
  return ''.join(names.get(size, '?') for size in shape)


def trace(**changes):
  """The forward pass of the loss on a mesh of 8 devices: its equations."""
  config = CONFIG.replace(**changes)
  params = jax.eval_shape(lambda: init_params(config, 0))
  tokens = jax.ShapeDtypeStruct((16, 12), jnp.int32)
  batch = {'decoder_input_tokens': tokens, 'decoder_target_tokens': tokens}
  with jax.set_mesh(partitioning.make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])):
    return list(equations(jax.make_jaxpr(lambda p, b: loss_and_metrics(config, p, b))(params, batch).jaxpr))


def pinned(found):
  specs = collections.Counter()
  for equation in found:
    if equation.primitive.name == 'sharding_constraint':
      shape = equation.outvars[0].aval.shape
      spec = tuple(equation.params['sharding'].spec)
      specs[letters(shape), spec + (None,) * (len(shape) - len(spec))] += 1
  return dict(specs)


BATCH = ('data', 'expert')
# (shape, mesh axes of each dimension): how often in a block of one dense and one sparse layer, and around the blocks.
ACTIVATIONS = {
    ('BLD', (BATCH, None, None)): 13,  # residual stream and normalised inputs; the FFNs keep to their operands
    ('BLHK', (BATCH, None, 'model', None)): 8,  # queries, keys, values and results of attention, of two layers
    ('GTD', (BATCH, None, None)): 2,  # tokens in groups, before and after the experts
}
SLOTS = {('EGCD', ('expert', 'data', None, None)): 2}
# The vocabulary's arrays are split by shard_map, in layers.TokenEmbedder and losses.
KERNELS = {
    ('DJ', (None, 'model')): 6,
    ('JD', ('model', None)): 2,
    ('DW', (None, 'model')): 2,
    ('DF', (None, 'model')): 2,
    ('FD', ('model', None)): 2,
    ('DE', (None, None)): 1,
    ('EDW', ('expert', None, 'model')): 1,
    ('EDF', ('expert', None, 'model')): 1,
    ('EFD', ('expert', 'model', None)): 1,
}


@pytest.mark.parametrize('dispatch', ('all_to_all', 'sort', 'einsum', 'dropless'))
def test_pinned_activations(dispatch):
  if dispatch == 'dropless':  # has no slots, and no groups but one, which no mesh splits
    found = pinned(trace(dispatch=dispatch, capacity_mode='none'))
    assert {key: found[key] for key in ACTIVATIONS if key[0][0] == 'B'} == {
        key: count for key, count in ACTIVATIONS.items() if key[0][0] == 'B'}
  else:
    at_home = {('GECD', (BATCH, None, None, None)): 2} if dispatch == 'sort' else {}
    assert pinned(trace(dispatch=dispatch)) == {**ACTIVATIONS, **SLOTS, **at_home, **KERNELS}


def test_remat_names():
  """The input of a layer, three named outputs in a sparse one and two in a dense one, of the shape of the residual stream;
  no others."""
  names = [(e.params['name'], letters(e.outvars[0].aval.shape)) for e in trace() if e.primitive.name == 'name']
  assert names == [(name, 'BLD') for name in (
      'layer_input', 'attention_out', 'mlp_out', 'layer_input', 'attention_out', 'mlp_out', 'extra_mlp_out')]
  assert {name for name, _ in names} == {model_lib.LAYER_INPUT, *model_lib.REMAT_NAMES}


@pytest.mark.parametrize('policy, kept', (('minimal', ['BLD'] * 5), ('full', [])))
def test_what_remat_keeps(policy, kept):
  """Of every layer besides its input: the named outputs, or nothing."""
  found = trace(remat=policy)
  layers = [e for e in found if e.primitive.name in ('checkpoint', 'remat', 'remat2')]
  assert len(layers) == 2
  saved = [letters(e.outvars[0].aval.shape) for layer in layers for e in equations(layer.params['jaxpr'])
           if layer.params['policy'](e.primitive, *(v.aval for v in e.invars), **e.params)]
  assert saved == kept
