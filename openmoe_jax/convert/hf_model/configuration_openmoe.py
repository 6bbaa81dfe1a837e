"""Settings of OpenMoE for Hugging Face transformers 4.50 to 5.

This file lies in the model's folder beside config.json. The released PyTorch code calls half of its settings by two
names; either is read here, both are written, and two that contradict each other are refused.
"""

import math
import numbers
from typing import Any, Dict, Optional, Sequence

from transformers import PretrainedConfig

ACTIVATIONS = ('swiglu', 'silu', 'gelu', 'relu', 'linear')
CAPACITY_MODES = ('none', 't5x', 'colossalai')
DTYPES = ('float32', 'bfloat16', 'float16')
WEIGHT_FORMATS = (None, 'int8')

# name here -> (its other name in the released code, default)
_TWO_NAMES = {
    'topk': ('router_topk', 2),
    'capacity_factor_train': ('router_capacity_factor_train', 1.25),
    'capacity_factor_eval': ('router_capacity_factor_eval', 2.0),
    'min_capacity': ('router_min_capacity', 4),
    'noisy_policy': ('router_noisy_policy', None),
    'drop_tks': ('router_drop_tks', True),
    'gated': ('mlp_gated', True),
    'layer_norm_epsilon': ('rms_norm_eps', 1e-6),
}


