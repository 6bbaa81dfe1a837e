"""An exported tokenizer gives the ids of training, for every text, and the text back; in transformers, offline."""

import argparse
import collections
import copy
import functools
import inspect
import io
import json
import os
import pathlib
import tempfile
import textwrap
import warnings

from hypothesis import given, settings, strategies as st
import pytest
import sentencepiece

from openmoe_jax import vocabulary
from openmoe_jax.config import ConfigError
from openmoe_jax.convert import hf_tokenizer
from openmoe_jax.tensorflow_setup import import_seqio

_FOLDERS = tempfile.TemporaryDirectory(prefix='convert_hf_tokenizer_test_')  # gone when the process ends
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # a look at the network is an error, not a delay
try:
  import transformers
except ImportError:
  transformers = None

pytestmark = pytest.mark.torch
seqio = import_seqio()
EXTRA_IDS = 30
TRAINING = {'pad_id': 0, 'eos_id': 1, 'unk_id': 2, 'bos_id': -1}
# What the sentencepiece models of the tests differ in; umT5's are unigram models with pad, eos, unk in front.
MODELS = {
    'demo': None,
    'unigram_bytes': {**TRAINING, 'model_type': 'unigram', 'byte_fallback': True, 'normalization_rule_name': 'identity',
                      'remove_extra_whitespaces': False},
    'unigram_nfkc': {**TRAINING, 'model_type': 'unigram', 'normalization_rule_name': 'nmt_nfkc'},
    # As LLaMA's: id 0 is the unknown piece, 1 begins and 2 ends a sequence.
    'llama_like': {'pad_id': -1, 'unk_id': 0, 'bos_id': 1, 'eos_id': 2, 'model_type': 'bpe', 'byte_fallback': True,
                   'normalization_rule_name': 'identity', 'remove_extra_whitespaces': False},
}
NAMES = list(MODELS)
TEXTS = ('', ' ', 'plain words', '  leading and trailing   ', 'a      b', 'line\n\nline\r\n', '\t\ttabs\t',
         'def f(x):\n    if x:\n        return "a"  # b\n',
         'Größe ½ ﬁn ① x²', '日本語テキスト ｶﾞ が', '가나다 가', 'e\u0301 \u00e9 ́',
         '\U0001F600\U0001F468\u200d\U0001F469', '\u3000wide\u00a0space\u200b', 'NUL \x00 \x7f', '000000000000 ======',
         '</s> <unk> <s> <pad> <0x0A>', 'Answer: <extra_id_0>', '<extra_id_0> at the front', 'jel<extra_id_3>',
         'a <extra_id_29><extra_id_28> <extra_id_99>', '\u2581\u2581literal\u2581',
         '[NLU] Question: who? Answer: <extra_id_0> .')
TRICKY = st.lists(st.sampled_from(list('ae0-= .\n\t#<>/s_\u2581é\u0301ﬁ½한가がｶﾞ\u3000\U0001F600') +
                                  ['  ', ' <extra_id_1>', '</s>', '<pad>', ' def ', 'self.']), max_size=24).map(''.join)
ANY_TEXT = st.text(st.characters(exclude_categories=['Cs']), max_size=40) | TRICKY


def sentences():
  """Some thousand lines of the standard library, with some characters from elsewhere."""
  lines = [line for module in (argparse, collections, inspect, textwrap)
           for line in inspect.getsource(module).splitlines() if line.strip()]
  return lines + ['größe ½ ① 가나다 日本語 テスト が'] * 20


@functools.lru_cache(maxsize=None)
def model_bytes(name):
  if MODELS[name] is None:
    return pathlib.Path(vocabulary.demo_model_path()).read_bytes()
  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences()), model_writer=out, vocab_size=1000,
                                           minloglevel=2, num_threads=1, **MODELS[name])
  return out.getvalue()


@functools.lru_cache(maxsize=None)
def folder(name, chat=False):
  path = pathlib.Path(tempfile.mkdtemp(prefix=f'{name}_', dir=_FOLDERS.name))
  hf_tokenizer.write_tokenizer(path, model_bytes(name), EXTRA_IDS, 8576,
                               hf_tokenizer.RELEASED_CHAT_TEMPLATE if chat else None)
  return path


@functools.lru_cache(maxsize=None)
def trained_with(name):
  """The vocabulary of training."""
  path = pathlib.Path(_FOLDERS.name) / f'{name}.model'
  path.write_bytes(model_bytes(name))
  return seqio.SentencePieceVocabulary(str(path), extra_ids=EXTRA_IDS)


