"""openmoe-inspect as a user calls it."""

import json
import os
import subprocess
import sys

from openmoe_jax import inspection
import pytest


def call(capsys, *args):
  inspection.main(args)
  return capsys.readouterr().out


def report(capsys, *args):
  return json.loads(call(capsys, *args, '--json'))


def refused(capsys, *args):
  """The one line on stderr of a call that ends with status 2."""
  with pytest.raises(SystemExit) as caught:
    inspection.main(args)
  out, err = capsys.readouterr()
  assert caught.value.code == 2 and out == '' and err.count('\n') == 1, (out, err)
  return err


def test_the_34b_recipe_in_a_process_of_its_own(tmp_path):
  """No TensorFlow, no accelerator, no memory to speak of: also where another program holds the accelerator."""
  code = '''
import re, sys
from openmoe_jax import inspection
inspection.main(sys.argv[1:])
from jax._src import xla_bridge
assert 'tensorflow' not in sys.modules and 'seqio' not in sys.modules
assert set(xla_bridge._backends) <= {'cpu'}, xla_bridge._backends
# not ru_maxrss: that of a child begins at its parent's
assert int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) < 2e6, 'more than 2 GB'
'''
  args = ['--gin_file=recipes/openmoe_34b.gin', '--num_devices=1024']
  done = subprocess.run([sys.executable, '-c', code, *args], cwd=tmp_path, capture_output=True, text=True, check=False,
                        env={**os.environ, 'JAX_PLATFORMS': 'tpu'})
  assert done.returncode == 0 and done.stderr == '', done.stderr
  lines = {' '.join(line.split()) for line in done.stdout.splitlines()}
  assert 'total 46,270,737,408 100.0%' in lines
  assert 'active without input embedding 9,244,339,200 20.0%' in lines
  assert any(line.startswith('training ') for line in lines)
  assert any('data 2 x expert 32 x model 16' in line for line in lines)


def test_a_model_alone(capsys):
  got = report(capsys, '--gin_file=models/openmoe_8b.gin')
  assert got['parameters']['total'] == 11855046656
  assert got['length'] == 2048
  assert got['memory']['parameters'] == {'all_devices': 4 * 11855046656, 'one_device': 4 * 11855046656}
  assert got['mixture_or_task'] == '' and got['warnings'] == []


def test_a_recipe_with_changes_on_the_command_line(capsys):
  got = report(capsys, '--gin_file=recipes/demo.gin', '--gin.ModelConfig.num_experts=4', '--gin.BATCH_SIZE=16',
               '--gin.ModelConfig.dispatch=einsum')
  assert got['model']['num_experts'] == 4
  assert got['tokens_per_step'] == 16 * got['length']
  assert got['flops_per_token']['train_dispatch'] > 0
  assert sum(got['flops_per_token']['forward_useful'].values()) * 3 == got['flops_per_token']['train_useful']
  assert got['routing']['train']['num_groups'] * got['routing']['train']['group_size'] == got['tokens_per_step']
  assert report(capsys, '--gin_file=recipes/demo.gin', '--length=64')['length'] == 64


def test_memory_per_device_follows_the_mesh(capsys):
  args = ('--gin_file=recipes/demo.gin', '--gin.NUM_EXPERT_PARTITIONS=2', '--gin.NUM_MODEL_PARTITIONS=2')
  got = report(capsys, *args, '--num_devices=8', '--sharding')
  assert got['mesh'] == {'pipe': 1, 'data': 2, 'expert': 2, 'model': 2}
  arrays = {row['name']: row for row in got['sharding'] if row['kind'] == 'parameter'}
  experts = arrays['decoder/layers_1/mlp/expert/wi_1/kernel']
  assert experts['spec'] == ['expert', None, 'model'] and experts['device_bytes'] * 4 == experts['bytes']
  for what, kind in (('parameters', 'parameter'), ('optimizer state', 'optimizer')):
    assert got['memory'][what]['one_device'] == sum(
        row['device_bytes'] for row in got['sharding'] if row['kind'] == kind)


def test_tables_of_shapes_and_shardings(capsys):
  out = call(capsys, '--gin_file=recipes/demo.gin', '--shapes', '--sharding')
  lines = [' '.join(line.split()) for line in out.splitlines()]
  model = report(capsys, '--gin_file=recipes/demo.gin')['model']
  assert any(line.startswith(f'token_embedder/embedding {model["vocab_size"]} x {model["emb_dim"]} ') for line in lines)
  assert any(line.startswith('decoder/layers_1/mlp/expert/wo/kernel') and 'expert, model, -' in line for line in lines)
  assert '…' not in out  # nothing is cut off


def test_a_mesh_that_cannot_be_is_a_warning(capsys):
  got = report(capsys, '--gin_file=recipes/demo.gin', '--gin.NUM_EXPERT_PARTITIONS=3')
  assert len(got['warnings']) == 1 and 'num_experts' in got['warnings'][0]


def test_mistakes_are_one_line(capsys):
  assert 'did you mean BATCH_SIZE?' in refused(capsys, '--gin_file=recipes/demo.gin', '--gin.BATCHSIZE=3')
  assert '--gin_file=' in refused(capsys)
  assert 'recipes/demo.gin' in refused(capsys, '--gin_file=recipes/demoo.gin')
  assert '7 devices' in refused(capsys, '--gin_file=recipes/openmoe_8b.gin', '--num_devices=7')
  assert '--num_devices' in refused(capsys, '--gin_file=recipes/demo.gin', '--num_device=7')
  assert '--num_devices' in refused(capsys, '--gin_file=recipes/demo.gin', '--num_devices=many')


def test_print_config_and_environment(capsys):
  assert 'ModelConfig.num_experts' in call(capsys, '--gin_file=recipes/demo.gin', '--print_config')
  assert 'jax' in call(capsys, '--environment')
