"""Every setting of the library, as frozen dataclasses that hold nothing but data.

gin binds their fields (`ModelConfig.emb_dim = 768`); `openmoe_jax.gin_utils` builds a `RunConfig` from gin files.
They are pure data so that a run's whole configuration can be printed, written beside its checkpoints as config.json,
and compared with the configuration of the run that is being resumed.
"""

import dataclasses
import math
import numbers
from typing import Any, Mapping, Tuple

DTYPES = ('float32', 'bfloat16', 'float16')
CAPACITY_MODES = ('t5x', 'none', 'colossalai')
DISPATCH_BACKENDS = ('sort', 'einsum', 'dropless')
ROUTERS = ('top_k',)
REMAT_POLICIES = ('none', 'full', 'minimal', 'dots')
ACTIVATIONS = ('swiglu', 'silu', 'gelu', 'relu', 'linear')


class ConfigError(ValueError):
  """A setting that cannot work. The message names the setting, its value and what would be valid."""


def require(condition: bool, message: str) -> None:
  """Raises `ConfigError(message)` unless `condition` holds."""
  if not condition:
    raise ConfigError(message)


def _one_of(name: str, value: Any, valid: Tuple[str, ...]) -> None:
  require(value in valid, f'{name} = {value!r} is not known; valid: {", ".join(map(repr, valid))}')


def _integers(owner: Any, least: int, *names: str) -> None:
  """Makes the fields plain integers (NumPy's are taken, too) and checks that they are at least `least`."""
  for name in names:
    value = getattr(owner, name)
    require(isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least,
            f'{type(owner).__name__}.{name} = {value!r} must be an integer of at least {least}')
    object.__setattr__(owner, name, int(value))


