"""Every setting of the library, as frozen dataclasses that hold nothing but data.

gin binds their fields (`ModelConfig.emb_dim = 768`); `openmoe_jax.gin_utils` builds a `RunConfig` from gin files.
They are pure data so that a run's whole configuration can be printed, written beside its checkpoints as config.json,
and compared with the configuration of the run that is being resumed.
"""

import dataclasses
import re
from typing import Any, Mapping, Tuple

# Also for everybody who imports these from here.
from openmoe_jax.checks import ConfigError, integers, not_negative, one_of, require
from openmoe_jax.model_config import ACTIVATIONS, CAPACITY_MODES, DISPATCH_BACKENDS, DTYPES, ROUTERS, ModelConfig

FSDP = ((), ('data',), ('expert',), ('data', 'expert'))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How devices are split. `data` -1 takes all devices that `expert` and `model` leave.

  Attributes:
    data, expert, model: sizes of the mesh axes; the batch is split over data and expert together.
    pipe: stages of a pipeline, each with as many of the model's blocks; the microbatches of a step pass through them
      (TrainConfig.num_microbatches). Vocabulary matrices are split over it, too.
    platform: 'cpu', 'gpu' or 'tpu' to insist on one; '' takes what JAX finds.
    fsdp: mesh axes, of data and expert, over which every large parameter and its optimizer state are split besides;
      a layer's parameters are brought together while it is computed. Experts' kernels, which are split over expert
      anyway, follow data only.
    shard_optimizer: the same for the optimizer state alone, in addition to `fsdp`.
    tpu_compiler_options: of XLA, for the training step on TPUs: 'xla_tpu_enable_async_all_to_all=true' and the like, as
      they would stand in LIBTPU_INIT_ARGS.
  """
  data: int = -1
  expert: int = 1
  model: int = 1
  pipe: int = 1
  platform: str = ''
  fsdp: Tuple[str, ...] = ()
  shard_optimizer: Tuple[str, ...] = ()
  tpu_compiler_options: Tuple[str, ...] = ()

  @property
  def optimizer_fsdp(self) -> Tuple[str, ...]:
    """Mesh axes over which the optimizer state, and gradients on their way to it, are split besides."""
    return tuple(axis for axis in FSDP[-1] if axis in self.fsdp + self.shard_optimizer)

  def __post_init__(self):
    for name in ('fsdp', 'shard_optimizer'):
      axes = getattr(self, name)
      axes = (axes,) if isinstance(axes, str) else tuple(axes)
      require(set(axes) <= set(FSDP[-1]) and len(set(axes)) == len(axes), f'MeshConfig.{name} = {axes!r} must be one of '
              f'{", ".join(map(str, FSDP))}')
      object.__setattr__(self, name, tuple(axis for axis in FSDP[-1] if axis in axes))
    options = self.tpu_compiler_options
    options = tuple(str(o).removeprefix('--') for o in ((options,) if isinstance(options, str) else options))
    for option in options:
      require(re.fullmatch(r'\w+=\S+', option), f'MeshConfig.tpu_compiler_options: {option!r} must be a name and a value, '
              "such as 'xla_tpu_enable_async_all_to_all=true'")
    object.__setattr__(self, 'tpu_compiler_options', options)
    integers(self, 1, 'expert', 'model', 'pipe')
    integers(self, -1, 'data')
    require(self.data != 0,
            f'MeshConfig.data = {self.data!r} must be a positive integer, or -1 for all remaining devices')
    one_of('MeshConfig.platform', self.platform, ('', 'cpu', 'gpu', 'tpu'))


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
    integers(self, 1, 'batch_size', 'num_streams', 'open_rows')
    integers(self, 0, 'seed', 'extra_ids', 'eval_batch_size', 'eval_batches')
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
    one_of('OptimizerConfig.name', self.name, ('adafactor', 'adamw'))
    integers(self, 0, 'warmup_steps', 'decay_steps')
    integers(self, 1, 'min_dim_size_to_factor')
    not_negative(self, 'learning_rate', 'min_learning_rate', 'decay_exponent', 'epsilon1', 'epsilon2',
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
    integers(self, 0, 'period', 'max_to_keep', 'keep_period')
    one_of('CheckpointConfig.restore', self.restore, ('params', 'full'))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The training loop.

  Attributes:
    train_steps: the run ends when the step counter reaches it.
    num_microbatches: gradient accumulation; must divide the batch size.
    seed: of initialisation and dropout.
    log_period: steps between points in TensorBoard.
    eval_period: steps between evaluations; 0 evaluates only at the end.
    plots: write PNGs of loss, expert load and routing when the run ends.
    routing_metrics: log for every sparse layer who is dropped and how sure the router is (docs/routing_analysis.md).
    max_metric_keys: most curves in TensorBoard, half of them of training, the others of the sources of validation together;
      figures of single experts, then of single layers give way. metrics.jsonl has everything.
    stop_on_nan: end the run, its checkpoints kept, when max_skipped_steps steps in a row were skipped; False goes on
      skipping. A step whose loss or gradients are not finite is always skipped: it changes nothing but the position in
      the data. Parameters that are not finite always end the run.
    max_skipped_steps: see stop_on_nan; 1 ends the run at the first.
    loss_spike_sigmas: warn of a loss so many standard deviations above the mean of the 128 steps before; 0 does not.
    dead_expert_load: warn of experts that got less than this share of the mean load in ten logged windows in a row; 0
      does not.
    hang_minutes: end the run, with what every thread was doing, when no step is done for so long; 0 does not. Compiling,
      evaluations and checkpoints may take ten times as long.
    lost_process_seconds: with several processes, one that gives no sign of life for so long ends the run on all of them.
  """
  train_steps: int = 1000
  num_microbatches: int = 1
  seed: int = 0
  log_period: int = 10
  eval_period: int = 1000
  stop_on_nan: bool = True
  max_skipped_steps: int = 10
  loss_spike_sigmas: float = 6.0
  dead_expert_load: float = 0.1
  hang_minutes: float = 30.0
  lost_process_seconds: float = 60.0
  plots: bool = True
  routing_metrics: bool = True
  max_metric_keys: int = 300

  def __post_init__(self):
    integers(self, 1, 'train_steps', 'num_microbatches', 'log_period', 'max_skipped_steps')
    integers(self, 0, 'seed', 'eval_period', 'max_metric_keys')
    not_negative(self, 'loss_spike_sigmas', 'dead_expert_load', 'hang_minutes', 'lost_process_seconds')
    require(self.lost_process_seconds >= 5, f'TrainConfig.lost_process_seconds = {self.lost_process_seconds} must be at '
            'least 5: a busy machine is silent for that long')


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
    integers(self, 1, 'batch_size', 'max_new_tokens', 'num_samples')
    integers(self, 0, 'period', 'max_examples', 'window', 'shots', 'top_k', 'seed')
    not_negative(self, 'temperature')
    one_of('EvalConfig.long_prompts', self.long_prompts, ('refuse', 'cut_left', 'cut_right'))
    one_of('EvalConfig.capacity_mode', self.capacity_mode, CAPACITY_MODES[:2])
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
