"""The PyTorch model against the released one's numbers and against the JAX model: same logits, losses and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import torch_model  # first: skips without PyTorch
import torch
from transformers import AutoModelForCausalLM

from openmoe_jax.config import ModelConfig
from openmoe_jax.convert.hf_model import feedforward_openmoe
from openmoe_jax.convert.huggingface import HuggingFaceSink
from openmoe_jax.convert.tensors import PARAMS, Source, TensorInfo
from openmoe_jax.convert.torch_names import torch_names
from openmoe_jax.convert.transfer import transfer
from openmoe_jax.model import OpenMoE
from openmoe_jax.names import from_t5x_names, t5x_shapes, to_t5x_names
from openmoe_jax.routers.groups import group_tokens
from openmoe_jax.train_step import loss_and_metrics
from tests import golden, golden_model
from tests.torch_model import modules_folder

pytestmark = pytest.mark.torch

# Two float32 programs that add in different orders; logits are of order 1 to 10.
LOGITS = 2e-5
LOSS = 1e-5
GRADIENTS = 1e-4  # of the largest of each tensor
SPARSE = (1, 3)

SMALL = ModelConfig(vocab_size=61, emb_dim=24, mlp_dim=20, num_heads=2, head_dim=16, num_layers=4, moe_interval=2,
                    num_experts=4, group_size=16, dtype='float32', scan_blocks=False, init_scale=1.0)


def golden_torch(mode: str):
  config = golden_model.config(capacity_mode=mode)
  return torch_model.from_jax(config, golden_model.params(config))


def small_params(config: ModelConfig, seed: int = 0) -> dict:
  """Random parameters, each of which matters."""
  rng = np.random.default_rng(seed)
  flat = {}
  for name, shape in t5x_shapes(config).items():
    if name.endswith('scale'):
      flat[name] = rng.normal(1, 0.3, shape)
    else:
      flat[name] = rng.normal(0, {'embedding': 1., 'w/kernel': 0.3}.get(name.split('/', 1)[1], shape[-2]**-0.5), shape)
  return from_t5x_names(config, {name: array.astype(np.float32) for name, array in flat.items()})


def small_batch(config: ModelConfig, rows: int, length: int) -> dict:
  """Targets in every column but the last, whose label PyTorch does not have."""
  ids = np.random.default_rng(1).integers(1, config.vocab_size, (rows, length + 1)).astype(np.int32)
  ids[:, 0] = 0
  weights = np.ones((rows, length), np.float32)
  weights[:, -1] = 0
  return {'decoder_input_tokens': ids[:, :-1].copy(), 'decoder_target_tokens': ids[:, 1:].copy(),
          'decoder_loss_weights': weights}


def labels_of(batch: dict) -> torch.Tensor:
  """Labels in the places of the inputs that they are: target t is label t + 1."""
  targets, weights = batch['decoder_target_tokens'], batch['decoder_loss_weights']
  labels = np.full(targets.shape, -100)
  labels[:, 1:] = np.where(weights > 0, targets, -100)[:, :-1]
  return torch.from_numpy(labels)


def mask_of(batch: dict):
  mask = batch['decoder_target_tokens'] > 0
  return None if mask.all() else torch.from_numpy(mask.astype(np.int64))


def assert_same(config: ModelConfig, params: dict, batch: dict, train: bool):
  """Logits at positions that are no padding, loss, and the gradient of every parameter."""
  if not train:  # PyTorch's evaluation loss is without the auxiliary ones
    config = config.replace(aux_loss_factor=0., router_z_loss_factor=0.)

  @jax.jit
  def compute(params):
    (loss, _), grads = jax.value_and_grad(lambda p: loss_and_metrics(config, p, batch, train), has_aux=True)(params)
    return loss, grads, OpenMoE(config).apply({'params': params}, batch, train)

  loss, grads, logits = compute(params)
  model = torch_model.from_jax(config, params).train(train)
  out = model(torch.from_numpy(batch['decoder_input_tokens']).long(), attention_mask=mask_of(batch),
              labels=labels_of(batch))
  out.loss.backward()
  real = batch['decoder_target_tokens'] > 0
  np.testing.assert_allclose(out.logits.detach().numpy()[real], np.asarray(logits)[real], rtol=0, atol=LOGITS)
  np.testing.assert_allclose(out.loss.item(), loss, rtol=LOSS)
  got = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
  want = to_t5x_names(config, grads)
  for name, (torch_name, transposed) in torch_names(config).items():
    gradient = np.asarray(want[name])
    assert np.abs(gradient).max() > 0, name
    np.testing.assert_allclose(got[torch_name].T if transposed else got[torch_name], gradient, rtol=0,
                               atol=GRADIENTS * np.abs(gradient).max(), err_msg=name)
  return out


def test_names_and_shapes():
  state = golden_torch('none').state_dict()
  want = golden.load_json('torch_state_dict_shapes.json')
  assert {name: list(tensor.shape) for name, tensor in state.items()} == want


# ---- the released PyTorch code ----


def sparse_records(model, ids):
  """(load-balance loss, router z-loss) of each sparse layer, both [layers]."""
  records = []
  hooks = [model.model.layers[i].mlp.register_forward_hook(lambda *args: records.append(args[-1][2:])) for i in SPARSE]
  with torch.no_grad():
    model(ids, output_router_logits=True)
  for hook in hooks:
    hook.remove()
  return np.array([[float(x) for x in record] for record in records]).T


def test_released_code_logits():
  want, batch = golden.load_arrays('torch_logits.npz'), golden_model.batch('lm')
  model = golden_torch('colossalai')
  with torch.no_grad():
    logits = model(torch.from_numpy(batch['decoder_input_tokens']).long()).logits.numpy()
  whole = (batch['decoder_target_tokens'] > 0).all(axis=1)
  assert whole.sum() == 4
  np.testing.assert_allclose(logits[whole], want['logits_eval'][whole], rtol=0, atol=LOGITS)
  # Without a mask padding is a token like any other there, and here.
  np.testing.assert_allclose(logits, want['logits_eval'], rtol=0, atol=LOGITS)


def test_released_code_full_and_cached():
  """Cached, the released code is right where the first token is masked; here it is right without."""
  want = golden.load_arrays('torch_logits.npz')
  ids = torch.from_numpy(golden.load_arrays('decode.npz')['teacher_input_tokens']).long()
  model = golden_torch('colossalai')
  with torch.no_grad():
    np.testing.assert_allclose(model(ids).logits.numpy(), want['teacher_full_logits'], rtol=0, atol=LOGITS)
    np.testing.assert_allclose(golden_torch('none')(ids).logits.numpy(), want['teacher_full_logits'], rtol=0,
                               atol=LOGITS)  # nothing is dropped
    cache, steps = None, []
    for begin, end in ((0, 4), *((t, t + 1) for t in range(4, ids.shape[1]))):
      out = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
      cache = out.past_key_values
      steps.append(out.logits[:, -1])
  np.testing.assert_allclose(torch.stack(steps, 1).numpy(), want['teacher_cached_mask_first0'], rtol=0, atol=LOGITS)


def test_released_code_auxiliary_losses():
  want = golden.load_arrays('torch_logits.npz')
  ids = torch.from_numpy(golden_model.batch('lm')['decoder_input_tokens']).long()
  model = golden_torch('colossalai')
  for train, kind in ((False, 'eval'), (True, 'train')):
    aux, z = sparse_records(model.train(train), ids)
    np.testing.assert_allclose(aux, want[f'aux_{kind}'], rtol=1e-5)
    np.testing.assert_allclose(z, want[f'rz_{kind}'], rtol=1e-5)


# ---- the JAX model ----


@pytest.mark.parametrize('train', (False, True))
@pytest.mark.parametrize('mode', ('none', 't5x', 'colossalai'))
def test_golden_parameters(mode, train):
  """Rows of the golden batch that have no padding."""
  config = golden_model.config(capacity_mode=mode, group_size=128)  # groups of it drop tokens in evaluation, too
  batch = golden_model.batch('lm')
  whole = (batch['decoder_target_tokens'] > 0).all(axis=1)
  batch = {name: array[whole] for name, array in batch.items()}
  batch['decoder_loss_weights'][:, -1] = 0
  out = assert_same(config, golden_model.params(config), batch, train)
  other = golden_torch('none').train(train)(torch.from_numpy(batch['decoder_input_tokens']).long()).logits
  dropped = (out.logits - other).abs().amax(-1) > 1e-3
  assert bool(dropped.any()) == (mode == 't5x' or mode == 'colossalai' and train)


VARIANTS = {
    'silu': dict(mlp_activations=('silu', 'linear')),
    'gelu_swiglu': dict(mlp_activations=('gelu', 'swiglu')),
    'parallel': dict(parallel_moe=True),
    'no_extra': dict(extra_mlp=False, num_selected_experts=3),
    'dense': dict(num_experts=0, moe_interval=1),
    'smoothing': dict(label_smoothing=0.1, z_loss=0.01, num_selected_experts=1),
    'sparse_only': dict(moe_interval=1, num_layers=2, num_expert_replicas=2),
    'ignored_padding': dict(ignore_padding_tokens=True, capacity_mode='none'),
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_variants(variant):
  config = SMALL.replace(**VARIANTS[variant])
  # 3 * 17 tokens are no multiple of the experts: zero vectors fill the groups up.
  assert_same(config, small_params(config), small_batch(config, 3, 17), train=True)


@pytest.mark.parametrize('mode, ignored', (('t5x', False), ('none', False), ('none', True)))
def test_padding_is_the_same_as_in_jax(mode, ignored):
  """Also the places in the experts' queues and the auxiliary losses, in which padding counts unless ignored."""
  config = SMALL.replace(capacity_mode=mode, ignore_padding_tokens=ignored)
  batch = small_batch(config, 4, 16)
  for row, length in enumerate((16, 5, 11, 1)):
    for array in batch.values():
      array[row, length:] = 0
  assert_same(config, small_params(config), batch, train=True)


