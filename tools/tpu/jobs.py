"""What is remembered of a slice and its run on the machine that manages them: one JSON file a slice."""

import dataclasses
import json
import os
import pathlib
from typing import Any, Tuple

from openmoe_jax.checks import ConfigError, require

# Accelerator types begin with these; the base image that Google lists for each.
_RUNTIMES = (('v2-', 'tpu-ubuntu2204-base'), ('v3-', 'tpu-ubuntu2204-base'), ('v4-', 'tpu-ubuntu2204-base'),
             ('v5litepod-', 'v2-alpha-tpuv5-lite'), ('v5p-', 'v2-alpha-tpuv5'), ('v6e-', 'v2-alpha-tpuv6e'))


@dataclasses.dataclass(frozen=True)
class Job:
  """A slice, and the run on it.

  Attributes:
    name: of the queued resource, its node and its run.
    zone, project: where; without a project gcloud takes its own.
    accelerator: such as 'v4-32'; '' for a slice that was not made here and cannot be made again.
    runtime_version: image of the machines.
    tier: 'spot', 'reserved' or '' for on demand.
    gcloud_flags: further flags of `queued-resources create`.
    train_flags: of openmoe-train.
    restarts: how often a worker starts training again after status 3 (a lost process, a hang).
  """
  name: str
  zone: str
  project: str = ''
  accelerator: str = ''
  runtime_version: str = ''
  tier: str = ''
  gcloud_flags: Tuple[str, ...] = ()
  train_flags: Tuple[str, ...] = ()
  restarts: int = 10

  def replace(self, **changes: Any) -> 'Job':
    return dataclasses.replace(self, **changes)


def runtime_version(accelerator: str) -> str:
  """The image for an accelerator type.

  Raises:
    ConfigError: none is known.
  """
  found = next((version for start, version in _RUNTIMES if accelerator.startswith(start)), None)
  require(found is not None, f'--accelerator={accelerator} is of no kind that is known here '
          f'({", ".join(start + "N" for start, _ in _RUNTIMES)}): give --runtime_version too')
  return found


def folder() -> pathlib.Path:
  """$OPENMOE_TPU_JOBS, or a folder of the user's configuration."""
  config = os.environ.get('XDG_CONFIG_HOME') or pathlib.Path.home() / '.config'
  return pathlib.Path(os.environ.get('OPENMOE_TPU_JOBS') or pathlib.Path(config) / 'openmoe_jax' / 'tpu')


def save(job: Job) -> None:
  folder().mkdir(parents=True, exist_ok=True)
  (folder() / f'{job.name}.json').write_text(json.dumps(dataclasses.asdict(job), indent=2) + '\n')


def forget(name: str) -> None:
  (folder() / f'{name}.json').unlink(missing_ok=True)


def load(name: str, zone: str = '', project: str = '') -> Job:
  """The job of that name; zone and project, where given, are taken instead of what is remembered.

  Raises:
    ConfigError: nothing is remembered, and there is no zone.
  """
  file = folder() / f'{name}.json'
  given = {key: value for key, value in (('zone', zone), ('project', project)) if value}
  if not file.exists():
    require(zone != '', f'{name!r} was not created from this machine ({file} is not there): give --zone')
    return Job(name, **given)
  try:
    values = json.loads(file.read_text())
    values.update(gcloud_flags=tuple(values['gcloud_flags']), train_flags=tuple(values['train_flags']))
    return Job(**{**values, **given})
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f'{file} is damaged ({error}): remove it, and create or name the slice again') from error
