"""Text in, text out: generation and scoring of strings by a loaded model (`loading.load`).

`model` is anything with `config`, `params` and a seqio `vocabulary`.
"""

from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from jax.sharding import Mesh
import numpy as np

from openmoe_jax import decoding, scoring
from openmoe_jax.config import require

CHUNK = 16  # tokens between two looks at the text for stop strings


class TextScores(NamedTuple):
  """Per pair of input and target, as NumPy arrays; see `scoring.Scores`."""
  log_probs: np.ndarray
  num_targets: np.ndarray
  greedy: np.ndarray


class Piece(NamedTuple):
  """What one continuation has grown by: prompt and sample number, new text, and whether it has ended."""
  prompt: int
  sample: int
  text: str
  done: bool


def encode(model: Any, texts: Sequence[Union[str, List[int]]], name: str = 'texts') -> List[List[int]]:
  """Ids of texts, without a start id or EOS; lists of ids stay what they are.

  Raises:
    ConfigError: something that is not a string, or an id that the model does not have.
  """
  require(not isinstance(texts, (str, bytes)), f'{name} must be a list of strings; one string was given: [text]')
  for i, text in enumerate(texts):
    require(isinstance(text, (str, list)), f'{name}[{i}] is a {type(text).__name__}, not a string')
  rows = [[int(t) for t in (model.vocabulary.encode(text) if isinstance(text, str) else text)] for text in texts]
  top = max((t for row in rows for t in row), default=0)
  require(top < model.config.vocab_size, f'the vocabulary gives the id {top}, but the model has vocab_size = '
          f'{model.config.vocab_size}: this is not the vocabulary it was trained with')
  return rows


def decode(model: Any, ids: Sequence[int], prompt: Sequence[int] = ()) -> str:
  """Text of ids behind a prompt, up to an EOS; ids that the vocabulary does not have (the embedding's padding rows) are
  left out."""
  vocabulary = model.vocabulary
  known = lambda ids: [int(i) for i in ids if 0 < i < vocabulary.vocab_size]
  ids, prompt = known(ids), known(prompt)
  if vocabulary.eos_id in ids:
    ids = ids[:ids.index(vocabulary.eos_id)]
  # A first piece loses its space when it is decoded alone: what the prompt adds to the front is taken off again.
  before, text = vocabulary.tokenizer.decode(prompt), vocabulary.tokenizer.decode(prompt + ids)
  return text[len(before):] if text.startswith(before) else vocabulary.tokenizer.decode(ids)


def batches(rows: Sequence[Sequence[int]], size: int) -> Iterator[Tuple[List[int], np.ndarray, np.ndarray]]:
  """Rows of similar length together, longest first: (their numbers, ids int32 [B, L], lengths [B])."""
  order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
  for start in range(0, len(order), size):
    numbers = order[start:start + size]
    lengths = np.asarray([len(rows[i]) for i in numbers], np.int32)
    ids = np.zeros((len(numbers), max(int(lengths.max()), 1)), np.int32)
    for row, i in enumerate(numbers):
      ids[row, :len(rows[i])] = rows[i]
    yield numbers, ids, lengths


def cut(text: str, stops: Sequence[str]) -> Tuple[str, bool]:
  """The text in front of the first stop string in it, and whether there was one."""
  found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
  return (text[:min(found)], True) if found else (text, False)


def settled(text: str, stops: Sequence[str]) -> str:
  """The part of an unfinished text that more tokens cannot change: not a beginning of a stop string at its end, nor the
  replacement characters of a letter of which some bytes are still to come."""
  text = text.rstrip('\ufffd')
  held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
  return text[:len(text) - held]


class _Batch:
  """One batch on its way, and its text so far."""

  def __init__(self, model, prompts, numbers, ids, lengths, max_new_tokens, stops, num_samples, eos_id, row_ids, options):
    self.model, self.stops, self.numbers = model, stops, numbers
    self.prompts = [prompts[i] for i in numbers]
    eos_id = model.vocabulary.eos_id if eos_id == 'vocabulary' else eos_id
    self.generation = decoding.Generation(
        model.config, model.variables, ids, lengths, max_new_tokens, num_samples=num_samples,
        row_ids=[row_ids[i] for i in numbers], eos_id=eos_id, **options)
    self.texts = [[''] * num_samples for _ in numbers]
    self.stopped = np.zeros((len(numbers), num_samples), bool)

  def look(self) -> np.ndarray:
    """Brings the texts up to date and ends the rows that hold a stop string; bool [B, num_samples], rows that ended."""
    result = self.generation.result()
    for row, prompt in enumerate(self.prompts):
      for sample in range(self.stopped.shape[1]):
        if not self.stopped[row, sample]:
          new = result.tokens[row, sample, :result.lengths[row, sample]]
          text = decode(self.model, new, prompt)
          self.texts[row][sample], self.stopped[row, sample] = cut(text, self.stops)
    ended = self.generation.done() | self.stopped
    if (ended & ~self.generation.done()).any():
      self.generation.finish(ended)
    return ended