class OpenMoeConfig(PretrainedConfig):
  """Settings of an OpenMoE model; the defaults are those of the released base model.

  Args:
    vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, head_dim: sizes.
    num_experts: experts of a sparse layer; 0 makes every layer dense.
    moe_layer_interval: layer i is sparse iff i % moe_layer_interval == moe_layer_interval - 1.
    topk (router_topk): experts that each token asks for.
    capacity_mode: what happens to tokens whose expert is full. 'none': nothing is ever full; what a token gets depends
      neither on its neighbours nor on padding. 't5x': the rule of the original training, see `group_size`.
      'colossalai': that of the released PyTorch code, where all tokens of a batch are one group.
    capacity_factor_train, capacity_factor_eval (router_...): slots per expert, relative to an even share.
    min_capacity (router_min_capacity): fewest slots per expert and group.
    group_size: most tokens per routing group of mode 't5x', before rounding.
    num_expert_replicas: the number of groups is a multiple of this times num_experts.
    ignore_padding_tokens: padding takes no slot and is left out of the load-balance loss.
    batch_prioritized: other ways to hand out slots exist in training; here only with capacity_mode 'none', where it
      makes no difference.
    extra_mlp: an always-on feed-forward network behind the experts, with a norm of its own.
    parallel_moe: experts and extra network read the same normalised input.
    hidden_act: the first of `mlp_activations`.
    mlp_activations: of the two input matrices of a feed-forward network; 'swiglu' is twice as wide as the others.
    layer_norm_epsilon (rms_norm_eps): added to the mean square.
    residual_dtype: type of the sum of all layers' outputs; the type of the weights where that is more precise.
    dropout_rate: in training; one mask for all positions of a row.
    init_scale: variance scale of a new model's kernels.
    router_aux_loss_factor, router_z_loss_factor, z_loss_factor, label_smoothing: of the loss, see `OpenMoeForCausalLM`.
    output_router_logits: return them, and the auxiliary losses outside training too.
    weight_format: 'int8' for kernels stored as int8 with float32 scales.
    drop_tks, noisy_policy, gated, num_key_value_heads, pretraining_tp, enable_kernel, max_position_embeddings: of the
      released code; noisy routing, ungated networks and shared keys do not exist, the others change nothing.
    **kwargs: of `PretrainedConfig`, and the second names.

  Raises:
    ValueError: a setting that cannot be, or two names of one setting with different values.
  """
  model_type = 'openmoe'
  keys_to_ignore_at_inference = ['past_key_values', 'cache']
  attribute_map = {second: first for first, (second, _) in _TWO_NAMES.items()}

  def __init__(self, vocab_size: int = 256384, hidden_size: int = 768, intermediate_size: int = 2048,
               num_hidden_layers: int = 12, num_attention_heads: int = 12, head_dim: int = 64, num_experts: int = 16,
               moe_layer_interval: int = 4, capacity_mode: str = 'none', group_size: int = 4096,
               num_expert_replicas: int = 1, ignore_padding_tokens: bool = False, batch_prioritized: bool = False,
               extra_mlp: bool = True, parallel_moe: bool = False, hidden_act: Optional[str] = None,
               mlp_activations: Optional[Sequence[str]] = None, residual_dtype: str = 'float32',
               dropout_rate: float = 0.0, init_scale: float = 0.1, router_aux_loss_factor: float = 0.01,
               router_z_loss_factor: float = 1e-4, z_loss_factor: float = 1e-4, label_smoothing: float = 0.0,
               output_router_logits: bool = False, weight_format: Optional[str] = None,
               max_position_embeddings: int = 2048, num_key_value_heads: Optional[int] = None,
               pretraining_tp: int = 1, enable_kernel: bool = False, use_cache: bool = True, bos_token_id: int = 0,
               pad_token_id: int = 0, eos_token_id: int = 1, tie_word_embeddings: bool = False, **kwargs):
    for name, (second, default) in _TWO_NAMES.items():
      given = {key: kwargs.pop(key) for key in (name, second) if key in kwargs}
      if len(given) == 2 and given[name] != given[second]:
        raise ValueError(f'{name} = {given[name]!r} and {second} = {given[second]!r} are one setting and contradict '
                         'each other')
      setattr(self, name, next(iter(given.values()), default))
    self.vocab_size = vocab_size
    self.hidden_size = hidden_size
    self.intermediate_size = intermediate_size
    self.num_hidden_layers = num_hidden_layers
    self.num_attention_heads = num_attention_heads
    self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
    self.head_dim = head_dim
    self.num_experts = num_experts
    self.moe_layer_interval = moe_layer_interval
    self.capacity_mode = capacity_mode
    self.group_size = group_size
    self.num_expert_replicas = num_expert_replicas
    self.ignore_padding_tokens = ignore_padding_tokens
    self.batch_prioritized = batch_prioritized
    self.extra_mlp = extra_mlp
    self.parallel_moe = parallel_moe
    self.mlp_activations = [hidden_act or 'swiglu', 'linear'] if mlp_activations is None else list(mlp_activations)
    self.hidden_act = self.mlp_activations[0] if hidden_act is None and self.mlp_activations else hidden_act
    self.residual_dtype = residual_dtype
    self.dropout_rate = dropout_rate
    self.init_scale = init_scale
    self.router_aux_loss_factor = router_aux_loss_factor
    self.router_z_loss_factor = router_z_loss_factor
    self.z_loss_factor = z_loss_factor
    self.label_smoothing = label_smoothing
    self.output_router_logits = output_router_logits
    self.weight_format = weight_format
    self.max_position_embeddings = max_position_embeddings
    self.pretraining_tp = pretraining_tp
    self.enable_kernel = enable_kernel
    self.use_cache = use_cache
    kwargs.pop('model_type', None)  # a released config.json says 'llama'
    if 'dtype' in kwargs and not hasattr(PretrainedConfig(), 'dtype'):  # transformers before 4.56
      kwargs.setdefault('torch_dtype', kwargs.pop('dtype'))
    super().__init__(bos_token_id=bos_token_id, pad_token_id=pad_token_id, eos_token_id=eos_token_id,
                     tie_word_embeddings=tie_word_embeddings, **kwargs)
    self.check()

  def is_sparse(self, layer: int) -> bool:
    """Whether 0-based layer `layer` holds experts."""
    return bool(self.num_experts) and layer % self.moe_layer_interval == self.moe_layer_interval - 1

  def to_dict(self) -> Dict[str, Any]:
    """All settings, under both names where there are two."""
    values = super().to_dict()
    for name, (second, _) in _TWO_NAMES.items():
      values[second] = values[name]
    return values

  def check(self) -> None:
    """Raises `ValueError` for a setting that cannot be, with its name, its value and what would be valid."""
    for name in ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
                 'head_dim', 'moe_layer_interval', 'topk', 'min_capacity', 'group_size', 'num_expert_replicas'):
      self._integer(name, 1)
    self._integer('num_experts', 0)
    for name in ('capacity_factor_train', 'capacity_factor_eval', 'layer_norm_epsilon', 'dropout_rate', 'init_scale',
                 'router_aux_loss_factor', 'router_z_loss_factor', 'z_loss_factor', 'label_smoothing'):
      value = getattr(self, name)
      number = isinstance(value, numbers.Real) and not isinstance(value, bool)
      _require(number and math.isfinite(value) and value >= 0, name, value, 'a number that is not negative')
    for name in ('dropout_rate', 'label_smoothing'):
      _require(getattr(self, name) < 1, name, getattr(self, name), 'a number below 1')
    self._one_of('capacity_mode', CAPACITY_MODES)
    self._one_of('residual_dtype', DTYPES)
    self._one_of('weight_format', WEIGHT_FORMATS)
    self._one_of('gated', (True,))
    self._one_of('noisy_policy', (None,))
    self._one_of('tie_word_embeddings', (False,))
    self._one_of('num_key_value_heads', (self.num_attention_heads,))
    for name in ('extra_mlp', 'parallel_moe', 'ignore_padding_tokens', 'batch_prioritized'):
      self._one_of(name, (True, False))
    both = self.mlp_activations
    _require(len(both) == 2 and all(name in ACTIVATIONS for name in both), 'mlp_activations', both,
             f'two of {", ".join(map(repr, ACTIVATIONS))}')
    _require(self.hidden_act == both[0], 'hidden_act', self.hidden_act, f'{both[0]!r}, the first of mlp_activations')
    _require(self.head_dim % 2 == 0, 'head_dim', self.head_dim, 'an even number: rotary embedding turns pairs')
    _require(self.num_hidden_layers % self.moe_layer_interval == 0, 'moe_layer_interval', self.moe_layer_interval,
             f'a divisor of num_hidden_layers = {self.num_hidden_layers}')
    if self.num_experts:
      _require(self.topk <= self.num_experts, 'topk', self.topk, f'at most num_experts = {self.num_experts}')
    _require(self.extra_mlp or not self.parallel_moe, 'parallel_moe', self.parallel_moe, 'False without extra_mlp')
    _require(self.capacity_mode == 'none' or not self.batch_prioritized, 'batch_prioritized', self.batch_prioritized,
             f'False with capacity_mode = {self.capacity_mode!r}')

  def _integer(self, name: str, least: int) -> None:
    value = getattr(self, name)
    _require(isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least, name, value,
             f'an integer of at least {least}')

  def _one_of(self, name: str, valid: Sequence[Any]) -> None:
    value = getattr(self, name)
    # 1 == True and 0 == False, which are no flags.
    _require(any(value == v and type(value) is type(v) for v in valid), name, value, ' or '.join(map(repr, valid)))


def _require(condition: bool, name: str, value: Any, valid: str) -> None:
  if not condition:
    raise ValueError(f'{name} = {value!r} is not valid; valid: {valid}')
