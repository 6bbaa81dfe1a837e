"""Expert surgery: takes experts out of a trained model, or replaces a layer's router, and measures what it costs.

Every figure is the change of loss on the same tokens, in nats per target token, domain by domain. No token is dropped, so
that an ablation does not change who finds a free slot. One compiled program runs them all (`routers.surgery`).
"""

import dataclasses
import functools
import io
import json
import time
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import jax
import jax.numpy as jnp
import numpy as np

from openmoe_jax import decoding, paths, scoring
from openmoe_jax import data as data_lib
from openmoe_jax.analysis import resampling
from openmoe_jax.analysis.resampling import Estimate
from openmoe_jax.attention import make_logit_mask
from openmoe_jax.bar import Bar
from openmoe_jax.config import ConfigError, ModelConfig, require
from openmoe_jax.model import OpenMoE, variables
from openmoe_jax.progress import short_number
from openmoe_jax.recording import collect, policies, tables
from openmoe_jax.recording.forward import FEATURES
from openmoe_jax.routers import frozen, surgery
from openmoe_jax.train_step import target_weights

# Of an expert: its output is zero, and nothing else changes; or it may not be chosen, and the next best takes its place.
EXPERT_KINDS = ('zero', 'next')
# Of a layer: no expert gives anything; random experts; even gates; experts by a hash of the token id, always the same
# ones, or by a table of token ids. All but the last leave each rank of choice its gate.
LAYER_KINDS = ('no_experts', 'random', 'uniform', 'hash', 'same', 'table')
KINDS = EXPERT_KINDS + LAYER_KINDS
_SECONDS_BETWEEN_SAVES = 30.


class Ablation(NamedTuple):
  """Attributes:
    kind: one of KINDS.
    layer: number of a sparse layer among the decoder's layers.
    expert: for EXPERT_KINDS; -1 for a whole layer.
  """
  kind: str
  layer: int
  expert: int = -1

  def __str__(self) -> str:
    return f'{self.kind}:{self.layer}' + (f':{self.expert}' if self.expert >= 0 else '')


def refusal(config: ModelConfig, kind: str) -> str:
  """Why a kind is nothing for a model's routers; '' if it is something."""
  others = config.num_experts - config.num_selected_experts
  if config.router == 'hierarchical':
    others = config.num_experts // config.num_expert_groups - config.num_selected_experts // config.num_selected_groups
  if kind == 'next' and config.router in ('hash', 'frozen'):
    return f'the router {config.router!r} has no next best expert'
  if kind == 'next' and others < 1:
    return 'every expert is chosen, there is no next best'
  if kind == 'uniform' and (config.num_selected_experts == 1 or config.router == 'hash'):
    return 'the gates of a token are even already'
  if kind in ('hash', 'table') and config.router in ('hash', 'frozen'):
    return f'the router {config.router!r} chooses by token id already'
  if kind == 'table' and config.router not in ('top_k', 'switch'):
    return f"the router {config.router!r} has other gates than the router 'frozen'; it is for 'top_k' and 'switch'"
  return ''


def plan(config: ModelConfig, kinds: Sequence[str] = (), experts: Sequence[Tuple[int, int]] = (),
         layers: Sequence[int] = ()) -> List[Ablation]:
  """What is to be done.

  Args:
    config: of the model.
    kinds: () for all that make sense for its router.
    experts: (layer, expert) of EXPERT_KINDS; () for all of `layers`.
    layers: sparse layers; () for all, or, where experts are given, for LAYER_KINDS in none.

  Raises:
    ConfigError: a name, layer or expert that there is not, or nothing to do.
  """
  require(config.num_sparse_layers > 0, 'this model has no sparse layers (ModelConfig.num_experts = 0): there is nothing '
          'to ablate')
  sparse = tables.sparse_layers(config)
  for kind in kinds:
    require(kind in KINDS, f'--ablations: {kind!r} is not known; valid: {", ".join(KINDS)}')
    require(not refusal(config, kind), f'--ablations: {kind!r} makes no sense: {refusal(config, kind)}')
  for layer in [*layers, *(layer for layer, _ in experts)]:
    require(layer in sparse, f'layer {layer} holds no experts; the sparse layers are {", ".join(map(str, sparse))}')
  for layer, expert in experts:
    require(0 <= expert < config.num_experts, f'expert {expert} of layer {layer} does not exist; a layer has experts 0 to '
            f'{config.num_experts - 1}')
  chosen = experts or [(layer, expert) for layer in layers or sparse for expert in range(config.num_experts)]
  whole = layers or (() if experts else sparse)
  kinds = kinds or [kind for kind in KINDS if not refusal(config, kind)]
  found = [Ablation(kind, *which) for kind in kinds if kind in EXPERT_KINDS for which in chosen]
  found += [Ablation(kind, layer) for kind in kinds if kind in LAYER_KINDS for layer in whole]
  require(bool(found), '--experts without --layers leaves nothing to do for the kinds that are about a whole layer')
  return list(dict.fromkeys(found))


