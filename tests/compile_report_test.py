"""openmoe-compile-report: a tiny recipe compiled for a small slice by the real TPU compiler, and its mistakes."""

import dataclasses
import importlib.util
import json
import sys

import jax
import pytest

from openmoe_jax import compile_report, tpu_slices
from openmoe_jax.analysis import flops
from openmoe_jax.config import ConfigError, DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from openmoe_jax.tpu import programs, sweep
from openmoe_jax.tpu import report as report_lib
from openmoe_jax.tpu import tables
from tests.tpu_parts_test import PARTS

TINY = ['--gin_file=recipes/openmoe_base.gin', '--gin_file=runs/one_pass.gin', '--gin.BATCH_SIZE=32',
        "--gin.TASK_FEATURE_LENGTHS={'targets': 256}", '--gin.NUM_EXPERT_PARTITIONS=4', '--gin.TRAIN_STEPS=10',
        '--gin.NUM_EMBEDDINGS=1024', '--gin.ModelConfig.emb_dim=128', '--gin.ModelConfig.mlp_dim=256',
        '--gin.ModelConfig.num_heads=2', '--gin.ModelConfig.head_dim=64', '--gin.ModelConfig.num_layers=4',
        '--gin.ModelConfig.moe_interval=2', '--gin.ModelConfig.num_experts=8', '--gin.GROUP_SIZE=512']


def report(capsys, *flags):
  compile_report.main([*TINY, '--json', *flags])
  return json.loads(capsys.readouterr().out)


@pytest.mark.tpu
def test_train_and_decode(tmp_path, capsys):
  """Every TPU compiler change that no slice accepts is found here; and the figures are of the right size."""
  got = report(capsys, '--topology=v5e-8', f'--output={tmp_path}/report.json', f'--plot={tmp_path}/report.png',
               f'--save_hlo={tmp_path}')
  assert got['mesh'] == {'pipe': 1, 'data': 2, 'expert': 4, 'model': 1} and got['fsdp'] == ['data', 'expert']
  assert json.loads((tmp_path / 'report.json').read_text()) == got
  assert (tmp_path / 'report.png').stat().st_size > 10_000 and 'HloModule' in (tmp_path / 'train.hlo').read_text()[:100]
  for program in (got['train'], got['decode']):
    assert program['fits'] and program['roofline']['limited_by'] in program['roofline']['terms']
    assert sum(program['memory'].values()) == pytest.approx(program['memory_total'], rel=0.02)
    assert program['memory']['parameters' if program is got['train'] else 'arguments'] < program['memory_peak']
    assert 0 < program['roofline']['no_overlap']['mfu'] <= program['roofline']['overlap']['mfu'] < 1
    assert not program['flops']['unknown_kernels']
  train = got['train']
  assert not train['flops']['unknown_loops']  # generation's are dropless: rounds until no token is left
  # Everything that is computed is known: what is left is what the compiler's own counting calls by another name.
  counts = train['flops']
  assert abs(counts['waste']['other']) < 0.03 * counts['compiled']
  assert train['token_budget'] == 10 * 32 * 256
  spent = {part['name']: part for part in train['parts']}
  assert set(spent) == PARTS
  assert sum(part['share'] for part in spent.values()) == pytest.approx(1.) and spent['other']['compute'] == 0.
  assert spent['loss']['compute'] == pytest.approx(
      3 * 2 * 32 * 256 * 1024 * 128 / 8 / tpu_slices.parse('v5e-8').chip.peak_flops, rel=0.01)
  axes = {(c['kind'], c['axes']) for c in train['collectives']}
  assert ('all-gather', 'data+expert') in axes  # parameters
  assert any(kind == 'all-to-all' and 'expert' in a for kind, a in axes)  # tokens to experts
  assert all(c['network'] == 'ici' for c in train['collectives'])


