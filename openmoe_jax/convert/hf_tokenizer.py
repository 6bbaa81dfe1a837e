"""The tokenizer files of an exported model: ids are those of the vocabulary it was trained with, for every text.

    spiece.model               the sentencepiece model with the sentinels as its last pieces
    tokenization_openmoe.py    the class that runs it; see there for what it adds to a text
    tokenizer_config.json      tells transformers of that class, the special tokens and the chat template

There is deliberately no tokenizer.json: the `tokenizers` library composes characters by other rules and breaks ties
between unigram segmentations in another order, so that a run of digits or a composed letter gets other ids than in
training.
"""

import json
import pathlib
from typing import Any, Optional

import sentencepiece

from openmoe_jax import paths
from openmoe_jax.config import ConfigError, require

TOKENIZER_FILES = ('spiece.model', 'tokenization_openmoe.py', 'tokenizer_config.json')

# The format the released chat model was tuned on. The start id in front is the model's, all else, '<s>' and '</s>'
# included, is text to the vocabulary.
RELEASED_CHAT_TEMPLATE = (
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}"
    "{% set system = 'You are a helpful, respectful and honest assistant.' %}{% set turns = messages %}"
    "{% endif %}"
    "{{ bos_token + '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}"
    "{% for message in turns %}"
    "{% if message['role'] == 'user' and loop.index0 % 2 == 0 %}"
    "{{ '<s>[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' and loop.index0 % 2 == 1 %}"
    "{{ ' ' + message['content'] + ' </s>' }}"
    "{% else %}"
    "{{ raise_exception('roles must be user, assistant, user, ... behind an optional system message; not '"
    " + message['role'] + ' at this place') }}"
    "{% endif %}"
    "{% endfor %}")


def with_sentinels(sentencepiece_bytes: bytes, extra_ids: int) -> bytes:
  """A sentencepiece model with <extra_id_{extra_ids - 1}> to <extra_id_0> behind its pieces, in this order.

  Raises:
    ConfigError: it is no sentencepiece model, or has sentinels already.
  """
  proto = _parse(sentencepiece_bytes)
  known = {piece.piece for piece in proto.pieces}
  for number in reversed(range(extra_ids)):
    name = f'\u2581<extra_id_{number}>'
    require(name not in known, f'the sentencepiece model holds the piece {name!r} already; extra_ids = {extra_ids} '
            'must be 0 for a model with sentinels of its own')
    proto.pieces.add(piece=name, score=0.0, type=type(proto.pieces[0]).USER_DEFINED)
  return proto.SerializeToString()


def has_sentinels(sentencepiece_bytes: bytes) -> bool:
  """Whether a sentencepiece model has them among its pieces, as the ones of our exports have."""
  return any(piece.piece == '\u2581<extra_id_0>' for piece in _parse(sentencepiece_bytes).pieces)


def _parse(data: bytes) -> Any:
  from sentencepiece import sentencepiece_model_pb2  # needs protobuf, which a plain import of this module should not
  try:
    proto = sentencepiece_model_pb2.ModelProto.FromString(data)
  except Exception as error:  # protobuf's implementations raise different classes
    raise ConfigError(f'the vocabulary ({len(data)} bytes) is not a sentencepiece model: {error}') from error
  require(len(proto.pieces) > 0, f'the vocabulary ({len(data)} bytes) is not a sentencepiece model: it has no pieces')
  return proto


def write_tokenizer(folder: paths.PathLike, sentencepiece_bytes: bytes, extra_ids: int, vocab_size: int,
                    chat_template: Optional[str] = None, max_length: int = 2048) -> None:
  """Writes `TOKENIZER_FILES` into an existing folder.

  Args:
    folder: of the exported model.
    sentencepiece_bytes: the sentencepiece model of the training run (`DataConfig.vocabulary`), without sentinels.
    extra_ids: sentinels above its pieces (`DataConfig.extra_ids`).
    vocab_size: rows of the model's embedding.
    chat_template: Jinja template of conversations, such as `RELEASED_CHAT_TEMPLATE`; None writes none.
    max_length: tokens of the longest sequence; longer texts get a warning from transformers.

  Raises:
    ConfigError: not a sentencepiece model, one that gives id 0 to text or has no end-of-sequence piece, or one with
      more ids than the embedding has rows.
  """
  model = with_sentinels(sentencepiece_bytes, extra_ids)
  processor = sentencepiece.SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(model)
  except Exception as error:  # sentencepiece has no error classes of its own
    raise ConfigError(f'the sentencepiece model cannot be used: {error}') from error
  size = processor.get_piece_size()
  require(size <= vocab_size, f'the vocabulary has {size} ids ({extra_ids} of them sentinels), but the embedding has '
          f'{vocab_size} rows (vocab_size); it must have at least as many')
  require(processor.is_control(0) or processor.is_unknown(0), f'the vocabulary gives id 0 to the piece '
          f'{processor.id_to_piece(0)!r}; the model starts and pads with id 0, so it must not be text')
  require(processor.eos_id() > 0, 'the vocabulary has no end-of-sequence piece')
  folder = paths.path(folder)
  settings = {
      'tokenizer_class': 'OpenMoeTokenizer',
      'auto_map': {'AutoTokenizer': ['tokenization_openmoe.OpenMoeTokenizer', None]},
      'bos_token': processor.id_to_piece(0),
      'pad_token': processor.id_to_piece(0),
      'eos_token': processor.id_to_piece(processor.eos_id()),
      'unk_token': processor.id_to_piece(processor.unk_id()),
      'padding_side': 'left',
      'model_max_length': max_length,
      'clean_up_tokenization_spaces': False,
  }
  if chat_template is not None:
    settings['chat_template'] = chat_template
  (folder / 'spiece.model').write_bytes(model)
  source = pathlib.Path(__file__).with_name('hf_model') / 'tokenization_openmoe.py'
  (folder / 'tokenization_openmoe.py').write_text(source.read_text(encoding='utf-8'), encoding='utf-8')
  paths.write_text(folder / 'tokenizer_config.json', json.dumps(settings, indent=2) + '\n')