class Domain(NamedTuple):
  """What was measured of a domain: R rows that hold targets, N sparse layers, E experts.

  Attributes:
    targets: float64 [R], target tokens of each row (their weights).
    loss: float64 [R], sums over the row, of the model as it is.
    load: float64 [N, E], share of all choices that asked for each expert, times E.
    gate: float64 [N, E], mean gate of those choices; 0 where nobody asks.
    changed: {ablation: float64 [R], sums of the loss of the ablated model}.
  """
  targets: np.ndarray
  loss: np.ndarray
  load: np.ndarray
  gate: np.ndarray
  changed: Dict[Ablation, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Ablations:
  """Results.

  Attributes:
    config: of the model.
    step: training steps of the checkpoint.
    ablations: what was done.
    domains: {task: Domain}.
    unseen: share of the tokens whose id the table of 'table' did not know; NaN without it.
  """
  config: ModelConfig
  step: int
  ablations: List[Ablation]
  domains: Dict[str, Domain]
  unseen: float
  _changes: Dict[Tuple[Ablation, str], Estimate] = dataclasses.field(default_factory=dict, repr=False)

  def loss(self, domain: str) -> Estimate:
    """Loss of the model as it is, nats per target token."""
    of = self.domains[domain]
    return resampling.ratio(of.loss, of.targets, resampling.blocks_of(np.arange(len(of.loss))))

  def change(self, ablation: Ablation, domain: str) -> Estimate:
    """How much larger the loss is, nats per target token; paired, blocks of rows are drawn again."""
    if (ablation, domain) not in self._changes:
      of = self.domains[domain]
      blocks = resampling.blocks_of(np.arange(len(of.loss)))
      self._changes[ablation, domain] = resampling.ratio(of.changed[ablation] - of.loss, of.targets, blocks)
    return self._changes[ablation, domain]

  def layer_index(self, layer: int) -> int:
    """Of a decoder layer among the sparse ones."""
    return list(tables.sparse_layers(self.config)).index(layer)


def ablate(model: Any, data: collect.Settings, kinds: Sequence[str] = (), experts: Sequence[Tuple[int, int]] = (),
           layers: Sequence[int] = (), rows_file: Optional[paths.PathLike] = None, say: Callable[[str], None] = print
           ) -> Ablations:
  """Measures a model with every ablation over tasks.

  Args:
    model: `loading.Model`.
    data: mixtures, tokens of each task, split, length and batch_size; each task is a domain.
    kinds, experts, layers: see `plan`.
    rows_file: what is found is kept in this file, and what it holds is not computed again.
    say: prints a line.

  Raises:
    ConfigError: settings that cannot be, unknown tasks, a domain with fewer than 8 rows, or a file of something else.
  """
  collect.check(data)
  config = policies.configure(model.config, 'none')
  ablations = plan(config, kinds, experts, layers)
  tasks = collect.tasks(collect.data_settings(model.run, data), data)
  batches = {domain: list(data_lib.eval_batches(own, domain)) for domain, own in tasks.items()}
  for domain, own in batches.items():
    rows = sum(int(_weights(batch).any(axis=1).sum()) for batch in own)
    require(rows >= 8, f'{domain} has {rows} rows with targets, at least 8 are needed for an interval; give more --tokens, '
            'or a shorter --length')
  operation = _Operation(model, config, batches, ablations)
  with _Store(rows_file, list(batches), operation.baseline) as store:
    operation.run(store, say)
  return Ablations(config, model.step, ablations, operation.domains, operation.unseen)


class _Operation:
  """Runs a model over batches that are kept.

  Attributes:
    baseline: {domain: float64 [R]}, loss of each row.
    domains: what is known so far.
    unseen: see Ablations.
  """

  def __init__(self, model: Any, config: ModelConfig, batches: Mapping[str, List[Any]], ablations: Sequence[Ablation]):
    self._model, self._config, self._batches, self._ablations = model, config, batches, ablations
    self._rows = {domain: [_weights(batch).any(axis=1) for batch in own] for domain, own in batches.items()}
    self._neutral = surgery.neutral(config)
    self._neutral['experts'] = jnp.asarray(self._neutral['experts'])  # the large one goes to the device once
    self._totals: Any = None  # of routers' probabilities by token id, of all batches
    self.unseen = float('nan')
    if any(ablation.kind == 'table' for ablation in ablations):
      self._count_probabilities()
    self.domains = {domain: self._baseline(domain) for domain in batches}
    self.baseline = {domain: of.loss for domain, of in self.domains.items()}
    asked = sum(of.load for of in self.domains.values())
    self._busiest = np.argsort(-asked, axis=1, kind='stable')[:, :config.num_selected_experts].astype(np.int32)

  def run(self, store: '_Store', say: Callable[[str], None]) -> None:
    """Does all that the store does not know."""
    positions = {domain: sum(batch['decoder_input_tokens'].size for batch in own) for domain, own in self._batches.items()}
    total = sum(positions.values()) * len(self._ablations)
    with Bar(total, say, f'{len(self._ablations)} ablations', lambda n: f'{short_number(n)} tokens') as bar:
      for ablation in self._ablations:
        for domain, of in self.domains.items():
          rows = store.get(domain, ablation)
          if rows is None:
            edits = (self._edits(ablation, domain, i) for i in range(len(self._batches[domain])))
            rows = self._losses(domain, edits)[0]
            store.put(domain, ablation, rows)
          of.changed[ablation] = rows
          bar.advance(positions[domain])

  def _baseline(self, domain: str) -> Domain:
    loss, asked, gate = self._losses(domain, (self._neutral for _ in self._batches[domain]))
    targets = np.concatenate([_weights(batch).sum(axis=1)[rows]
                              for batch, rows in zip(self._batches[domain], self._rows[domain])]).astype(np.float64)
    share = asked / asked.sum(axis=1, keepdims=True)
    return Domain(targets, loss, share * self._config.num_experts, gate / np.maximum(asked, 1), {})

  def _losses(self, domain: str, edits: Iterator[Mapping[str, np.ndarray]]):
    """Sums of loss float64 [R]; choices that asked for each expert, and the sum of their gates, float64 [N, E]."""
    losses, asked, gates = [], 0., 0.
    for batch, rows, own in zip(self._batches[domain], self._rows[domain], edits):
      log_prob, ask, gate = self._call(_run, batch, own)
      losses.append(-np.sum(log_prob.astype(np.float64) * _weights(batch), axis=1)[rows])
      asked, gates = asked + ask.astype(np.float64), gates + gate.astype(np.float64)
    return np.concatenate(losses), asked, gates

  def _call(self, function: Callable, batch: Mapping[str, np.ndarray], *more: Any) -> Any:
    mesh, length = self._model.mesh, batch['decoder_input_tokens'].shape[1]
    with decoding.mesh_scope(mesh):
      placed = {name: decoding.place(mesh, value) for name, value in batch.items() if name in FEATURES}
      out = function(decoding.for_prompts(self._config, length), self._model.variables, placed, *more)
      return jax.tree.map(functools.partial(decoding.fetch, mesh), out)

  def _edits(self, ablation: Ablation, domain: str, batch: int) -> Dict[str, np.ndarray]:
    """What an ablation is, as data."""
    config = self._config
    layer = list(tables.sparse_layers(config)).index(ablation.layer)
    edits = {name: value.copy() for name, value in self._neutral.items() if name != 'experts'}
    edits['experts'] = self._neutral['experts']
    if ablation.kind in EXPERT_KINDS:
      edits['scale' if ablation.kind == 'zero' else 'allowed'][layer, ablation.expert] = 0
    elif ablation.kind == 'no_experts':
      edits['scale'][layer] = 0
    elif ablation.kind == 'uniform':
      edits['gates'][layer] = surgery.EVEN
    elif ablation.kind == 'random':
      edits['chooser'][layer] = surgery.RANDOM
      edits['seed'] += np.uint32(config.num_sparse_layers * batch)
    else:
      edits['chooser'][layer] = surgery.TABLE
      if ablation.kind == 'hash':
        edits['experts'] = _hash_table(config)
      elif ablation.kind == 'same':
        edits['experts'] = np.broadcast_to(self._busiest[:, None], edits['experts'].shape)
      else:
        edits['gates'][layer] = surgery.OF_CHOICES
        edits['experts'] = self._table(domain, batch)
    return edits

  def _count_probabilities(self) -> None:
    config = self._config
    self._totals = (np.zeros((config.num_sparse_layers, config.vocab_size, config.num_experts), np.float32),
                    np.zeros(config.vocab_size, np.float32))
    counts = []  # of each batch, tokens by id
    for domain, own in self._batches.items():
      for i in range(len(own)):
        found = self._counts(domain, i)
        self._totals = tuple(total + x for total, x in zip(self._totals, found))
        counts.append(found[1])
    unseen = sum(float(own[own == self._totals[1]].sum()) for own in counts)
    self.unseen = unseen / float(self._totals[1].sum())

  def _counts(self, domain: str, batch: int) -> Tuple[np.ndarray, np.ndarray]:
    """Of one batch, what `frozen.count_probabilities` gives."""
    return self._call(_count, self._batches[domain][batch])

  def _table(self, domain: str, batch: int) -> np.ndarray:
    """The table of `frozen.table` from all other batches."""
    sums, counts = (total - own for total, own in zip(self._totals, self._counts(domain, batch)))
    return np.asarray(jax.jit(frozen.table, static_argnums=0)(self._config, (sums, counts)))


@functools.lru_cache(maxsize=1)
def _hash_table(config: ModelConfig) -> np.ndarray:
  return np.asarray(frozen.hash_table(config))


@functools.partial(jax.jit, static_argnums=(0,))
def _run(config: ModelConfig, params: Any, batch: Mapping[str, jax.Array], edits: surgery.Edits):
  """log_prob [B, L] of the targets; choices that asked for each expert, and the sum of their gates, [N, E]."""
  model = OpenMoE(config, record_routing=True)
  edited = {**variables(params), surgery.SURGERY: edits}
  hidden, kernel, record = model.apply(edited, batch, False, method='features')
  log_probs, _ = scoring.log_likelihoods(hidden, kernel, batch['decoder_target_tokens'], config.loss_chunk_tokens)
  chosen = jax.nn.one_hot(record.assignment.expert_index, config.num_experts)
  gates = jnp.sum(chosen * record.assignment.gate[..., None], axis=(1, 2, 3))
  return log_probs, jnp.sum(chosen, axis=(1, 2, 3)), gates


@functools.partial(jax.jit, static_argnums=(0,))
def _count(config: ModelConfig, params: Any, batch: Mapping[str, jax.Array]):
  """Sums of router probabilities [N, V, E] and numbers of tokens [V] by token id."""
  record = OpenMoE(config, record_routing=True).apply(variables(params), batch, False, method='features')[2]
  ids = batch['decoder_input_tokens']
  probs = jax.nn.softmax(record.router_logits).reshape(config.num_sparse_layers, ids.size, config.num_experts)
  totals = jnp.zeros((probs.shape[0], config.vocab_size, config.num_experts)), jnp.zeros(config.vocab_size)
  return frozen.count_probabilities(totals, probs, ids.reshape(-1), make_logit_mask(ids).reshape(-1))


def _weights(batch: Mapping[str, np.ndarray]) -> np.ndarray:
  return np.asarray(target_weights(batch))


class _Store:
  """Rows' losses in a file: saved now and then, and when it is left.

  Args:
    file: None keeps nothing.
    domains: names, in order.
    baseline: {domain: losses of rows}, by which a file of the same model and data is known.
  """

  def __init__(self, file: Optional[paths.PathLike], domains: Sequence[str], baseline: Mapping[str, np.ndarray]):
    self._file = None if file is None else paths.path(file)
    self._rows: Dict[str, np.ndarray] = {}
    self._about = json.dumps(domains)
    self._saved = time.monotonic()
    if self._file is not None and self._file.exists():
      self._rows = self._read()
      for domain, rows in baseline.items():
        known = self._rows.get(domain)
        require(known is not None and known.shape == rows.shape and np.allclose(known, rows, rtol=1e-4),
                f'{file} holds losses of another model or of other rows; give another --output')
    self._rows.update(baseline)

  def _read(self) -> Dict[str, np.ndarray]:
    try:
      with np.load(io.BytesIO(self._file.read_bytes()), allow_pickle=False) as arrays:
        rows = dict(arrays)
    except Exception as error:
      raise ConfigError(f'{self._file} is damaged ({type(error).__name__}): remove it, or give another --output') from error
    about = str(rows.pop('about', ''))
    require(about == self._about, f'{self._file} holds losses of {about or "something else"}, not of {self._about}; give '
            'another --output')
    return rows

  def get(self, domain: str, ablation: Ablation) -> Optional[np.ndarray]:
    return self._rows.get(f'{domain} {ablation}')

  def put(self, domain: str, ablation: Ablation, rows: np.ndarray) -> None:
    self._rows[f'{domain} {ablation}'] = rows
    if time.monotonic() - self._saved > _SECONDS_BETWEEN_SAVES:
      self._save()

  def _save(self) -> None:
    if self._file is not None:
      stream = io.BytesIO()
      np.savez_compressed(stream, about=np.asarray(self._about), **self._rows)
      paths.write_bytes(self._file, stream.getvalue())
    self._saved = time.monotonic()

  def __enter__(self) -> '_Store':
    return self

  def __exit__(self, *error) -> None:
    self._save()
