"""Batches: a mixture as D logical streams, rows of the streams side by side, and positions that can be saved.

Every stream is a pipeline of its own, with its own share of the documents, its own seed and its own position. A host
reads the streams whose rows its devices hold, so the global batches do not depend on the number of hosts, and a saved
run continues on another number.

A task may mark tokens of `targets` as context that is not scored by writing them as negative ids.

  train: TrainStreams(data, num_microbatches) -> [microbatch, rows, length] arrays -> to_global(batch, mesh)
  evaluation: for source in eval_sources(data): for batch in eval_batches(data, source) -> [rows, length] arrays
"""

import dataclasses
import functools
import hashlib
import math
import os
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import jax
import numpy as np

from openmoe_jax import mixtures, vocabulary
from openmoe_jax.config import DataConfig, require
from openmoe_jax.iterator_state import iterator_from_bytes, iterator_to_bytes
from openmoe_jax.partitioning import batch_sharding
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow  # pylint: disable=unused-import

Batch = Dict[str, np.ndarray]


# Streams.


@functools.lru_cache(maxsize=None)
def _stream_source_class() -> type:
  tf, seqio = import_tensorflow(), import_seqio()

  class StreamSource(seqio.DataSource):
    """One stream's endless view of a source: its shard of the documents, reordered in every pass.

    Built inside a flat_map, so that each place of the pipeline that iterates it has a shuffle of its own and sees the
    same order. Without that, all copies of a `shuffle` draw from one sequence of seeds, and an objective that iterates
    its documents several times (UL2) gets other documents in every run.
    """

    def __init__(self, source: Any, common_seed: int):
      super().__init__(splits=source.splits, caching_permitted=source.caching_permitted)
      self._source = source
      self._common_seed = common_seed

    @property
    def supports_arbitrary_sharding(self) -> bool:
      return True

    @property
    def performs_internal_shuffling(self) -> bool:
      return self._source.performs_internal_shuffling

    def list_shards(self, split):
      return self._source.list_shards(split)

    def get_dataset(self, split='train', shuffle=True, seed=None, shard_info=None):
      return tf.data.Dataset.range(1).flat_map(lambda _: self.documents(split, shuffle, seed, shard_info).repeat())

    def fingerprint(self, split):
      """What tells these documents from others: the source's own word, or the names of its files."""
      if hasattr(self._source, 'fingerprint'):
        return self._source.fingerprint(split)
      return fingerprint(os.path.basename(str(shard)) for shard in self._source.list_shards(split))

    def documents(self, split, shuffle, seed, shard_info):
      """One pass over the shard."""
      source, count = self._source, shard_info.num_shards
      if source.supports_arbitrary_sharding or len(source.list_shards(split)) >= count:
        return source.get_dataset(split=split, shuffle=shuffle, seed=seed, shard_info=shard_info)
      # Too few files for every stream to have its own: all read everything, in the same order, and keep their share.
      return source.get_dataset(split=split, shuffle=shuffle, seed=self._common_seed).shard(count, shard_info.index)

  return StreamSource


def fingerprint(texts: Iterable[str]) -> str:
  """A short name of a sequence of texts, another one for other texts or another order."""
  digest = hashlib.sha256()
  for text in texts:
    digest.update(hashlib.sha256(text.encode()).digest())
  return digest.hexdigest()[:16]


def _stream_seed(seed: int, stream: int) -> int:
  """A seed far from those of other streams, since seqio counts on from it."""
  return int(np.random.SeedSequence([seed, stream]).generate_state(1)[0] >> 1)


def _options() -> Any:
  """A stream runs on one thread: several streams fill the cores, and buffers stay small."""
  tf = import_tensorflow()
  options = tf.data.Options()
  options.deterministic = True
  options.autotune.enabled = False
  options.threading.private_threadpool_size = 1
  options.threading.max_intra_op_parallelism = 1
  # A shuffle inside a flat_map counts as external state, although its state is part of the iterator that is saved.
  options.experimental_external_state_policy = tf.data.experimental.ExternalStatePolicy.IGNORE
  return options


