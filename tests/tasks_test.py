"""The demo's documents, tasks and mixtures."""

import ast
import importlib
import sys

import numpy as np
import pytest

from openmoe_jax import data as data_lib
from openmoe_jax import vocabulary
from openmoe_jax.config import ConfigError, DataConfig
from openmoe_jax.tasks import demo, standard_library
from openmoe_jax.tensorflow_setup import import_seqio

seqio = import_seqio()

EOS = 1
NAMES = [f'demo_{kind}_{objective}' for kind in ('code', 'prose') for objective in ('full_lm', 'prefix_lm', 'ul2')]


def settings(name, **changes):
  lengths = {'targets': 64} if name.endswith('full_lm') else {'inputs': 64, 'targets': 64}
  values = dict(mixture_or_task=name, task_feature_lengths=lengths, batch_size=4, num_streams=1, eval_batches=2)
  return DataConfig(**{**values, **changes})


# Documents.


def test_splits_share_no_file():
  files = {split: {d.file for kind in standard_library.KINDS for d in standard_library.documents(kind, split)}
           for split in standard_library.SPLITS}
  assert not files['train'] & files['validation']
  assert len(files['train']) > 300 and len(files['validation']) > 20
  for split, names in files.items():
    assert all(standard_library.split_of(name) == split for name in names)
  share = len(files['validation']) / sum(map(len, files.values()))
  assert .05 < share < .15


def test_docstrings_follow_their_file_and_topics_are_one_file():
  for split in standard_library.SPLITS:
    code = {d.file for d in standard_library.documents('code', split)}
    prose = {d.file for d in standard_library.documents('prose', split)} - {standard_library.TOPICS_FILE}
    assert prose <= code
  topics = [d for d in standard_library.documents('prose', 'train') if d.file == standard_library.TOPICS_FILE]
  assert len(topics) > 50
  assert all(d.file != standard_library.TOPICS_FILE for d in standard_library.documents('prose', 'validation'))


def test_documents_are_not_empty_and_not_tests():
  for kind in standard_library.KINDS:
    for split in standard_library.SPLITS:
      documents = standard_library.documents(kind, split)
      assert all(d.text.strip() for d in documents)
      assert not any(part in standard_library.SKIPPED_FOLDERS for d in documents for part in d.file.split('/')[:-1]
                     if d.file != standard_library.TOPICS_FILE)
  with pytest.raises(ConfigError, match='kinds'):
    standard_library.documents('music', 'train')


def _parsed_docstrings(source):
  """Triple-quoted docstrings without escapes, by Python's own parser."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
      literal = ast.get_source_segment(source, node.body[0].value)
      if literal.lstrip('rRuU')[:3] in ('"""', "'''") and '\\' not in literal and ast.get_docstring(node).strip():
        found.append(ast.get_docstring(node))
  return found


def test_docstrings_are_those_that_python_finds():
  count = 0
  for document in standard_library.documents('code', 'validation')[:25]:
    expected = _parsed_docstrings(document.text)
    found = [text for text in standard_library.docstrings(document.text) if '\\' not in text]
    assert sorted(found) == sorted(expected), document.file
    count += len(expected)
  assert count > 50


def test_quotes_in_comments_and_strings_are_no_docstrings():
  source = '''#!/usr/bin/env python
# It's a comment with """ quotes
"""The module."""
x = """not this:
"""
def f():  # isn't """ either
  r\'\'\'The function.

  Text
    indented more.
  \'\'\'
  y = {'a':
       1}
  """not a docstring"""
class A(dict):
  "one line, not counted"
'''
  assert standard_library.docstrings(source) == ['The module.', 'The function.\n\nText\n  indented more.']


def test_corpus_is_large_enough_to_learn_from():
  vocabulary.configure()
  encode = vocabulary.get().encode
  tokens = {kind: sum(len(encode(d.text)) for d in standard_library.documents(kind, 'train'))
            for kind in standard_library.KINDS}
  assert tokens['code'] > 1_500_000 and tokens['prose'] > 300_000, tokens


# Registration.


def test_all_names_are_registered_under_one_module_name():
  assert set(NAMES) <= set(seqio.TaskRegistry.names())
  mixtures = {'demo_full_lm', 'demo_prefix_lm', 'demo_ul2'}
  assert mixtures <= set(seqio.MixtureRegistry.names())
  for name in mixtures:
    mixture = seqio.MixtureRegistry.get(name)
    assert {task.name for task in mixture.tasks} == {n for n in NAMES if n.endswith(name[len('demo_'):])}
    assert len({mixture.get_rate(task) for task in mixture.tasks}) == 1, 'half code, half prose'
  assert 'tasks' not in sys.modules


def test_registering_again_changes_nothing():
  before = {name: seqio.TaskRegistry.get(name) for name in NAMES}
  demo.register()
  importlib.reload(demo)
  assert all(seqio.TaskRegistry.get(name) is task for name, task in before.items())


