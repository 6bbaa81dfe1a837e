"""Options of the TPU compiler that a run sets for its training step (`MeshConfig.tpu_compiler_options`)."""

from typing import Any, Dict

import jax
from jax.sharding import Mesh, SingleDeviceSharding
import jax.numpy as jnp

from openmoe_jax.config import ConfigError, MeshConfig


def of(config: MeshConfig, mesh: Mesh) -> Dict[str, str]:
  """Options for `jax.jit(compiler_options=...)`; none where the devices are no TPUs, whose compiler they are for."""
  if next(iter(mesh.devices.flat)).platform != 'tpu':
    return {}
  return dict(option.split('=', 1) for option in config.tpu_compiler_options)


def check(config: MeshConfig, mesh: Mesh) -> None:
  """Compiles next to nothing with each option, within a second: a mistake is not to be found out after the data is read.

  Raises:
    ConfigError: the compiler does not know an option, or not this value of it.
  """
  for name, value in of(config, mesh).items():
    _check(name, value, _device(mesh))


def _device(mesh: Mesh) -> Any:
  """A device of this process, or any of a slice that is not there."""
  devices = list(mesh.devices.flat)
  return next((device for device in devices if device.process_index == jax.process_index()), devices[0])


def _check(name: str, value: str, device: Any) -> None:
  number = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
  try:
    jax.jit(lambda x: x + 1, compiler_options={name: value}).lower(number).compile()
  except jax.errors.JaxRuntimeError as error:
    raise ConfigError(f"MeshConfig.tpu_compiler_options: the TPU compiler does not take '{name}={value}' "
                      f'({" ".join(str(error).split())[:200]})') from error
