"""Raw files to data sets to batches, for every data set that can be prepared, and your own text."""

import json
import os

from etils.epath import backend as epath_backend
from etils.epath import gpath as epath_gpath
import pytest

from openmoe_jax import data as data_lib
from openmoe_jax import vocabulary
from openmoe_jax.config import DataConfig
from openmoe_jax.tensorflow_setup import import_tensorflow
from openmoe_jax.tools import prepare_data
from tests import raw_data
from tests.prepared import forget_folder  # pylint: disable=unused-import

SUBSETS = ('common_crawl', 'c4', 'github', 'arxiv', 'book', 'wikipedia', 'stackexchange')
TEXTS = [f'Document {i} with ünïcödé 漢字 \U0001F600 and "quotes".\n' + 'word ' * (i % 40) for i in range(60)]
EMPTY = ['', ' \n\t']


def run(*arguments):
  prepare_data.main([str(argument) for argument in arguments])


def batch(folder, task, lengths, **changes):
  values = dict(mixture_or_task=task, task_feature_lengths=lengths, batch_size=4, num_streams=2, eval_split='',
                tfds_data_dir=str(folder))
  return next(data_lib.TrainStreams(DataConfig(**{**values, **changes})))


def text_of(rows):
  return vocabulary.decode(rows['decoder_target_tokens'].reshape(-1))


# Each data set.


def write_redpajama(folder, subset, texts):
  """Two files as RedPajama-1T has them, one of them compressed, and what their records should become."""
  texts = texts[:30] + EMPTY + texts[30:]
  if subset == 'common_crawl':
    records = [{'text': text, 'pred_label': '__label__cc', 'wiki_prob': .25, 'source': f'cc/é{i}'}
               for i, text in enumerate(texts)]
    metas = [{key: value for key, value in record.items() if key != 'text'} for record in records]
  else:
    records = [{'text': text, 'meta': {'url': f'http://é/{i}', 'number': i, 'nothing': None}}
               for i, text in enumerate(texts)]
    metas = [record['meta'] for record in records]
  raw_data.write(folder / 'part_0.jsonl', raw_data.json_lines(records[:25]))
  raw_data.write(folder / 'en' / 'part_1.jsonl.zst', raw_data.json_lines(records[25:]))
  order = list(range(25, len(texts))) + list(range(25))  # 'en/part_1' comes before 'part_0'
  return [(texts[i], metas[i]) for i in order if texts[i].strip()]


@pytest.mark.parametrize('subset', [pytest.param(subset, marks=pytest.mark.slow if place else [])
                                    for place, subset in enumerate(SUBSETS)])
def test_redpajama_to_batches(tmp_path, subset):
  texts = TEXTS * 40 if subset == 'c4' else TEXTS  # 2,000 documents of C4 are for validation
  expected = write_redpajama(tmp_path / 'raw', subset, texts)
  name = f'redpajama_{subset}'
  run(f'{name}:1.0.0', f'--input={tmp_path / "raw"}', f'--output={tmp_path}', '--processes=1', '--shard_mb=.002')
  found = raw_data.examples(tmp_path, name)
  assert [(example['text'], json.loads(example['meta'])) for example in found] == expected
  assert len(list((tmp_path / name / '1.0.0').glob('*.tfrecord-*'))) > 2
  assert 'Document' in text_of(batch(tmp_path, f'{name}_full_lm', {'targets': 64}))


def test_the_stack_to_batches(tmp_path):
  rows = [{'content': text, 'size': len(text), 'lang': 'Python', 'stars': None if i % 2 else i, 'paths': ['a', 'é'],
           'ratio': .5} for i, text in enumerate(TEXTS + EMPTY)]
  raw_data.write_parquet(tmp_path / 'raw' / 'data' / 'python' / 'train-00000-of-00002.parquet', rows[:40], 7)
  raw_data.write_parquet(tmp_path / 'raw' / 'data' / 'python' / 'train-00001-of-00002.parquet', rows[40:], 100)
  run('the_stack_dedup', f'--input={tmp_path / "raw"}', f'--output={tmp_path}', '--processes=1', '--shard_mb=.002')
  found = raw_data.examples(tmp_path, 'the_stack_dedup')
  assert [example['text'] for example in found] == TEXTS
  for example, row in zip(found, rows):
    assert {'content': example['text'], **json.loads(example['meta'])} == row
  assert 'Document' in text_of(batch(tmp_path, 'the_stack_dedup_prefix_lm', {'inputs': 32, 'targets': 32}))


def conversation(*turns):
  return [{'role': ('user', 'assistant')[i % 2], 'content': text, 'toxic': False} for i, text in enumerate(turns)]


