"""ModelConfig as config.json of a Hugging Face folder, and back (SPEC 14).

The released PyTorch code calls half of its settings by two names; both are written, either is read. Settings that it
has no name for are written under ours. How a model is computed (`scan_blocks`, `remat`, ...) is no property of the
model and is not written.

Two fields say what happens to a token whose expert is full. `train_capacity_mode` is `ModelConfig.capacity_mode`;
`capacity_mode` is what the PyTorch model does, and 'none' (no token is dropped) unless asked otherwise.
"""

import numbers
import sys
from typing import Any, Dict, Mapping, NamedTuple, Tuple

from openmoe_jax.config import ACTIVATIONS, CAPACITY_MODES, DTYPES, ConfigError, ModelConfig, require
from openmoe_jax.model_config import PRIORITIES

DEFAULT_MAX_LENGTH = 2048  # what the released models were trained on; nothing in the model depends on it


class _Field(NamedTuple):
  """A setting of `ModelConfig` and its names in config.json.

  Attributes:
    names: spellings in config.json.
    kind: 'integer', 'number', 'flag', 'choice'.
    valid: smallest value, or what can be chosen.
    required: there is no default, which else is `ModelConfig`'s: that of the released models.
  """
  names: Tuple[str, ...]
  kind: str
  valid: Any = None
  required: bool = False


_FIELDS = {
    'vocab_size': _Field(('vocab_size',), 'integer', 1, required=True),
    'emb_dim': _Field(('hidden_size',), 'integer', 1, required=True),
    'mlp_dim': _Field(('intermediate_size',), 'integer', 1, required=True),
    'num_heads': _Field(('num_attention_heads',), 'integer', 1, required=True),
    'head_dim': _Field(('head_dim',), 'integer', 1, required=True),
    'num_layers': _Field(('num_hidden_layers',), 'integer', 1, required=True),
    'num_experts': _Field(('num_experts',), 'integer', 0, required=True),
    'moe_interval': _Field(('moe_layer_interval',), 'integer', 1),
    'num_selected_experts': _Field(('topk', 'router_topk'), 'integer', 1),
    'train_capacity_factor': _Field(('capacity_factor_train', 'router_capacity_factor_train'), 'number'),
    'eval_capacity_factor': _Field(('capacity_factor_eval', 'router_capacity_factor_eval'), 'number'),
    'min_expert_capacity': _Field(('min_capacity', 'router_min_capacity'), 'integer', 1),
    'layer_norm_epsilon': _Field(('layer_norm_epsilon', 'rms_norm_eps'), 'number'),
    'dropout_rate': _Field(('dropout_rate',), 'number'),
    'aux_loss_factor': _Field(('router_aux_loss_factor',), 'number'),
    'router_z_loss_factor': _Field(('router_z_loss_factor',), 'number'),
    'z_loss': _Field(('z_loss_factor',), 'number'),
    'label_smoothing': _Field(('label_smoothing',), 'number'),
    # ours
    'group_size': _Field(('group_size',), 'integer', 1),
    'num_expert_replicas': _Field(('num_expert_replicas',), 'integer', 1),
    'batch_prioritized': _Field(('batch_prioritized',), 'flag'),
    'ignore_padding_tokens': _Field(('ignore_padding_tokens',), 'flag'),
    'capacity_times_k': _Field(('capacity_times_k',), 'flag'),
    'priority': _Field(('priority',), 'choice', PRIORITIES),
    'router_jitter': _Field(('router_jitter',), 'number'),
    'capacity_mode': _Field(('train_capacity_mode',), 'choice', CAPACITY_MODES),
    'extra_mlp': _Field(('extra_mlp',), 'flag'),
    'parallel_moe': _Field(('parallel_moe',), 'flag'),
    'init_scale': _Field(('init_scale',), 'number'),
    'loss_normalization': _Field(('loss_normalization',), 'choice', ('target_tokens', 'sum')),
    'dtype': _Field(('activation_dtype',), 'choice', DTYPES),
    'residual_dtype': _Field(('residual_dtype',), 'choice', DTYPES),
}

# What other models of the format can do and OpenMoE does not: {field: the only value}.
_FIXED = {
    'tie_word_embeddings': False, 'attention_bias': False, 'mlp_bias': False, 'attention_dropout': 0.0,
    'gated': True, 'mlp_gated': True, 'noisy_policy': None, 'router_noisy_policy': None,
    'rope_theta': 10000.0, 'rope_scaling': None,
}