@functools.lru_cache(maxsize=None)
def exported(name, chat=False):
  """The tokenizer as a user gets it, from nothing but the folder."""
  if transformers is None:
    message = 'transformers is not installed: exported tokenizers are NOT tested here. pip install .[torch]'
    warnings.warn(message)
    pytest.skip(message)
  return transformers.AutoTokenizer.from_pretrained(folder(name, chat), trust_remote_code=True)


def check_text(name, text):
  tokenizer, reference = exported(name), trained_with(name)
  ids = reference.encode(text)
  # A '<pad>' at the beginning is the start id: the one text that reads differently unless asked otherwise.
  assert tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
  if not text.startswith(tokenizer.pad_token):
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer(text) == {'input_ids': [0] + ids, 'attention_mask': [1] * (len(ids) + 1)}
  decoded = reference.decode(ids)
  assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == decoded
  assert tokenizer.decode([0] + ids + [reference.eos_id, 0], skip_special_tokens=True) == decoded


@pytest.mark.parametrize('name', NAMES)
def test_ids_and_text_are_those_of_training(name):
  for text in TEXTS:
    check_text(name, text)
    # Training reads through TensorFlow's copy of sentencepiece.
    assert trained_with(name).encode_tf(text).numpy().tolist() == trained_with(name).encode(text)


@pytest.mark.parametrize('name', NAMES)
def test_whole_files_have_the_ids_of_training(name):
  for module in (functools, io, textwrap):
    check_text(name, inspect.getsource(module))


@pytest.mark.parametrize('name', NAMES)
@settings(max_examples=200)
@given(text=ANY_TEXT)
def test_any_text_has_the_ids_of_training(name, text):
  check_text(name, text)


@pytest.mark.parametrize('name', NAMES)
@settings(max_examples=100)
@given(data=st.data())
def test_any_ids_give_the_text_of_training(name, data):
  tokenizer, reference = exported(name), trained_with(name)
  # seqio stops at the end of a sequence, which in transformers is generate's business.
  # Ids above the pieces are unknown.
  ids = data.draw(st.lists(st.integers(1, 8575).filter(lambda i: i != reference.eos_id), max_size=20))
  assert tokenizer.decode(ids, skip_special_tokens=True) == reference.decode(ids)


@pytest.mark.parametrize('name', NAMES)
def test_pieces_and_sentinels_are_those_of_training(name):
  tokenizer, reference = exported(name), trained_with(name)
  size = reference.vocab_size
  assert len(tokenizer) == tokenizer.vocab_size == size
  assert tokenizer.get_vocab() == {reference.tokenizer.id_to_piece(i): i for i in range(size)}
  assert (folder(name) / 'spiece.model').read_bytes() == reference.sp_model
  names = ['<extra_id_0>', '▁<extra_id_0>', '<extra_id_29>']
  assert tokenizer.convert_tokens_to_ids(names) == [size - 1, size - 1, size - 30]
  # Sentinels are found behind a space, as in training, and are text elsewhere.
  assert tokenizer.encode('Answer: <extra_id_0>')[-1] == size - 1
  assert size - 1 in tokenizer.encode('Answer: <extra_id_0> .')
  assert not {size - 4} & set(tokenizer.encode('jel<extra_id_3>'))


def test_special_tokens():
  for name, pad, eos, unk in (('demo', '<pad>', 1, 2), ('unigram_nfkc', '<pad>', 1, 2), ('llama_like', '<unk>', 2, 0)):
    tokenizer = exported(name)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 0)
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id) == (eos, unk)
    assert (tokenizer.pad_token, tokenizer.eos_token) == (pad, '</s>')
  assert exported('demo').model_max_length == 2048


def test_the_start_id_is_there_once():
  tokenizer = exported('demo')
  ids = tokenizer.encode('some words', add_special_tokens=False)
  assert tokenizer.encode('<pad>some words') == tokenizer.encode('some words') == [0] + ids
  assert tokenizer.encode('<pad>some words', add_special_tokens=False) == [0] + ids
  assert tokenizer.decode([0] + ids + [1]) == '<pad>some words</s>'
  assert tokenizer.encode('a', 'b') == [0] + tokenizer.encode('a', add_special_tokens=False) + tokenizer.encode(
      'b', add_special_tokens=False)
  assert tokenizer('some words', return_special_tokens_mask=True)['special_tokens_mask'] == [1] + [0] * len(ids)
  assert tokenizer.encode('some words and more of them', truncation=True, max_length=3) == [0] + ids[:2]