@pytest.mark.tpu
@pytest.mark.parametrize('flags', (
    ('--topology=v4-8', '--gin.ModelConfig.attention="splash"', '--gin.ModelConfig.remat="none"'),
    # There the kernel is not used.
    pytest.param(('--topology=v3-8', '--gin.ModelConfig.attention="splash"', '--gin.ModelConfig.remat="full"'),
                 marks=pytest.mark.exhaustive),
    ('--topology=v5p-8', '--gin.ModelConfig.dispatch="dropless"', '--gin.ModelConfig.capacity_mode="none"'),
    pytest.param(('--topology=v6e-8', '--gin.ModelConfig.remat="offload"', '--gin.NUM_MODEL_PARTITIONS=2',
                  '--gin.FSDP=("data",)'), marks=pytest.mark.exhaustive),
    ('--topology=2*v5e-4', '--gin.MeshConfig.shard_optimizer=("data",)', '--gin.FSDP=()'),
    pytest.param(('--topology=v5e-8', '--gin.MeshConfig.pipe=2', '--gin.NUM_EXPERT_PARTITIONS=2', '--gin.NUM_MICROBATCHES=4',
                  '--gin.NUM_STREAMS=8'), marks=pytest.mark.exhaustive)), ids=lambda flags: ' '.join(flags[:2]))
def test_other_programs(flags, capsys):
  got = report(capsys, '--no-decode', *flags)['train']
  counts = got['flops']
  assert got['fits'] and not counts['unknown_kernels']
  if 'dropless' not in flags[1] and 'pipe' not in flags[1]:  # rounds until no token is left; a bubble is computed too
    assert not counts['unknown_loops'] and abs(counts['waste']['other']) < 0.05 * counts['compiled'], counts
  if 'splash' in flags[1]:
    assert (got['flops']['kernels'] > 0) == ('v3' not in flags[0])
  if '2*' in flags[0]:
    assert {'dcn', 'ici'} == {c['network'] for c in got['collectives']}
  if 'pipe' in flags[1]:  # from stage to stage
    assert ('collective-permute', 'pipe') in {(c['kind'], c['axes']) for c in got['collectives']}


@pytest.mark.tpu
def test_what_does_not_fit(capsys):
  got = report(capsys, '--topology=v5e-4', '--gin.ModelConfig.emb_dim=8192', '--gin.ModelConfig.mlp_dim=65536',
               '--gin.ModelConfig.num_layers=12')['train']
  assert not got['fits'] and got['needed_bytes'] > 16 * 2 ** 30 and got['advice']


@pytest.mark.exhaustive
@pytest.mark.tpu
def test_sweep(capsys):
  compile_report.main([*TINY, '--topology=v5e-4', '--sweep', '--sweep_limit=2'])
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith('1 of 2: ') and sum(line.split()[5:6] == ['1'] for line in lines) >= 1


# Without the compiler.


def run_of(**changes):
  model = ModelConfig(vocab_size=1024, emb_dim=128, mlp_dim=256, num_heads=2, head_dim=64, num_layers=2, num_experts=8,
                      moe_interval=2)
  run = RunConfig(model=model, data=DataConfig(task_feature_lengths={'targets': 256}, batch_size=32), mesh=MeshConfig(),
                  train=TrainConfig())
  return dataclasses.replace(run, **changes)


@pytest.mark.slow
def test_sweep_tries_what_divides():
  slice_ = tpu_slices.parse('v5e-8')
  tried = sweep.candidates(run_of(), slice_)
  assert tried and len({(c.mesh, c.train.num_microbatches) for c in tried}) == len(tried)
  for c in tried:
    assert c.mesh.data * c.mesh.expert * c.mesh.model == 8 and 8 % c.mesh.expert == 0
    assert 32 % (c.train.num_microbatches * c.mesh.data * c.mesh.expert) == 0
  first = tried[0]
  assert (first.mesh.model, first.train.num_microbatches, first.mesh.expert) == (1, 1, 8)


@pytest.mark.parametrize('flags, message', (
    (['--topology=v4-100'], "v4 has no such slice; nearest: v4-128"),
    ([], '--topology=NAME is needed'),
    (['--topology=v4-8', '--sweep_limit=x'], 'invalid int value')))
def test_mistakes_are_one_line(flags, message, capsys):
  with pytest.raises(SystemExit) as error:
    compile_report.main([*TINY, *flags])
  assert error.value.code == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and message in lines[0]


