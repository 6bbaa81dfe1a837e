"""Options of the TPU compiler that a run sets for its training step (`MeshConfig.tpu_compiler_options`)."""

from typing import Dict, Optional

import jax
from jax.sharding import Mesh, SingleDeviceSharding
import jax.numpy as jnp

from openmoe_jax.config import ConfigError, MeshConfig


def of(config: MeshConfig, mesh: Optional[Mesh]) -> Dict[str, str]:
  """Options for `jax.jit(compiler_options=...)`; none where the devices are no TPUs, whose compiler they are for."""
  if mesh is None or mesh.devices.flat[0].platform != 'tpu':
    return {}
  return dict(option.split('=', 1) for option in config.tpu_compiler_options)


def check(config: MeshConfig, mesh: Mesh) -> None:
  """Compiles next to nothing with each option, within a second: a mistake is not to be found out after the data is read.

  Raises:
    ConfigError: the compiler does not know an option, or not this value of it.
  """
  # A device of this process, or any of a slice that is not there.
  device = next((d for d in mesh.devices.flat if d.process_index == jax.process_index()), mesh.devices.flat[0])
  number = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
  for name, value in of(config, mesh).items():
    try:
      jax.jit(lambda x: x + 1, compiler_options={name: value}).lower(number).compile()
    except jax.errors.JaxRuntimeError as error:
      raise ConfigError(f"MeshConfig.tpu_compiler_options: the TPU compiler does not take '{name}={value}' "
                        f'({" ".join(str(error).split())[:200]})') from error
