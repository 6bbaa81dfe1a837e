"""The demo vocabulary, the choice of another one, and the tool that trains them."""

import base64
import dataclasses
import json
import os

import numpy as np
import pytest

from openmoe_jax import data as data_lib
from openmoe_jax import vocabulary, vocabulary_files
from openmoe_jax.config import ConfigError, DataConfig
from openmoe_jax.convert import hf_tokenizer
from openmoe_jax.tensorflow_setup import import_seqio
from openmoe_jax.tools import train_vocab
from tests import prepared

seqio = import_seqio()
TEST_MODEL = os.path.join(os.path.dirname(seqio.__file__), 'test_data', 'sentencepiece', 'sentencepiece.model')

TEXTS = ['', ' ', 'def f(x):\n\tif x:\n        return "a"\r\n\n\n  # trailing  \n', '  leading and trailing   ',
         'naïve Ωmega 漢字 \U0001F600 e\u0301', 'NUL \x00 and control \x01\x7f', '3.14159e-26 0xFFFF 1_000', '\n',
         '\t\t x', 'a <extra_id_x> b', 'A' * 500, '</s> <unk> <pad>']


@pytest.fixture(autouse=True)
def default_vocabulary():
  vocabulary.configure()
  yield
  vocabulary.configure()


def test_demo_model_has_the_ids_of_the_specification():
  model = vocabulary.get()
  assert (model.pad_id, model.eos_id, model.unk_id) == (0, 1, 2)
  assert model.tokenizer.bos_id() == -1
  assert model.vocab_size == 8192 + 300 and vocabulary.padded_size() == 8576
  assert model.tokenizer.id_to_piece(model.vocab_size - 1) == '▁<extra_id_0>'
  assert os.path.getsize(vocabulary.demo_model_path()) < 150_000


@pytest.mark.parametrize('text', TEXTS)
def test_demo_model_gives_text_back_exactly(text):
  model = vocabulary.get()
  ids = model.encode(text)
  assert vocabulary.decode(ids) == text and model.decode(ids) == text
  assert 2 not in ids, 'no unknown piece, thanks to bytes'
  np.testing.assert_array_equal(model.encode_tf(text), np.asarray(ids, np.int32))


def test_demo_model_gives_source_files_back_exactly():
  from openmoe_jax.tasks import standard_library
  for kind in standard_library.KINDS:
    for document in standard_library.documents(kind, 'validation'):
      if '\u2581' not in document.text:
        assert vocabulary.decode(vocabulary.get().encode(document.text)) == document.text, document.file


def test_decode_shows_sentinels_ends_and_unused_rows():
  encode = vocabulary.get().encode
  ids = [0] + encode('let x') + [8491] + encode(' = 3') + [8490, 1, 8500] + encode('\nend') + [1, 0, 0]
  assert vocabulary.decode(ids) == 'let x<extra_id_0> = 3<extra_id_1></s><id 8500>\nend</s>'
  assert vocabulary.decode(np.asarray(ids, np.int32)) == vocabulary.decode(ids)


def test_shared_vocabulary_follows_configure():
  shared = vocabulary.shared()
  assert shared is vocabulary.shared()
  sizes = []
  for path, extra_ids in (('', 300), (TEST_MODEL, 300), (TEST_MODEL, 0), ('', 100)):
    vocabulary.configure(path, extra_ids)
    chosen = vocabulary.get()
    sizes.append(shared.vocab_size)
    assert shared.extra_ids == extra_ids and shared.eos_id == chosen.eos_id == 1 and shared.pad_id == 0
    ids = shared.encode('this is a test')
    assert ids == chosen.encode('this is a test') and shared.decode(ids) == chosen.decode(ids)
    np.testing.assert_array_equal(shared.encode_tf('this is a test'), ids)
  assert sizes == [8492, 326, 26, 8292]


def test_too_small_embedding_is_refused():
  vocabulary.check_fits(8492)
  with pytest.raises(ConfigError, match='8492 ids.*vocab_size = 8491.*8576'):
    vocabulary.check_fits(8491)


