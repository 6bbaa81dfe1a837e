"""Token ids as text, by the vocabulary that a recording names, without TensorFlow, which takes long to import."""

from typing import Any, Callable, Mapping

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from openmoe_jax import paths, vocabulary, vocabulary_files
from openmoe_jax.config import require


def processor(path: str, extra_ids: int = 0) -> sentencepiece.SentencePieceProcessor:
  """The sentencepiece model of a vocabulary, '' for the package's; ConfigError as `vocabulary_files`."""
  return sentencepiece.SentencePieceProcessor(model_proto=_model(path, extra_ids))


def _model(path: str, extra_ids: int) -> bytes:
  where = f'vocabulary {path!r}'
  file = vocabulary_files.sentencepiece_file(path or vocabulary.demo_model_path(), extra_ids, where)
  return paths.path(file).read_bytes()


def recorded(about: Mapping[str, Any]) -> sentencepiece.SentencePieceProcessor:
  """The vocabulary of a recording.

  Raises:
    ConfigError: it is gone, or is another one now.
  """
  path, extra_ids = about['vocabulary']['path'], about['vocabulary']['extra_ids']
  data = _model(path, extra_ids)
  model = sentencepiece_model_pb2.ModelProto.FromString(data)
  for i in reversed(range(extra_ids)):  # as seqio puts them there
    model.pieces.add(piece=f'▁<extra_id_{i}>', score=0., type=model.SentencePiece.USER_DEFINED)
  known = vocabulary_files.fingerprint(model.SerializeToString(deterministic=True), extra_ids)
  require(known == about['vocabulary']['fingerprint'], f'vocabulary {path!r} is not the one that this was recorded '
          f'with: its fingerprint is {known}, not {about["vocabulary"]["fingerprint"]}')
  return sentencepiece.SentencePieceProcessor(model_proto=data)


def namer(tokenizer: sentencepiece.SentencePieceProcessor) -> Callable[[int], str]:
  """Token id -> its piece; spaces are shown as ␣, ends of lines as ⏎, and what cannot be seen by its number."""
  def name(token_id: int) -> str:
    if token_id == 0:
      return '<start>'
    if not 0 < token_id < tokenizer.get_piece_size():
      return f'<{token_id}>'
    piece = tokenizer.id_to_piece(token_id).replace('▁', '␣').replace('\n', '⏎').replace('\t', '⇥')
    return piece if piece.isprintable() else f'<{token_id}>'
  return name
