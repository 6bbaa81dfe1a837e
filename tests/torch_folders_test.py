"""Folders of the PyTorch model, as transformers saves and loads them: code, types, int8; and the configuration.

Runs with transformers 4.50 to 5 and needs no JAX.
"""

import json
import math

import pytest

from tests import torch_model as _  # first: skips without PyTorch
from safetensors.torch import load_file, save_file
import torch
import transformers
from transformers import AutoModelForCausalLM

from openmoe_jax.convert.hf_model.configuration_openmoe import OpenMoeConfig
from openmoe_jax.convert.hf_model.modeling_openmoe import OpenMoeForCausalLM, OpenMoeModel
from tests.torch_model import CLOSE, modules_folder, small_config, small_model, tokens

pytestmark = pytest.mark.torch

DTYPE = 'dtype' if tuple(map(int, transformers.__version__.split('.')[:2])) >= (4, 56) else 'torch_dtype'


@pytest.fixture(autouse=True)
def no_gradients():
  with torch.no_grad():
    yield


def assert_same_state(first, second):
  """All tensors to the bit. Logits may differ in rounding: how sums are vectorised depends on where tensors lie."""
  first, second = first.state_dict(), second.state_dict()
  assert first.keys() == second.keys()
  for name, x in first.items():
    assert x.dtype == second[name].dtype and torch.equal(x, second[name]), name


@pytest.fixture
def auto_class(monkeypatch):
  """`save_pretrained` writes the code too."""
  for cls, auto in ((OpenMoeConfig, 'AutoConfig'), (OpenMoeModel, 'AutoModel'),
                    (OpenMoeForCausalLM, 'AutoModelForCausalLM')):
    monkeypatch.setattr(cls, '_auto_class', None)
    cls.register_for_auto_class(auto)


def test_folder_with_its_own_code(tmp_path, auto_class, modules_folder):
  folder = tmp_path / 'exported'
  model = small_model(mlp_activations=['silu', 'linear'], topk=3)
  model.save_pretrained(folder)
  written = json.loads((folder / 'config.json').read_text())
  assert written['model_type'] == 'openmoe' and written['topk'] == written['router_topk'] == 3
  assert 'AutoModelForCausalLM' in written['auto_map']
  assert (folder / 'modeling_openmoe.py').exists() and (folder / 'model.safetensors').exists()
  loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
  assert type(loaded).__module__.startswith('transformers_modules')
  assert_same_state(loaded, model)
  ids = tokens(2, 7)
  torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **CLOSE)
  options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
  assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))


def test_bfloat16_folder(tmp_path):
  model = small_model()
  model.save_pretrained(tmp_path)
  loaded = OpenMoeForCausalLM.from_pretrained(tmp_path, **{DTYPE: torch.bfloat16})
  assert {x.dtype for x in loaded.parameters()} == {torch.bfloat16}
  ids = tokens(4, 8)
  out, want = loaded(ids, output_hidden_states=True), model(ids).logits
  assert out.logits.dtype == out.hidden_states[2].dtype == torch.float32
  assert out.hidden_states[-1].dtype == torch.bfloat16
  # Where routing is the same; a token that goes elsewhere is off by more.
  difference = (out.logits - want).abs().amax(-1) / want.abs().amax(-1)
  assert difference.median() < 0.05


def test_missing_weights_are_initialised_and_the_others_kept(tmp_path):
  model = small_model()
  model.save_pretrained(tmp_path)
  state = load_file(tmp_path / 'model.safetensors')
  missing = ('model.layers.1.mlp.gate_weight', 'model.layers.1.mlp.experts.wo')
  save_file({k: v for k, v in state.items() if k not in missing}, tmp_path / 'model.safetensors', {'format': 'pt'})
  loaded = OpenMoeForCausalLM.from_pretrained(tmp_path).state_dict()
  for name, value in model.state_dict().items():
    if name not in missing:
      assert torch.equal(loaded[name], value), name
  assert loaded[missing[0]].std() == pytest.approx(0.02, rel=0.2)
  assert loaded[missing[1]].std() == pytest.approx(24**-0.5, rel=0.05)


def test_parts_on_disk(tmp_path):
  """Modules are called, not read, so that their weights can be elsewhere."""
  pytest.importorskip('accelerate')
  model = small_model()
  model.save_pretrained(tmp_path)
  ids = tokens(2, 7)
  places = {'model.embed_tokens': 'cpu', 'model.norm': 'cpu', 'lm_head': 'disk',
            **{f'model.layers.{i}': 'disk' if i % 2 else 'cpu' for i in range(4)}}
  for device_map in ('auto', places):
    loaded = OpenMoeForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / 'offload')
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **CLOSE)
  assert loaded.model.layers[1].mlp.gate_weight.device.type == 'meta'


def test_resized_embeddings():
  model = small_model().to(torch.bfloat16)
  ids = tokens(2, 5)
  before = model(ids).logits
  model.resize_token_embeddings(100, mean_resizing=False)
  out = model(ids).logits
  assert out.shape[-1] == 100 == model.config.vocab_size and out.dtype == torch.float32
  assert torch.equal(out[..., :96], before)
  assert model.lm_head.weight.requires_grad and not model.config.tie_word_embeddings


# ---- int8 ----


def quantize_int8(weight, axis):
  scale = weight.abs().amax(axis, keepdim=True) / 127
  return torch.round(weight / scale).to(torch.int8), scale