def test_fingerprint_changes_with_the_text(monkeypatch):
  """A saved data position belongs to it."""
  sources = {name: seqio.TaskRegistry.get(f'demo_{name}_full_lm').source for name in standard_library.KINDS}
  words = {(kind, split): source.fingerprint(split) for kind, source in sources.items()
           for split in standard_library.SPLITS}
  assert len(set(words.values())) == 4
  assert demo.StandardLibrarySource('code').fingerprint('train') == words['code', 'train']
  documents = standard_library.documents

  def changed(how):
    monkeypatch.setattr(standard_library, 'documents', lambda kind, split: how(list(documents(kind, split))))
    return sources['code'].fingerprint('train')

  assert changed(lambda d: d) == words['code', 'train']
  assert len({words['code', 'train'], changed(lambda d: d[:-1]), changed(lambda d: d[::-1]),
              changed(lambda d: [d[0]._replace(text=d[0].text + ' ')] + d[1:])}) == 4


def test_all_tasks_hold_the_one_shared_vocabulary():
  for name in NAMES:
    for feature in seqio.TaskRegistry.get(name).output_features.values():
      assert feature.vocabulary is vocabulary.shared() and feature.add_eos


# Batches.


@pytest.mark.parametrize('name', ['demo_full_lm', 'demo_prefix_lm'])
def test_every_source_has_validation_batches(name):
  data = settings(name)
  for source in data_lib.eval_sources(data):
    batches = list(data_lib.eval_batches(data, source))
    assert len(batches) == 2
    for batch in batches:
      assert batch['decoder_target_tokens'].shape == (4, data.row_length)
      assert batch['decoder_loss_weights'].sum() > 0
      assert batch['decoder_target_tokens'].max() < vocabulary.get().vocab_size


def test_full_lm_rows_are_full_and_end_with_eos():
  streams = data_lib.TrainStreams(settings('demo_full_lm'))
  tokens = np.concatenate([next(streams)['decoder_target_tokens'][0] for _ in range(20)])
  assert (tokens > 0).mean() > .9
  assert all(row[row > 0][-1] == EOS for row in tokens)


def test_half_of_the_full_lm_examples_are_code():
  corpus = {kind: '\0'.join(d.text for d in standard_library.documents(kind, 'train'))
            for kind in standard_library.KINDS}
  streams = data_lib.TrainStreams(settings('demo_full_lm'))
  counts = {'code': 0, 'prose': 0}
  for _ in range(100):
    for row in next(streams)['decoder_target_tokens'][0]:
      text = vocabulary.decode(row[:-1])
      kinds = [kind for kind in counts if text in corpus[kind]]  # Rows over the end of a document are in none,
      if len(kinds) == 1:  # and rows from an unindented docstring in both.
        counts[kinds[0]] += 1
  total = sum(counts.values())
  assert total > 250
  assert abs(counts['code'] / total - .5) < .12, counts  # Four standard deviations.


def test_vocabulary_setting_changes_tasks():
  from tests.vocabulary_test import TEST_MODEL
  sizes = {}
  try:
    for path in ('', TEST_MODEL):
      batch = next(data_lib.TrainStreams(settings('demo_prefix_lm', vocabulary=path)))
      sizes[path] = batch['decoder_target_tokens'].max()
      assert sizes[path] < vocabulary.get().vocab_size
  finally:
    vocabulary.configure()
  assert sizes[TEST_MODEL] < 26 < 1000 < sizes['']


@pytest.fixture(scope='module')
def ul2_rows():
  """Rows of one stream of UL2 over prose, and those of the same stream made again and restored in the middle."""
  data = settings('demo_prose_ul2')
  streams = data_lib.TrainStreams(data)
  first = [next(streams)['decoder_target_tokens'] for _ in range(30)]
  state = streams.state()
  after = [next(streams)['decoder_target_tokens'] for _ in range(10)]
  again = data_lib.TrainStreams(data)
  repeated = [next(again)['decoder_target_tokens'] for _ in range(30)]
  again.restore(state)
  restored = [next(again)['decoder_target_tokens'] for _ in range(10)]
  return first, repeated, after, restored


def test_ul2_is_the_same_every_time_although_six_denoisers_share_the_documents(ul2_rows):
  first, repeated, after, restored = ul2_rows
  np.testing.assert_array_equal(first, repeated)
  np.testing.assert_array_equal(after, restored)


def test_ul2_stream_has_all_prompts_from_the_start(ul2_rows):
  text = vocabulary.decode(np.concatenate(ul2_rows[0]).reshape(-1))
  counts = {prompt: text.count(f'[{prompt}] ') for prompt in ('NLU', 'NLG', 'S2S')}
  total = sum(counts.values())
  assert total > 100
  # Rates .2, .3, .5 within four standard deviations.
  for prompt, rate in (('NLU', .2), ('NLG', .3), ('S2S', .5)):
    assert abs(counts[prompt] / total - rate) < 4 * (rate * (1 - rate) / total)**.5, counts


def test_every_denoiser_has_validation_data():
  assert all(len(standard_library.documents(kind, 'validation')) >= 6 * demo.DOCUMENTS
             for kind in standard_library.KINDS)


@pytest.mark.slow
def test_ul2_mixture_streams_and_evaluates():
  data = settings('demo_ul2', batch_size=8, num_streams=4)
  batch = next(data_lib.TrainStreams(data))
  assert batch['decoder_causal_attention'].shape == (1, 8, 128)
  for source in data_lib.eval_sources(data):
    assert len(list(data_lib.eval_batches(data, source))) == 2
