"""What this program runs on: `openmoe-inspect --environment` prints `report()`.

It uses the standard library alone until it asks jax for devices, because it has to work exactly where something is
missing or broken. Nothing heavy is imported: versions and files come from the installed packages' metadata.
"""

import csv
import glob
import importlib.util
import os
import platform
import sys
from importlib import metadata
from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple

from openmoe_jax import cluster_environment

# distribution, module to import, needed (True: nothing works without it), what it is for
PACKAGES = (
    ('jax', 'jax', True, 'the model'),
    ('jaxlib', 'jaxlib', True, 'the model'),
    ('flax', 'flax', True, 'the model'),
    ('optax', 'optax', True, 'optimizers'),
    ('orbax-checkpoint', 'orbax.checkpoint', True, 'checkpoints'),
    ('tensorstore', 'tensorstore', True, 'checkpoints'),
    ('etils', 'etils.epath', True, 'paths, gs:// included'),
    ('numpy', 'numpy', True, 'everything'),
    ('absl-py', 'absl.flags', True, 'command lines'),
    ('gin-config', 'gin.config', True, 'configuration files'),
    ('tensorflow', 'tensorflow', True, 'data'),
    ('tensorflow-text', 'tensorflow_text', True, 'data'),
    ('tensorflow-datasets', 'tensorflow_datasets', True, 'data'),
    ('importlib_resources', 'importlib_resources', True, 'tensorflow-datasets, which does not declare it'),
    ('seqio', 'seqio', True, 'data'),
    ('t5', 't5', True, 'data'),
    ('sentencepiece', 'sentencepiece', True, 'vocabularies'),
    ('clu', 'clu', True, 'metric writers'),
    ('tensorboard', 'tensorboard', True, 'metric writers'),
    ('matplotlib', 'matplotlib', True, 'plots'),
    ('rich', 'rich', True, 'the progress line'),
    ('babel', 'babel', True, 'import of t5'),
    ('pandas', 'pandas', True, 'import of t5'),
    ('rouge-score', 'rouge_score', True, 'import of t5'),
    ('sacrebleu', 'sacrebleu', True, 'import of t5'),
    ('scikit-learn', 'sklearn', True, 'import of t5'),
    ('torch', 'torch', False, 'extra [torch]'),
    ('transformers', 'transformers', False, 'extra [torch]'),
    ('safetensors', 'safetensors', False, 'extra [torch]'),
    ('lm-eval', 'lm_eval', False, 'extra [eval]'),
    ('libtpu', 'libtpu', False, 'extra [tpu]'),
    ('jax-cuda12-plugin', 'jax_cuda12_plugin', False, 'extra [gpu]'),
    ('pytest', 'pytest', False, 'extra [test]'),
    ('hypothesis', 'hypothesis', False, 'extra [test]'),
)
# folder in site-packages -> the one distribution that should own it
OWNERS = {'seqio': 'seqio', 'tensorflow_datasets': 'tensorflow-datasets'}
SUPPORTED_PYTHONS = ((3, 11), (3, 12), (3, 13))


class Package(NamedTuple):
  """One line of the report: `version` is None where the package is missing, `note` says what is wrong with it."""
  name: str
  version: Optional[str]
  needed: bool
  purpose: str
  note: str


def report() -> str:
  """The environment in words: versions, devices and hosts, then every problem with the command that repairs it."""
  packages = [inspect_package(*row, ranges=declared_ranges()) for row in PACKAGES]
  devices, device_problems = _devices()
  cluster, cluster_problems = cluster_lines()
  problems = (_python_problems() + _package_problems(packages) + ownership_problems() + device_problems +
              cluster_problems)
  lines = [f'python {platform.python_version()} at {sys.executable}, {platform.system()} {platform.machine()}, '
           f'{os.cpu_count()} CPUs', _own_version(), '', 'Packages']
  for package in packages:
    state = package.version or ('MISSING' if package.needed else 'not installed')
    lines.append(f'  {package.name:<20} {state:<14} {package.note or package.purpose}')
  lines += ['', 'Devices', *(f'  {line}' for line in devices), '', 'Other processes', *(f'  {line}' for line in cluster), '']
  if problems:
    lines.append(f'{len(problems)} problem{"s" * (len(problems) > 1)}')
    for problem in problems:
      lines += [f'  * {line}' if i == 0 else f'      {line}' for i, line in enumerate(problem.splitlines())]
  else:
    lines.append('Nothing is missing.')
  return '\n'.join(lines)