def int8_folder(model, folder):
  """Writes the model with int8 kernels; returns their float32 values by name."""
  state, values = {}, {}
  for name, x in model.state_dict().items():
    kernel = '.layers.' in name and ('proj' in name or 'experts' in name)
    if kernel:
      state[name], state[name + '_scale'] = quantize_int8(x, axis=1)  # [out, in] and [experts, in, out]: over inputs
      values[name] = state[name].float() * state[name + '_scale']
    else:
      state[name] = x
  save_file(state, folder / 'model.safetensors', {'format': 'pt'})
  model.config.weight_format = 'int8'
  model.config.save_pretrained(folder)
  model.config.weight_format = None
  return values


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
def test_int8(dtype, tmp_path):
  model = small_model()
  ids = tokens(4, 8)
  exact = model(ids).logits
  values = int8_folder(model, tmp_path)
  assert len(values) == 4 * 4 + 2 * 3 + 2 * 6
  loaded = OpenMoeForCausalLM.from_pretrained(tmp_path, **{DTYPE: dtype})
  state = loaded.state_dict()
  assert state['model.layers.1.mlp.experts.wo'].dtype == torch.int8
  for name, value in values.items():
    assert state[name].dtype == torch.int8 and state[name + '_scale'].dtype == torch.float32
    assert torch.equal(state[name].float() * state[name + '_scale'], value), name
  assert state['lm_head.weight'].dtype == state['model.layers.1.mlp.gate_weight'].dtype == dtype
  model.load_state_dict(values, strict=False)
  want = model(ids).logits
  assert (want - exact).abs().max() > 0.01
  got = loaded(ids).logits
  if dtype == torch.float32:
    torch.testing.assert_close(got, want, **CLOSE)
  else:
    assert ((got - want).abs().amax(-1) / want.abs().amax(-1)).median() < 0.05
  loaded.save_pretrained(tmp_path / 'again')
  again = OpenMoeForCausalLM.from_pretrained(tmp_path / 'again', **{DTYPE: dtype})
  assert_same_state(again, loaded)


# ---- configuration ----

TWO_NAMES = {
    ('topk', 'router_topk'): (1, 2), ('capacity_factor_train', 'router_capacity_factor_train'): (1.5, 1.0),
    ('capacity_factor_eval', 'router_capacity_factor_eval'): (1.5, 1.0),
    ('min_capacity', 'router_min_capacity'): (5, 6), ('noisy_policy', 'router_noisy_policy'): (None, 'Jitter'),
    ('drop_tks', 'router_drop_tks'): (False, True), ('gated', 'mlp_gated'): (True, False),
    ('layer_norm_epsilon', 'rms_norm_eps'): (1e-5, 1e-6)}


@pytest.mark.parametrize('names', TWO_NAMES, ids=lambda names: names[0])
def test_two_names_of_one_setting(names):
  value, other = TWO_NAMES[names]
  for given in (names[:1], names[1:], names):
    config = small_config(**dict.fromkeys(given, value))
    assert getattr(config, names[0]) == getattr(config, names[1]) == value
    values = json.loads(config.to_json_string())
    assert values[names[0]] == values[names[1]] == value
    assert OpenMoeConfig.from_dict(values).to_dict() == config.to_dict()
  with pytest.raises(ValueError, match=f'{names[0]} = .* and {names[1]} = .* contradict'):
    small_config(**{names[0]: value, names[1]: other})


@pytest.mark.parametrize('setting, value', (
    ('capacity_mode', 'jax'), ('topk', 9), ('topk', 0), ('topk', True), ('hidden_size', 2.5), ('head_dim', 7),
    ('num_hidden_layers', 0), ('moe_layer_interval', 3), ('mlp_activations', ['swiglu']), ('hidden_act', 'tanh'),
    ('noisy_policy', 'Jitter'), ('gated', False), ('tie_word_embeddings', True), ('num_key_value_heads', 2),
    ('weight_format', 'int4'), ('residual_dtype', 'int8'), ('label_smoothing', 1.0), ('dropout_rate', -0.1),
    ('layer_norm_epsilon', math.nan), ('extra_mlp', 1)))
def test_settings_that_cannot_be(setting, value):
  with pytest.raises(ValueError, match=f'({setting}|mlp_activations) = .*valid: '):
    small_config(**{setting: value})


def test_settings_changed_later_are_checked_by_the_model():
  config = small_config()
  config.router_topk = 100
  with pytest.raises(ValueError, match='topk = 100'):
    OpenMoeForCausalLM(config)


def test_released_configuration():
  """What the released 8B model's config.json has, whose model_type is that of another model."""
  config = OpenMoeConfig.from_dict({
      'architectures': ['OpenMoeForCausalLM'], 'model_type': 'llama', 'intermediate_size': 8192, 'hidden_size': 2048,
      'num_hidden_layers': 24, 'head_dim': 128, 'num_attention_heads': 24, 'dropout_rate': 0.0,
      'layer_norm_epsilon': 1e-06, 'vocab_size': 256384, 'hidden_act': 'swiglu', 'num_experts': 32, 'topk': 2,
      'capacity_factor_train': 1.25, 'capacity_factor_eval': 2.0, 'min_capacity': 4, 'noisy_policy': None,
      'drop_tks': True, 'expert_parallel': None, 'gated': True, 'moe_layer_interval': 6})
  assert config.model_type == 'openmoe' and config.to_dict()['model_type'] == 'openmoe'
  assert [i for i in range(24) if config.is_sparse(i)] == [5, 11, 17, 23]
  assert config.mlp_activations == ['swiglu', 'linear'] and config.capacity_mode == 'none'
  assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 0, 1)
  with torch.device('meta'):
    count = sum(x.numel() for x in OpenMoeForCausalLM(config).parameters())
  assert count == 11_855_046_656