def to_hf_config(model: ModelConfig, dtype: str, capacity_mode: str = 'none',
                 max_position_embeddings: int = DEFAULT_MAX_LENGTH, eos_token_id: int = 1, **more) -> Dict[str, Any]:
  """config.json of an exported model, as a dictionary of JSON values.

  Args:
    model: what is exported.
    dtype: of the stored weights.
    capacity_mode: what the PyTorch model does with a token whose expert is full.
    max_position_embeddings: longest sequence promised.
    eos_token_id: end of sequence in the vocabulary.
    **more: fields that are added as they are.

  Raises:
    ConfigError: a setting of `model` that changes what is computed and that the PyTorch model does not have.
  """
  require(dtype in DTYPES, f'dtype = {dtype!r} is not known; valid: {", ".join(map(repr, DTYPES))}')
  require(capacity_mode in CAPACITY_MODES, f'capacity_mode = {capacity_mode!r} is not known; valid: '
          f'{", ".join(map(repr, CAPACITY_MODES))}')
  require(model.router == 'top_k', f"ModelConfig.router = {model.router!r} cannot be exported: the PyTorch model has "
          "the router 'top_k' only")
  require(not model.inputs_bidirectional_attention, 'ModelConfig.inputs_bidirectional_attention = True cannot be '
          'exported: attention of the PyTorch model is causal')
  require(not model.parallel_attention and not model.num_shared_experts, 'ModelConfig.parallel_attention = '
          f'{model.parallel_attention} and num_shared_experts = {model.num_shared_experts} cannot be exported: the PyTorch '
          'model has neither')
  require(not model.normalize_gates, 'ModelConfig.normalize_gates = True cannot be exported: gates of the PyTorch model '
          'are probabilities')
  require(capacity_mode == 'none' or (model.priority == 'position' and not model.capacity_times_k),
          f'ModelConfig.priority = {model.priority!r} and capacity_times_k = {model.capacity_times_k} cannot be exported '
          f"with capacity_mode = {capacity_mode!r}; 'none' can")
  for name in ('batch_prioritized', 'ignore_padding_tokens'):
    # They choose who gets the slots of a full expert; an expert without a limit gives everybody one.
    require(not getattr(model, name) or capacity_mode == 'none', f'ModelConfig.{name} = True cannot be exported with '
            f"capacity_mode = {capacity_mode!r}, which the PyTorch model fills in the order of tokens; 'none' can")
  config: Dict[str, Any] = {
      'architectures': ['OpenMoeForCausalLM'],
      'model_type': 'openmoe',
      'auto_map': {'AutoConfig': 'configuration_openmoe.OpenMoeConfig',
                   'AutoModel': 'modeling_openmoe.OpenMoeModel',
                   'AutoModelForCausalLM': 'modeling_openmoe.OpenMoeForCausalLM'},
      'bos_token_id': 0, 'pad_token_id': 0, 'eos_token_id': eos_token_id,
      'torch_dtype': dtype, 'dtype': dtype,  # transformers 4 and 5
      'hidden_act': model.mlp_activations[0],
      'max_position_embeddings': max_position_embeddings,
      'num_key_value_heads': model.num_heads,
      'pretraining_tp': 1, 'enable_kernel': False, 'expert_parallel': None, 'use_cache': True,
      'tie_word_embeddings': False,
      'gated': True, 'mlp_gated': True,
      'noisy_policy': None, 'router_noisy_policy': None,
      'drop_tks': model.capacity_mode != 'none', 'router_drop_tks': model.capacity_mode != 'none',
      'capacity_mode': capacity_mode,
      'mlp_activations': list(model.mlp_activations),
  }
  for name, field in _FIELDS.items():
    config.update(dict.fromkeys(field.names, getattr(model, name)))
  twice = sorted(set(more) & set(config))
  require(not twice, f'{", ".join(twice)} of config.json cannot be set: it follows from the model')
  return {**config, **more}


def from_hf_config(config: Mapping[str, Any]) -> ModelConfig:
  """The model that a config.json describes, a released one or ours.

  Fields that do not describe the model are ignored: ids, types of files, how PyTorch splits or speeds up the work.

  Raises:
    ConfigError: a field is missing, of the wrong type, contradicts another one, or asks for what OpenMoE is not.
  """
  require(isinstance(config, Mapping), f'{type(config).__name__} instead of an object with fields')
  _check_kind_of_model(config)
  values = {}
  for name, field in _FIELDS.items():
    if field.required:
      require(field.names[0] in config, f'{field.names[0]} is missing')
    found = {spelling: _value(config, spelling, field) for spelling in field.names if spelling in config}
    if found:
      values[name] = _agreed(found)
  values['mlp_activations'] = _activations(config)
  drops = {name: _value(config, name, _Field((), 'flag')) for name in ('drop_tks', 'router_drop_tks') if name in config}
  if drops:
    dropping = _agreed(drops)
    mode = values.setdefault('capacity_mode', ModelConfig.capacity_mode if dropping else 'none')
    require(dropping == (mode != 'none'), f'{next(iter(drops))} = {dropping!r} and train_capacity_mode = {mode!r} '
            "contradict each other: 'none' is the mode that drops no tokens")
  if values['num_experts']:
    require('moe_interval' in values, 'moe_layer_interval is missing; which layers hold the experts follows from it')
  try:
    return ModelConfig(**values)
  except ConfigError as error:
    names = {name: field.names[0] for name, field in _FIELDS.items()}
    message = str(error)
    for name in sorted(names, key=len, reverse=True):
      message = message.replace(f'ModelConfig.{name}', names[name])
    raise ConfigError(message) from error


