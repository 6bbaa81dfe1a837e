"""openmoe-convert: the ways between formats, interruptions of real processes, and one clear line for every mistake."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import jax
import numpy as np
import pytest

import openmoe_jax
from openmoe_jax import conversion, names
from openmoe_jax.config import ConfigError
from openmoe_jax.convert.huggingface import HuggingFaceSource
from openmoe_jax.convert.orbax import OrbaxSource
from openmoe_jax.convert.t5x import T5XSource
from openmoe_jax.convert.tensors import PARAMS
import golden
import golden_model
import tiny_run

GIN = {'vocab_size': 384, 'emb_dim': 64, 'mlp_dim': 80, 'num_heads': 4, 'head_dim': 16, 'num_layers': 4,
       'moe_interval': 2, 'num_experts': 8, 'group_size': 32, 'dtype': "'float32'"}


def convert(*args):
  conversion._main([str(a) for a in args])


def refused(message, *args):
  with pytest.raises(ConfigError, match=message) as error:
    convert(*args)
  assert '\n' not in str(error.value)


@pytest.fixture(scope='module')
def t5x(tmp_path_factory):
  """The original's own checkpoint of the golden model, and a gin file of that model."""
  folder = tmp_path_factory.mktemp('t5x')
  with tarfile.open(golden.require_golden('t5x_checkpoint.tar.gz')) as archive:
    archive.extractall(folder, filter='data')
  gin = folder / 'golden.gin'
  gin.write_text('\n'.join(f'ModelConfig.{name} = {value}' for name, value in GIN.items()))
  step, = folder.rglob('checkpoint_5')
  return step, f'--gin_file={gin}'


def same(a, b):
  assert a.tensors.keys() == b.tensors.keys() and a.step == b.step
  for name in a.tensors:
    x, y = a.read(name), b.read(name)
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y, err_msg=name)


def test_golden_checkpoint_in_out_and_in_again(t5x, tmp_path, capsys):
  step, gin = t5x
  convert('t5x-to-orbax', step, tmp_path / 'orbax', gin, '--verify')
  assert 'differ by 0 at most' in capsys.readouterr().out
  convert('orbax-to-t5x', tmp_path / 'orbax', tmp_path / 't5x')
  convert('t5x-to-orbax', tmp_path / 't5x', tmp_path / 'again', gin)
  model = golden_model.config()
  first = T5XSource(step, model)
  for there in (OrbaxSource(tmp_path / 'orbax'), T5XSource(tmp_path / 't5x', model), OrbaxSource(tmp_path / 'again')):
    same(first, there)
    assert there.step == 5
  stats = golden.load_arrays('train_adafactor_step5.npz')
  for name, value in stats.items():
    if value.shape != (1,):
      np.testing.assert_array_equal(OrbaxSource(tmp_path / 'again').read(f'state/param_states/{name}'), value)


def test_all_formats_in_a_circle(t5x, tmp_path):
  step, gin = t5x
  convert('t5x-to-hf', step, tmp_path / 'hf', gin, '--vocabulary=none', '--shard_size=200KB')
  convert('hf-to-orbax', tmp_path / 'hf', tmp_path / 'orbax')
  convert('orbax-to-hf', tmp_path / 'orbax', tmp_path / 'hf2', '--vocabulary=none', '--shard_size=0.3MB')
  convert('hf-to-t5x', tmp_path / 'hf2', tmp_path / 't5x')
  model = golden_model.config()
  same(T5XSource(step, model, with_state=False), T5XSource(tmp_path / 't5x', model))
  models = OrbaxSource(tmp_path / 'orbax').model, HuggingFaceSource(tmp_path / 'hf').model
  assert models == (model.replace(scan_blocks=True),) * 2


@pytest.mark.slow
def test_a_converted_model_computes_the_golden_logits(t5x, tmp_path):
  """Parameters of golden/params.npz, through Hugging Face and T5X folders, give the original's logits."""
  from openmoe_jax.convert.t5x import T5XSink
  from openmoe_jax.convert.transfer import transfer
  from convert_hf_test import Numbers
  source = Numbers(golden_model.config())
  source.arrays = {PARAMS + n: x for n, x in golden_model.flat_params().items()}
  transfer(source, T5XSink(source.model, 0), tmp_path / 't5x', say=lambda text: None)
  gin = tmp_path / 'golden.gin'
  gin.write_text('\n'.join(f'ModelConfig.{name} = {value}' for name, value in GIN.items()))
  convert('t5x-to-hf', tmp_path / 't5x', tmp_path / 'hf', f'--gin_file={gin}', '--vocabulary=none')
  model = openmoe_jax.load(tmp_path / 'hf', dtype='float32', scan_blocks=False)
  logits = openmoe_jax.OpenMoE(model.config).apply({'params': model.params}, golden_model.batch('lm'))
  np.testing.assert_allclose(logits, golden.load_arrays('fwd_lm_eval.npz')['logits'], atol=2e-5)  # see golden's README