def owners(folder: str) -> Dict[str, Tuple[str, List[str]]]:
  """The distributions that installed files into a top-level folder: {name: (version, paths of those files)}.

  Args:
    folder: name of a folder of site-packages, such as 'seqio'.
  """
  found = {}
  for distribution in metadata.distributions():
    # Not `distribution.files`: it is slow, and from Python 3.12 on it leaves out the files that are gone.
    lines = [line for line in (distribution.read_text('RECORD') or '').splitlines() if f'{folder}/' in line]
    files = [row[0] for row in csv.reader(lines) if row[0].startswith(f'{folder}/')]
    if files:
      paths = [str(distribution.locate_file(file)) for file in files]
      found[distribution.metadata['Name'].lower().replace('_', '-')] = (distribution.version, paths)
  return found


def ownership_problems() -> List[str]:
  """What is wrong with the folders in `OWNERS`: shared with a nightly build, or with files gone after its removal."""
  intruders, damaged = [], []
  for folder, rightful in OWNERS.items():
    found = owners(folder)
    others = sorted(set(found) - {rightful})
    if others:
      shared = sum(len(found[name][1]) for name in others)
      intruders += others
      yours = f'{rightful} {found[rightful][0]} and ' if rightful in found else ''
      damaged.append((folder, f'{yours}{" and ".join(f"{name} {found[name][0]}" for name in others)} write the same '
                      f'folder {folder}/ ({shared} files); which of them runs depends on the order of installation.'))
    elif rightful in found and not all(os.path.exists(path) for path in found[rightful][1]):
      damaged.append((folder, f'files of {rightful} {found[rightful][0]} are gone from {folder}/, as after the removal '
                      'of a nightly build that shared it.'))
  if not damaged:
    return []
  commands = []
  if intruders:
    commands.append(f'{_pip()} uninstall --yes {" ".join(sorted(intruders))}')
  wanted = ' '.join(_pin(OWNERS[folder]) for folder, _ in damaged)
  commands.append(f'{_pip()} install --no-deps --force-reinstall {wanted}')
  return ['\n'.join([*(text for _, text in damaged), 'repair:', *commands])]


def declared_ranges() -> Dict[str, str]:
  """Version ranges that setup.py declares, read from this installation: {distribution in lower case: '>=1,<2'}."""
  try:
    from packaging.requirements import Requirement  # pylint: disable=g-import-not-at-top
    declared = [Requirement(text) for text in metadata.requires('openmoe_jax') or ()]
  except (ImportError, metadata.PackageNotFoundError):
    return {}
  return {requirement.name.lower(): str(requirement.specifier) for requirement in declared if not requirement.marker}


def inspect_package(name: str, module: str, needed: bool, purpose: str, ranges: Dict[str, str]) -> Package:
  """Looks one package up without importing it."""
  try:
    version = metadata.version(name)
  except metadata.PackageNotFoundError:
    # An import may still succeed: a nightly build, or a folder that happens to have the name (gin/ of a checkout).
    return Package(name, None, needed, purpose, f'for {purpose}')
  if not _importable(module):
    return Package(name, version, needed, purpose, f'BROKEN: installed, but the module {module} is not there')
  if ranges.get(name.lower()) and not _within(version, ranges[name.lower()]):
    return Package(name, version, needed, purpose, f'OUTSIDE the tested range {ranges[name.lower()]}')
  return Package(name, version, needed, purpose, '')


def _importable(module: str) -> bool:
  """Whether the module's file can be found; imports its parent packages only (gin before gin.config)."""
  try:
    spec = importlib.util.find_spec(module)
  except (ImportError, ValueError):
    return False
  return spec is not None and (spec.origin is not None or spec.submodule_search_locations is not None)


def _within(version: str, specifier: str) -> bool:
  from packaging.specifiers import SpecifierSet  # pylint: disable=g-import-not-at-top
  return SpecifierSet(specifier).contains(version, prereleases=True)