def to_generation_config(model: ModelConfig, eos_token_id: int = 1) -> Dict[str, Any]:
  """generation_config.json: greedy, as in the original's evaluations, from id 0 to the end of the sequence.

  Args:
    model: what is exported.
    eos_token_id: end of sequence in the vocabulary.
  """
  require(eos_token_id < model.vocab_size, f'eos_token_id = {eos_token_id} is not one of the {model.vocab_size} ids')
  return {'bos_token_id': 0, 'pad_token_id': 0, 'eos_token_id': eos_token_id, 'do_sample': False, 'num_beams': 1,
          'use_cache': True}


def _check_kind_of_model(config: Mapping[str, Any]) -> None:
  """Raises `ConfigError` for a model of another architecture, or with a part that OpenMoE does not have."""
  architectures = config.get('architectures')
  if architectures is not None:
    ours = isinstance(architectures, list) and any(str(name).startswith('OpenMoe') for name in architectures)
    require(ours, f"architectures = {architectures!r} is another model; valid: ['OpenMoeForCausalLM']")
  else:
    kind = config.get('model_type', 'openmoe')
    require(kind == 'openmoe', f"model_type = {kind!r} is another model; valid: 'openmoe'")
  for name, valid in _FIXED.items():
    value = config.get(name, valid)
    same = value == valid and isinstance(value, bool) == isinstance(valid, bool)
    require(same, f'{name} = {value!r} is not what OpenMoE models can do; valid: {valid!r}')
  rotary = config.get('rope_parameters') or {}  # what transformers 5 writes instead of rope_theta and rope_scaling
  require(isinstance(rotary, Mapping) and rotary.get('rope_theta', 10000.0) == 10000.0 and
          rotary.get('rope_type', 'default') == 'default', f'rope_parameters = {rotary!r} is not what OpenMoE models '
          "can do; valid: {'rope_theta': 10000.0, 'rope_type': 'default'}")
  heads = config.get('num_attention_heads')
  groups = config.get('num_key_value_heads')
  require(groups is None or groups == heads, f'num_key_value_heads = {groups!r} must be num_attention_heads = '
          f'{heads!r}: every head of an OpenMoE model has keys and values of its own')
  mode = config.get('capacity_mode', 'none')
  require(mode in CAPACITY_MODES, f'capacity_mode = {mode!r} is not known; valid: '
          f'{", ".join(map(repr, CAPACITY_MODES))}')


def _value(config: Mapping[str, Any], name: str, field: _Field) -> Any:
  """The value of a field, checked."""
  value = config[name]
  number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if field.kind == 'integer':
    require(number and isinstance(value, numbers.Integral) and value >= field.valid,
            f'{name} = {value!r} must be an integer of at least {field.valid}')
  elif field.kind == 'number':  # NaN is not between any two numbers
    require(number and 0 <= value <= sys.float_info.max,
            f'{name} = {value!r} must be a finite number that is not negative')
  elif field.kind == 'flag':
    require(isinstance(value, bool), f'{name} = {value!r} must be true or false')
  else:
    require(value in field.valid, f'{name} = {value!r} is not known; valid: {", ".join(map(repr, field.valid))}')
  return value


def _agreed(found: Mapping[str, Any]) -> Any:
  """The one value of a setting under all its names."""
  (name, value), *others = found.items()
  for other, its in others:
    require(value == its, f'{name} = {value!r} and {other} = {its!r} are one setting and contradict each other')
  return value


def _activations(config: Mapping[str, Any]) -> Tuple[str, str]:
  first = config.get('hidden_act', 'swiglu')
  require(first in ACTIVATIONS, f'hidden_act = {first!r} is not known; valid: {", ".join(map(repr, ACTIVATIONS))}')
  both = config.get('mlp_activations', (first, 'linear'))
  require(isinstance(both, (list, tuple)) and len(both) == 2 and all(name in ACTIVATIONS for name in both),
          f'mlp_activations = {both!r} must be two of {", ".join(map(repr, ACTIVATIONS))}')
  require(both[0] == config.get('hidden_act', both[0]), f'hidden_act = {first!r} and mlp_activations = {both!r} '
          'contradict each other: the first activation is hidden_act')
  return tuple(both)
