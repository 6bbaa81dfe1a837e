"""openmoe-infer: one prompt, files that survive kill -9, conversations, and mistakes told in one line."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from openmoe_jax import chat, generation_files, infer, loading
from tests import tiny_checkpoint, tiny_run

NEW = ['--max_new_tokens=12', '--vocabulary=', '--extra_ids=300']


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  return tiny_checkpoint.write(tmp_path_factory.mktemp('tiny') / 'run')


@pytest.fixture(scope='module')
def model(checkpoint):
  return loading.load(checkpoint)


def write_prompts(file, texts):
  file.write_text('\n'.join(json.dumps({'id': i, 'prompt': text}) for i, text in enumerate(texts)) + '\n')
  return str(file)


def outputs(file):
  return [json.loads(line) for line in open(file, encoding='utf-8')]


def test_one_prompt(checkpoint, model, capsys, monkeypatch):
  want, = model.generate(['def main('], 12)
  infer.main([checkpoint, 'def main(', *NEW])
  assert capsys.readouterr().out == want + '\n'
  monkeypatch.setattr(sys, 'stdin', io.StringIO('def main('))
  infer.main([checkpoint, '-', *NEW])
  assert capsys.readouterr().out == want + '\n'
  samples, = model.generate(['def main('], 12, num_samples=2, temperature=1., seed=7)
  infer.main([checkpoint, 'def main(', '--num_samples=2', '--temperature=1', '--seed=7', *NEW])
  assert capsys.readouterr().out == f'--- 1 of 2\n{samples[0]}\n--- 2 of 2\n{samples[1]}\n'


@pytest.mark.slow  # each compiles its own programs
@pytest.mark.parametrize('flags', (['--int8'], ['--dtype=bfloat16'], ['--capacity_mode=t5x'], ['--mesh=2,4,1']))
def test_ways_to_run(checkpoint, capsys, flags):
  infer.main([checkpoint, 'def main(', *NEW, *flags])
  assert len(capsys.readouterr().out) > 5


def test_a_file(checkpoint, model, tmp_path, capsys):
  texts = ['def main(', 'x', 'Über allem steht', 'import os\n\nprint(os.', 'class A:']
  source, out = write_prompts(tmp_path / 'in.jsonl', texts), str(tmp_path / 'new' / 'out.jsonl')
  infer.main([checkpoint, f'--input={source}', f'--output={out}', *NEW])
  want = model.generate(texts, 12)
  assert outputs(out) == [{'id': i, 'prompt': t, 'output': w} for i, (t, w) in enumerate(zip(texts, want))]
  assert '5 new results' in capsys.readouterr().out
  infer.main([checkpoint, f'--input={source}', f'--output={out}', *NEW])  # nothing is left to do
  assert len(outputs(out)) == 5 and '0 new results' in capsys.readouterr().out


@pytest.mark.slow
def test_the_window_is_that_of_training(checkpoint, tmp_path, capsys):
  source = write_prompts(tmp_path / 'in.jsonl', ['short', 'x y ' * 60])
  with pytest.raises(SystemExit):
    infer.main([checkpoint, f'--input={source}', f'--output={tmp_path}/out.jsonl', *NEW])
  assert 'prompt 2 has 1' in (error := capsys.readouterr().err) and '1 to 63 fit the window of 64' in error
  with pytest.raises(SystemExit):
    infer.main([checkpoint, 'x y ' * 60, *NEW])
  assert 'does not fit the window of 64 positions' in capsys.readouterr().err
  infer.main([checkpoint, 'x y ' * 60, '--window=300', *NEW])


@pytest.mark.parametrize('samples', ([], ['--num_samples=2']))
@pytest.mark.slow
def test_goes_on_after_part_of_a_line(checkpoint, tmp_path, samples):
  """Sampled, in smaller batches the second time: the result is that of one start, to the byte."""
  texts = [f'word {i} ' * (1 + i % 3) for i in range(11)]
  source = write_prompts(tmp_path / 'in.jsonl', texts)
  flags = ['--temperature=1', *samples, *NEW]
  infer.main([checkpoint, f'--input={source}', f'--output={tmp_path}/whole.jsonl', *flags])
  whole = (tmp_path / 'whole.jsonl').read_bytes()
  for lines in (0, 1, 7):
    end = sum(len(line) + 1 for line in whole.split(b'\n')[:lines])
    (tmp_path / 'out.jsonl').write_bytes(whole[:end + 9])
    (tmp_path / 'out.jsonl.settings.json').write_bytes((tmp_path / 'whole.jsonl.settings.json').read_bytes())
    infer.main([checkpoint, f'--input={source}', f'--output={tmp_path}/out.jsonl', '--batch_size=2', *flags])
    assert (tmp_path / 'out.jsonl').read_bytes() == whole


@pytest.mark.slow  # three starts of a process
def test_killed_and_started_again(checkpoint, tmp_path):
  texts = [f'word {i}' for i in range(40)]
  source = write_prompts(tmp_path / 'in.jsonl', texts)
  command = [sys.executable, '-m', 'openmoe_jax.infer', checkpoint, f'--input={source}', '--batch_size=2', *NEW]
  start = lambda out: subprocess.Popen([*command, f'--output={tmp_path}/{out}'], env=tiny_run.environment(),
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  process = start('out.jsonl')
  while not (tmp_path / 'out.jsonl').exists() or not (tmp_path / 'out.jsonl').stat().st_size:
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.02)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  killed = (tmp_path / 'out.jsonl').read_bytes()
  assert 0 < killed.count(b'\n') < 40
  for out in ('out.jsonl', 'whole.jsonl'):
    process = start(out)
    _, error = process.communicate()
    assert process.returncode == 0, error
  assert (tmp_path / 'out.jsonl').read_bytes() == (tmp_path / 'whole.jsonl').read_bytes()


def test_another_process_writes_the_same_file(checkpoint, model, tmp_path):
  import fcntl
  out = tmp_path / 'out.jsonl'
  with open(out, 'ab') as stream:
    fcntl.flock(stream, fcntl.LOCK_EX)
    job = generation_files.Job([{'prompt': 'x'}], 'in', str(out), {})
    with pytest.raises(infer.command_line.ConfigError, match='being written by another process'):
      generation_files.run(job, model, 3, str, 2)


@pytest.mark.slow
def test_conversation(checkpoint, model, capsys, monkeypatch):
  lines = 'Hi?\n\nAnd?\n/reset\nHi?\n/system Be brief.\nHi?\n/what\n' + 'x y ' * 400 + '\n/quit\nunread\n'
  monkeypatch.setattr(sys, 'stdin', io.StringIO(lines))
  infer.main([checkpoint, '--chat', '--window=200', *NEW])
  got, said = capsys.readouterr()
  answer = lambda *args, **kwargs: chat.answer(model.generate([chat.prompt(*args, **kwargs)], 12, stop=chat.STOP)[0])
  first = answer('Hi?')
  want = [first, answer('And?', [('Hi?', first)]), first, answer('Hi?', system='Be brief.')]
  assert ' '.join(got.split()) == ' '.join(' '.join(want).split())
  assert said.count('/reset forgets') == 2 and 'that is too long: 187 tokens fit' in said
  infer.main([checkpoint, '--chat', 'Hi?', '--window=200', *NEW])
  assert capsys.readouterr().out.strip() == first


@pytest.mark.slow
def test_old_turns_are_left_out(checkpoint, capsys, monkeypatch):
  monkeypatch.setattr(sys, 'stdin', io.StringIO('Hi there?\n' * 6))
  infer.main([checkpoint, '--chat', '--window=150', *NEW])
  got, said = capsys.readouterr()
  assert 'no longer fit and are left out' in said and len(got.strip().split('\n')) >= 6


@pytest.mark.parametrize('flags, message', (
    ([], 'nothing to continue: give a PROMPT'),
    (['x', '--input=a', '--output=b'], 'two answers to one question'),
    (['--input=a'], '--input and --output go together'),
    (['--input=/nowhere.jsonl', '--output=b'], '--input=/nowhere.jsonl: there is no such file'),
    (['x', '--system=y'], '--system belongs to --chat'),
    (['x', '--max_new_tokens=0'], '--max_new_tokens=0 must be at least 1'),
    (['x', '--top_p=0'], '--top_p=0.0 must be above 0'),
    (['x', '--temperature=-1'], '--temperature=-1.0 must be'),
    (['x', '--top_k=99999'], 'top_k = 99999 must be'),
    (['x', '--num_samples=0'], '--num_samples=0 must be'),
    (['--chat', '--num_samples=2'], 'a conversation has one answer'),
    (['x', '--stop='], '--stop is an empty text'),
    (['x', '--window=1'], '--window=1 must be'),
    (['x', '--batch_size=0'], '--batch_size=0 must be'),
    (['x', '--mesh=2,2'], "--mesh='2,2' must be three numbers"),
    (['x', '--mesh=3,1,1'], 'device'),
    (['--chat', '--max_new_tokens=70'], 'leaves no room for a question in the window of 64'),
    (['x', '--vocabulary=/nowhere.model'], '/nowhere.model'),
    (['x', '--extra_ids=500'], 'has 8692 ids'),
    (['x', '--tempereture=1'], 'unknown argument --tempereture'),
    ([''], 'the prompt is empty')))
def test_mistakes_are_one_line(checkpoint, capsys, flags, message):
  with pytest.raises(SystemExit) as error:
    infer.main([checkpoint, *flags])
  said = capsys.readouterr().err
  assert error.value.code == 2 and message in said and said.count('\n') == 1


def test_a_missing_checkpoint(tmp_path, capsys):
  with pytest.raises(SystemExit):
    infer.main([str(tmp_path / 'none'), 'x'])
  assert f'{tmp_path}/none' in capsys.readouterr().err


@pytest.mark.parametrize('line, message', (
    ('{"prompt": "x"', 'line 2 is not JSON'), ('["x"]', 'line 2 must be an object with a text "prompt"'),
    ('{"prompt": ""}', 'that is not empty'), ('{"text": "x"}', 'line 2 must be an object'),
    ('{"prompt": "x", "output": ""}', 'line 2 has a field "output"')))
def test_bad_lines(checkpoint, tmp_path, capsys, line, message):
  (tmp_path / 'in.jsonl').write_text('{"prompt": "fine"}\n' + line + '\n')
  with pytest.raises(SystemExit):
    infer.main([checkpoint, f'--input={tmp_path}/in.jsonl', f'--output={tmp_path}/out.jsonl'])
  assert message in capsys.readouterr().err and not (tmp_path / 'out.jsonl').exists()


def test_an_output_of_something_else_is_kept(checkpoint, tmp_path, capsys):
  source, out = write_prompts(tmp_path / 'in.jsonl', ['a', 'b']), tmp_path / 'out.jsonl'
  refused = lambda message, *flags: _refused(checkpoint, source, out, capsys, message, *flags)
  out.write_text('mine\n')
  refused('has not begun it')
  assert out.read_text() == 'mine\n'
  out.unlink()
  infer.main([checkpoint, f'--input={source}', f'--output={out}', *NEW])
  before = out.read_bytes()
  refused('was begun with temperature = 0.0, now it is 1.0', '--temperature=1')
  refused('max_new_tokens = 12, now it is 13', '--max_new_tokens=13')
  write_prompts(tmp_path / 'in.jsonl', ['a', 'c'])
  refused('was begun with input_sha256')
  write_prompts(tmp_path / 'in.jsonl', ['a', 'b'])
  out.write_bytes(before * 2)
  refused('has 4 lines, but the input 2')
  (tmp_path / 'out.jsonl.settings.json').write_text('{')
  refused('is not JSON')
  refused('must be a local file', '--output=gs://bucket/out.jsonl')


def _refused(checkpoint, source, out, capsys, message, *flags):
  capsys.readouterr()
  with pytest.raises(SystemExit):
    infer.main([checkpoint, f'--input={source}', f'--output={out}', *NEW, *flags])
  assert message in capsys.readouterr().err
