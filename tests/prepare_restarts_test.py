"""Preparing data: restarts, processes, Beam, and mistakes."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from openmoe_jax.config import ConfigError
from openmoe_jax.preparation import pieces, plan, prepare, reading
from openmoe_jax.tools import prepare_data
from tests import raw_data

pytestmark = pytest.mark.slow  # many programs are compiled, or processes started

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def run(*arguments):
  prepare_data.main([str(argument) for argument in arguments])


def corpus(folder, documents=600):
  """Files of which some are cut and some are put together, and one that gives several shards."""
  records = [{'text': f'{i} ' + 'some words ' * (i % 50), 'meta': {'i': i}} for i in range(documents)]
  half = documents // 2
  raw_data.write(folder / 'large.jsonl', raw_data.json_lines(records[:half]))
  for i in range(5):
    raw_data.write(folder / f'small_{i}.jsonl', raw_data.json_lines(records[half + i * 3:half + i * 3 + 3]))
  raw_data.write(folder / 'zipped.jsonl.zst', raw_data.json_lines(records[half + 15:]))
  return folder


def make(raw, output, **changes):
  values = dict(data_set={'name': 'redpajama_github'}, inputs=[str(raw)], output=str(output),
                limits=reading.Limits(1 << 20, 1 << 18), shard_bytes=10_000)
  return plan.make(**{**values, **changes})


def quiet(_):
  pass


def test_the_number_of_processes_does_not_show(tmp_path):
  raw = corpus(tmp_path / 'raw')
  prepare.prepare(make(raw, tmp_path / 'one'), 1, say=quiet)
  prepare.prepare(make(raw, tmp_path / 'two'), 2, say=quiet)
  one, two = raw_data.files(tmp_path / 'one'), raw_data.files(tmp_path / 'two')
  assert one == two and len(one) > 10
  assert {name.split('/')[0] for name in one} == {'redpajama_github'}, 'nothing unfinished is left'
  content = b''.join(one[name] for name in sorted(one) if 'tfrecord' in name)
  assert [int(i) for i in re.findall(rb'{"i":(\d+)}', content)] == list(range(600)), 'in the order of the files'


class Interrupted(Exception):
  pass


@pytest.fixture(scope='module', name='whole')
def _whole(tmp_path_factory):
  """(raw files, the files of a data set made without an interruption)."""
  folder = tmp_path_factory.mktemp('whole')
  raw = corpus(folder / 'raw')
  prepare.prepare(make(raw, folder / 'tfds'), say=quiet)
  return raw, raw_data.files(folder / 'tfds')


@settings(max_examples=8)
@given(stops=st.lists(st.integers(1, 250), min_size=1, max_size=6))
def test_interruptions_do_not_show(tmp_path_factory, whole, stops):
  """After any number of examples, several times."""
  raw, expected = whole
  output = tmp_path_factory.mktemp('interrupted')
  for stop in stops:
    left = [stop]
    write = pieces._Shard.write

    def count(self, split, example):
      left[0] -= 1
      if left[0] < 0:
        raise Interrupted
      write(self, split, example)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(pieces._Shard, 'write', count)
      try:
        prepare.prepare(make(raw, output), say=quiet)
      except Interrupted:
        pass
  prepare.prepare(make(raw, output), say=quiet)
  assert raw_data.files(output) == expected


@pytest.mark.parametrize('at', ['move', 'describe', 'rmtree'])
def test_an_end_while_it_is_finished_does_not_show(tmp_path, whole, monkeypatch, at):
  raw, expected = whole
  module = prepare.finishing if at != 'rmtree' else type(make(raw, tmp_path).work)
  name = {'move': '_move', 'describe': 'describe', 'rmtree': 'rmtree'}[at]
  original, calls = getattr(module, name), []

  def interrupted(*arguments, **keywords):
    calls.append(arguments)
    if len(calls) > (at == 'move') * 3:
      raise Interrupted
    return original(*arguments, **keywords)

  with monkeypatch.context() as patch:
    patch.setattr(module, name, interrupted)
    with pytest.raises(Interrupted):
      prepare.prepare(make(raw, tmp_path), say=quiet)
  prepare.prepare(make(raw, tmp_path), say=quiet)
  assert raw_data.files(tmp_path) == expected


def test_killed_and_resumed(tmp_path):
  raw = corpus(tmp_path / 'raw', 60_000)
  arguments = ('redpajama_github', f'--input={raw}', '--shard_mb=.1', '--processes=2')
  work = tmp_path / 'killed' / 'redpajama_github' / '1.0.0.unfinished'
  for count in (1, 40):
    command = [sys.executable, '-m', 'openmoe_jax.tools.prepare_data', *arguments, f'--output={tmp_path / "killed"}']
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
      while process.poll() is None and len(list(work.glob('*.train.tfrecord'))) < count:
        time.sleep(.01)
      assert process.poll() is None, 'it ended before it could be killed'
      os.kill(process.pid, signal.SIGKILL)
    assert not work.with_name('1.0.0').exists()
  finished = {file.name: (work / file.name).stat().st_ino for file in work.glob('*.train.tfrecord')
              if (work / file.name.replace('.train.tfrecord', '.json')).exists()}
  run(*arguments, f'--output={tmp_path / "killed"}')
  run(*arguments, f'--output={tmp_path / "whole"}')
  assert raw_data.files(tmp_path / 'killed') == raw_data.files(tmp_path / 'whole')
  # The very same files, moved.
  now = {file.stat().st_ino for file in (tmp_path / 'killed' / 'redpajama_github' / '1.0.0').iterdir()}
  assert len(finished) >= 39 and set(finished.values()) <= now


def test_processes_end_with_the_first_one(tmp_path):
  """They would wait for work for ever."""
  raw = corpus(tmp_path / 'raw', 60_000)
  command = [sys.executable, '-m', 'openmoe_jax.tools.prepare_data', 'redpajama_github', f'--input={raw}',
             f'--output={tmp_path}', '--shard_mb=.1', '--processes=2']
  with subprocess.Popen(command, cwd=REPOSITORY) as process:
    children = []
    while process.poll() is None and len(children) < 3:  # two, and one that watches over semaphores
      children = pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
      time.sleep(.01)
    process.kill()
  end = time.monotonic() + 30
  while any(pathlib.Path(f'/proc/{child}').exists() for child in children):
    assert time.monotonic() < end
    time.sleep(.05)


# Beam.


def test_beam_writes_the_same_files(tmp_path, whole):
  pytest.importorskip('apache_beam', reason='NOT TESTED: Apache Beam is not installed (pip install openmoe_jax[beam])')
  raw, expected = whole
  options = ['--runner=DirectRunner', '--direct_num_workers=1']
  prepare.prepare(make(raw, tmp_path), beam_options=options, say=quiet)
  assert raw_data.files(tmp_path) == expected
  raw_data.write(raw.parent / 'bad' / 'a.jsonl', b'{"text": "good", "meta": {}}\n{"text": 1}\n')
  with pytest.raises(ConfigError, match=r"a.jsonl:2: malformed record: field 'text' is not a string; .*_malformed=0"):
    prepare.prepare(make(raw.parent / 'bad', tmp_path / 'bad'), beam_options=options, say=quiet)


def test_without_beam_it_says_what_to_install(tmp_path, whole, monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  with pytest.raises(ConfigError, match=r"--beam needs Apache Beam .*pip install 'openmoe_jax.beam.'"):
    prepare.prepare(make(whole[0], tmp_path), beam_options=[], say=quiet)


# Mistakes.


BAD_LINES = [b'{"text": "one", "meta": {}}', b'{"text": "cut', b'{"meta": {}}', b'{"text": null}', b'[]',
             b'{"text": "two", "meta": {}}', b'{"text": "\\ud800"}']


@pytest.mark.parametrize('suffix', ['jsonl', 'jsonl.zst'])
def test_malformed_lines_are_counted_and_skipped_up_to_a_limit(tmp_path, suffix, capsys):
  file = raw_data.write(tmp_path / f'a.{suffix}', b'\n'.join(BAD_LINES))
  arguments = ('redpajama_book', f'--input={file}', f'--output={tmp_path}', '--processes=1')
  for limit, line, reason in ((0, 2, 'not JSON: Unterminated string'), (1, 3, "no field 'text'; it has 'meta'"),
                              (2, 4, "field 'text' is null"), (3, 5, 'a JSON list'),
                              (4, 7, "field 'text' has half a surrogate")):
    with pytest.raises(SystemExit) as status:
      run(*arguments, f'--max_malformed={limit}')
    error = capsys.readouterr().err
    assert status.value.code == 2 and error.count('\n') == 1
    assert f'{file}:{line}: malformed record: {reason}' in error and f'more than --max_malformed={limit} ' in error
  run(*arguments, '--max_malformed=5')
  output = capsys.readouterr().out
  assert 'train: 2 documents' in output and 'skipped: 5 malformed records, listed in ' in output
  listed = (tmp_path / 'redpajama_book' / '1.0.0' / 'malformed_records.txt').read_text().splitlines()
  assert [line.split(': ')[0] for line in listed] == [f'{file}:{number}' for number in (2, 3, 4, 5, 7)]


@pytest.mark.parametrize('processes', [1, 2])
def test_the_limit_counts_all_files_together(tmp_path, processes):
  for i in range(4):
    raw_data.write(tmp_path / 'raw' / f'{i}.jsonl', b'\n'.join([BAD_LINES[0]] * 9 + [BAD_LINES[1]]))
  cut = make(tmp_path / 'raw', tmp_path, shard_bytes=300)
  assert len(cut.pieces) == 4
  with pytest.raises(ConfigError, match=r'\d.jsonl:10: malformed record: not JSON: .* more than --max_malformed=3 '):
    prepare.prepare(cut, processes, 3, say=quiet)
  assert prepare.prepare(cut, processes, 4, say=quiet).examples == {'train': 36}


def mistake(tmp_path, capsys, *arguments):
  """The one line of a command that fails."""
  with pytest.raises(SystemExit) as status:
    run(*arguments, f'--output={tmp_path / "tfds"}')
  error = capsys.readouterr().err
  assert status.value.code == 2 and error.count('\n') == 1, error
  return error


@pytest.mark.parametrize('arguments, message', [
    (('redpajama_c4', '--input=/no/such/folder'), '--input=/no/such/folder: no such file or folder'),
    (('redpajama_c4', '--input=/no/such/*.jsonl'), '--input=/no/such/*.jsonl: no file has such a name'),
    (('redpajama_c4:1.0.1', '--input=RAW'), 'redpajama_c4:1.0.1: the tasks read version 1.0.0'),
    (('redpajama_c5', '--input=RAW'), 'did you mean redpajama_c4'),
    (('the_stack_dedup', '--input=RAW/text'), 'no files that end in '),
    (('the_stack_dedup', '--input=RAW/text/a.txt'), 'a.txt: not a .jsonl or '),
    (('redpajama_c4', '--input=RAW/empty'), 'redpajama_c4 has no examples: all records are left out (2 empty)'),
    (('redpajama_c4', '--input=RAW/nothing'), 'redpajama_c4 has no examples: 1 files, and no records in them'),
    (('mmlu', '--input=RAW/empty'), 'none of the 1 files is one that mmlu is made of'),
    (('text', '--name=mine', '--input=RAW/text'), "mine has no examples in its split 'validation', and 1 in the other"),
    (('text', '--input=RAW/text'), '--name=NAME is needed'),
    (('text', '--name=redpajama_c4', '--input=RAW/text'), "--name='redpajama_c4' must be lower-case"),
    (('text', '--name=My', '--input=RAW/text'), "--name='My' must be lower-case"),
    (('text', '--name=my', '--version=1', '--input=RAW/text'), "--version='1' must be like 1.0.0"),
    (('text', '--name=my', '--validation=1', '--input=RAW/text'), '--validation=1.0 must be at least 0 and less'),
    (('redpajama_c4', '--validation=.1', '--input=RAW'), '--validation is for text, not for redpajama_c4'),
    (('redpajama_c4', '--processes=0', '--input=RAW'), '--processes=0 must be positive'),
    (('redpajama_c4', '--input=RAW/cut'), 'cut.jsonl.zst cannot be read as JSON lines (zstd): it is truncated'),
    (('redpajama_c4', '--input=RAW/text', '--input=RAW/text/a.jsonl'), 'a.jsonl is there twice'),
])
def test_mistakes_are_one_clear_line(tmp_path, capsys, arguments, message):
  raw = tmp_path / 'raw'
  raw_data.write(raw / 'text' / 'a.txt', b'text')
  raw_data.write(raw / 'text' / 'a.jsonl', b'')
  raw_data.write(raw / 'empty' / 'a.jsonl', raw_data.json_lines([{'text': '', 'meta': {}}, {'text': ' ', 'meta': {}}]))
  raw_data.write(raw / 'nothing' / 'a.jsonl', b'\n')
  whole = raw_data.write(raw / 'cut' / 'cut.jsonl.zst', raw_data.json_lines({'text': str(i)} for i in range(10_000)))
  whole.write_bytes(whole.read_bytes()[:-9])
  if 'the_stack_dedup' in arguments:
    (raw / 'text' / 'a.jsonl').unlink()
  arguments = [argument.replace('RAW', str(raw)) for argument in arguments]
  assert message in mistake(tmp_path, capsys, *arguments)


def test_other_input_or_settings_are_refused(tmp_path, capsys, monkeypatch):
  raw = corpus(tmp_path / 'raw', 60)
  arguments = ('redpajama_github', f'--input={raw}', '--processes=1')
  with monkeypatch.context() as patch:
    patch.setattr(prepare.finishing, 'move', lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    assert 'no space is left for ' in mistake(tmp_path, capsys, *arguments)
  assert 'was begun with another shard bytes (' in mistake(tmp_path, capsys, *arguments, '--shard_mb=2')
  run(*arguments, f'--output={tmp_path / "tfds"}')
  run(*arguments, f'--output={tmp_path / "tfds"}')
  assert 'is there already' in capsys.readouterr().out
  raw_data.write(raw / 'large.jsonl', b'')
  error = mistake(tmp_path, capsys, *arguments)
  assert f'was prepared with other input files (1 differ, first {raw / "large.jsonl"})' in error
  (tmp_path / 'tfds' / 'redpajama_github' / '1.0.0' / 'preparation.json').unlink()
  assert 'is there already, and comes from somewhere else' in mistake(tmp_path, capsys, *arguments)


def test_two_at_a_time_are_refused(tmp_path, capsys):
  raw = corpus(tmp_path / 'raw', 60)
  work = make(raw, tmp_path / 'tfds').work
  work.mkdir(parents=True)
  with prepare.paths.locked(work / 'lock', 'x'):
    error = mistake(tmp_path, capsys, 'redpajama_github', f'--input={raw}')
  assert f'1.0.0.unfinished is in use by another process (pid {os.getpid()} on ' in error
