"""The tokenizer of an exported OpenMoE model for Hugging Face transformers 4.50 to 5.

This file lies in the model's folder beside spiece.model, a sentencepiece model with the sentinels among its pieces, and
is used by `AutoTokenizer.from_pretrained(folder, trust_remote_code=True)`. Text goes through sentencepiece itself, so
that ids are those of training, whatever the text: a conversion to tokenizer.json composes characters and breaks ties
differently. It needs the packages transformers and sentencepiece, nothing else.

What differs from other tokenizers, because it was so in training:
  - Id 0 ('<pad>') is the start of every sequence and is put in front; no end-of-sequence id is put behind. With
    add_special_tokens=False there is neither.
  - '</s>' or '<unk>' in a text is text. Only a '<pad>' at the very beginning is the start id, which is then not put
    there twice; with split_special_tokens=True it is text, too.
  - ' <extra_id_0>' in a text is the sentinel, with the space as a part of it; without a space in front it is text (and
    a space comes in front of the whole text where the sentencepiece model adds one).
"""

import os
from typing import Any, Dict, List, Optional, Tuple

import sentencepiece
from transformers import PreTrainedTokenizer


class OpenMoeTokenizer(PreTrainedTokenizer):
  """A sentencepiece model behind the interface of transformers.

  Args:
    vocab_file: path of the sentencepiece model, sentinels included.
    **kwargs: of `PreTrainedTokenizer`; the special tokens' names follow from the model.
  """
  vocab_files_names = {'vocab_file': 'spiece.model'}
  model_input_names = ['input_ids', 'attention_mask']

  def __init__(self, vocab_file: str, **kwargs):
    self.sp_model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
    piece = self.sp_model.id_to_piece
    names = {'bos_token': piece(0), 'pad_token': piece(0), 'eos_token': piece(self.sp_model.eos_id()),
             'unk_token': piece(self.sp_model.unk_id())}
    super().__init__(**{**names, **kwargs})

  @property
  def vocab_size(self) -> int:
    """Pieces and sentinels; the model's embedding has this many rows or some more."""
    return self.sp_model.get_piece_size()

  def get_vocab(self) -> Dict[str, int]:
    return {self.sp_model.id_to_piece(i): i for i in range(self.vocab_size)}

  def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
    unknown = [str(token) for token in new_tokens or [] if self._id(str(token)) is None]
    if unknown:
      raise ValueError(f'{unknown} cannot be added: the tokens of this tokenizer are the pieces of spiece.model')
    return super()._add_tokens(new_tokens, special_tokens=special_tokens)

  def tokenize(self, text: str, split_special_tokens: Optional[bool] = None, **kwargs) -> List[str]:
    """Names of the tokens of a text.

    Args:
      text: any text.
      split_special_tokens: take a '<pad>' at the beginning for text instead of the start of the sequence.
      **kwargs: what transformers passes to tokenizers in general; nothing here depends on it.
    """
    split = getattr(self, 'split_special_tokens', False) if split_special_tokens is None else split_special_tokens
    start = self.sp_model.id_to_piece(0)
    ids = []
    if text.startswith(start) and not split:
      ids, text = [0], text[len(start):]
    return [self.sp_model.id_to_piece(i) for i in ids + self.sp_model.encode(text)]

  def build_inputs_with_special_tokens(self, token_ids_0: List[int], token_ids_1: Optional[List[int]] = None):
    return self._start(token_ids_0) + token_ids_0 + (token_ids_1 or [])

  def get_special_tokens_mask(self, token_ids_0: List[int], token_ids_1: Optional[List[int]] = None,
                              already_has_special_tokens: bool = False) -> List[int]:
    if not already_has_special_tokens:
      token_ids_0 = self._start(token_ids_0) + token_ids_0
    special = (0, self.sp_model.eos_id())
    return [int(i in special) for i in token_ids_0 + (token_ids_1 or [])]

  def create_token_type_ids_from_sequences(self, token_ids_0: List[int], token_ids_1: Optional[List[int]] = None):
    return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

  def _start(self, ids: List[int]) -> List[int]:
    return [] if ids[:1] == [0] else [0]

  def _id(self, token: str) -> Optional[int]:
    """The id of the piece of exactly this name; None where there is none."""
    index = self.sp_model.piece_to_id(token)
    return index if self.sp_model.id_to_piece(index) == token else None

  def _convert_token_to_id(self, token: str) -> int:
    index = self._id(token)
    if index is None and token.startswith('<extra_id_'):  # a sentinel without the space that is a part of it
      index = self._id(f'\u2581{token}')
    return self.sp_model.unk_id() if index is None else index

  def _known(self, index: int) -> int:
    """Rows of the embedding above the pieces are unknown, as they are to seqio."""
    return index if 0 <= index < self.vocab_size else self.sp_model.unk_id()

  def _convert_id_to_token(self, index: int) -> str:
    return self.sp_model.id_to_piece(self._known(index))

  def convert_tokens_to_string(self, tokens: List[str]) -> str:
    return self.sp_model.decode(list(tokens)) if tokens else ''

  def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs) -> str:
    """Text as sentencepiece gives it back: nothing is cleaned up.

    Args:
      token_ids: one id or several.
      skip_special_tokens: leave '<pad>' and '</s>' out; unknown pieces and sentinels stay.
      **kwargs: other settings of transformers' tokenizers; nothing here depends on them.
    """
    del kwargs
    ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]

    def decode(run):
      return self.sp_model.decode([self._known(i) for i in run])

    if skip_special_tokens:  # sentencepiece leaves out control pieces itself; in some models id 0 is none
      return decode([i for i in ids if i or self.sp_model.is_control(0)])
    parts, run = [], []
    for i in ids:
      if i == 0 or self.sp_model.is_control(self._known(i)):
        parts += [decode(run), self.sp_model.id_to_piece(i)]
        run = []
      else:
        run.append(i)
    return ''.join(parts + [decode(run)])

  def save_vocabulary(self, save_directory: str, filename_prefix: Optional[str] = None) -> Tuple[str]:
    name = self.vocab_files_names['vocab_file']
    path = os.path.join(save_directory, f'{filename_prefix}-{name}' if filename_prefix else name)
    with open(path, 'wb') as file:
      file.write(self.sp_model.serialized_model_proto())
    return (path,)
