"""The PyTorch model of exported folders, made from the parameters of a JAX model; skips loudly without PyTorch."""

import sys
import warnings

import numpy as np
import pytest

try:
  import torch
  import transformers
  from transformers import dynamic_module_utils
except ImportError as error:
  MESSAGE = f'{error}: the PyTorch model is NOT tested here; `pip install torch transformers` makes it'
  warnings.warn(MESSAGE)
  pytest.skip(MESSAGE, allow_module_level=True)

from openmoe_jax.convert.hf_model.configuration_openmoe import OpenMoeConfig
from openmoe_jax.convert.hf_model.modeling_openmoe import OpenMoeForCausalLM

transformers.logging.set_verbosity_error()
torch.set_num_threads(2)

# The same float32 sums in other orders and shapes; logits of `small_model` are of order 10.
CLOSE = dict(rtol=0, atol=5e-5)
# Five rows of tokens and how many of them there are; each begins with id 0, which is no padding.
LENGTHS = (7, 12, 3, 1, 9)


def small_config(**changes) -> OpenMoeConfig:
  """Four layers, two of them sparse, with kernels large enough for every part to matter."""
  values = dict(vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
                head_dim=8, num_experts=8, moe_layer_interval=2, group_size=32, init_scale=1.0, eos_token_id=95)
  return OpenMoeConfig(**{**values, **changes})


def small_model(seed: int = 0, **changes) -> OpenMoeForCausalLM:
  """A new model in evaluation mode, the same for the same seed; norms and router far from their initial values."""
  torch.manual_seed(seed)
  model = OpenMoeForCausalLM(small_config(**changes))
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if 'norm' in name:
        parameter.normal_(1, 0.3)
      elif name.endswith('gate_weight'):
        parameter.mul_(20)
  return model.eval()


def tokens(batch: int, length: int, vocab_size: int = 96, seed: int = 0) -> torch.Tensor:
  ids = torch.randint(2, vocab_size - 1, (batch, length), generator=torch.Generator().manual_seed(seed))
  ids[:, 0] = 0
  return ids


def padded(side: str, lengths=LENGTHS):
  """(rows of their own, the batch that they are padded to on the 'left' or 'right', its attention mask)."""
  rows = [tokens(1, length, seed=length)[0] for length in lengths]
  ids, mask = torch.zeros(2, len(rows), max(lengths), dtype=torch.long)
  for i, row in enumerate(rows):
    at = slice(-len(row), None) if side == 'left' else slice(len(row))
    ids[i, at], mask[i, at] = row, 1
  return rows, ids, mask


@pytest.fixture
def modules_folder(tmp_path, monkeypatch):
  """Where transformers copies a folder's code to, for this test alone."""
  def forget():
    for name in [name for name in sys.modules if name.split('.')[0] == 'transformers_modules']:
      del sys.modules[name]

  folder = tmp_path / 'modules'
  monkeypatch.setattr(dynamic_module_utils, 'HF_MODULES_CACHE', str(folder))
  monkeypatch.setattr(sys, 'path', [str(folder), *sys.path])
  forget()
  yield
  forget()


def from_jax(model, params) -> OpenMoeForCausalLM:
  """The PyTorch model of a `ModelConfig` and its parameters; its capacity mode is the JAX model's."""
  from openmoe_jax.convert.hf_config import to_hf_config
  from openmoe_jax.convert.torch_names import torch_names
  from openmoe_jax.names import to_t5x_names

  values = to_hf_config(model, 'float32', capacity_mode=model.capacity_mode)
  torch_model = OpenMoeForCausalLM(OpenMoeConfig.from_dict(values))
  flat, state = to_t5x_names(model, params), {}
  for name, (torch_name, transposed) in torch_names(model).items():
    array = np.array(flat[name], np.float32)
    state[torch_name] = torch.from_numpy(array.T.copy() if transposed else array)
  torch_model.load_state_dict(state)
  return torch_model.eval()
