"""Options of the TPU compiler: whose they are, that they reach it, and that it is asked about them at once."""

import jax
from jax.sharding import NamedSharding, PartitionSpec
import jax.numpy as jnp
import pytest

from openmoe_jax import compile_report, compiler_options, partitioning, tpu_slices
from openmoe_jax.config import ConfigError, MeshConfig
from openmoe_jax.tpu import programs
from tests.compile_report_test import TINY

NO_RINGS = 'xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000'


def test_other_compilers_get_none():
  config = MeshConfig(tpu_compiler_options=(NO_RINGS, 'no_such_option=1'))
  mesh = partitioning.make_mesh(config, jax.devices()[:1])
  compiler_options.check(config, mesh)
  assert compiler_options.of(config, mesh) == {}


@pytest.mark.parametrize('options, kept', (
    (f'--{NO_RINGS}', (NO_RINGS,)), (['--a=true', 'b=x=y'], ('a=true', 'b=x=y')), ((), ())))
def test_flags_are_taken_as_they_are_written_elsewhere(options, kept):
  assert MeshConfig(tpu_compiler_options=options).tpu_compiler_options == kept


@pytest.mark.parametrize('options', ('xla_tpu_x', ('=3',), ('a= b',), ('--a-b=1',)))
def test_mistakes(options):
  with pytest.raises(ConfigError, match='MeshConfig.tpu_compiler_options: .* must be a name and a value'):
    MeshConfig(tpu_compiler_options=options)


@pytest.mark.tpu
def test_they_reach_the_compiler():
  """Without the option this product passes the kernel around in a ring."""
  devices = programs.topology_devices(tpu_slices.parse('v5p-64'))
  counts = {}
  for options in ((), (NO_RINGS,)):
    config = MeshConfig(expert=32, tpu_compiler_options=options)
    mesh = partitioning.make_mesh(config, devices)
    split = NamedSharding(mesh, PartitionSpec('expert'))
    shapes = [jax.ShapeDtypeStruct(shape, 'bfloat16', sharding=split) for shape in ((2048, 8192), (256, 2048, 2048))]
    product = jax.jit(lambda w, x: jax.lax.with_sharding_constraint(jnp.tanh(x @ w), split),
                      compiler_options=compiler_options.of(config, mesh))
    counts[options] = product.lower(*shapes).compile().as_text().count('collective-permute-start(')
  assert counts[()] > 0 and counts[NO_RINGS,] == 0


@pytest.mark.tpu
@pytest.mark.parametrize('option, why', (
    ('no_such_option=1', 'No such compile option'), ('xla_tpu_enable_async_all_to_all=perhaps', 'perhaps')))
def test_what_the_compiler_does_not_know_is_one_line(option, why, capsys):
  with pytest.raises(SystemExit) as error:
    compile_report.main([*TINY, '--topology=v5e-8', f"--gin.MeshConfig.tpu_compiler_options=('{option}',)"])
  lines = capsys.readouterr().err.strip().splitlines()
  assert error.value.code == 2 and len(lines) == 1 and option in lines[0] and why in lines[0]