def test_batches_are_padded_on_the_left():
  batch = exported('demo')(['x', 'some words'], padding=True)
  length = len(batch['input_ids'][1])
  assert batch['attention_mask'] == [[0] * (length - 2) + [1, 1], [1] * length]
  assert batch['input_ids'][0] == [0] * (length - 1) + exported('demo').encode('x')[1:]


def test_saved_and_copied_tokenizers_are_the_same(tmp_path):
  tokenizer, text = exported('demo', True), 'def f():\n  <extra_id_4>'
  tokenizer.save_pretrained(tmp_path)
  again = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
  assert (tmp_path / 'spiece.model').read_bytes() == (folder('demo', True) / 'spiece.model').read_bytes()
  assert again.padding_side == 'left' and again.chat_template == tokenizer.chat_template
  # A copy goes through what worker processes use, too.
  assert again.encode(text) == copy.deepcopy(tokenizer).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize('token', ['<new>', '<extra_id_99>', '<extra_id_0>'])
def test_tokens_cannot_be_added(token):
  with pytest.raises(ValueError, match=f'{token}.* cannot be added'):
    exported('demo').add_tokens([token])


SYSTEM = '<<SYS>>\nYou are a helpful, respectful and honest assistant.\n<</SYS>>\n\n'
TURNS = [('Hi', 'Hello.'), ('1 + 1?', '2'), ('Why?', None)]


@pytest.mark.parametrize('number', [1, 2, 3])
@pytest.mark.parametrize('system', [None, 'Be brief.'])
def test_chat_template_is_the_released_one(number, system):
  tokenizer = exported('demo', True)
  messages, text = [], SYSTEM
  if system:
    messages, text = [{'role': 'system', 'content': system}], f'<<SYS>>\n{system}\n<</SYS>>\n\n'
  for i, (question, answer) in enumerate(TURNS[:number]):
    messages.append({'role': 'user', 'content': question})
    text += f'<s>[INST] {question} [/INST]'
    if i < number - 1:
      messages.append({'role': 'assistant', 'content': answer})
      text += f' {answer} </s>'
  assert tokenizer.apply_chat_template(messages, tokenize=False) == '<pad>' + text
  # One start id in front, no end behind; '</s>' of a turn is text, as in training.
  ids = tokenizer.apply_chat_template(messages, return_dict=True, add_generation_prompt=True)['input_ids']
  assert ids == [0] + trained_with('demo').encode(text)
  assert tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False)) == ids


def test_chat_template_refuses_other_orders():
  assistant, user = {'role': 'assistant', 'content': 'x'}, {'role': 'user', 'content': 'y'}
  for messages in ([assistant], [user, user], [user, {'role': 'tool', 'content': 'z'}]):
    with pytest.raises(Exception, match='roles must be user, assistant'):
      exported('demo', True).apply_chat_template(messages, tokenize=False)


def test_chat_template_is_written_only_when_asked():
  assert 'chat_template' not in json.loads((folder('demo') / 'tokenizer_config.json').read_text())
  assert exported('demo').chat_template is None


def test_files_are_those_announced_and_name_no_path():
  assert sorted(path.name for path in folder('demo').iterdir()) == sorted(hf_tokenizer.TOKENIZER_FILES)
  assert os.sep + 'tmp' not in (folder('demo') / 'tokenizer_config.json').read_text()


@pytest.mark.parametrize('data, extra_ids, size, message', [
    (b'', 300, 8576, 'not a sentencepiece model: it has no pieces'),
    (b'no protocol buffer', 300, 8576, 'not a sentencepiece model'),
    ('demo', 300, 8491, r'has 8492 ids \(300 of them sentinels\), but the embedding has 8491 rows'),
    ('twice', 1, 8576, "holds the piece '▁<extra_id_0>' already"),
    ('text_first', 0, 8576, "gives id 0 to the piece"),
    ('no_end', 0, 8576, 'no end-of-sequence piece'),
])
def test_vocabularies_that_cannot_work(tmp_path, data, extra_ids, size, message):
  if data == 'demo':
    data = model_bytes('demo')
  elif data == 'twice':
    data = hf_tokenizer.with_sentinels(model_bytes('demo'), 300)
  elif isinstance(data, str):
    proto = hf_tokenizer._parse(model_bytes('demo'))
    if data == 'text_first':
      proto.pieces[0].type = proto.pieces[0].NORMAL
    else:
      proto.pieces[1].piece = '<end>'
    data = proto.SerializeToString()
  with pytest.raises(ConfigError, match=message):
    hf_tokenizer.write_tokenizer(tmp_path, data, extra_ids, size)
  assert not list(tmp_path.iterdir()), 'nothing is written before everything is checked'
