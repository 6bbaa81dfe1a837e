"""What a mixture really gives: shares of sources and objectives in tokens, fill of the rows, tokens that are cut off."""

import contextlib
import inspect
import itertools
import time
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from openmoe_jax import data as data_lib
from openmoe_jax import mixtures, vocabulary
from openmoe_jax.config import DataConfig, require
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow

LANGUAGE_MODEL, PREFIX_LM = 'language modelling', 'prefix LM'
_SOURCE, _CUT = 'source_number', 'tokens_cut'


class Share(NamedTuple):
  """Attributes:
    configured: share of the examples that the settings ask for; None where they do not say.
    examples, tokens: measured shares.
    count: examples.
  """
  configured: Optional[float]
  examples: float
  tokens: float
  count: int


class Page(NamedTuple):
  """An example as text, sentinels and ends included."""
  source: str
  objective: str
  inputs: Optional[str]
  targets: str


class Report(NamedTuple):
  """Attributes:
    sources: {task: share}; tokens are those of inputs and targets together, prompts and sentinels included.
    objectives: {name: share}, told from the examples themselves.
    examples, tokens: how many were looked at, after cutting.
    tokens_cut, examples_cut: what did not fit into the lengths of the features, and how many examples lost something.
    rows, fill, scored, segments: rows of the batch made of the examples, share of their places that hold a token, share
      that is scored, and mean number of examples in a row.
    seconds: that reading all of this took, on one thread.
    pages: examples to read, the first ones of each source and objective.
  """
  sources: Dict[str, Share]
  objectives: Dict[str, Share]
  examples: int
  tokens: int
  tokens_cut: int
  examples_cut: int
  rows: int
  fill: float
  scored: float
  segments: float
  seconds: float
  pages: List[Page]


def measure(data: DataConfig, examples: int, pages: int = 12, on_example: Callable[[], None] = lambda: None) -> Report:
  """Reads the beginning of stream 0 of the training split as training would, and counts.

  Args:
    data: the settings; `num_streams` decides which documents stream 0 has.
    examples: how many are read.
    pages: how many are kept as text.
    on_example: called after each.

  Raises:
    ConfigError: as `data.TrainStreams`.
  """
  began = time.monotonic()
  dataset, mixture = _counted_examples(data)
  cached = dataset.take(examples).cache()
  names = [task.name for task in mixture.tasks]
  configured, rates = _configured_objectives(mixture), [mixture.get_rate(task) for task in mixture.tasks]
  found: List[Tuple[int, str, int]] = []  # source, objective, tokens
  kept: Dict[Tuple[int, str], List[Page]] = {}
  tokens_cut = examples_cut = 0
  for example in cached.as_numpy_iterator():
    parts = {name: abs(example[name])[:length] for name, length in _room(data, mixture, example).items()}
    cut = int(example[_CUT]) + sum(len(example[name]) - len(part) for name, part in parts.items())
    tokens_cut, examples_cut = tokens_cut + cut, examples_cut + (cut > 0)
    source, objective = int(example[_SOURCE]), objective_of(parts.get('inputs'), parts['targets'], list(configured))
    found.append((source, objective, sum(map(len, parts.values()))))
    texts = kept.setdefault((source, objective), [])
    if len(texts) < pages:
      inputs = vocabulary.decode(parts['inputs']) if 'inputs' in parts else None
      texts.append(Page(names[source], objective, inputs, vocabulary.decode(parts['targets'])))
    on_example()
  require(bool(found), f'{data.mixture_or_task} gives no examples')
  rows, fill, scored, segments = _rows(data, mixture, cached)
  total = sum(tokens for _, _, tokens in found)
  by_source = {name: rate / sum(rates) for name, rate in zip(names, rates)}
  return Report(
      sources=_shares([(names[source], tokens) for source, _, tokens in found], by_source),
      objectives=_shares([(objective, tokens) for _, objective, tokens in found], configured),
      examples=len(found), tokens=total, tokens_cut=tokens_cut, examples_cut=examples_cut, rows=rows, fill=fill,
      scored=scored, segments=segments, seconds=time.monotonic() - began, pages=_choose(list(kept.values()), pages))


def _room(data: DataConfig, mixture: Any, example: Mapping[str, np.ndarray]) -> Dict[str, int]:
  """How many tokens of each feature of an example have a place."""
  from openmoe_jax.feature_converters import share_window
  room = dict(data.task_feature_lengths)
  if share_window(mixture) and 'inputs' in room:
    room = {'inputs': data.row_length, 'targets': max(data.row_length - len(example['inputs']), 0)}
  return room


def _shares(counted: Sequence[Tuple[str, int]], configured: Mapping[str, float]) -> Dict[str, Share]:
  total = sum(tokens for _, tokens in counted)
  names = list(configured) + sorted({name for name, _ in counted} - set(configured))
  shares = {}
  for name in names:
    own = [tokens for other, tokens in counted if other == name]
    shares[name] = Share(configured.get(name), len(own) / len(counted), sum(own) / max(total, 1), len(own))
  return shares


def _choose(kept: List[List[Page]], pages: int) -> List[Page]:
  """The first of each kind, then the second of each, ..."""
  turns = itertools.zip_longest(*kept)
  return [page for turn in turns for page in turn if page is not None][:pages]


# Examples with their source, and with what was cut off.