def test_dtype_and_params_only(t5x, tmp_path):
  step, gin = t5x
  convert('t5x-to-orbax', step, tmp_path / 'half', gin, '--dtype=bfloat16', '--params_only')
  source = OrbaxSource(tmp_path / 'half')
  assert {str(info.dtype) for info in source.tensors.values()} == {'bfloat16'}
  assert all(name.startswith(PARAMS) for name in source.tensors)
  convert('orbax-to-orbax', tmp_path / 'half', tmp_path / 'whole', '--dtype=float32')
  name = PARAMS + 'decoder/logits_dense/kernel'
  np.testing.assert_array_equal(OrbaxSource(tmp_path / 'whole').read(name), source.read(name).astype(np.float32))
  with_state = tmp_path / 'half_with_state'
  convert('t5x-to-orbax', step, with_state, gin, '--dtype=bfloat16')
  dtypes = {str(info.dtype) for n, info in OrbaxSource(with_state).tensors.items() if not n.startswith(PARAMS)}
  assert dtypes == {'float32'}


@pytest.mark.slow
def test_growing(t5x, tmp_path, capsys):
  step, gin = t5x
  convert('t5x-to-orbax', step, tmp_path / 'a', gin, '--params_only')
  convert('average', tmp_path / 'a', tmp_path / 'a', tmp_path / 'mean')
  same(OrbaxSource(tmp_path / 'a'), OrbaxSource(tmp_path / 'mean'))
  convert('average', tmp_path / 'a', tmp_path / 'mean', tmp_path / 'weighted', '--weights=1,3', '--to=hf',
          '--vocabulary=none')
  convert('extend-vocabulary', tmp_path / 'weighted', tmp_path / 'larger', '--vocab_size=400')
  larger = OrbaxSource(tmp_path / 'larger')
  assert larger.model.vocab_size == 400 and larger.tensors[PARAMS + 'token_embedder/embedding'].shape == (400, 64)
  dense = tmp_path / 'dense.gin'
  dense.write_text('\n'.join(f'ModelConfig.{n} = {v}' for n, v in {**GIN, 'num_experts': 0}.items()))
  from openmoe_jax.convert.orbax import OrbaxSink
  from openmoe_jax.convert.transfer import transfer
  from convert_hf_test import Numbers
  numbers = Numbers(golden_model.config(num_experts=0, dtype='float32'))
  transfer(numbers, OrbaxSink(openmoe_jax.RunConfig(model=numbers.model), 3), tmp_path / 'dense')
  capsys.readouterr()
  convert('upcycle', tmp_path / 'dense', tmp_path / 'sparse', gin, '--verify')
  assert 'differ by 0 at most' in capsys.readouterr().out
  assert OrbaxSource(tmp_path / 'sparse').model.num_experts == 8
  refused('needs the sparse model', 'upcycle', tmp_path / 'dense', tmp_path / 'x')
  refused('needs --vocab_size', 'extend-vocabulary', tmp_path / 'a', tmp_path / 'x')
  refused("--weights='a,b'", 'average', tmp_path / 'a', tmp_path / 'a', tmp_path / 'x', '--weights=a,b')


@pytest.mark.exhaustive
def test_training_goes_on_after_a_way_through_t5x(tmp_path):
  """Parameters, statistics and step survive: the next steps have the very numbers of a start from the original."""
  run = tiny_run.tiny_run(tmp_path / 'first', train=dict(train_steps=3, log_period=1, eval_period=0))
  gin = tmp_path / 'run.gin'
  gin.write_text(tiny_run.gin_text(run))
  done = tiny_run.run_process(gin)
  assert done.returncode == 0, done.stderr
  convert('orbax-to-t5x', tmp_path / 'first', tmp_path / 't5x')
  convert('t5x-to-orbax', tmp_path / 't5x', tmp_path / 'back', f'--gin_file={gin}')
  curves = []
  for start in ('first', 'back'):
    run = tiny_run.tiny_run(tmp_path / f'from_{start}', train=dict(train_steps=5, log_period=1, eval_period=0),
                            checkpoint=dict(initial_checkpoint_path=str(tmp_path / start), restore='full'))
    gin.write_text(tiny_run.gin_text(run))
    done = tiny_run.run_process(gin)
    assert done.returncode == 0 and 'beginning at step 3' in done.stdout, done.stderr
    curves.append(tiny_run.curve(tmp_path / f'from_{start}'))
  assert curves[0] == curves[1] and [r['step'] for r in curves[0] if r['kind'] == 'train'] == [4, 5]