class GoldenSource(Source):
  """The golden parameters, to be exported."""

  def __init__(self):
    self.model, self.run, self.step, self.where, self.fingerprint = golden_model.config(), {}, 0, 'golden', {}
    self._arrays = {PARAMS + name: array for name, array in golden_model.flat_params().items()}
    self.tensors = {name: TensorInfo(array.shape, array.dtype) for name, array in self._arrays.items()}

  def axis(self, name):
    return 0

  def read(self, name, axis=0, start=0, stop=None):
    return self._arrays[name][start:stop] if axis == 0 else self._arrays[name][:, start:stop]

  def check(self, sums):
    pass


@pytest.mark.parametrize('int8', (False, True))
def test_exported_folder(int8, tmp_path, modules_folder):
  """It holds all the code that it needs."""
  source = GoldenSource()
  transfer(source, HuggingFaceSink(source.model, {}, 0, int8=int8), tmp_path / 'exported')
  loaded = AutoModelForCausalLM.from_pretrained(tmp_path / 'exported', trust_remote_code=True)
  assert type(loaded).__module__.startswith('transformers_modules')
  ids = torch.from_numpy(golden_model.batch('lm')['decoder_input_tokens'][[0, 2]]).long()
  with torch.no_grad():
    difference = (loaded(ids).logits - golden_torch('none')(ids).logits).abs()
  if int8:
    assert loaded.model.layers[1].mlp.experts.wo.dtype == torch.int8
    assert 1e-3 < difference.mean() < 0.02  # of logits of order 1
  else:
    assert difference.max() < LOGITS