def test_a_model_is_no_run(capsys):
  with pytest.raises(SystemExit):
    compile_report.main(['--gin_file=models/openmoe_8b.gin', '--topology=v4-8'])
  assert 'DataConfig.task_feature_lengths is not set' in capsys.readouterr().err


def test_list_of_slices(capsys):
  compile_report.main(['--topologies'])
  assert 'v5p-128      v5p:4x4x4' in capsys.readouterr().out.splitlines()


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is not None, reason='the compiler is there')
def test_without_the_compiler(capsys):
  with pytest.raises(SystemExit):
    compile_report.main([*TINY, '--topology=v4-8'])
  assert 'make install-tpu' in capsys.readouterr().err


def test_what_is_lacking():
  """The figure is of everything, in both forms of the complaint."""
  temporaries = 'the total memory required for HLO temporaries (1.50G) exceeds available HBM (1.00G).'
  assert programs.needed_bytes(temporaries) == 1.5 * 2 ** 30
  assert programs.needed_bytes('Ran out: Used 22.50G of 15.75G hbm.') == 22.5 * 2 ** 30
  assert programs.needed_bytes('no numbers') == 0


@pytest.mark.parametrize('name, times, larger', (
    ('v5e-16', 1.1, 'v5e-32'), ('v5e-16', 2.1, 'v5e-64'), ('v5e-16', 0.5, 'v5e-32'), ('v4-8', 1.3, 'v4-16'),
    ('v5e-256', 1.1, '')))
def test_larger_slice(name, times, larger):
  assert tpu_slices.larger(tpu_slices.parse(name), times) == larger


def test_advice_names_a_slice_with_enough_memory():
  slice_ = tpu_slices.parse('v5e-8')
  mesh = jax.make_mesh((1, 1, 8, 1), ('pipe', 'data', 'expert', 'model'))
  lines = report_lib.advice(run_of(), slice_, mesh, 3 * slice_.device_hbm_bytes)
  assert lines[-1].startswith('--topology=v5e-32 ') and any('remat' in line for line in lines)


@pytest.mark.parametrize('gib, advised', ((15, False), (22, True)))
def test_what_has_no_place_as_it_is_laid_out_is_said(gib, advised):
  """It fits, as the compiler accepts it; but what would help is said."""
  slice_, mesh = tpu_slices.parse('v5e-8'), jax.make_mesh((1, 1, 8, 1), ('pipe', 'data', 'expert', 'model'))
  text = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((8, 8), 'float32')).compile().as_text()
  memory = programs.Memory(arguments=0., outputs=0., temporaries=gib * tpu_slices.GIB, code=0., peak=12. * tpu_slices.GIB)
  got = report_lib.train_report(run_of(), slice_, mesh, programs.Program('train', text, memory, '', 1.))
  assert got['fits'] and got['memory_peak'] < got['memory_total'] == gib * tpu_slices.GIB
  assert ('advice' in got) == advised
  said = tables.report_tables({**report_lib.describe(run_of(), slice_, mesh), 'train': got})
  assert ('laid out as it says, it would have no place' in said) == ('--topology=v5e-16 has' in said) == advised


@pytest.mark.tpu
def test_the_compiler_goes_by_the_worst_moment():
  """Arguments alone can be too much, and the complaint speaks of them; a program at the limit is accepted by its peak."""
  devices = programs.topology_devices(tpu_slices.parse('v5e-4'))
  whole = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, ('data',)), jax.sharding.PartitionSpec())
  array = lambda gib: jax.ShapeDtypeStruct((gib, 256, 1024, 1024), 'float32', sharding=whole)
  lower = jax.jit(lambda x: (2 * x).sum(), out_shardings=whole).lower
  refused = programs.compile_program('sum', lower, array(17))
  assert not refused.fits and refused.needed == pytest.approx(17 * 2 ** 30, rel=1e-3)
  fits = programs.compile_program('sum', lower, array(15))
  assert fits.memory.peak == pytest.approx(15 * 2 ** 30, rel=1e-3) and fits.memory.arguments == 15 * 2 ** 30
