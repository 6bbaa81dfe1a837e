"""The report on two vocabularies: counts against counting by hand, names, the picture, and mistakes."""

import json

import pytest

from openmoe_jax import vocabulary
from openmoe_jax.tools import compare_tokenizers, train_vocab

TEXTS = ['one two two', 'drei vier\n', '漢字']


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  path = tmp_path_factory.mktemp('vocabulary') / 'small.model'
  path.write_bytes(train_vocab.train(['one two three four five six\n' * 200], 290))
  return path


def test_counts_are_those_of_the_vocabularies(small):
  models = [compare_tokenizers.load(path) for path in ('', str(small))]
  for model, found in zip(models, compare_tokenizers.count(TEXTS, models)):
    ids = [model.encode(text) for text in TEXTS]
    assert (found.characters, found.utf8_bytes) == (23, 27)
    assert found.tokens == sum(map(len, ids)) and found.used == len(set(sum(ids, [])))
    assert found.byte_pieces == sum(model.id_to_piece(i).startswith('<0x') for i in sum(ids, []))
  assert vocabulary.get().extra_ids == 300, 'the vocabulary of the run is as it was'


def test_program_writes_table_numbers_and_picture(small, tmp_path, capsys):
  for i, text in enumerate(TEXTS):
    (tmp_path / f'{i}.txt').write_text(text * 20)
  compare_tokenizers.main(['', str(small), f'a={tmp_path / "0.txt"}', f'all={tmp_path}',
                           f'--output={tmp_path}/report'])
  out = capsys.readouterr().out
  assert '| a ' in out and 'tokens, package' in out and 'tokens, small.model' in out
  numbers = json.loads((tmp_path / 'report.json').read_text())
  assert numbers['a']['small.model']['utf8_bytes'] == 220 and numbers['all']['package']['utf8_bytes'] > 500
  ratio = numbers['a']['package']['tokens'] / numbers['a']['small.model']['tokens']
  assert f'{ratio:.3f}' in out.splitlines()[2]
  picture = (tmp_path / 'report.png').read_bytes()
  assert picture.startswith(b'\x89PNG') and len(picture) > 5000


def test_names_tell_paths_apart():
  assert compare_tokenizers.distinct_names('', 'x/umt5.model') == ['package', 'umt5.model']
  assert compare_tokenizers.distinct_names('gs://b/one/v.model', '/two/v.model') == ['one/v.model', 'two/v.model']


@pytest.mark.parametrize('arguments, message', [
    (['', '/no/such.model'], 'no such file'), (['', '', 'words'], 'must be NAME=FILE'),
    (['', '', 'a=/no/such/file'], 'no such file'), (['', '', 'a=.', 'a=.'], 'named twice'),
    (['', '', '--names=x'], 'two names'), (['', '', '--output=/no/such/folder/x'], 'there is no folder')])
def test_mistakes_are_one_line(capsys, arguments, message):
  with pytest.raises(SystemExit) as stopped:
    compare_tokenizers.main(arguments)
  error = capsys.readouterr().err
  assert stopped.value.code == 2 and message in error and error.count('\n') == 1