@pytest.mark.slow
def test_wildchat(tmp_path):
  rows = [
      {'model': 'gpt-4-0314', 'conversation': conversation('one?', 'first 1', 'two ü?', 'second 2'), 'turn': 2},
      {'model': 'gpt-3.5-turbo', 'conversation': conversation('not', 'wanted'), 'turn': 1},
      {'model': 'gpt-4', 'conversation': conversation('only?', 'answer', 'without an answer'), 'turn': 1},
      {'model': 'gpt-4', 'conversation': conversation('empty answer', ''), 'turn': 1},
      {'model': 'gpt-4', 'conversation': conversation('a', 'b')[::-1], 'turn': 1}]
  raw_data.write_parquet(tmp_path / 'raw' / 'train-00000-of-00001.parquet', rows * 80)
  for name in ('wildchat_gpt4_chat', 'wildchat_gpt4_sft'):
    run(name, f'--input={tmp_path / "raw"}', f'--output={tmp_path}', '--processes=1')
  assert raw_data.examples(tmp_path, 'wildchat_gpt4_chat') == [
      {'user': ['one?', 'two ü?'], 'assistant': ['first 1', 'second 2']},
      {'user': ['only?'], 'assistant': ['answer']}] * 80
  head = '<<SYS>>\nYou are a helpful, respectful and honest assistant.\n<</SYS>>\n\n'
  assert raw_data.examples(tmp_path, 'wildchat_gpt4_sft') == [
      {'input': f'{head}<s>[INST] one? [/INST] first 1 </s><s>[INST] two ü? [/INST]', 'output': ' second 2 </s>'},
      {'input': f'{head}<s>[INST] only? [/INST]', 'output': ' answer </s>'}] * 80
  summary = json.loads((tmp_path / 'wildchat_gpt4_sft' / '1.0.0' / 'preparation.json').read_text())['summary']
  assert summary['left_out'] == {'not GPT-4': 80, 'user and assistant do not take turns': 80, 'without an answer': 80}
  assert 'second 2 </s>' in text_of(batch(tmp_path, 'wildchat_gpt4_sft', {'inputs': 128, 'targets': 32}))
  assert 'second 2 </s>' in text_of(batch(tmp_path, 'wildchat_gpt4_chat', {'targets': 256}, num_streams=1))


def test_orca(tmp_path):
  rows = [{'id': f'flan.{i}', 'system_prompt': '' if i % 2 else 'Be brief. ', 'question': f'What is {i}?',
           'response': f'It is {i}.'} for i in range(30)]
  raw_data.write_parquet(tmp_path / 'raw' / '1M-GPT4-Augmented.parquet', rows)
  raw_data.write(tmp_path / 'raw' / 'more.jsonl', raw_data.json_lines(rows[:5]))
  run('orca', f'--input={tmp_path / "raw"}', f'--output={tmp_path}', '--processes=1')
  expected = [{key: value for key, value in row.items() if key != 'id'} for row in rows]
  assert raw_data.examples(tmp_path, 'orca') == expected + expected[:5]
  rows = batch(tmp_path, 'orca_sft', {'inputs': 64, 'targets': 32}, shuffle=False, pack=False, num_streams=1)
  assert vocabulary.decode(rows['decoder_target_tokens'][0, 0]) == 'Be brief. USER: What is 0?ASSISTANT: It is 0.</s>'


def test_mmlu_has_five_worked_questions_of_the_subject(tmp_path):
  line = lambda kind, i: f'"{kind}, {i}?",one,"two, ""2""",three,four,{"ABCD"[i % 4]}\n'
  for subject in ('abstract_algebra', 'astronomy'):
    for kind, count in (('dev', 6), ('test', 3), ('val', 2)):
      content = ''.join(line(f'{subject} {kind}', i) for i in range(count)).encode()
      raw_data.write(tmp_path / 'data' / kind / f'{subject}_{kind}.csv', content)
  run('mmlu', f'--input={tmp_path / "data"}', f'--output={tmp_path}', '--processes=1')
  found = raw_data.examples(tmp_path, 'mmlu')
  assert len(found) == 6 and [example['answer'] for example in found] == list('ABC') * 2
  options = '\nA. one\nB. two, "2"\nC. three\nD. four\nAnswer:'
  worked = ''.join(f'abstract_algebra dev, {i}?{options} {"ABCD"[i % 4]}\n\n' for i in range(5))
  head = 'The following are multiple choice questions (with answers) about abstract algebra.\n\n'
  assert found[1]['prompt'] == f'{head}{worked}abstract_algebra test, 1?{options}'
  # The same questions, as Hugging Face has them.
  for kind, count in (('dev', 6), ('test', 3), ('validation', 2)):
    rows = [{'question': f'{subject} {kind}, {i}?', 'subject': subject, 'choices': ['one', 'two, "2"', 'three', 'four'],
             'answer': i % 4} for subject in ('abstract_algebra', 'astronomy') for i in range(count)]
    raw_data.write_parquet(tmp_path / 'parquet' / f'{kind}-00000-of-00001.parquet', rows)
  run('mmlu', f'--input={tmp_path / "parquet"}', f'--output={tmp_path / "other"}', '--processes=1')
  assert raw_data.examples(tmp_path / 'other', 'mmlu') == found


