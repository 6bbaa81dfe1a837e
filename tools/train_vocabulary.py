"""python -m openmoe_jax.tools.train_vocabulary --output=my.model [--size=8192] [FILE_OR_FOLDER ...]

Trains a byte-fallback BPE sentencepiece model on text files, or, without any, on the standard library (the training
split of the demo tasks; this is how tasks/vocabulary/demo.model was made). Pieces 0, 1 and 2 are padding, end of
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
from typing import Iterable, Iterator, Optional, Sequence

from openmoe_jax.config import ConfigError, require

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


def train(texts: Iterable[str], size: int) -> bytes:
  """Trains on `texts` and returns the serialized sentencepiece model of exactly `size` pieces.

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
          model_type='bpe', byte_fallback=True, character_coverage=0.9999, split_digits=True,
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


def _standard_library() -> Iterator[str]:
  from openmoe_jax.tasks import standard_library
  for kind in standard_library.KINDS:
    for document in standard_library.documents(kind, 'train'):
      yield document.text


def main(argv: Optional[Sequence[str]] = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('paths', nargs='*', metavar='FILE_OR_FOLDER', help='UTF-8 text; default: the standard library')
  parser.add_argument('--output', required=True, help='the model file to write; an existing file is not replaced')
  parser.add_argument('--size', type=int, default=8192, help='pieces, the 256 bytes and 3 special ones included')
  arguments = parser.parse_args(argv)
  try:
    require(not os.path.exists(arguments.output), f'{arguments.output} exists; remove it or choose another --output')
    model = train(read_texts(arguments.paths) if arguments.paths else _standard_library(), arguments.size)
    with open(arguments.output, 'wb') as f:
      f.write(model)
  except (ConfigError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(f'{arguments.output}: {arguments.size} pieces, {len(model):,} bytes')
  return 0


if __name__ == '__main__':
  sys.exit(main())