_SLOW = '''
import sys, time
sys.path.insert(0, {tests!r})
from openmoe_jax import conversion
from openmoe_jax.convert import tensors
from openmoe_jax.convert import {module} as module
tensors.PART_BYTES = 20_000
write = module.{sink}.write
def slow(self, *args):
  time.sleep(.01)
  write(self, *args)
module.{sink}.write = slow
conversion.main({args!r})
'''


@pytest.mark.slow
@pytest.mark.parametrize('target, module, sink', [
    ('hf', 'huggingface', 'HuggingFaceSink'), ('orbax', 'orbax', 'OrbaxSink'), ('t5x', 't5x', 'T5XSink')])
def test_kill_nine_of_the_program(t5x, tmp_path, target, module, sink):
  step, gin = t5x
  more = ['--vocabulary=none', '--shard_size=300KB'] if target == 'hf' else []
  out = tmp_path / 'out'
  args = [f't5x-to-{target}', str(step), str(out), gin, *more]
  code = _SLOW.format(tests=str(tiny_run.TESTS), module=module, sink=sink, args=args)
  journal = tmp_path / 'out.partial' / 'conversion'
  finished = lambda: len(list(journal.glob('0*.json'))) if journal.exists() else 0
  for _ in range(3):
    before = finished()
    process = subprocess.Popen([sys.executable, '-c', code], env=tiny_run.environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    end = time.time() + 120
    while finished() < before + 3 and process.poll() is None and time.time() < end:
      time.sleep(.005)
    assert process.poll() is None, process.stdout.read()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    for name in ('check', f'{target}-to-{target}'):  # nobody takes the half folder for a whole one
      with pytest.raises(ConfigError):
        convert(name, tmp_path / 'out.partial', *([tmp_path / 'x'] if name != 'check' else []), gin)
  done = subprocess.run([sys.executable, '-c', code], env=tiny_run.environment(), capture_output=True, text=True,
                        timeout=300, check=False)
  assert done.returncode == 0 and 'going on: ' in done.stdout, done.stderr
  opened = {'hf': lambda: HuggingFaceSource(out), 'orbax': lambda: OrbaxSource(out),
            't5x': lambda: T5XSource(out, golden_model.config())}[target]()
  first = T5XSource(step, golden_model.config())
  for name in opened.tensors:
    np.testing.assert_array_equal(opened.read(name), first.read(name), err_msg=name)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['out']


def test_check_finds_damage(t5x, tmp_path, capsys):
  step, gin = t5x
  convert('t5x-to-hf', step, tmp_path / 'hf', gin, '--vocabulary=none')
  convert('check', tmp_path / 'hf')
  assert 'have the checksums of openmoe_manifest.json' in capsys.readouterr().out
  file = tmp_path / 'hf' / 'model.safetensors'
  data = bytearray(file.read_bytes())
  data[-5] ^= 4
  file.write_bytes(bytes(data))
  refused('does not have the checksum', 'check', tmp_path / 'hf')
  convert('t5x-to-orbax', step, tmp_path / 'orbax', gin)
  convert('check', tmp_path / 'orbax')
  assert 'checksums that they were written with' in capsys.readouterr().out


def test_mistakes(t5x, tmp_path):
  step, gin = t5x
  convert('t5x-to-orbax', step, tmp_path / 'orbax', gin)
  empty = tmp_path / 'empty'
  empty.mkdir()
  refused('unknown argument --dtyp', 'orbax-to-hf', tmp_path / 'orbax', tmp_path / 'x', '--dtyp=float32')
  refused('invalid choice', 'orbax-to-onnx', tmp_path / 'orbax', tmp_path / 'x')
  refused('takes a source and a destination', 'orbax-to-hf', tmp_path / 'orbax')
  refused('takes at least two sources', 'average', tmp_path / 'orbax')
  refused('check takes one folder', 'check')
  refused('does not exist', 'orbax-to-hf', tmp_path / 'nothing', tmp_path / 'x')
  refused('is no checkpoint', 'orbax-to-hf', empty, tmp_path / 'x')
  refused('in the format orbax, not hf', 'hf-to-orbax', tmp_path / 'orbax', tmp_path / 'x')
  refused('does not say what model', 't5x-to-orbax', step, tmp_path / 'x')
  refused('cannot be source and destination', 'orbax-to-orbax', tmp_path / 'orbax', tmp_path / 'orbax')
  refused('is not empty', 'orbax-to-hf', tmp_path / 'orbax', tmp_path / 'orbax' / 'checkpoints')
  refused('--int8 is a format of Hugging Face', 'orbax-to-t5x', tmp_path / 'orbax', tmp_path / 'x', '--int8')
  refused("--shard_size='5XB'", 'orbax-to-hf', tmp_path / 'orbax', tmp_path / 'x', '--shard_size=5XB')
  refused('such file', 'orbax-to-hf', tmp_path / 'orbax', tmp_path / 'x', '--vocabulary=/no/such/file')
  refused('--tokens is for --verify', 'orbax-to-hf', tmp_path / 'orbax', tmp_path / 'x', '--tokens=3')
  refused('from 1 to 383', 'orbax-to-hf', tmp_path / 'orbax', tmp_path / 'x', '--tokens=3,384', '--verify')
  refused('neither a file nor numbers', 'orbax-to-hf', tmp_path / 'orbax', tmp_path / 'x', '--tokens=a', '--verify')
  refused(r'\+ target/decoder/layers_2', 't5x-to-orbax', step, tmp_path / 'x', gin, '--gin.ModelConfig.num_layers=2')
  refused('NO_SUCH|no such|No such|not found', 't5x-to-orbax', step, tmp_path / 'x', '--gin_file=models/none.gin')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['empty', 'orbax']


def test_a_mistake_is_one_line_of_the_process(tmp_path):
  done = subprocess.run([sys.executable, '-m', 'openmoe_jax.conversion', 'orbax-to-hf', 'nothing', str(tmp_path / 'x')],
                        env=tiny_run.environment(), capture_output=True, text=True, timeout=120, check=False)
  assert done.returncode == 2 and re.fullmatch(r'\w+: error: nothing does not exist\n', done.stderr), done.stderr


def test_load_reads_an_export(t5x, tmp_path):
  """With the demo's vocabulary: text in and out of a loaded export gives the vocabulary's ids."""
  step, gin = t5x
  convert('t5x-to-orbax', step, tmp_path / 'orbax', gin)
  convert('orbax-to-hf', tmp_path / 'orbax', tmp_path / 'hf', '--vocabulary=none', '--max_length=77')
  assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['max_position_embeddings'] == 77
  a, b = openmoe_jax.load(tmp_path / 'orbax'), openmoe_jax.load(tmp_path / 'hf')
  assert a.config == b.config and a.step == b.step == 5
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
  refused('is no checkpoint|holds no', 'check', tmp_path)


def test_nothing_of_this_machine_leaves_with_an_export(t5x, tmp_path):
  step, gin = t5x
  vocabulary = tmp_path / 'my_vocabulary.model'
  shutil.copy(openmoe_jax.vocabulary.demo_model_path(), vocabulary)
  convert('t5x-to-orbax', step, tmp_path / 'orbax', gin, f'--gin.DataConfig.vocabulary={str(vocabulary)!r}',
          f'--model_dir={tmp_path}/secret')
  convert('orbax-to-hf', tmp_path / 'orbax', tmp_path / 'hf', '--vocabulary=none')
  for file in (tmp_path / 'hf').iterdir():
    assert str(tmp_path).encode() not in file.read_bytes(), file.name
  assert json.loads((tmp_path / 'hf' / 'openmoe_run.json').read_text())['run']['data']['vocabulary'] == vocabulary.name


@pytest.mark.torch
def test_verify_runs_pytorch(t5x, tmp_path, capsys):
  pytest.importorskip('transformers')
  step, gin = t5x
  convert('t5x-to-hf', step, tmp_path / 'hf', gin, '--vocabulary=none', '--verify')
  out = capsys.readouterr().out
  assert 'both in JAX: the logits' in out and 'differ by 0 at most' in out and 'in JAX and in PyTorch' in out
  convert('t5x-to-hf', step, tmp_path / 'int8', gin, '--vocabulary=none', '--verify', '--int8')
  assert 'in JAX and in PyTorch' in capsys.readouterr().out
  tokens = tmp_path / 'tokens.txt'
  tokens.write_text('5 17 3\n9,8\n')
  convert('t5x-to-hf', step, tmp_path / 'bf16', gin, '--vocabulary=none', '--verify', '--dtype=bfloat16',
          f'--tokens={tokens}')
  assert 'in JAX and in PyTorch' in capsys.readouterr().out
