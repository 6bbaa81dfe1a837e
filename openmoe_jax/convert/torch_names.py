"""The names and layouts of the released PyTorch checkpoints (SPEC 9) beside those of T5X."""

from typing import Dict, NamedTuple

from openmoe_jax.config import ModelConfig
from openmoe_jax.names import t5x_shapes


class TorchName(NamedTuple):
  """Where a T5X parameter lies in a PyTorch state dict, and whether as the transposed matrix."""
  name: str
  transposed: bool


_ATTENTION = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'out': 'o_proj'}
_DENSE = {'wi_0': 'gate_proj', 'wi_1': 'up_proj', 'wo': 'down_proj'}
_EXPERT = {'wi_0': 'wi_gate', 'wi_1': 'wi_up', 'wo': 'wo'}
_NORM = {'pre_self_attention_layer_norm': 'input_layernorm', 'pre_mlp_layer_norm': 'post_attention_layernorm',
         'pre_extra_mlp_layer_norm': 'pre_extra_mlp_layernorm'}
_WHOLE = {'token_embedder/embedding': TorchName('model.embed_tokens.weight', False),
          'decoder/decoder_norm/scale': TorchName('model.norm.weight', False),
          'decoder/logits_dense/kernel': TorchName('lm_head.weight', True)}


def _torch_name(name: str) -> TorchName:
  if name in _WHOLE:
    return _WHOLE[name]
  _, layer, module, *rest = name.split('/')
  prefix = f'model.layers.{layer.removeprefix("layers_")}'
  if module in _NORM:
    return TorchName(f'{prefix}.{_NORM[module]}.weight', False)
  if module == 'self_attention':
    return TorchName(f'{prefix}.self_attn.{_ATTENTION[rest[0]]}.weight', True)
  if rest[0] == 'expert':
    return TorchName(f'{prefix}.mlp.experts.{_EXPERT[rest[1]]}', False)
  if rest[0] == 'router':
    return TorchName(f'{prefix}.mlp.gate_weight', True)
  return TorchName(f'{prefix}.{module}.{_DENSE[rest[0]]}.weight', True)


def torch_names(config: ModelConfig) -> Dict[str, TorchName]:
  """T5X name of every parameter (`names.t5x_shapes`) -> its name and orientation in PyTorch."""
  return {name: _torch_name(name) for name in t5x_shapes(config)}
