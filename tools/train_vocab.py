"""Trains a sentencepiece model with byte fallback, BPE or (slower; umT5's kind) unigram.

  python -m openmoe_jax.tools.train_vocab --output=my.model --size=32000 FILE_OR_FOLDER ...
  python -m openmoe_jax.tools.train_vocab --output=my.model --data_set=my_texts --tfds_data_dir=DIR --megabytes=200
  python -m openmoe_jax.tools.train_vocab --output=demo.model

The texts are UTF-8 files, or the training split of a prepared data set, or, without either, the standard library (the
training split of the demo tasks; this is how tasks/vocabulary/demo.model was made). sentencepiece keeps all of them in
memory, several times: --megabytes takes the beginning only. Pieces 0, 1 and 2 are padding, end of
sequence and unknown, as in umT5; there is no beginning-of-sequence piece, the model starts from padding. Text is not
normalised, so that decoding gives back exactly the text that was encoded, indentation and newlines included. (Two
characters are lost: sentencepiece cannot tell its mark for a space, U+2581, from a space, and U+FFFE, which Unicode
defines not to be a character, becomes U+FFFD.)

Use it with `--gin.VOCABULARY=my.model`; the model's vocab_size must be at least size + DataConfig.extra_ids.
"""

import argparse
import io
import os
import sys
import tempfile
from typing import Any, Iterable, Iterator, Optional, Sequence

from openmoe_jax.config import ConfigError, require
from openmoe_jax.tensorflow_setup import import_seqio

# sentencepiece skips training sentences of more than 4,192 bytes; a character is at most four bytes.
_CHUNK_CHARACTERS = 1000
# With no rule at all the sentencepiece inside TensorFlow logs that to stderr for every pipeline that tokenizes, and it
# does not accept rules without effect.
_ONE_RULE = 'FFFE\tFFFD\n'


def chunks(text: str) -> Iterator[str]:
  """Cuts a text into pieces that sentencepiece accepts, at line ends where possible, keeping every character."""
  part = ''
  for line in text.splitlines(keepends=True):
    if part and len(part) + len(line) > _CHUNK_CHARACTERS:
      yield part
      part = ''
    part += line
    while len(part) > _CHUNK_CHARACTERS:
      yield part[:_CHUNK_CHARACTERS]
      part = part[_CHUNK_CHARACTERS:]
  if part:
    yield part


def train(texts: Iterable[str], size: int, model_type: str = 'bpe') -> bytes:
  """Trains on `texts` and returns the serialized sentencepiece model of exactly `size` pieces.

  Args:
    texts: whole documents.
    size: pieces, the 256 bytes and 3 special ones included.
    model_type: 'bpe' or 'unigram'.

  Raises:
    ConfigError: sentencepiece cannot make that many pieces of that text.
  """
  import sentencepiece
  from sentencepiece import sentencepiece_model_pb2
  model = io.BytesIO()
  with tempfile.TemporaryDirectory() as folder:
    rules = os.path.join(folder, 'rules.tsv')
    with open(rules, 'w', encoding='ascii') as f:
      f.write(_ONE_RULE)
    try:
      sentencepiece.SentencePieceTrainer.train(
          sentence_iterator=(chunk for text in texts for chunk in chunks(text)), model_writer=model, vocab_size=size,
          model_type=model_type, byte_fallback=True, character_coverage=0.9999, split_digits=True,
          pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
          normalization_rule_tsv=rules, add_dummy_prefix=False, remove_extra_whitespaces=False,
          allow_whitespace_only_pieces=True, minloglevel=2)
    except RuntimeError as error:
      raise ConfigError(f'sentencepiece cannot train {size} pieces on this text: {error}') from error
  # The model would otherwise hold the name of the temporary file.
  proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
  proto.normalizer_spec.ClearField('normalization_rule_tsv')
  return proto.SerializeToString(deterministic=True)