def test_bad_models_are_refused(tmp_path):
  empty, text = tmp_path / 'empty.model', tmp_path / 'text.model'
  empty.write_bytes(b'')
  text.write_text('this is not a model')
  for path, message in ((tmp_path / 'absent.model', 'no such file'), (tmp_path, 'is a folder'),
                        (text, 'not a sentencepiece model'), (empty, 'not a sentencepiece model')):
    vocabulary.configure(str(path))
    with pytest.raises(ConfigError, match=message) as error:
      vocabulary.get()
    assert str(path) in str(error.value)
    with pytest.raises(ConfigError, match=message):
      vocabulary.shared().encode('x')


def test_model_whose_id_0_is_text_is_refused(tmp_path):
  import sentencepiece
  corpus = tmp_path / 'corpus.txt'
  corpus.write_text('some words to make pieces of\n' * 50)
  sentencepiece.SentencePieceTrainer.train(
      input=str(corpus), model_prefix=str(tmp_path / 'm'), vocab_size=40, model_type='char', hard_vocab_limit=False,
      pad_id=-1, unk_id=5, bos_id=-1, eos_id=6, minloglevel=2)
  vocabulary.configure(str(tmp_path / 'm.model'))
  with pytest.raises(ConfigError, match='id 0 as padding'):
    vocabulary.get()


# The tool.


def test_tool_trains_a_model_that_works_as_vocabulary(tmp_path, capsys):
  folder = tmp_path / 'texts'
  folder.mkdir()
  (folder / 'a.py').write_text('def add(x, y):\n  return x + y\n' * 200)
  (folder / 'b.txt').write_text('Some prose, with names and numbers: 12, 345.\n' * 200)
  (folder / 'picture.bin').write_bytes(b'\xff\xfe\x00')
  output = tmp_path / 'mine.model'
  assert train_vocab.main([f'--output={output}', '--size=320', str(folder)]) == 0
  assert '320 pieces' in capsys.readouterr().out
  assert str(tmp_path).encode() not in output.read_bytes()
  vocabulary.configure(str(output), 10)
  assert vocabulary.get().vocab_size == 330
  for text in TEXTS:
    assert vocabulary.decode(vocabulary.get().encode(text)) == text
  first = output.read_bytes()
  assert train_vocab.train(train_vocab.read_texts([str(folder)]), 320) == first


@pytest.mark.parametrize('arguments, message', [
    (['--size=320', 'no_such_folder'], 'no such file'), (['--size=20', __file__], 'cannot train 20 pieces'),
    (['--output=' + __file__, __file__], 'exists')])
def test_tool_reports_mistakes_in_one_line(tmp_path, capsys, arguments, message):
  assert train_vocab.main([f'--output={tmp_path / "x.model"}'] + arguments) == 2
  error = capsys.readouterr().err
  assert message in error and error.startswith('error: ') and error.count('\n') == 1
  assert not (tmp_path / 'x.model').exists()


def test_chunks_keep_every_character():
  text = 'line\n' * 1000 + 'x' * 5000 + '\r\nend'
  chunks = list(train_vocab.chunks(text))
  assert ''.join(chunks) == text and max(map(len, chunks)) <= 1000


def test_tool_reads_the_beginning_of_a_prepared_data_set(tmp_path, capsys):
  prepared.corpora(tmp_path, {'my_texts': [f'Line {i * i}: a text with quite different words, quickly jumping over {i}.\n' * 9 for i in range(50)]})
  output = tmp_path / 'mine.model'
  arguments = [f'--output={output}', '--size=300', '--data_set=my_texts', f'--tfds_data_dir={tmp_path}']
  assert train_vocab.main(arguments + ['--megabytes=0.005', '--model_type=unigram']) == 0
  assert '300 pieces' in capsys.readouterr().out
  vocabulary.configure(str(output))
  assert vocabulary.decode(vocabulary.get().encode('Line 3, naïve')) == 'Line 3, naïve'
  assert train_vocab.main([*arguments[1:], f'--output={tmp_path}/other.model', '--data_set=no_texts']) == 2
  assert 'no_texts is not in' in capsys.readouterr().err
  texts = ['abcd', 'naïve', 'x' * 10]
  assert list(train_vocab.first_megabytes(texts, 0)) == texts
  assert ''.join(train_vocab.first_megabytes(texts, 14e-6)) == 'abcdnaïvexxxx'