def _not_negative(owner: Any, *names: str) -> None:
  """Makes the fields plain floats and checks that they are finite and not negative."""
  for name in names:
    value = getattr(owner, name)
    require(isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value) and value >= 0,
            f'{type(owner).__name__}.{name} = {value!r} must be a number that is not negative')
    object.__setattr__(owner, name, float(value))


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
    router: name of the routing function, see `openmoe_jax.routers`.
    batch_prioritized: fill expert slots in the order of descending top-1 probability instead of token order.
    ignore_padding_tokens: padding takes no expert slot and is left out of the load-balance loss (SPEC 2.11).
    group_size: most tokens per routing group, before the rounding rules of SPEC 2.2 (GROUP_SIZE of the original).
    train_capacity_factor, eval_capacity_factor: expert slots per group = factor * tokens per group / E (SPEC 2.3).
    min_expert_capacity: fewest slots per expert and group.
    num_expert_replicas: R of SPEC 2.1; the number of groups is a multiple of R*E.
    capacity_mode: 't5x' (SPEC 2.3), 'none' (no token is ever dropped), 'colossalai' (SPEC 9 a, b).
    dispatch: 'sort' (gather and scatter) or 'einsum' (one-hot matrices, the reference), equal to rounding; 'dropless',
      for capacity_mode = 'none': runs of rows instead of slots, nothing padded, all tokens one routing group.
    extra_mlp: an always-on feed-forward network behind the experts, with its own norm.
    parallel_moe: the paper's equation 4: experts and extra MLP read the same normalised input and are added together.
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
      but the sub-layers' named outputs), 'full'.
    attention_query_blocks: causal attention is computed in this many blocks of queries, each against the keys up to
      its end; 1 computes the whole square.
    loss_chunk_tokens: tokens of each batch shard whose float32 logits exist at one time in the loss.
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
  batch_prioritized: bool = False
  ignore_padding_tokens: bool = False
  group_size: int = 4096
  train_capacity_factor: float = 1.25
  eval_capacity_factor: float = 2.0
  min_expert_capacity: int = 4
  num_expert_replicas: int = 1
  capacity_mode: str = 't5x'
  dispatch: str = 'sort'
  extra_mlp: bool = True
  parallel_moe: bool = False
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
  attention_query_blocks: int = 4
  loss_chunk_tokens: int = 512

  def __post_init__(self):
    object.__setattr__(self, 'mlp_activations', tuple(self.mlp_activations))
    _integers(self, 1, 'vocab_size', 'emb_dim', 'mlp_dim', 'num_heads', 'head_dim', 'num_layers', 'moe_interval',
              'num_selected_experts', 'group_size', 'min_expert_capacity', 'num_expert_replicas',
              'attention_query_blocks', 'loss_chunk_tokens')
    _integers(self, 0, 'num_experts')
    _not_negative(self, 'train_capacity_factor', 'eval_capacity_factor', 'dropout_rate', 'layer_norm_epsilon',
                  'aux_loss_factor', 'router_z_loss_factor', 'z_loss', 'label_smoothing', 'init_scale')
    _one_of('ModelConfig.router', self.router, ROUTERS)
    _one_of('ModelConfig.capacity_mode', self.capacity_mode, CAPACITY_MODES)
    _one_of('ModelConfig.dispatch', self.dispatch, DISPATCH_BACKENDS)
    _one_of('ModelConfig.remat', self.remat, REMAT_POLICIES)
    _one_of('ModelConfig.loss_normalization', self.loss_normalization, ('target_tokens', 'sum'))
    _one_of('ModelConfig.dtype', self.dtype, DTYPES)
    _one_of('ModelConfig.residual_dtype', self.residual_dtype, DTYPES)
    require(len(self.mlp_activations) == 2, f'ModelConfig.mlp_activations = {self.mlp_activations} must name two '
            "activations; the released models use ('swiglu', 'linear'), a plain SwiGLU is ('silu', 'linear')")
    for activation in self.mlp_activations:
      _one_of('ModelConfig.mlp_activations', activation, ACTIVATIONS)
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

  @property
  def num_blocks(self) -> int:
    """Number of blocks of `moe_interval` layers, the last of which is sparse."""
    return self.num_layers // self.moe_interval

  @property
  def num_sparse_layers(self) -> int:
    return self.num_blocks if self.num_experts else 0

  def is_sparse(self, layer: int) -> bool:
    """Whether 0-based decoder layer `layer` holds experts (SPEC 1.4)."""
    return bool(self.num_experts) and layer % self.moe_interval == self.moe_interval - 1

  def replace(self, **changes) -> 'ModelConfig':
    return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How devices are split. `data` -1 takes all devices that `expert` and `model` leave.

  Attributes:
    data, expert, model: sizes of the mesh axes; the batch is split over data and expert together.
    platform: 'cpu', 'gpu' or 'tpu' to insist on one; '' takes what JAX finds.
  """
  data: int = -1
  expert: int = 1
  model: int = 1
  platform: str = ''

  def __post_init__(self):
    _integers(self, 1, 'expert', 'model')
    _integers(self, -1, 'data')
    require(self.data != 0,
            f'MeshConfig.data = {self.data!r} must be a positive integer, or -1 for all remaining devices')
    _one_of('MeshConfig.platform', self.platform, ('', 'cpu', 'gpu', 'tpu'))


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What is read and how it becomes batches.

  Attributes:
    mixture_or_task: seqio name; train split is `train_split`.
    mixture_schedule: what is trained on from which batch on, instead of `mixture_or_task`, which is then only evaluated:
      ('0: 0.9 mix_ul2 + 0.1 wildchat_gpt4_chat', '10000: mix_ul2', '500000: mix_ul2_stage2'); see docs/data.md.
    task_feature_lengths: tokens per feature, e.g. {'inputs': 1024, 'targets': 1024}; a row of the batch is their sum.
    batch_size: rows per training step, over all hosts and microbatches.
    vocabulary: path of a sentencepiece model (local or gs://); '' is the small one in the package.
    extra_ids: sentinels above the sentencepiece pieces.
    pack: several examples in a row.
    open_rows: unfinished rows of a stream among which packing looks for the one where an example fits best; 1 packs in
      order, as the original did.
    loss_on_targets_only: prefix-LM examples are scored on their targets only.
    seed: of shuffling and of the objectives.
    shuffle: shuffle the training split.
    num_streams: logical streams (D): batches do not depend on the number of hosts as long as it divides D.
    train_split: seqio split to train on.
    use_cached: read tasks from seqio's cache directories.
    eval_mixture_or_task: what is evaluated during training; '' is `mixture_or_task`. A mixture is reported per source
      and as a whole.
    eval_split, eval_batch_size (0: batch_size), eval_batches: validation split ('': no evaluation) and how much of it.
    tfds_data_dir: where TFDS data sets lie; '' is TFDS's own default.
    module_imports: extra modules that register tasks, imported before the mixture is looked up.
  """
  mixture_or_task: str = ''
  mixture_schedule: Tuple[str, ...] = ()
  task_feature_lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)
  batch_size: int = 8
  vocabulary: str = ''
  extra_ids: int = 300
  pack: bool = True
  open_rows: int = 1
  loss_on_targets_only: bool = True
  seed: int = 0
  shuffle: bool = True
  num_streams: int = 4
  train_split: str = 'train'
  use_cached: bool = False
  eval_mixture_or_task: str = ''
  eval_split: str = 'validation'
  eval_batch_size: int = 0
  eval_batches: int = 10
  tfds_data_dir: str = ''
  module_imports: Tuple[str, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, 'task_feature_lengths', dict(self.task_feature_lengths))
    object.__setattr__(self, 'module_imports', tuple(self.module_imports))
    object.__setattr__(self, 'mixture_schedule', tuple(self.mixture_schedule))
    _integers(self, 1, 'batch_size', 'num_streams', 'open_rows')
    _integers(self, 0, 'seed', 'extra_ids', 'eval_batch_size', 'eval_batches')
    for feature, length in self.task_feature_lengths.items():
      require(feature in ('inputs', 'targets') and isinstance(length, int) and length > 0,
              f'DataConfig.task_feature_lengths[{feature!r}] = {length!r}: features are inputs and targets, '
              'lengths positive integers')
    require(self.batch_size % self.num_streams == 0, f'DataConfig.batch_size = {self.batch_size} must be a multiple '
            f'of num_streams = {self.num_streams}: every stream fills the same number of rows')

  @property
  def row_length(self) -> int:
    """Tokens of one row of a batch (L)."""
    return sum(self.task_feature_lengths.values())


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Optimizer and learning-rate schedule; see `openmoe_jax.optimizers` (SPEC 4).

  Attributes:
    name: 'adafactor' or 'adamw'.
    schedule: factors joined by ' * ' as in T5X: constant, linear_warmup, linear_decay, rsqrt_decay, cosine_decay.
    learning_rate: value of the `constant` factor.
    warmup_steps: of linear_warmup and rsqrt_decay.
    decay_steps: length of cosine_decay and linear_decay; 0 is the number of training steps.
    min_learning_rate: floor of the schedule.
    decay_exponent, epsilon1, epsilon2, clipping_threshold, min_dim_size_to_factor, multiply_by_parameter_scale:
      Adafactor, which keeps no momentum.
    adam_b1, adam_b2, adam_epsilon, weight_decay: AdamW.
    max_grad_norm: clip the global gradient norm before the optimizer; 0 does not clip (the original).
  """
  name: str = 'adafactor'
  schedule: str = 'constant * rsqrt_decay'
  learning_rate: float = 1.0
  warmup_steps: int = 10000
  decay_steps: int = 0
  min_learning_rate: float = 1e-8
  decay_exponent: float = 0.8
  epsilon1: float = 1e-30
  epsilon2: float = 1e-3
  clipping_threshold: float = 1.0
  min_dim_size_to_factor: int = 128
  multiply_by_parameter_scale: bool = True
  adam_b1: float = 0.9
  adam_b2: float = 0.95
  adam_epsilon: float = 1e-8
  weight_decay: float = 0.0
  max_grad_norm: float = 0.0

  def __post_init__(self):
    _one_of('OptimizerConfig.name', self.name, ('adafactor', 'adamw'))
    _integers(self, 0, 'warmup_steps', 'decay_steps')
    _integers(self, 1, 'min_dim_size_to_factor')
    _not_negative(self, 'learning_rate', 'min_learning_rate', 'decay_exponent', 'epsilon1', 'epsilon2',
                  'clipping_threshold', 'adam_b1', 'adam_b2', 'adam_epsilon', 'weight_decay', 'max_grad_norm')
    for name in ('adam_b1', 'adam_b2'):
      require(getattr(self, name) < 1, f'OptimizerConfig.{name} = {getattr(self, name)} must be below 1')
    require(self.epsilon1 > 0, f'OptimizerConfig.epsilon1 = {self.epsilon1} must be positive: gradients that are 0 are '
            'divided by its root')


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Where a run starts from and what it keeps.

  Attributes:
    period: steps between checkpoints; 0 saves only at the end and on SIGTERM.
    max_to_keep: newest checkpoints kept; 0 keeps all.
    keep_period: steps that are multiples of it are kept for ever; 0 for none.
    initial_checkpoint_path: warm start from this checkpoint when model_dir holds none.
    restore: 'params' or 'full' (with optimizer state) from initial_checkpoint_path.
    reset_step: begin a warm start at step 0 even when restore is 'full'.
    allow_setting_changes: resume although a setting that decides data order or model differs.
  """
  period: int = 1000
  max_to_keep: int = 3
  keep_period: int = 0
  initial_checkpoint_path: str = ''
  restore: str = 'params'
  reset_step: bool = False
  allow_setting_changes: bool = False

  def __post_init__(self):
    _integers(self, 0, 'period', 'max_to_keep', 'keep_period')
    _one_of('CheckpointConfig.restore', self.restore, ('params', 'full'))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The training loop.

  Attributes:
    train_steps: the run ends when the step counter reaches it.
    num_microbatches: gradient accumulation; must divide the batch size.
    seed: of initialisation and dropout.
    log_period: steps between points in TensorBoard.
    eval_period: steps between evaluations; 0 evaluates only at the end.
    stop_on_nan: end the run, its checkpoints kept, when loss or gradients are no longer finite.
    plots: write PNGs of loss and expert load when the run ends.
  """
  train_steps: int = 1000
  num_microbatches: int = 1
  seed: int = 0
  log_period: int = 10
  eval_period: int = 1000
  stop_on_nan: bool = True
  plots: bool = True

  def __post_init__(self):
    _integers(self, 1, 'train_steps', 'num_microbatches', 'log_period')
    _integers(self, 0, 'seed', 'eval_period')


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Evaluation by tasks that score answers (`openmoe-eval`, or during training); validation loss is TrainConfig's.

  Attributes:
    tasks: names of evaluation tasks (docs/evaluation.md), 'bigbench_lite' among them.
    perplexity: tasks or mixtures of which the perplexity is measured; of a training run these are the validation's.
    period: training steps between evaluations; 0: not during training.
    checkpoint: what openmoe-eval evaluates: a model_dir, a step in it, or a Hugging Face folder.
    output_dir: where openmoe-eval writes; '' is the folder `eval` in the checkpoint's.
    data_dir: local files of evaluation data, DATASET/SPLIT.jsonl; what is not there comes from TFDS.
    bigbench_data: BIG-bench's source distribution or a folder of its tasks.
    split: of the tasks.
    max_examples: questions of each task; 0 for all.
    batch_size: sequences at a time; changes no result in capacity_mode 'none'.
    max_new_tokens: of a generated answer.
    window: most positions, the start id included; 0 is the row length of training.
    long_prompts: what becomes of a question that does not fit the window: 'refuse' it, 'cut_left' or 'cut_right' it.
    shots: worked examples in each prompt of BIG-bench.
    num_samples, temperature, top_k, top_p, seed: of generated answers; figures are means over the samples.
    capacity_mode: 'none', or 't5x' as the original evaluated.
  """
  tasks: Tuple[str, ...] = ()
  perplexity: Tuple[str, ...] = ()
  period: int = 0
  checkpoint: str = ''
  output_dir: str = ''
  data_dir: str = ''
  bigbench_data: str = ''
  split: str = 'validation'
  max_examples: int = 0
  batch_size: int = 16
  max_new_tokens: int = 128
  window: int = 0
  long_prompts: str = 'refuse'
  shots: int = 3
  num_samples: int = 1
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  capacity_mode: str = 'none'

  def __post_init__(self):
    object.__setattr__(self, 'tasks', tuple(self.tasks))
    object.__setattr__(self, 'perplexity', tuple(self.perplexity))
    _integers(self, 1, 'batch_size', 'max_new_tokens', 'num_samples')
    _integers(self, 0, 'period', 'max_examples', 'window', 'shots', 'top_k', 'seed')
    _not_negative(self, 'temperature')
    _one_of('EvalConfig.long_prompts', self.long_prompts, ('refuse', 'cut_left', 'cut_right'))
    _one_of('EvalConfig.capacity_mode', self.capacity_mode, CAPACITY_MODES[:2])
    require(0 < self.top_p <= 1, f'EvalConfig.top_p = {self.top_p} must be above 0 and at most 1')
    require(not self.window or self.window > self.max_new_tokens + 1, f'EvalConfig.window = {self.window} leaves no room '
            f'for a question beside max_new_tokens = {self.max_new_tokens}')
    require(self.num_samples == 1 or self.temperature > 0, f'EvalConfig.num_samples = {self.num_samples} with '
            'temperature = 0 gives the same answer every time; set a temperature')


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Everything about one run. `model_dir` is the only setting that may differ between a run and its copy."""
  model: ModelConfig
  data: DataConfig = DataConfig()
  mesh: MeshConfig = MeshConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = EvalConfig()
  model_dir: str = ''

  def __post_init__(self):
    batch, micro = self.data.batch_size, self.train.num_microbatches
    require(batch % (micro * self.data.num_streams) == 0, f'DataConfig.batch_size = {batch} must be a multiple of '
            f'TrainConfig.num_microbatches = {micro} times DataConfig.num_streams = {self.data.num_streams}')


def to_dict(config: Any) -> Any:
  """A dataclass of this module as plain dictionaries, lists, strings and numbers (fit for JSON)."""
  if dataclasses.is_dataclass(config):
    return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
  if isinstance(config, Mapping):
    return {key: to_dict(value) for key, value in config.items()}
  if isinstance(config, (tuple, list)):
    return [to_dict(value) for value in config]
  return config


_SECTIONS = {'model': ModelConfig, 'data': DataConfig, 'mesh': MeshConfig, 'optimizer': OptimizerConfig,
             'checkpoint': CheckpointConfig, 'train': TrainConfig, 'eval': EvalConfig}


def from_dict(cls: Any, values: Mapping[str, Any]) -> Any:
  """The inverse of `to_dict` for `RunConfig` and its parts; unknown fields raise `ConfigError`."""
  names = {f.name for f in dataclasses.fields(cls)}
  unknown = sorted(set(values) - names)
  require(not unknown, f'{cls.__name__} has no setting {", ".join(unknown)}; it has {", ".join(sorted(names))}')
  if cls is RunConfig:
    values = {k: from_dict(_SECTIONS[k], v) if k in _SECTIONS else v for k, v in values.items()}
  return cls(**values)


def flatten(config: Any, prefix: str = '') -> dict:
  """{'model.emb_dim': 768, ...}: every setting on a line of its own, for printing and for comparing two runs."""
  flat = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      flat.update(flatten(value, f'{prefix}{field.name}.'))
    else:
      flat[prefix + field.name] = to_dict(value)
  return flat
