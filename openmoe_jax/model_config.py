"""The settings of a model. Everybody else imports them from `openmoe_jax.config`."""

import dataclasses
from typing import Dict, Tuple

from openmoe_jax.checks import integers, not_negative, one_of, require

DTYPES = ('float32', 'bfloat16', 'float16')
CAPACITY_MODES = ('t5x', 'none', 'colossalai')
DISPATCH_BACKENDS = ('auto', 'sort', 'einsum', 'all_to_all', 'dropless')
ROUTERS = ('top_k', 'switch', 'sigmoid', 'noisy_top_k', 'hash', 'frozen', 'expert_choice', 'hierarchical')
# Routers whose gates need not add up to 1.
NORMALIZABLE = ('top_k', 'sigmoid', 'frozen', 'hierarchical')
PRIORITIES = ('position', 'reversed', 'random')
REMAT_POLICIES = ('none', 'full', 'minimal', 'dots', 'offload')
ACTIVATIONS = ('swiglu', 'silu', 'gelu', 'relu', 'linear')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and mathematics of one OpenMoE model (SPEC sections 1, 2, 3, 13).

  Attributes:
    vocab_size: rows of the embedding and columns of the output matrix (V), sentinels and padding included.
    emb_dim: width of the residual stream (D).
    mlp_dim: hidden width of every feed-forward network, dense or expert (F).
    num_heads: attention heads (H).
    head_dim: width of one head (K); H*K need not equal D.
    num_layers: decoder layers.
    moe_interval: layer i is sparse iff i % moe_interval == moe_interval - 1; must divide num_layers. 1 for a dense model.
    num_experts: experts of a sparse layer (E); 0 makes every layer dense.
    num_selected_experts: experts each token asks for (S).
    router: name of the routing function: 'top_k', 'switch' (top-1), 'sigmoid' (DeepSeek-V3),
      'noisy_top_k' (Shazeer et al. 2017), 'hash' (by token id), 'frozen' (by a table of token ids that the tool
      freeze_router makes of a checkpoint), 'expert_choice' (Zhou et al. 2022), 'hierarchical' (two
      levels, Shazeer et al. 2017); see docs/routing.md.
    allow_future_leak: has to be True for the router 'expert_choice', which shows a causal model later tokens.
    normalize_gates: a token's gates are divided by their sum over its choices, dropped ones included.
    num_expert_groups, num_selected_groups: of the router 'hierarchical': num_selected_experts are chosen in equal
      parts from this many of so many groups of experts.
    bias_update_rate: of the router 'sigmoid': how much an expert's bias moves after a step, towards equal loads.
    hash_seed: of the router 'hash', and of token ids that were never seen when a router was frozen.
    router_jitter: in training the router's input is multiplied by noise between 1 - router_jitter and 1 + router_jitter.
    priority: which tokens choose first: 'position' (in token order), 'reversed' or 'random' (drawn anew in every layer
      and step; in evaluation always the same).
    batch_prioritized: fill expert slots in the order of descending top-1 probability instead of token order.
    ignore_padding_tokens: padding takes no expert slot and is left out of the load-balance loss (SPEC 2.11).
    group_size: most tokens per routing group, before the rounding rules of SPEC 2.2 (GROUP_SIZE of the original).
    train_capacity_factor, eval_capacity_factor: expert slots per group = factor * tokens per group / E (SPEC 2.3).
    capacity_times_k: these slots are multiplied by num_selected_experts, as in GShard (capacity_mode 't5x').
    min_expert_capacity: fewest slots per expert and group.
    num_expert_replicas: R of SPEC 2.1; the number of groups is a multiple of R*E.
    capacity_mode: 't5x' (SPEC 2.3), 'none' (no token is ever dropped), 'colossalai' (SPEC 9 a, b).
    dispatch: 'sort' (gather and scatter), 'einsum' (one-hot matrices, the reference) or 'all_to_all' ('sort', with the
      exchange over the mesh axis `expert` written out), equal to rounding; 'auto' is 'all_to_all' where that axis splits
      experts and else 'sort'. 'dropless', for capacity_mode = 'none': runs of rows instead of slots, nothing padded, all
      tokens one routing group.
    extra_mlp: an always-on feed-forward network behind the experts, with its own norm.
    parallel_moe: the paper's equation 4: experts and extra MLP read the same normalised input and are added together.
    parallel_attention: in a sparse layer attention, experts and extra MLP all read the same normalised input.
    num_shared_experts: experts of a sparse layer that every token goes to besides those it chooses, as one network of
      that many times mlp_dim, added without a gate.
    mlp_activations: ('swiglu', 'linear') is the released models' three-factor gate with wi_0 [D, 2F];
      ('silu', 'linear') is the plain SwiGLU of the paper's text.
    inputs_bidirectional_attention: positions with decoder_causal_attention = 1 see each other both ways.
    dropout_rate: of the embedding, the attention weights, each FFN's hidden layer, each sub-layer's output and the
      final norm's output; one mask for all positions of a row, as in T5X.
    layer_norm_epsilon: added to the mean square in RMS norm.
    init_scale: variance scale of the kernels' initialisation (SPEC 5; the dense twins use 1.0).
    aux_loss_factor, router_z_loss_factor, z_loss: weights of the auxiliary losses (SPEC 3).
    label_smoothing: probability mass moved from the target to the other tokens.
    loss_normalization: 'target_tokens' (mean over weighted targets) or 'sum' (SPEC 13, the dense twins).
    dtype: activations; parameters are always float32.
    residual_dtype: the residual stream (SPEC 15.3).
    scan_blocks: one compiled block scanned over stacked parameters (fast to compile), or one copy a block (fast on CPU).
    remat: which activations the backward pass computes again: 'none', 'dots' (all but matmul results), 'minimal' (all
      but the sub-layers' named outputs), 'offload' (as 'minimal', but these and the layers' inputs wait in the host's
      memory), 'full'.
    attention: 'blocked', or 'splash': on TPUs from v4 on, a kernel that never writes the scores, where rows are a
      multiple of 128 tokens; the same numbers to rounding.
    attention_query_blocks: 'blocked' computes causal attention in this many blocks of queries, each against the keys up
      to its end; 1 computes the whole square.
    loss_chunk_tokens: tokens of each batch shard whose float32 logits exist at one time in the loss.
    logits_matmul_dtype: in training, what factors of products with the output matrix are rounded to; sums stay float32.
  """
  vocab_size: int
  emb_dim: int
  mlp_dim: int
  num_heads: int
  head_dim: int
  num_layers: int
  moe_interval: int = 1
  num_experts: int = 0
  num_selected_experts: int = 2
  router: str = 'top_k'
  normalize_gates: bool = False
  allow_future_leak: bool = False
  num_expert_groups: int = 2
  num_selected_groups: int = 2
  bias_update_rate: float = 1e-3
  hash_seed: int = 0
  router_jitter: float = 0.0
  priority: str = 'position'
  batch_prioritized: bool = False
  ignore_padding_tokens: bool = False
  group_size: int = 4096
  train_capacity_factor: float = 1.25
  eval_capacity_factor: float = 2.0
  capacity_times_k: bool = False
  min_expert_capacity: int = 4
  num_expert_replicas: int = 1
  capacity_mode: str = 't5x'
  dispatch: str = 'auto'
  extra_mlp: bool = True
  parallel_moe: bool = False
  parallel_attention: bool = False
  num_shared_experts: int = 0
  mlp_activations: Tuple[str, ...] = ('swiglu', 'linear')
  inputs_bidirectional_attention: bool = False
  dropout_rate: float = 0.0
  layer_norm_epsilon: float = 1e-6
  init_scale: float = 0.1
  aux_loss_factor: float = 0.01
  router_z_loss_factor: float = 1e-4
  z_loss: float = 1e-4
  label_smoothing: float = 0.0
  loss_normalization: str = 'target_tokens'
  dtype: str = 'bfloat16'
  residual_dtype: str = 'float32'
  scan_blocks: bool = True
  remat: str = 'none'
  attention: str = 'blocked'
  attention_query_blocks: int = 4
  loss_chunk_tokens: int = 512
  logits_matmul_dtype: str = 'float32'

  def __post_init__(self):
    object.__setattr__(self, 'mlp_activations', tuple(self.mlp_activations))
    integers(self, 1, 'vocab_size', 'emb_dim', 'mlp_dim', 'num_heads', 'head_dim', 'num_layers', 'moe_interval',
             'num_selected_experts', 'num_expert_groups', 'num_selected_groups', 'group_size', 'min_expert_capacity',
             'num_expert_replicas', 'attention_query_blocks', 'loss_chunk_tokens')
    integers(self, 0, 'num_experts', 'num_shared_experts', 'hash_seed')
    not_negative(self, 'train_capacity_factor', 'eval_capacity_factor', 'dropout_rate', 'layer_norm_epsilon',
                 'aux_loss_factor', 'router_z_loss_factor', 'z_loss', 'label_smoothing', 'init_scale',
                 'bias_update_rate', 'router_jitter')
    one_of('ModelConfig.router', self.router, ROUTERS)
    one_of('ModelConfig.priority', self.priority, PRIORITIES)
    one_of('ModelConfig.capacity_mode', self.capacity_mode, CAPACITY_MODES)
    one_of('ModelConfig.dispatch', self.dispatch, DISPATCH_BACKENDS)
    one_of('ModelConfig.remat', self.remat, REMAT_POLICIES)
    one_of('ModelConfig.attention', self.attention, ('blocked', 'splash'))
    require(self.attention == 'blocked' or not (self.inputs_bidirectional_attention or self.dropout_rate),
            "ModelConfig.attention = 'splash' is causal and drops nothing: it needs inputs_bidirectional_attention = False "
            "and dropout_rate = 0; 'blocked' does both")
    one_of('ModelConfig.loss_normalization', self.loss_normalization, ('target_tokens', 'sum'))
    one_of('ModelConfig.dtype', self.dtype, DTYPES)
    one_of('ModelConfig.residual_dtype', self.residual_dtype, DTYPES)
    one_of('ModelConfig.logits_matmul_dtype', self.logits_matmul_dtype, DTYPES)
    require(len(self.mlp_activations) == 2, f'ModelConfig.mlp_activations = {self.mlp_activations} must name two '
            "activations; the released models use ('swiglu', 'linear'), a plain SwiGLU is ('silu', 'linear')")
    for activation in self.mlp_activations:
      one_of('ModelConfig.mlp_activations', activation, ACTIVATIONS)
    require(self.head_dim % 2 == 0, f'ModelConfig.head_dim = {self.head_dim} must be even: rotary embedding '
            'turns pairs of features')
    require(self.num_layers % self.moe_interval == 0, f'ModelConfig.moe_interval = {self.moe_interval} must divide '
            f'num_layers = {self.num_layers}')
    require(self.dropout_rate < 1, f'ModelConfig.dropout_rate = {self.dropout_rate} must be below 1')
    require(self.label_smoothing < 1, f'ModelConfig.label_smoothing = {self.label_smoothing} must be below 1')
    if self.num_experts:
      require(self.num_selected_experts <= self.num_experts, 'ModelConfig.num_selected_experts = '
              f'{self.num_selected_experts} must be at most num_experts = {self.num_experts}')
    require(self.dispatch != 'dropless' or self.capacity_mode == 'none', f"ModelConfig.dispatch = 'dropless' has no "
            f"capacity: it needs capacity_mode = 'none', not {self.capacity_mode!r}")
    require(self.dispatch != 'dropless' or not self.dropout_rate, "ModelConfig.dispatch = 'dropless' has no dropout: "
            f'it needs dropout_rate = 0, not {self.dropout_rate}')
    require(not (self.parallel_moe and not self.extra_mlp),
            'ModelConfig.parallel_moe = True needs extra_mlp = True: it adds the two together')
    self._check_routing()

  def _check_routing(self):
    require(self.router_jitter < 1, f'ModelConfig.router_jitter = {self.router_jitter} must be below 1')
    require(not self.batch_prioritized or self.priority == 'position', 'ModelConfig.batch_prioritized = True is an order '
            f"of its own: it needs priority = 'position', not {self.priority!r}")
    require(not self.capacity_times_k or self.capacity_mode != 'colossalai', 'ModelConfig.capacity_times_k = True needs '
            "capacity_mode = 't5x': in 'colossalai' the capacity is multiplied by num_selected_experts already")
    if not self.num_experts:
      return
    require(self.router != 'switch' or self.num_selected_experts == 1, "ModelConfig.router = 'switch' needs "
            f'num_selected_experts = 1, not {self.num_selected_experts}')
    if self.router == 'hierarchical':
      groups, chosen = self.num_expert_groups, self.num_selected_groups
      require(self.num_experts % groups == 0, f'ModelConfig.num_expert_groups = {groups} must divide num_experts = '
              f'{self.num_experts}')
      require(chosen <= groups and self.num_selected_experts % chosen == 0, f'ModelConfig.num_selected_groups = {chosen} '
              f'must be at most num_expert_groups = {groups} and divide num_selected_experts = {self.num_selected_experts}')
      require(self.num_selected_experts // chosen <= self.num_experts // groups, 'ModelConfig.num_selected_experts = '
              f'{self.num_selected_experts} is more than {chosen} groups of {self.num_experts // groups} experts hold')
    if self.router == 'expert_choice':
      require(self.allow_future_leak, "ModelConfig.router = 'expert_choice' lets a token's experts depend on later tokens: a "
              'causal model leaks the future in training and evaluation; allow_future_leak = True accepts that')
      require(self.capacity_mode != 'none', "ModelConfig.router = 'expert_choice' fills experts up to a capacity: it cannot "
              "have capacity_mode = 'none', which generation, scoring and dispatch = 'dropless' go with")
      require(not self.batch_prioritized and self.priority == 'position', "ModelConfig.router = 'expert_choice' has no "
              'order of tokens: it needs batch_prioritized = False and priority = "position"')
    require(self.router != 'hash' or not self.router_jitter, f"ModelConfig.router = 'hash' does not look at the input: "
            f'it needs router_jitter = 0, not {self.router_jitter}')
    require(self.router != 'noisy_top_k' or self.num_selected_experts > 1, "ModelConfig.router = 'noisy_top_k' needs "
            'num_selected_experts of at least 2: the gate of a single expert would always be 1')
    if self.normalize_gates:
      require(self.router in NORMALIZABLE, f'ModelConfig.normalize_gates = True is not for router = {self.router!r}; '
              f'it is for {", ".join(map(repr, NORMALIZABLE))}')
      require(self.num_selected_experts > 1, 'ModelConfig.normalize_gates = True needs num_selected_experts of at least 2: '
              'the gate of a single expert would always be 1, and the router would learn nothing from it')

  @property
  def num_blocks(self) -> int:
    """Number of blocks of `moe_interval` layers, the last of which is sparse."""
    return self.num_layers // self.moe_interval

  @property
  def num_sparse_layers(self) -> int:
    return self.num_blocks if self.num_experts else 0

  @property
  def router_draws(self) -> bool:
    """Whether routing in training needs a random key."""
    return bool(self.num_experts) and (self.router_jitter > 0 or self.priority == 'random' or
                                       self.router == 'noisy_top_k')

  @property
  def router_kernels(self) -> Dict[str, int]:
    """The router's kernels [D, width] in every sparse layer: name -> width."""
    if self.router == 'hash':
      return {}
    more = {'noisy_top_k': {'noise_weights': self.num_experts},
            'hierarchical': {'group_weights': self.num_expert_groups}}
    return {'router_weights': self.num_experts, **more.get(self.router, {})}

  def is_sparse(self, layer: int) -> bool:
    """Whether 0-based decoder layer `layer` holds experts (SPEC 1.4)."""
    return bool(self.num_experts) and layer % self.moe_interval == self.moe_interval - 1

  def replace(self, **changes) -> 'ModelConfig':
    return dataclasses.replace(self, **changes)
