"""The vocabulary of a run: chosen once with `configure`, followed by everything, tasks included.

Ids, from low to high: 0 padding (also the first input of every sequence), 1 end of sequence, 2 unknown, the pieces of a
sentencepiece model, then `extra_ids` sentinels in descending order: the highest id is <extra_id_0>.
"""

import functools
import importlib.util
import os
import re
from typing import Any, List, NamedTuple, Sequence

from openmoe_jax import vocabulary_files
from openmoe_jax.config import ConfigError, require
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow

# Embedding rows are rounded up to this, so that they divide over devices and fill the TPU's lanes (SPEC section 6).
ROWS_MULTIPLE = 128


class _Choice(NamedTuple):
  path: str  # '' is the model in the package.
  extra_ids: int


_choice = _Choice('', 300)


def demo_model_path() -> str:
  """Where the small model of the demo tasks lies, in an installed package as well as in a checkout."""
  spec = importlib.util.find_spec('openmoe_jax.tasks')
  if spec is not None:
    folders = list(spec.submodule_search_locations or [])
  else:
    folders = [os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'tasks')]
  for folder in folders:
    path = os.path.join(folder, 'vocabulary', 'demo.model')
    if os.path.exists(path):
      return path
  raise ConfigError('the demo vocabulary, tasks/vocabulary/demo.model, is not part of this installation; '
                    'install the package again, or set DataConfig.vocabulary to a sentencepiece model')


def configure(path: str = '', extra_ids: int = 300) -> None:
  """Chooses the vocabulary of this process. Cheap: the file is read on first use.

  Args:
    path: a sentencepiece model, a tokenizer.json or a folder with one, local or gs:// (see `vocabulary_files`); '' is the
      small one in the package.
    extra_ids: number of sentinels above its pieces.
  """
  global _choice
  _choice = _Choice(os.fspath(path), int(extra_ids))


def get() -> Any:
  """The configured vocabulary, a `seqio.SentencePieceVocabulary`.

  Raises:
    ConfigError: the file is missing, is no sentencepiece model, or gives id 0 to a piece of text.
  """
  path = _choice.path or demo_model_path()
  return _load(path, _choice.extra_ids)


@functools.lru_cache(maxsize=None)
def _load(path: str, extra_ids: int) -> Any:
  where = f'DataConfig.vocabulary = {path!r}'
  path = vocabulary_files.sentencepiece_file(path, extra_ids, where)
  seqio = import_seqio()
  try:
    vocabulary = seqio.SentencePieceVocabulary(path, extra_ids=extra_ids)
    tokenizer = vocabulary.tokenizer
  except Exception as error:  # Protocol buffer and sentencepiece errors have no common base class.
    raise ConfigError(f'{where} is not a sentencepiece model: {error}') from error
  require(tokenizer.piece_size() > extra_ids, f'{where} is not a sentencepiece model: it holds no pieces')
  require(tokenizer.pad_id() == 0 or tokenizer.is_unknown(0) or tokenizer.is_control(0),
          f'{where}: its id 0 is the piece {tokenizer.id_to_piece(0)!r}; the model uses id 0 as padding')
  require(tokenizer.eos_id() > 0, f'{where} has no end-of-sequence piece')
  return vocabulary


def fingerprint() -> str:
  """A short name of what the vocabulary does: another one for other pieces, scores, normalisation or sentinels."""
  chosen = get()
  return vocabulary_files.fingerprint(chosen.sp_model, chosen.extra_ids)


def padded_size() -> int:
  """Rows that the embedding needs: pieces and sentinels, rounded up to a multiple of 128."""
  return -(-get().vocab_size // ROWS_MULTIPLE) * ROWS_MULTIPLE


def check_fits(vocab_size: int) -> None:
  """Raises `ConfigError` unless every id of the vocabulary is a row of an embedding of `vocab_size` rows."""
  size = get().vocab_size
  require(size <= vocab_size, f'the vocabulary {_choice.path or "of the demo"} has {size} ids '
          f'({_choice.extra_ids} of them sentinels), but ModelConfig.vocab_size = {vocab_size}; '
          f'it must be at least {size}, and {padded_size()} rounds that up to a multiple of {ROWS_MULTIPLE}')


def decode(ids: Sequence[int]) -> str:
  """Ids as text that shows everything: sentinels as <extra_id_0>, ends of sequences as </s>; padding is left out."""
  vocabulary = get()
  tokenizer, size = vocabulary.tokenizer, vocabulary.vocab_size
  parts: List[str] = []
  run: List[int] = []

  def flush():
    parts.append(tokenizer.decode(run))
    run.clear()

  for i in map(int, ids):
    if i == 0:
      continue
    if 0 < i < size and i != vocabulary.eos_id:
      run.append(i)
    else:
      flush()
      parts.append('</s>' if i == vocabulary.eos_id else f'<id {i}>')
  flush()
  # Sentinels carry the space in front of them as part of the piece, where there was none in the text.
  return re.sub(r' (<extra_id_\d+>)', r'\1', ''.join(parts))


@functools.lru_cache(maxsize=None)
def shared() -> Any:
  """The one vocabulary object that every task's features hold; it does whatever `get()` does at the time of use."""
  import_tensorflow()
  seqio = import_seqio()

  class SharedVocabulary(seqio.Vocabulary):
    """Passes every call on to the configured vocabulary."""

    bos_id = property(lambda self: get().bos_id)
    eos_id = property(lambda self: get().eos_id)
    pad_id = property(lambda self: get().pad_id)
    unk_id = property(lambda self: get().unk_id)
    extra_ids = property(lambda self: get().extra_ids)
    vocab_size = property(lambda self: get().vocab_size)
    tokenizer = property(lambda self: get().tokenizer)
    tf_tokenizer = property(lambda self: get().tf_tokenizer)
    _base_vocab_size = property(lambda self: get().vocab_size)

    def encode(self, s):
      return get().encode(s)

    def decode(self, ids):
      return get().decode(ids)

    def encode_tf(self, s):
      return get().encode_tf(s)

    def decode_tf(self, ids):
      return get().decode_tf(ids)

    # What the base class wants to see defined; the public methods above do not come here.
    _encode, _decode, _encode_tf, _decode_tf = encode, decode, encode_tf, decode_tf

    def __str__(self):
      return str(get())

  return SharedVocabulary()