# Other files of vocabularies.

CHARSMAP_OF = 'nmt_nfkc'  # umT5's normalisation.


@pytest.fixture(scope='module')
def unigram(tmp_path_factory):
  """A model like umT5's: unigram, bytes, NFKC, spaces squeezed and one put in front."""
  import sentencepiece
  folder = tmp_path_factory.mktemp('unigram')
  corpus = folder / 'corpus.txt'
  corpus.write_text('Some words, and more words with numbers 12 345.\nnaïve Ωmega and others\n' * 60)
  sentencepiece.SentencePieceTrainer.train(
      input=str(corpus), model_prefix=str(folder / 'spiece'), vocab_size=330, model_type='unigram', byte_fallback=True,
      hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name=CHARSMAP_OF,
      minloglevel=2)
  return folder / 'spiece.model'


def described(model, sentinels=300):
  """What Hugging Face's tokenizer.json of a sentencepiece model says."""
  proto = vocabulary_files._parse(model.read_bytes(), '')
  pieces = [[piece.piece, piece.score] for piece in proto.pieces]
  token = dict(special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
  special = [dict(token, id=i, content=piece.piece) for i, piece in enumerate(proto.pieces) if i < 3]
  extra = [dict(token, id=len(pieces) + i, content=f'<extra_id_{sentinels - 1 - i}>') for i in range(sentinels)]
  return {
      'version': '1.0', 'added_tokens': special + extra, 'post_processor': None, 'decoder': None,
      'normalizer': {'type': 'Sequence', 'normalizers': [
          {'type': 'Precompiled',
           'precompiled_charsmap': base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()},
          {'type': 'Replace', 'pattern': {'Regex': ' {2,}'}, 'content': ' '}]},
      'pre_tokenizer': {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'always', 'split': True},
      'model': {'type': 'Unigram', 'unk_id': 2, 'vocab': pieces, 'byte_fallback': True}}


def test_hugging_face_files_give_the_ids_of_the_sentencepiece_model(unigram, tmp_path):
  vocabulary.configure(str(unigram))
  expected, print_ = [vocabulary.get().encode(text) for text in TEXTS], vocabulary.fingerprint()
  size = vocabulary.get().vocab_size
  (tmp_path / 'json').mkdir()
  (tmp_path / 'json' / 'tokenizer.json').write_text(json.dumps(described(unigram)))
  (tmp_path / 'spiece').mkdir()
  (tmp_path / 'spiece' / 'spiece.model').write_bytes(hf_tokenizer.with_sentinels(unigram.read_bytes(), 300))
  for path in (tmp_path / 'json' / 'tokenizer.json', tmp_path / 'json', tmp_path / 'spiece' / 'spiece.model',
               tmp_path / 'spiece'):
    vocabulary.configure(str(path))
    chosen = vocabulary.get()
    assert chosen.vocab_size == size and (chosen.pad_id, chosen.eos_id, chosen.unk_id) == (0, 1, 2)
    assert [chosen.encode(text) for text in TEXTS] == expected
    assert chosen.tokenizer.id_to_piece(size - 1) == '▁<extra_id_0>' and vocabulary.fingerprint() == print_
  vocabulary.configure(str(tmp_path / 'spiece'), 100)
  with pytest.raises(ConfigError, match='holds 300 sentinels.*extra_ids = 100; set it to 300'):
    vocabulary.get()


def test_a_bpe_tokenizer_json_gives_the_ids_of_the_sentencepiece_model(tmp_path):
  """As LLaMA's: BPE with bytes, a space in front, nothing normalised."""
  proto = vocabulary_files._parse(open(vocabulary.demo_model_path(), 'rb').read(), '')
  pieces = {piece.piece: i for i, piece in enumerate(proto.pieces)}
  merges = []
  for piece in sorted(pieces, key=pieces.get):
    merges += [[piece[:cut], piece[cut:]] for cut in range(1, len(piece))
               if proto.pieces[pieces[piece]].type == 1 and piece[:cut] in pieces and piece[cut:] in pieces]
  file = tmp_path / 'tokenizer.json'
  description = {
      'added_tokens': [dict(id=i, content=name, special=True) for i, name in enumerate(('<pad>', '</s>', '<unk>'))],
      'normalizer': {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}, 'pre_tokenizer': None,
      'model': {'type': 'BPE', 'unk_token': '<unk>', 'byte_fallback': True, 'vocab': pieces, 'merges': merges}}
  for written in (merges, [' '.join(merge) for merge in merges]):
    description['model']['merges'] = written
    file.write_text(json.dumps(description))
    expected = [vocabulary.get().encode(text) for text in TEXTS]
    vocabulary.configure(str(file))
    assert [vocabulary.get().encode(text) for text in TEXTS] == expected
    vocabulary.configure()


def _with(**changes):
  return lambda description: {**description, **changes}


@pytest.mark.parametrize('change, message', [
    (_with(pre_tokenizer={'type': 'ByteLevel', 'add_prefix_space': False}), "cannot do what its 'ByteLevel' does"),
    (_with(model={'type': 'WordPiece', 'vocab': {}}), 'WordPiece'),
    (_with(model={'type': 'BPE', 'vocab': {'a': 0}, 'merges': []}), 'byte-level BPE'),
    (_with(model={'type': 'Unigram', 'vocab': [['a', 0.]], 'unk_id': 7}), 'no piece for unknown text'),
    (lambda _: {'no': 'model'}, 'is not a tokenizer.json'), (lambda _: [], 'is not a tokenizer.json')])
def test_what_sentencepiece_cannot_run_is_refused(unigram, tmp_path, change, message):
  file = tmp_path / 'tokenizer.json'
  file.write_text(json.dumps(change(described(unigram))))
  vocabulary.configure(str(file))
  with pytest.raises(ConfigError, match=message) as error:
    vocabulary.get()
  assert str(file) in str(error.value) and '\n' not in str(error.value)


def test_fingerprints_tell_vocabularies_apart(unigram):
  prints = []
  for path, extra_ids in (('', 300), ('', 100), (str(unigram), 300)):
    vocabulary.configure(path, extra_ids)
    prints.append(vocabulary.fingerprint())
  assert len(set(prints)) == 3


def test_a_data_position_of_another_vocabulary_is_refused(unigram):
  """Even under the same name: what the file holds counts."""
  data = DataConfig(mixture_or_task='demo_prose_full_lm', task_feature_lengths={'targets': 32}, num_streams=1)
  streams = data_lib.TrainStreams(data)
  next(streams)
  state = streams.state()
  other = data_lib.TrainStreams(dataclasses.replace(data, vocabulary=str(unigram)))
  with pytest.raises(ConfigError, match='vocabulary: .* then, .* now'):
    other.restore(state)


@pytest.mark.torch
def test_the_tokenizers_library_agrees(unigram, tmp_path):
  """The description above is what that library reads; it cuts plain text alike."""
  import tokenizers
  (tmp_path / 'tokenizer.json').write_text(json.dumps(described(unigram)))
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  vocabulary.configure(str(tmp_path / 'tokenizer.json'))
  for text in ('Some words, and more words', 'numbers 345  with spaces', 'Ωmega'):
    assert theirs.encode(text, add_special_tokens=False).ids == vocabulary.get().encode(text)
  assert theirs.token_to_id('<extra_id_0>') == vocabulary.get().vocab_size - 1