def stream_mixture(data: DataConfig) -> Any:
  """The training mixture with sources that stream endlessly."""
  seqio = import_seqio()
  provider = mixtures.provider_for(data, data.mixture_or_task, data.train_split)
  tasks = [(_stream_task(data, task), rate) for task, rate in mixtures.tasks_with_rates(provider)
           if data.train_split in task.splits]
  if isinstance(provider, seqio.Mixture):
    return seqio.Mixture(provider.name, tasks, sample_fn=provider._sample_fn)  # pylint: disable=protected-access
  return seqio.Mixture(provider.name, tasks)


def _scheduled_mixtures(data: DataConfig) -> Tuple[List[Any], List[mixtures.Phase]]:
  """A mixture for each task of the schedule, with a source that streams endlessly, and the phases."""
  tasks, phases = mixtures.schedule(data)
  return [import_seqio().Mixture(task.name, [(_stream_task(data, task), 1.0)]) for task in tasks], phases


def _stream_task(data: DataConfig, task: Any) -> Any:
  """The task over a source that streams endlessly: its own or, with `use_cached`, its cached files."""
  source, preprocessors = task.source, list(task.preprocessors)
  if data.use_cached:
    with mixtures.reading(task):  # There may be no cache.
      source = task._get_cached_source(data.train_split)  # pylint: disable=protected-access
    placeholder = import_seqio().CacheDatasetPlaceholder
    step, = [i for i, part in enumerate(preprocessors) if isinstance(part, placeholder)]
    preprocessors = preprocessors[step + 1:]
  source = _stream_source_class()(source, _stream_seed(data.seed, 2**31))
  return task.replace(source=source, preprocessors=preprocessors)


def stream_examples(data: DataConfig, mixture: Any, stream: int, extra_features: Sequence[str] = ()) -> Any:
  """The examples of one stream of `stream_mixture`, endlessly, with `extra_features` that its tasks may have."""
  shard = import_seqio().ShardInfo(stream, data.num_streams)
  with mixtures.reading(mixture):  # A task may forbid shuffling.
    return mixture.get_dataset(data.task_feature_lengths, split=data.train_split, shuffle=data.shuffle,
                               seed=_stream_seed(data.seed, stream), shard_info=shard, num_epochs=None,
                               passthrough_features=extra_features, trim_output_features=False,
                               try_in_mem_cache=False)


def _stream_dataset(data: DataConfig, mixture: Any, stream: int) -> Any:
  """Rows of one stream, [batch_size / num_streams, L] at a time."""
  from openmoe_jax.feature_converters import converter_for
  converter = converter_for(mixture, data, data.task_feature_lengths)
  return _batched(data, converter(stream_examples(data, mixture, stream), data.task_feature_lengths))