def read_texts(paths: Sequence[str]) -> Iterator[str]:
  """The UTF-8 text of every file in `paths`; folders are read with their subfolders, other files in them skipped."""
  for path in paths:
    require(os.path.exists(path), f'{path}: no such file or folder')
    if os.path.isfile(path):
      names = [path]
    else:
      names = sorted(os.path.join(folder, name) for folder, _, files in os.walk(path) for name in files)
    for name in names:
      try:
        with open(name, encoding='utf-8', newline='') as f:
          yield f.read()
      except UnicodeDecodeError as error:
        require(name != path, f'{name} is not UTF-8 text: {error}')


def read_data_set(name: str, folder: str) -> Iterator[str]:
  """The texts of the training split of a prepared data set, in the order of its files."""
  dataset = tfds_texts(name, folder)
  for text in dataset.as_numpy_iterator():
    yield text.decode('utf-8', 'replace')


def tfds_texts(name: str, folder: str) -> Any:
  """A tf.data.Dataset of the field `text` of the training split of data set NAME[:VERSION] in `folder`.

  Raises:
    ConfigError: there is no such data set, or it has no texts.
  """
  from openmoe_jax.tasks import pretraining
  if ':' not in name:
    version = pretraining.newest_version(name, folder)
    require(version != '', f'--data_set={name} is not in --tfds_data_dir={folder!r}')
    name = f'{name}:{version}'
  try:
    source = import_seqio().TfdsDataSource(name, tfds_data_dir=folder, read_only=True)
    dataset = source.get_dataset('train', shuffle=False)
  except Exception as error:  # TFDS raises many kinds; all mean that it cannot be read.
    first = str(error).strip().split('\n', 1)[0]
    raise ConfigError(f'--data_set={name} cannot be read from {folder!r}: {first}') from error
  require('text' in dataset.element_spec, f'--data_set={name} has no field text; it has {", ".join(dataset.element_spec)}')
  return dataset.map(lambda record: record['text'])


def first_megabytes(texts: Iterable[str], megabytes: float) -> Iterator[str]:
  """The first texts, up to a size in UTF-8; the last one may be cut. 0 is no limit."""
  left = megabytes * 1e6 if megabytes else float('inf')
  for text in texts:
    size = len(text.encode())
    if size >= left:
      yield text[:int(len(text) * left / size)]
      return
    left -= size
    yield text


def _standard_library() -> Iterator[str]:
  from openmoe_jax.tasks import standard_library
  for kind in standard_library.KINDS:
    for document in standard_library.documents(kind, 'train'):
      yield document.text


def main(argv: Optional[Sequence[str]] = None) -> int:
  parser = argparse.ArgumentParser(prog='train_vocab', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('paths', nargs='*', metavar='FILE_OR_FOLDER', help='UTF-8 text; default: the standard library')
  parser.add_argument('--data_set', metavar='NAME[:VERSION]', help='a prepared data set instead of files')
  parser.add_argument('--tfds_data_dir', default='', metavar='DIR', help='where it lies')
  parser.add_argument('--megabytes', type=float, default=0, help='use so much of the text (0: all of it)')
  parser.add_argument('--model_type', choices=('bpe', 'unigram'), default='bpe')
  parser.add_argument('--output', required=True, help='the model file to write; an existing file is not replaced')
  parser.add_argument('--size', type=int, default=8192, help='pieces, the 256 bytes and 3 special ones included')
  arguments = parser.parse_args(argv)
  try:
    require(not os.path.exists(arguments.output), f'{arguments.output} exists; remove it or choose another --output')
    require(not (arguments.paths and arguments.data_set), 'give files or --data_set, not both')
    require(bool(arguments.tfds_data_dir) == bool(arguments.data_set), '--data_set and --tfds_data_dir go together')
    require(arguments.megabytes >= 0, f'--megabytes={arguments.megabytes} must not be negative')
    texts = read_data_set(arguments.data_set, arguments.tfds_data_dir) if arguments.data_set else (
        read_texts(arguments.paths) if arguments.paths else _standard_library())
    model = train(first_megabytes(texts, arguments.megabytes), arguments.size, arguments.model_type)
    with open(arguments.output, 'wb') as f:
      f.write(model)
  except (ConfigError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(f'{arguments.output}: {arguments.size} pieces, {len(model):,} bytes')
  return 0


if __name__ == '__main__':
  sys.exit(main())