def _counted_examples(data: DataConfig) -> Tuple[Any, Any]:
  """The examples of stream 0 with two more features, and the mixture that they are of."""
  seqio = import_seqio()
  mixture = data_lib.stream_mixture(data)
  for task in mixture.tasks:
    data_lib.require_documents(task, data, [0])
  trim = seqio.preprocessors.append_eos_after_trim
  tasks = []
  for number, task in enumerate(mixture.tasks):
    steps = [_count_cuts if step is trim else step for step in task.preprocessors]
    tasks.append((task.replace(preprocessors=[*steps, _tag(number)]), mixture.get_rate(task)))
  tagged = seqio.Mixture(mixture.name, tasks, sample_fn=mixture._sample_fn)  # pylint: disable=protected-access
  with _cuts_are_counted():
    return data_lib.stream_examples(data, tagged, 0, (_SOURCE, _CUT)), mixture


def _tag(number: int) -> Callable[[Any], Any]:
  tf = import_tensorflow()

  def tag(dataset):
    return dataset.map(lambda example: {**example, _SOURCE: tf.constant(number), _CUT: example.get(_CUT, tf.constant(0))})

  return tag


def _count_cuts(dataset: Any, output_features: Mapping[str, Any], sequence_length: Mapping[str, int]) -> Any:
  """seqio's `append_eos_after_trim`, with the number of tokens that it cuts off as one more feature."""
  tf = import_tensorflow()

  def count(example):
    cut = example.get(_CUT, tf.constant(0))
    for name, feature in output_features.items():
      if name in example and name in sequence_length:
        cut += tf.maximum(tf.size(example[name]) - (sequence_length[name] - int(feature.add_eos)), 0)
    return {**example, _CUT: cut}

  return _TRIM[0](dataset.map(count), output_features, sequence_length)


_TRIM: List[Any] = []  # seqio's own function, while `_cuts_are_counted`.


@contextlib.contextmanager
def _cuts_are_counted() -> Iterator[None]:
  """Objectives end with seqio's `append_eos_after_trim`; in this block they build pipelines that also count."""
  preprocessors = import_seqio().preprocessors
  _TRIM.append(preprocessors.append_eos_after_trim)
  preprocessors.append_eos_after_trim = _count_cuts
  try:
    yield
  finally:
    preprocessors.append_eos_after_trim = _TRIM.pop()


def _rows(data: DataConfig, mixture: Any, examples: Any) -> Tuple[int, float, float, float]:
  """Rows made of the examples: how many, and shares of places filled, of places scored, and segments per row."""
  from openmoe_jax.feature_converters import converter_for
  lengths = data.task_feature_lengths
  marked = examples.map(lambda example: {name: example[name] for name in lengths})
  converter = converter_for(mixture, data, lengths)
  found: List[np.ndarray] = []  # of each row: places filled, places scored, segments
  for row in converter(marked, lengths).as_numpy_iterator():
    targets = row['decoder_target_tokens']
    weights = (targets > 0) & (row['decoder_loss_weights'] > 0)
    found.append(np.array([(targets != 0).sum(), weights.sum(), row.get('decoder_segment_ids', np.ones(1)).max()]))
  # The last rows are only the beginnings of rows.
  unfinished = data.open_rows if data.pack else 1
  found = found[:-unfinished] or found
  filled, scored, segments = np.sum(found, axis=0)
  places = len(found) * data.row_length
  return len(found), float(filled / places), float(scored / places), float(segments / len(found))


# Objectives.


def _configured_objectives(mixture: Any) -> Dict[str, float]:
  """{objective: share of the examples} where every task of the mixture is of denoisers; else nothing."""
  shares: Dict[str, float] = {}
  total = sum(mixture.get_rate(task) for task in mixture.tasks)
  for task in mixture.tasks:
    for denoiser in _denoisers(task):
      name = span_name(denoiser.density, denoiser.mean_span) if denoiser.density else PREFIX_LM
      shares[name] = shares.get(name, 0.) + denoiser.rate * mixture.get_rate(task) / total
  return shares if abs(sum(shares.values()) - 1) < 1e-6 else {}


def _denoisers(task: Any) -> Sequence[Any]:
  """The denoisers that an objective among a task's preprocessors mixes, as its argument of this name says."""
  for step in task.preprocessors:
    with contextlib.suppress(TypeError, ValueError):
      parameter = inspect.signature(step).parameters.get('denoisers')
      if parameter is not None:
        return parameter.default
  return ()


def span_name(density: float, mean_span: float) -> str:
  """How a span-corruption objective is called in a report."""
  return f'spans of {mean_span:g}, {density:.0%}'


def objective_of(inputs: Optional[np.ndarray], targets: np.ndarray, known: Sequence[str] = ()) -> str:
  """What an example was made by, told from its sentinels: full language modelling, prefix LM or span corruption.

  Span corruption is named by the nearest of `known`, or by the density and mean span that the example has.
  """
  chosen = vocabulary.get()
  first_sentinel = chosen.vocab_size - chosen.extra_ids
  if inputs is None:
    # Texts have no sentinels; `fill_in_the_middle` begins with one, and with two if the suffix comes first.
    sentinels = int((targets[:2] >= first_sentinel).sum()) if len(targets) and targets[0] >= first_sentinel else 0
    return (LANGUAGE_MODEL, 'fill in the middle, PSM', 'fill in the middle, SPM')[sentinels]
  kept = int(((inputs > 1) & (inputs < first_sentinel)).sum())
  sentinels = int((inputs >= first_sentinel).sum())
  if not sentinels:
    return PREFIX_LM
  noise = int(((targets > 1) & (targets < first_sentinel)).sum())
  density, span = max(noise, 1) / max(noise + kept, 1), max(noise, 1) / sentinels
  spans = {name: name.removeprefix('spans of ').split(', ') for name in known if name.startswith('spans of ')}
  if not spans:
    return span_name(round(density, 2), round(span))

  def distance(name):
    known_span, known_density = float(spans[name][0]), float(spans[name][1].rstrip('%')) / 100
    return abs(np.log(density / known_density)) + abs(np.log(span / known_span))

  return min(spans, key=distance)