def test_dropout():
  """The mean over many masks is close to the value without; one mask serves all positions."""
  model = torch_model.small_model(dropout_rate=0.1).train()
  ids = torch_model.tokens(2, 6)
  with torch.no_grad():
    assert not torch.equal(model(ids).logits, model(ids).logits)
    x = torch.ones(2, 5, 1000)
    y = feedforward_openmoe.dropout(x, 0.1, training=True)
    assert torch.equal(y, y[:, :1].expand_as(y)) and abs(float((y == 0).float().mean()) - 0.1) < 0.03
    assert abs(float(y.mean()) - 1) < 0.03
    torch.testing.assert_close(model.eval()(ids).logits, torch_model.small_model()(ids).logits)


def test_groups_and_capacities():
  count = 0
  for mode in ('t5x', 'colossalai'):
    for experts, replicas, group_size in ((4, 1, 16), (8, 2, 64), (3, 1, 4096), (16, 1, 100)):
      config = SMALL.replace(capacity_mode=mode, num_experts=experts, num_expert_replicas=replicas,
                             group_size=group_size, train_capacity_factor=1.3)
      ours = torch_model.small_config(capacity_mode=mode, num_experts=experts, num_expert_replicas=replicas,
                                      group_size=group_size, capacity_factor_train=1.3)
      for batch in (1, 2, 5, 8):
        for length in (1, 7, 64, 100):
          for train in (False, True):
            want = group_tokens(config, batch, length, train)
            rows, columns, groups = feedforward_openmoe.padded_groups(ours, batch, length)
            capacity = feedforward_openmoe.expert_capacity(ours, rows * columns // groups, train)
            assert (rows, columns, groups, capacity) == (*want[:3], want.capacity)
            count += 1
  assert count == 256


def test_rotation_tables():
  """NumPy's float32 powers are off by one unit in the last place here and there: 2.4e-4 at position 4096."""
  from openmoe_jax.attention import rope_tables
  model = torch_model.small_model(head_dim=128, num_attention_heads=1)
  sin, cos = model.model._rope_tables(torch.arange(4096)[None])
  for got, want in zip((sin, cos), rope_tables(4096, 128)):
    np.testing.assert_allclose(got[0].numpy(), want, rtol=0, atol=3e-4)


def test_bfloat16_like_jax():
  """Sublayers in bfloat16, sums of layers in float32, logits float32; compared by quantile, for routes can flip."""
  config = golden_model.config(capacity_mode='none', dtype='bfloat16')
  batch = golden_model.batch('lm')
  batch = {name: array[[0, 2]] for name, array in batch.items()}
  params = golden_model.params(config)
  params = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), params)  # PyTorch's are rounded
  want = np.asarray(jax.jit(lambda p: OpenMoE(config).apply({'params': p}, batch))(params))
  model = torch_model.from_jax(config.replace(dtype='float32'), params).to(torch.bfloat16)
  with torch.no_grad():
    out = model(torch.from_numpy(batch['decoder_input_tokens']).long(), output_hidden_states=True)
  assert out.logits.dtype == torch.float32
  assert {x.dtype for x in out.hidden_states[:-1]} == {torch.float32}
  difference = np.abs(out.logits.numpy() - want)
  assert np.mean(difference < 0.03) >= 0.99 and np.mean(difference) < 0.006