def test_human_eval(tmp_path):
  problems = [{'task_id': f'HumanEval/{i}', 'prompt': f'def f{i}():\n', 'entry_point': f'f{i}',
               'canonical_solution': '  return 1\n', 'test': 'def check(f):\n  assert f() == 1\n'} for i in range(4)]
  file = raw_data.write(tmp_path / 'HumanEval.jsonl.gz', raw_data.json_lines(problems))
  run('human_eval', f'--input={file}', f'--output={tmp_path}')
  assert raw_data.examples(tmp_path, 'human_eval') == problems


# One's own text.


@pytest.fixture(name='own')
def _own(tmp_path):
  folder = tmp_path / 'own'
  for i, text in enumerate(TEXTS):
    raw_data.write(folder / 'notes' / f'{i}.txt', text.encode())
  raw_data.write(folder / 'src' / 'code.py', b'def f():\n  return 1\n' * 40)
  raw_data.write(folder / '.git' / 'config', b'hidden')
  raw_data.write(folder / 'picture.png', b'\x89PNG\0\0')
  raw_data.write(folder / 'blank.txt', b'\n')
  records = [{'text': f'line {i}', 'key': {'id': i // 2}} for i in range(80)]
  raw_data.write(folder / 'more.jsonl.gz', raw_data.json_lines(records))
  raw_data.write_parquet(folder / 'rows.parquet', [{'content': f'row {i}', 'key': {'id': i // 2}} for i in range(80)])
  return folder


def test_own_text_becomes_a_data_set_with_validation(tmp_path, own, capsys):
  arguments = ('text', '--name=my_texts', f'--input={own}', f'--output={tmp_path}', '--validation=.2', '--processes=1',
               '--document_kb=.5')
  run(*arguments, '--shard_mb=.002')
  assert 'left out: 1 records: empty' in capsys.readouterr().out
  splits = {split: raw_data.examples(tmp_path, 'my_texts', split) for split in ('train', 'validation')}
  everything = splits['train'] + splits['validation']
  is_code = lambda example: 'src/code.py' in example['meta']
  whole = [example['text'] for example in everything if not is_code(example)]
  assert sorted(whole) == sorted(TEXTS + [f'{kind} {i}' for kind in ('line', 'row') for i in range(80)])
  assert 30 < len(splits['validation']) < 70, 'a fifth of 220'
  parts = list(filter(is_code, everything))
  assert len(parts) == 2 and sum(len(part['text']) for part in parts) == 800
  assert {json.loads(part['meta'])['path'] for part in parts} == {'src/code.py:0', 'src/code.py:1'}
  # A document's split does not depend on what else there is.
  raw_data.write(own / 'a_new_one.txt', b'new')
  run(*arguments[:3], f'--output={tmp_path / "again"}', *arguments[4:])
  again = [example['text'] for example in raw_data.examples(tmp_path / 'again', 'my_texts', 'validation')]
  assert sorted(set(again) - {'new'}) == sorted(example['text'] for example in splits['validation'])
  rows = batch(tmp_path, 'my_texts_ul2', {'inputs': 32, 'targets': 32}, eval_split='validation', num_streams=1)
  assert rows['decoder_target_tokens'].any()


def test_records_are_split_by_a_field(tmp_path, own):
  for file in own.rglob('*.txt'):
    file.unlink()
  (own / 'picture.png').unlink()
  run('text', '--name=pairs', f'--input={own}', f'--output={tmp_path}', '--id_field=key.id', '--validation=.3')
  of = {}
  for split in ('train', 'validation'):
    for example in raw_data.examples(tmp_path, 'pairs', split):
      meta = json.loads(example['meta'])
      if 'key' in meta:
        of.setdefault(meta['key']['id'], set()).add(split)
  assert len(of) == 40 and all(len(splits) == 1 for splits in of.values())
  run('text', '--name=pairs', f'--input={own}', f'--output={tmp_path / "whole"}', '--validation=0')
  assert not (tmp_path / 'whole' / 'pairs' / '1.0.0').joinpath('pairs-validation.tfrecord-00000-of-00001').exists()
  assert len(raw_data.examples(tmp_path / 'whole', 'pairs')) == 161


# Buckets.


@pytest.fixture(name='bucket')
def _bucket(tmp_path, monkeypatch):
  """gs://bucket is a folder, behind the functions by which TensorFlow reaches it; nothing else knows of it."""
  gfile = import_tensorflow().io.gfile
  local = lambda value: str(value).replace('gs://bucket', str(tmp_path / 'bucket'), 1)
  remote = lambda value: value.replace(str(tmp_path / 'bucket'), 'gs://bucket', 1) if isinstance(value, str) else value

  class Functions:
    def __getattr__(self, name):
      function = getattr(gfile, name)

      def call(*arguments, **keywords):
        result = function(*(local(a) if isinstance(a, (str, os.PathLike)) else a for a in arguments), **keywords)
        if name == 'walk':
          return ((remote(folder), folders, files) for folder, folders, files in result)
        return [remote(value) for value in result] if isinstance(result, list) else remote(result)

      return call

  monkeypatch.setattr(type(epath_backend.tf_backend), 'gfile', Functions())
  monkeypatch.setattr(epath_gpath, '_is_zonal_gcs_bucket', lambda bucket: False)
  (tmp_path / 'bucket').mkdir()
  return tmp_path / 'bucket'


@pytest.mark.parametrize('source', ['gs://bucket/raw', 'gs://bucket/raw/*', 'gs://bucket/raw/[a-z]*.jsonl'])
def test_buckets(tmp_path, bucket, source):
  raw_data.write(bucket / 'raw' / 'b.jsonl', raw_data.json_lines({'text': text, 'meta': {}} for text in TEXTS[:40]))
  raw_data.write(bucket / 'raw' / 'a.jsonl', raw_data.json_lines({'text': text, 'meta': {}} for text in TEXTS[40:]))
  raw_data.write(bucket / 'raw' / '.hidden.jsonl', b'not JSON')
  arguments = ('redpajama_book', '--processes=1', '--shard_mb=.001')
  run(*arguments, f'--input={source}', '--output=gs://bucket/tfds')
  run(*arguments, f'--input={bucket / "raw"}', f'--output={tmp_path / "local"}')
  made, expected = raw_data.files(bucket / 'tfds'), raw_data.files(tmp_path / 'local')
  plan_file = 'redpajama_book/1.0.0/preparation.json'
  assert 'gs://bucket/raw/a.jsonl' in made.pop(plan_file).decode() and expected.pop(plan_file)
  assert made == expected and len(made) > 5
  run(*arguments, f'--input={source}', '--output=gs://bucket/tfds')


# Large documents.


@pytest.mark.parametrize('suffix', ['jsonl', 'jsonl.zst', 'parquet'])
def test_a_document_of_50_mb(tmp_path, suffix):
  big = ('A long line of a long document, ü.\n' * 1_430_000)[:50_000_000]
  if suffix == 'parquet':
    name = 'the_stack_dedup'
    raw_data.write_parquet(tmp_path / 'raw' / 'a.parquet', [{'content': text} for text in ('before', big, 'after')])
  else:
    name = 'redpajama_book'
    raw_data.write(tmp_path / 'raw' / f'a.{suffix}', raw_data.json_lines({'text': text, 'meta': {}} for text in (
        'before', big, 'after')))
  run(name, f'--input={tmp_path / "raw"}', f'--output={tmp_path}', '--processes=1')
  found = [example['text'] for example in raw_data.examples(tmp_path, name)]
  assert [len(text) for text in found] == [6, 50_000_000, 5] and found == ['before', big, 'after']


@pytest.mark.exhaustive  # Nearly all of it is sentencepiece, which takes a document as a whole.
def test_a_document_of_50_mb_to_batches(tmp_path):
  big = ('A long line of a long document, ü.\n' * 1_430_000)[:50_000_000]
  texts = TEXTS + [big] + TEXTS * 2
  raw_data.write(tmp_path / 'raw' / 'a.jsonl.zst', raw_data.json_lines({'text': text} for text in texts))
  run('redpajama_common_crawl', f'--input={tmp_path / "raw"}', f'--output={tmp_path}', '--processes=1')
  rows = batch(tmp_path, 'redpajama_common_crawl_full_lm', {'targets': 2048}, num_streams=1, shuffle=False,
               batch_size=16)
  text = text_of(rows)
  assert 'Document 0 with' in text and 'long line of a long document' in text
