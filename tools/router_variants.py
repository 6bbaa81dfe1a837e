"""The variants of tools/router_study: models, and the text that they are trained and evaluated on."""

import dataclasses
import functools
import itertools
from typing import Any, Mapping, NamedTuple, Sequence

from openmoe_jax import data as data_lib, mixtures, mt_bench, vocabulary
from openmoe_jax.analysis import flops
from openmoe_jax.config import ModelConfig, RunConfig, require

BASELINE = 'default'
SESSIONS = 'part_sessions_full_lm'  # prompts, what is typed, and what is answered: turns of a conversation
QUESTIONS = 'mt_bench_turns_full_lm'
CONVERSATION_SHARE = .25  # of the rows of the warm-up that has conversations in it
DOMAINS = ('language_c', 'language_javascript', 'language_markdown', 'manual_de', 'manual_fr', 'manual_ja')


class Settings(NamedTuple):
  """The flags of router_study; see their help."""
  variants: Sequence[str]
  seeds: Sequence[int]
  steps: int
  warmup: int
  domains: Sequence[str]
  batches: int
  questions: str
  speed_rounds: int


class Variant(NamedTuple):
  """Attributes:
    model: settings of ModelConfig that differ from the recipe's.
    conversations: whether the warm-up has conversations in it.
    freeze: whether routing is frozen by token id after the warm-up.
    dense: experts a token of the sparse model with whose FLOPs a dense twin is wide enough: 'chosen' or 'trained'.
  """
  model: Mapping[str, Any] = {}
  conversations: bool = False
  freeze: bool = False
  dense: str = ''


VARIANTS = {
    BASELINE: Variant(),
    'capacity_times_k': Variant({'capacity_times_k': True}),
    'dropless': Variant({'capacity_mode': 'none', 'dispatch': 'dropless'}),
    'conversations_in_warmup': Variant(conversations=True),
    'frozen_after_warmup': Variant(freeze=True),
    'random_priority': Variant({'priority': 'random'}),
    'loss_free': Variant({'router': 'sigmoid', 'normalize_gates': True, 'aux_loss_factor': 0.,
                          'router_z_loss_factor': 0.}),
    'parallel_moe': Variant({'parallel_moe': True}),
    'parallel_attention': Variant({'parallel_attention': True}),
    'dense_as_chosen': Variant(dense='chosen'),
    'dense_as_trained': Variant(dense='trained'),
}


def model_of(run: RunConfig, variant: Variant) -> ModelConfig:
  """The model of a variant (of a frozen one, before it is frozen)."""
  if variant.dense:
    return dense_twin(run.model, run.data.row_length, run.data.batch_size, variant.dense)
  return run.model.replace(**variant.model)


def dense_twin(model: ModelConfig, length: int, rows: int, experts: str) -> ModelConfig:
  """The same layers without experts, so wide that a forward pass has the same useful FLOPs (`analysis.flops`).

  Args:
    experts: 'chosen': a token of the sparse model counts with all experts that it chooses; 'trained': with those that
      the training capacity has slots for, on average.
  """
  if experts == 'chosen':
    model = model.replace(capacity_mode='none')
  wanted = sum(flops.forward_flops_per_token(model, length, rows).values())
  twin = model.replace(num_experts=0, moe_interval=1)
  one, two = (sum(flops.forward_flops_per_token(twin.replace(mlp_dim=width), length).values()) for width in (1, 2))
  return twin.replace(mlp_dim=round(1 + (wanted - one) / (two - one)))


# Data.


def register_questions(file: str) -> None:
  """A task of the turns of MT-Bench's questions: every other one is for training, the rest for validation."""
  from openmoe_jax.tasks import demo
  from openmoe_jax.tasks.standard_library import Document
  seqio = data_lib.import_seqio()
  if QUESTIONS in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(QUESTIONS)
  questions = mt_bench.read_questions(file)
  documents = [Document(str(question.id), '\n\n'.join(question.turns) + '\n') for question in questions]
  parts = {'train': documents[0::2], 'validation': documents[1::2]}
  preprocessor, features = demo.OBJECTIVES['full_lm']
  seqio.TaskRegistry.add(QUESTIONS, source=demo.DocumentSource(parts.get, tuple(parts)), preprocessors=[preprocessor],
                         output_features=features, shuffle_buffer_size=demo.SHUFFLE_BUFFER)


class Texts:
  """Batches of training and of validation, each read once."""

  def __init__(self, run: RunConfig, settings: Settings):
    vocabulary.configure(run.data.vocabulary, run.data.extra_ids)
    vocabulary.check_fits(run.model.vocab_size)
    self._run, self._settings = run, settings
    mixtures.load_tasks(run.data, run.data.mixture_or_task)
    self.conversations = [SESSIONS] + [QUESTIONS] * bool(settings.questions)
    if settings.questions:
      register_questions(settings.questions)
    from openmoe_jax.tasks import domains
    for name in settings.domains:
      require(name in domains.KINDS, f'--domains: {name!r} is not known; valid: {", ".join(domains.KINDS)}')
    there = {name for kind in {name.partition('_')[0] for name in settings.domains} for name in domains.available(kind)}
    self.outside = [f'{name}_full_lm' for name in settings.domains if name in there]
    require(bool(self.outside), f'--domains={",".join(settings.domains)}: this machine has none of these texts')
    self.inside = data_lib.eval_sources(run.data)

  @functools.lru_cache(maxsize=4)
  def training(self, seed: int, conversations: bool) -> Sequence[data_lib.Batch]:
    """All batches of a run, [1, rows, length] each."""
    mixture = self._run.data.mixture_or_task
    schedule = [f'0: {mixture}']
    if conversations:
      share = CONVERSATION_SHARE / len(self.conversations)
      added = ' + '.join(f'{share} {name}' for name in self.conversations)
      schedule = [f'0: {1 - CONVERSATION_SHARE} {mixture} + {added}', f'{self._settings.warmup}: {mixture}']
    data = dataclasses.replace(self._run.data, mixture_schedule=tuple(schedule), seed=seed)
    return list(itertools.islice(data_lib.TrainStreams(data), self._settings.steps))

  @functools.lru_cache(maxsize=None)
  def validation(self, source: str) -> Sequence[data_lib.Batch]:
    """Batches [rows, length] of a source's split for validation, or of all of it, without rows of padding alone."""
    data = dataclasses.replace(self._run.data, eval_batches=self._settings.batches,
                               eval_split='all' if source in self.outside else 'validation')
    return [batch for batch in data_lib.eval_batches(data, source) if batch['decoder_target_tokens'].any(axis=1).all()]