@functools.lru_cache(maxsize=None)
def _initial_std(name):
  model = torch_model.OpenMoeForCausalLM(torch_model.small_config(
      hidden_size=256, intermediate_size=128, head_dim=16, num_attention_heads=8, init_scale=0.1, vocab_size=512))
  return {key: (x.std().item(), x.abs().max().item()) for key, x in model.named_parameters()}[name]


@pytest.mark.parametrize('name, std, cut', (
    ('model.embed_tokens.weight', 1., None),
    ('model.layers.0.self_attn.q_proj.weight', (0.1 / 256 / 16)**0.5, None),
    ('model.layers.0.self_attn.k_proj.weight', (0.1 / 256)**0.5, None),
    ('model.layers.0.self_attn.o_proj.weight', (0.1 / 128)**0.5, None),
    ('model.layers.0.mlp.gate_proj.weight', (0.1 / 256)**0.5, 2.28),
    ('model.layers.1.extra_mlp.down_proj.weight', (0.1 / 128)**0.5, 2.28),
    ('model.layers.1.mlp.experts.wi_gate', (0.1 / 256)**0.5, None),
    ('model.layers.1.mlp.experts.wo', (0.1 / 128)**0.5, None),
    ('model.layers.1.mlp.gate_weight', 0.02, None),
    ('lm_head.weight', (0.1 / 256)**0.5, 2.28)))
def test_initial_values(name, std, cut):
  got, largest = _initial_std(name)
  assert got == pytest.approx(std, rel=0.06)  # 2048 values at least
  assert largest < cut * std if cut else largest > 2.5 * std