def _package_problems(packages: List[Package]) -> List[str]:
  problems = []
  missing = [package.name for package in packages if package.needed and package.version is None]
  if missing:
    text = f'missing: {", ".join(missing)}.'
    if 'gin-config' in missing:
      text += ('\nWithout gin-config, `import gin` may still succeed and find an empty namespace (the folder gin/ of a '
               'checkout): it is not gin.')
    if 'tensorflow' in missing:
      text += '\nWithout tensorflow the model runs, but no task can be read: training and evaluation need it.'
    text += '\nrepair:'
    others = [name for name in missing if name != 't5']
    if others:
      text += f'\n{_pip()} install {" ".join(map(_pin, others))}'
    if 't5' in missing:  # Its declared dependencies include the nightly builds.
      text += f'\n{_pip()} install --no-deps {_pin("t5")}'
    problems.append(text)
  for package in packages:
    if package.note.startswith('BROKEN') and package.name not in OWNERS.values():  # Those have a problem of their own.
      problems.append(f'{package.name} {package.version} is installed, but its files are gone.\nrepair:\n'
                      f'{_pip()} install --no-deps --force-reinstall {package.name}=={package.version}')
    elif package.note.startswith('OUTSIDE'):
      problems.append(f'{package.name} {package.version} is outside of the tested range '
                      f'{package.note.split()[-1]}.\nrepair:\n'
                      f"{_pip()} install '{package.name}{package.note.split()[-1]}'")
  return problems


def _python_problems() -> List[str]:
  if sys.version_info[:2] in SUPPORTED_PYTHONS:
    return []
  return [f'Python {platform.python_version()} is not supported: use 3.11, 3.12 or 3.13.']


def _devices() -> Tuple[List[str], List[str]]:
  """Lines about the devices jax sees, and what is wrong with them. Starts jax's back end."""
  try:
    import jax  # pylint: disable=g-import-not-at-top
    devices = jax.devices()
    hosts, host, local = jax.process_count(), jax.process_index(), jax.local_device_count()
  except Exception as error:  # pylint: disable=broad-exception-caught
    # A missing jax, a driver that does not match, a TPU another process holds: whatever it is, it belongs in the report.
    text = f'{type(error).__name__}: {" ".join(str(error).split())}'
    return [f'none: {text}'], [f'jax finds no device: {text}']
  kinds = sorted({device.device_kind for device in devices})
  lines = [f'{len(devices)} {devices[0].platform} device{"s" * (len(devices) > 1)} ({", ".join(kinds)})',
           f'{hosts} host{"s" * (hosts > 1)}; this is host {host}, with {local} of the devices']
  problems = []
  if devices[0].platform == 'cpu' and not os.environ.get('JAX_PLATFORMS', '').startswith('cpu'):
    for present, what, extra in ((glob.glob('/dev/nvidia[0-9]*'), 'an NVIDIA GPU', 'gpu'),
                                 (glob.glob('/dev/accel[0-9]*'), 'a TPU', 'tpu')):
      if present:
        problems.append(f'this machine has {what} ({present[0]}), but jax sees the CPU only.\nrepair:\n'
                        f"{_pip()} install 'openmoe_jax[{extra}]'")
  return lines, problems


def cluster_lines(env: Mapping[str, str] = os.environ) -> Tuple[List[str], List[str]]:
  """The variables that make a process one of several, and what is wrong with them."""
  lines = [f'{name} = {value!r}' for name, value in cluster_environment.variables(env).items()]
  return (lines or ['no variable of JAX, SLURM, Open MPI or a TPU slice is set: one process'],
          cluster_environment.problems(env))


def _own_version() -> str:
  where = os.path.dirname(os.path.abspath(__file__))
  try:
    return f'openmoe_jax {metadata.version("openmoe_jax")} in {where}'
  except metadata.PackageNotFoundError:
    return f'openmoe_jax, not installed, in {where}'


def _pin(name: str) -> str:
  """`name==version` of what is installed, or the declared range quoted for a shell, or the bare name."""
  try:
    return f'{name}=={metadata.version(name)}'
  except metadata.PackageNotFoundError:
    declared = declared_ranges().get(name.lower())
    return f"'{name}{declared}'" if declared else name


def _pip() -> str:
  return f'{sys.executable} -m pip'