def _start(model, texts, max_new_tokens, stop, num_samples, batch_size, eos_id, row_ids, options) -> Iterator[_Batch]:
  stops = [stop] if isinstance(stop, str) else list(stop)
  require(all(stops), 'stop holds an empty string')
  require(num_samples >= 1 and batch_size >= 1, f'num_samples = {num_samples} and batch_size = {batch_size} must be at '
          'least 1')
  row_ids = range(len(texts)) if row_ids is None else row_ids
  require(len(row_ids) == len(texts), f'{len(row_ids)} row_ids for {len(texts)} texts; give one for each')
  prompts = encode(model, texts)
  for i, prompt in enumerate(prompts):
    require(len(prompt) > 0, f'texts[{i}] = {texts[i]!r} has no tokens: there is nothing to continue')
    window = options.get('window')
    require(window is None or len(prompt) < window, f'texts[{i}] has {len(prompt)} tokens: with the start id it does not '
            f'fit the window of {window} positions')
  for numbers, ids, lengths in batches(prompts, max(batch_size // num_samples, 1)):
    yield _Batch(model, prompts, numbers, ids, lengths, max_new_tokens, stops, num_samples, eos_id, row_ids,
                 options)


def generate_texts(model: Any, texts: Sequence[Union[str, List[int]]], max_new_tokens: int = 128, *,
                   stop: Sequence[str] = (), num_samples: Optional[int] = None, batch_size: int = 16,
                   eos_id: Any = 'vocabulary', row_ids: Optional[Sequence[int]] = None, **options) -> List:
  """Continues texts.

  Args:
    model: see the module.
    texts: prompts, strings or lists of ids (`encode`).
    max_new_tokens: a continuation ends there, or earlier.
    stop: string or strings that end a continuation; it is cut in front of the first one.
    num_samples: continuations of each text; adds a list to the result, also if it is 1.
    batch_size: most continuations at a time (but those of one text always go together); texts of similar length share
      a batch. Does not change a result.
    eos_id: id that ends a continuation; None: none does. By default that of the vocabulary.
    row_ids: numbers of the texts for their random draws, if they are a part of a longer list; 0, 1, .. by default.
    **options: temperature, top_k, top_p, seed, capacity_mode, stop_ids, window and mesh of `decoding.generate`.

  Returns:
    A string for each text, or a list of num_samples strings, in the order of `texts`; without EOS and stop strings.

  Raises:
    ConfigError: as `decoding.generate`, or a text without tokens.
  """
  results: List[Any] = [None] * len(texts)
  samples = 1 if num_samples is None else num_samples
  for batch in _start(model, texts, max_new_tokens, stop, samples, batch_size, eos_id, row_ids, options):
    while True:
      batch.generation.advance(CHUNK if batch.stops else max_new_tokens)
      if batch.look().all():
        break
    for number, row in zip(batch.numbers, batch.texts):
      results[number] = row if num_samples is not None else row[0]
  return results


def stream_texts(model: Any, texts: Sequence[str], max_new_tokens: int = 128, *, stop: Sequence[str] = (),
                 num_samples: int = 1, batch_size: int = 16, eos_id: Any = 'vocabulary',
                 row_ids: Optional[Sequence[int]] = None, chunk: int = 1, **options) -> Iterator[Piece]:
  """As `generate_texts`, giving each continuation piece by piece, every `chunk` tokens, as far as it is settled."""
  for batch in _start(model, texts, max_new_tokens, stop, num_samples, batch_size, eos_id, row_ids, options):
    shown = [[0] * num_samples for _ in batch.numbers]
    told = np.zeros(batch.stopped.shape, bool)
    batch.generation.advance(chunk - batch.generation.count)
    while not told.all():
      ended = batch.look()
      for row, sample in np.argwhere(~told):
        text = batch.texts[row][sample]
        text = text if ended[row, sample] else settled(text, batch.stops)
        if len(text) > shown[row][sample] or ended[row, sample]:
          yield Piece(batch.numbers[row], int(sample), text[shown[row][sample]:], bool(ended[row, sample]))
          shown[row][sample] = max(len(text), shown[row][sample])
      told |= ended
      batch.generation.advance(chunk)


def score_texts(model: Any, inputs: Sequence[str], targets: Sequence[str], *, batch_size: int = 16,
                append_eos: bool = False, capacity_mode: str = 'none', window: Optional[int] = None,
                mesh: Optional[Mesh] = None) -> TextScores:
  """Log-likelihood of each target given its input.

  Args:
    model: see the module.
    inputs: may be empty strings: then the target is scored from the start of a sequence.
    targets: tokenised apart from the inputs, as in seqio tasks.
    batch_size: most pairs at a time.
    append_eos: score an EOS behind each target, too.
    capacity_mode, mesh: as for `scoring.score`.
    window: most positions of a sequence, the start id included.

  Returns:
    arrays in the order of `inputs`.

  Raises:
    ConfigError: as `scoring.score`; lists of different lengths, a target without tokens, a pair longer than the window.
  """
  require(len(inputs) == len(targets), f'{len(inputs)} inputs, but {len(targets)} targets')
  prefixes, ends = encode(model, inputs, 'inputs'), encode(model, targets, 'targets')
  if append_eos:
    ends = [[*end, model.vocabulary.eos_id] for end in ends]
  for i, (prefix, end) in enumerate(zip(prefixes, ends)):
    require(len(end) > 0, f'targets[{i}] = {targets[i]!r} has no tokens: there is nothing to score')
    require(window is None or len(prefix) + len(end) <= window, f'inputs[{i}] and targets[{i}] have {len(prefix)} + '
            f'{len(end)} tokens: more than the window of {window} positions')
  scores = TextScores(np.zeros(len(ends), np.float32), np.zeros(len(ends), np.int32), np.zeros(len(ends), bool))
  for numbers, ids, lengths in batches([p + e for p, e in zip(prefixes, ends)], batch_size):
    got = scoring.score(model.config, model.variables, ids, lengths, np.asarray([len(prefixes[i]) for i in numbers]),
                        capacity_mode, mesh=mesh)
    for whole, part in zip(scores, got):
      whole[numbers] = part
  return scores