def _batched(data: DataConfig, rows: Any) -> Any:
  return rows.batch(data.batch_size // data.num_streams, drop_remainder=True).prefetch(1).with_options(_options())


def _scheduled_dataset(data: DataConfig, sources: Sequence[Any], phases: Sequence[mixtures.Phase], stream: int) -> Any:
  """As `_stream_dataset`, by a schedule: each row is filled from one source, which the row's number alone decides.

  So the rates hold exactly from the batch on that they are given for, whatever packing makes of the examples, and a
  source goes on where it was when its rate changes.
  """
  tf = import_tensorflow()
  from openmoe_jax.feature_converters import converter_for
  with_inputs = any('inputs' in source.output_features for source in sources)

  def rows_of(source):
    lengths = data.task_feature_lengths
    if 'inputs' not in source.output_features:
      lengths = {'targets': data.row_length}  # Targets alone have the whole row.
    converter = converter_for(source, data, lengths)
    rows = converter(stream_examples(dataclasses.replace(data, task_feature_lengths=lengths), source, stream), lengths)
    if with_inputs and 'inputs' not in source.output_features:
      rows = rows.map(lambda row: {**row, 'decoder_causal_attention': tf.zeros_like(row['decoder_target_tokens'])})
    return rows

  bounds = np.cumsum([[phase.rates.get(source.name, 0.) for source in sources] for phase in phases], axis=1)
  bounds[bounds >= bounds[:, -1:]] = 1.  # Rounding must not leave a gap behind the last source that has a rate.
  bounds = tf.constant(bounds, tf.float64)
  starts = tf.constant([phase.first_batch * (data.batch_size // data.num_streams) for phase in phases], tf.int64)
  seed = tf.constant(_stream_seed(data.seed, 2**30 + stream), tf.int64)

  def choose(row):
    phase = tf.searchsorted(starts, [row], side='right')[0] - 1
    chance = tf.random.stateless_uniform([1], tf.stack([seed, row]), dtype=tf.float64)
    return tf.cast(tf.searchsorted(bounds[phase], chance, side='right')[0], tf.int64)

  choices = tf.data.Dataset.counter().map(choose)
  return _batched(data, tf.data.Dataset.choose_from_datasets([rows_of(source) for source in sources], choices))


def _without_context_loss(batch: Batch) -> Batch:
  """Tokens that a task gave as negative ids become ordinary ones, without a loss where they are targets."""
  targets = batch['decoder_target_tokens']
  if not (targets < 0).any():
    return batch
  weights = np.where(targets < 0, 0, batch['decoder_loss_weights'])
  return dict(batch, decoder_target_tokens=abs(targets), decoder_loss_weights=weights.astype(np.int32),
              decoder_input_tokens=abs(batch['decoder_input_tokens']))


def require_documents(task: Any, data: DataConfig, streams: Sequence[int]) -> None:
  """Raises `ConfigError` unless each stream's share of the task has text. (Endless passes over none would not end.)"""
  split = data.train_split
  for stream in streams:
    shard = import_seqio().ShardInfo(stream, data.num_streams)
    with mixtures.reading(task):
      found = any(map(_has_text, task.source.documents(split, False, 0, shard).as_numpy_iterator()))
    require(found, f'task {task.name} has no text for stream {stream} of {data.num_streams} in split {split!r}: '
            'there are fewer documents or files than streams (lower DataConfig.num_streams), or they are empty')


def _has_text(document: Any) -> bool:
  """Whether a document can become an example; a document without strings is taken to."""
  # Beside a text, other strings only describe it.
  parts = document['text'] if isinstance(document, dict) and 'text' in document else document
  strings = [value for value in jax.tree.leaves(parts) if isinstance(value, bytes)]
  return not strings or any(string.strip() for string in strings)


class TrainStreams:
  """The training batches of this process, an endless iterator.

  Each is a dictionary of int32 arrays [num_microbatches, rows, L], rows being this process's rows of one microbatch:
  those of its streams, in the order of `stream_ids`, batch_size / num_microbatches / num_streams of each.

  Attributes:
    stream_ids: the streams that this process reads.
  """

  def __init__(self, data: DataConfig, num_microbatches: int = 1, stream_ids: Optional[Sequence[int]] = None):
    """Prepares the streams; nothing is read yet but each stream's first document.

    Args:
      data: what is read.
      num_microbatches: must divide the rows that one stream gives to a step.
      stream_ids: all streams if None.

    Raises:
      ConfigError: unknown mixture, missing vocabulary, lengths that do not fit the features, or no documents.
    """
    ids = tuple(range(data.num_streams) if stream_ids is None else stream_ids)
    require(bool(ids) and len(set(ids)) == len(ids) and all(0 <= i < data.num_streams for i in ids),
            f'streams {ids} are not some of the {data.num_streams} of DataConfig.num_streams')
    require(data.batch_size % (num_microbatches * data.num_streams) == 0, f'DataConfig.batch_size = {data.batch_size} '
            f'must be a multiple of {num_microbatches} microbatches times DataConfig.num_streams = {data.num_streams}')
    require(bool(data.mixture_schedule or data.mixture_or_task), 'DataConfig.mixture_or_task is not set')
    self.stream_ids = ids
    self._data = data
    self._num_microbatches = num_microbatches
    if data.mixture_schedule:
      sources, phases = _scheduled_mixtures(data)
      tasks = [task for source in sources for task in source.tasks]
      self._rates = [[phase.first_batch, phase.rates] for phase in phases]
      dataset = functools.partial(_scheduled_dataset, data, sources, phases)
    else:
      mixture = stream_mixture(data)
      tasks = mixture.tasks
      self._rates = {task.name: float(mixture.get_rate(task)) for task in tasks}
      dataset = functools.partial(_stream_dataset, data, mixture)
    for task in tasks:
      require_documents(task, data, ids)
    self._documents = {f'documents of {task.name}': task.source.fingerprint(data.train_split) for task in tasks}
    self._datasets = {i: dataset(i) for i in ids}
    self._iterators = {}  # Made on first use, since `restore` and `skip` want others.
    self._batches = 0

  def __iter__(self) -> 'TrainStreams':
    return self

  def __next__(self) -> Batch:
    parts = [self._next_rows(i) for i in self.stream_ids]
    self._batches += 1
    return _without_context_loss({key: np.concatenate([part[key] for part in parts], axis=1) for key in parts[0]})

  def _iterator(self, stream: int) -> Any:
    if stream not in self._iterators:
      self._iterators[stream] = iter(self._datasets[stream])
    return self._iterators[stream]

  def _next_rows(self, stream: int) -> Batch:
    rows = next(self._iterator(stream), None)
    require(rows is not None, f'{self._data.mixture_or_task} gives no examples (stream {stream} of '
            f'{self._data.num_streams}): all its documents are empty, or too few for the objective')
    return {key: value.numpy().reshape((self._num_microbatches, -1) + tuple(value.shape[1:]))
            for key, value in rows.items()}

  @property
  def position(self) -> int:
    """Batches handed out since the beginning of training."""
    return self._batches

  def _settings(self) -> Dict[str, Any]:
    """What decides the contents of a stream besides its position."""
    data = self._data
    return dict(mixture_or_task=list(data.mixture_schedule) or data.mixture_or_task,
                task_feature_lengths=dict(data.task_feature_lengths), split=data.train_split, pack=data.pack,
                open_rows=data.open_rows, seed=data.seed, shuffle=data.shuffle, num_streams=data.num_streams,
                batch_size=data.batch_size, use_cached=data.use_cached, rates=self._rates, vocabulary=vocabulary.fingerprint(), **self._documents)

  def state(self) -> Dict[int, bytes]:
    """Each stream's position: exactly after the batches handed out, whatever is prefetched already."""
    return {i: iterator_to_bytes(self._iterator(i), self._batches, self._settings()) for i in self.stream_ids}

  def restore(self, state: Mapping[int, bytes]) -> None:
    """Continues where `state` was taken, possibly by other processes; takes no longer than saving did.

    Raises:
      ConfigError: a stream is missing, or the state is of other data settings or other documents; nothing is changed.
    """
    missing = [i for i in self.stream_ids if i not in state]
    require(not missing, f'the saved data position has no stream {missing}; it has {sorted(state)}')
    iterators = {i: iter(self._datasets[i]) for i in self.stream_ids}
    positions = {iterator_from_bytes(iterators[i], state[i], self._settings()) for i in self.stream_ids}
    require(len(positions) == 1, f'the saved streams are not of the same step: batches {sorted(positions)}')
    self._iterators = iterators
    self._batches = positions.pop()

  def skip(self, batches: int) -> None:
    """Goes `batches` ahead from the beginning of training by producing and dropping them."""
    require(self._batches == 0, 'skip works on fresh streams only')
    for _ in range(batches):
      next(self)


def batch_at(data: DataConfig, num_microbatches: int, step: int,
             state: Optional[Mapping[int, bytes]] = None) -> Batch:
  """All streams' batch for training step `step` (the first is 0), for looking at it again.

  Args:
    data: what was trained on.
    num_microbatches: as in training.
    step: number of batches handed out before the wanted one.
    state: a saved position at or before `step` to start from; without it everything before is produced again.
  """
  require(step >= 0, f'there is no step {step}')
  streams = TrainStreams(data, num_microbatches)
  if state is None:
    streams.skip(step)
  else:
    streams.restore(state)
    require(streams.position <= step, f'the saved data position is after step {step}: {streams.position}')
    for _ in range(step - streams.position):
      next(streams)
  return next(streams)


# Evaluation.


def eval_sources(data: DataConfig) -> List[str]:
  """The tasks of the evaluation mixture, each evaluated by itself; none if `eval_split` is ''."""
  if not data.eval_split:
    return []
  name = data.eval_mixture_or_task or data.mixture_or_task
  setting = f'DataConfig.{"eval_" if data.eval_mixture_or_task else ""}mixture_or_task'
  provider = mixtures.provider_for(data, name, data.eval_split, setting)
  return [task.name for task, _ in mixtures.tasks_with_rates(provider) if data.eval_split in task.splits]


def eval_batches(data: DataConfig, source: str) -> Iterator[Batch]:
  """The same [rows, L] int32 batches every time: the first `eval_batches` (0: all) of task `source`'s split.

  Every process gets all rows. The last batch is filled up with rows of padding, whose loss weights are 0.
  """
  tf = import_tensorflow()
  from openmoe_jax.feature_converters import converter_for
  provider = mixtures.provider_for(data, source, data.eval_split)
  rows = data.eval_batch_size or data.batch_size
  with mixtures.reading(provider):
    dataset = provider.get_dataset(data.task_feature_lengths, split=data.eval_split, use_cached=data.use_cached,
                                   shuffle=False, seed=0, num_epochs=1, trim_output_features=False,
                                   try_in_mem_cache=False)
  converter = converter_for(provider, data, data.task_feature_lengths)
  dataset = converter(dataset, data.task_feature_lengths).batch(rows)
  if data.eval_batches:
    dataset = dataset.take(data.eval_batches)
  options = _options()
  options.experimental_external_state_policy = tf.data.experimental.ExternalStatePolicy.WARN
  count = 0
  try:
    for batch in dataset.with_options(options).as_numpy_iterator():
      count += 1
      batch = {key: np.pad(value, [(0, rows - len(value)), (0, 0)]) for key, value in batch.items()}
      yield _without_context_loss(batch)
  except tf.errors.OpError as error:
    raise mixtures.read_error(provider, error) from error
  require(count > 0, f'{source} gives no examples in split {data.eval_split!r}')


# Onto devices.


def local_stream_ids(mesh: jax.sharding.Mesh, data: DataConfig) -> List[int]:
  """The streams of whose rows this process's devices hold a part."""
  streams = data.num_streams
  sharding = batch_sharding(mesh)
  # Some number of rows that both streams and devices divide; which one does not matter.
  rows = math.lcm(streams, int(np.prod([mesh.shape[axis] for axis in ('data', 'expert')])))
  slices = sharding.addressable_devices_indices_map((rows, 1)).values()
  return _streams_of_rows([index[0].indices(rows)[:2] for index in slices], rows, streams)


def _streams_of_rows(ranges: Sequence[Sequence[int]], rows: int, streams: int) -> List[int]:
  """Which of `streams` equal blocks of `rows` rows the ranges (start, stop) touch."""
  return sorted({stream for start, stop in ranges
                 for stream in range(start * streams // rows, -(-stop * streams // rows))})


def to_global(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh, microbatched: bool = True,
              stream_ids: Optional[Sequence[int]] = None, num_streams: Optional[int] = None) -> Dict[str, jax.Array]:
  """Global arrays sharded over rows on ('data', 'expert').

  Args:
    batch: [microbatch, rows, L] arrays, or [rows, L] when not `microbatched`.
    mesh: with the axes data, expert, model.
    microbatched: whether the first axis counts microbatches.
    stream_ids, num_streams: which of how many streams the rows are of (`TrainStreams.stream_ids`); by default `batch`
      holds all rows, on every process.
  """
  sharding = batch_sharding(mesh, microbatched)
  axis = 1 if microbatched else 0
  if stream_ids is None:
    stream_ids, num_streams = (0,), 1

  def globalize(local: np.ndarray) -> jax.Array:
    rows = local.shape[axis] // len(stream_ids)  # Of one stream.
    shape = local.shape[:axis] + (rows * num_streams,) + local.shape[axis + 1:]
    place = {stream: i * rows for i, stream in enumerate(stream_ids)}

    def shard(index):
      start, stop, _ = index[axis].indices(shape[axis])
      wanted = [place[row // rows] + row % rows for row in range(start, stop)]
      return np.take(local, wanted, axis=axis)[index[:axis] + (slice(None),) + index[axis + 1:]]

    return jax.make_array_from_callback(shape, sharding, shard)

  return {key: globalize(np.asarray(value)) for key, value in batch.items()}
