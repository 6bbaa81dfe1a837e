"""The demo vocabulary, the choice of another one, and the tool that trains them."""

import os

import numpy as np
import pytest

from openmoe_jax import vocabulary
from openmoe_jax.config import ConfigError
from openmoe_jax.tensorflow_setup import import_seqio
from openmoe_jax.tools import train_vocabulary

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
  assert train_vocabulary.main([f'--output={output}', '--size=320', str(folder)]) == 0
  assert '320 pieces' in capsys.readouterr().out
  assert str(tmp_path).encode() not in output.read_bytes()
  vocabulary.configure(str(output), 10)
  assert vocabulary.get().vocab_size == 330
  for text in TEXTS:
    assert vocabulary.decode(vocabulary.get().encode(text)) == text
  first = output.read_bytes()
  assert train_vocabulary.train(train_vocabulary.read_texts([str(folder)]), 320) == first


@pytest.mark.parametrize('arguments, message', [
    (['--size=320', 'no_such_folder'], 'no such file'), (['--size=20', __file__], 'cannot train 20 pieces'),
    (['--output=' + __file__, __file__], 'exists')])
def test_tool_reports_mistakes_in_one_line(tmp_path, capsys, arguments, message):
  assert train_vocabulary.main([f'--output={tmp_path / "x.model"}'] + arguments) == 2
  error = capsys.readouterr().err
  assert message in error and error.startswith('error: ') and error.count('\n') == 1
  assert not (tmp_path / 'x.model').exists()


def test_chunks_keep_every_character():
  text = 'line\n' * 1000 + 'x' * 5000 + '\r\nend'
  chunks = list(train_vocabulary.chunks(text))
  assert ''.join(chunks) == text and max(map(len, chunks)) <= 1000
