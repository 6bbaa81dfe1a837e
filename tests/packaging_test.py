"""The lock file, setup.py, the Makefile's refusals, and what a built wheel holds and can do."""

from importlib import metadata
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import zipfile

from openmoe_jax import environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
import pytest
import setuptools

ROOT = pathlib.Path(__file__).resolve().parent.parent
PIN = re.compile(r'(?P<name>[A-Za-z0-9._-]+)==(?P<version>[0-9]+(\.[0-9]+)*(\.post[0-9]+)?)')


LOCKS = ('requirements.lock', 'requirements-torch.lock', 'requirements-eval.lock', 'requirements-tpu.lock')


def lock_lines(file='requirements.lock'):
  lines = (ROOT / file).read_text().splitlines()
  return [line for line in lines if line and not line.startswith('#')]


def locked(file='requirements.lock'):
  """{canonical name: version}."""
  pins = [PIN.match(line) for line in lock_lines(file)]
  return {canonicalize_name(pin['name']): pin['version'] for pin in pins}


def setup_arguments(monkeypatch, version=None, command='egg_info'):
  """What setup.py hands to setuptools, on a Python of the given version."""
  captured = {}
  monkeypatch.setattr(setuptools, 'setup', lambda **arguments: captured.update(arguments))
  monkeypatch.setattr(sys, 'argv', ['setup.py', command])
  if version:
    monkeypatch.setattr(sys, 'version_info', (*version, 0, 'final', 0))
    monkeypatch.setattr(sys, 'version', f'{version[0]}.{version[1]}.0 (a compiler)')
  runpy.run_path(str(ROOT / 'setup.py'), run_name='__main__')
  return captured


@pytest.mark.parametrize('file', LOCKS)
def test_lock_is_public_releases_only(file):
  lines = lock_lines(file)
  for line in lines:
    assert re.fullmatch(PIN.pattern + r'(; python_version [<>=]+ "3\.1[0-9]")?', line), (
        f'{line!r} is not a plain pin of a public release')
  names = [canonicalize_name(PIN.match(line)['name']) for line in lines]
  assert len(names) == len(set(names)), 'a package is pinned twice'
  assert not [name for name in names if 'nightly' in name]
  assert not re.search(r'://|--index|--find-links|git\+', '\n'.join(lines))


def test_lock_satisfies_setup(monkeypatch):
  arguments = setup_arguments(monkeypatch)
  pins = locked()
  for text in arguments['install_requires'] + arguments['extras_require']['test']:
    requirement = Requirement(text)
    assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_torch_lock_only_adds(monkeypatch):
  pins, more = locked(), locked('requirements-torch.lock')
  assert not set(pins) & set(more), 'a package is pinned in both files'
  for text in setup_arguments(monkeypatch)['extras_require']['torch']:
    requirement = Requirement(text)
    assert requirement.specifier.contains(more[canonicalize_name(requirement.name)]), text


def test_eval_lock_adds_and_agrees(monkeypatch):
  pins, torch, more = map(locked, LOCKS[:3])
  assert not set(pins) & set(more), 'a package is pinned in both files'
  both = set(torch) & set(more)
  assert {name: torch[name] for name in both} == {name: more[name] for name in both}
  assert not set(more) & {'torch', 'transformers', 'accelerate'}
  requirement, = map(Requirement, setup_arguments(monkeypatch)['extras_require']['eval'])
  assert requirement.specifier.contains(more[canonicalize_name(requirement.name)])


def test_tpu_lock_is_what_jax_asks_for():
  """The TPU compiler and jaxlib must be of one version: jax names it."""
  pins, more = locked(), locked('requirements-tpu.lock')
  assert metadata.version('jax') == pins['jax'] and not set(pins) & set(more)
  wanted = [r for r in map(Requirement, metadata.requires('jax')) if r.marker and r.marker.evaluate({'extra': 'tpu'})]
  (libtpu,) = [r for r in wanted if r.name == 'libtpu']
  assert set(more) == {'libtpu'} and libtpu.specifier.contains(more['libtpu'])


@pytest.mark.lm_eval
def test_eval_lock_is_all_that_lm_eval_asks_for():
  pytest.importorskip('lm_eval', reason='lm-eval is NOT installed: requirements-eval.lock is not checked here')
  pins, wanted, seen = {**locked(), **locked('requirements-eval.lock')}, [Requirement('lm-eval')], set()
  while wanted:
    requirement = wanted.pop()
    name = canonicalize_name(requirement.name)
    assert name in pins, requirement
    assert requirement.specifier.contains(pins[name]) or name == 'python-dateutil', requirement  # see the file
    if (name, *sorted(requirement.extras)) in seen:
      continue
    seen.add((name, *sorted(requirement.extras)))
    extras = requirement.extras or {''}
    wanted += [needed for needed in map(Requirement, metadata.requires(name) or ())
               if needed.marker is None or any(needed.marker.evaluate({'extra': extra}) for extra in extras)]
  assert ('datasets',) in seen and not [name for name, *_ in seen if name in ('torch', 'transformers')]


@pytest.mark.parametrize('folder', sorted(environment.OWNERS))
def test_one_distribution_owns(folder):
  assert list(environment.owners(folder)) == [environment.OWNERS[folder]]


def test_ranges(monkeypatch):
  arguments = setup_arguments(monkeypatch)
  python = Requirement(f'python{arguments["python_requires"]}').specifier
  assert [minor for minor in range(6, 17) if python.contains(f'3.{minor}.1')] == [11, 12, 13]
  jax = next(r for r in map(Requirement, arguments['install_requires']) if r.name == 'jax').specifier
  versions = ['0.9.2', '0.10.0', '0.10.2', '0.11.2', '0.12.0.1', '0.13.0']
  assert [version for version in versions if jax.contains(version)] == versions[1:-1]
  assert any(Requirement(text).name == 't5' for text in arguments['install_requires'])


def test_extras_and_urls(monkeypatch):
  arguments = setup_arguments(monkeypatch)
  assert set(arguments['extras_require']) == {'tpu', 'gpu', 'torch', 'eval', 'beam', 'test'}
  everything = arguments['install_requires'] + sum(arguments['extras_require'].values(), [])
  assert all(Requirement(text).url is None for text in everything)
  for name in ('tpu', 'gpu'):
    jax, = map(Requirement, arguments['extras_require'][name])
    assert jax.name == 'jax' and jax.specifier == Requirement(arguments['install_requires'][6]).specifier


@pytest.mark.parametrize('version', [(3, 10), (3, 14)])
def test_other_pythons_are_refused(monkeypatch, version):
  """Building stops with one line; the metadata names no package to download before pip reads python_requires."""
  with pytest.raises(SystemExit) as refusal:
    setup_arguments(monkeypatch, version, 'bdist_wheel')
  assert refusal.value.code == f'openmoe_jax needs Python 3.11, 3.12 or 3.13; this is Python {version[0]}.{version[1]}.0.'
  assert setup_arguments(monkeypatch, version)['install_requires'] == []


def test_make_refuses_in_one_line(tmp_path):
  python = tmp_path / 'python'
  python.write_text('#!/bin/sh\nexit 1\n')
  python.chmod(0o755)
  # Under `make test` this is a make inside a make, which would announce the folder it enters.
  result = subprocess.run(['make', '--no-print-directory', 'test', f'PYTHON={python}', f'VENV={tmp_path}/venv'],
                          cwd=ROOT, text=True, capture_output=True, check=False)
  message, *rest = [line for line in result.stderr.splitlines() if not line.startswith('make')]
  assert result.returncode != 0 and not rest and not result.stdout
  assert message == (f'openmoe_jax needs Python 3.11, 3.12 or 3.13 with venv; {python} is not one. '
                     'Name it: make PYTHON=/path/to/python')
  assert not (tmp_path / 'venv').exists()


def test_gin_folder_holds_no_modules():
  assert not list((ROOT / 'gin').rglob('*.py')), 'gin/*.py would shadow gin-config'


@pytest.fixture(name='wheel', scope='module')
def built_wheel(tmp_path_factory):
  """A wheel of this checkout, built from a copy: setuptools leaves build/ and *.egg-info behind."""
  folder = tmp_path_factory.mktemp('wheel')
  for name in ('openmoe_jax', 'gin', 'tasks', 'tools'):
    shutil.copytree(ROOT / name, folder / 'source' / name, ignore=shutil.ignore_patterns('__pycache__', '.*'))
  for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, folder / 'source')
  subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', folder,
                  folder / 'source'], check=True)
  path, = folder.glob('*.whl')
  return path


def test_wheel_content(wheel):
  """Every module, gin file and vocabulary of the checkout is there, under the one package, and nothing else is."""
  source, wanted = wheel.parent / 'source', set()
  for folder, prefix in (('openmoe_jax', ''), ('gin', 'openmoe_jax/'), ('tasks', 'openmoe_jax/'),
                         ('tools', 'openmoe_jax/')):
    for path in (source / folder).rglob('*'):
      if path.suffix in ('.py', '.gin') or path.parent.name == 'vocabulary' and path.is_file():
        wanted.add(prefix + path.relative_to(source).as_posix())
  names = zipfile.ZipFile(wheel).namelist()
  assert {name for name in names if '.dist-info/' not in name} == wanted
  assert 'openmoe_jax/gin/recipes/demo.gin' in wanted and any(name.endswith('.model') for name in wanted)
  assert any(name.endswith('dist-info/licenses/LICENSE') or name.endswith('dist-info/LICENSE') for name in names)


@pytest.mark.slow
def test_sdist_gives_the_same_wheel(wheel, tmp_path):
  source = wheel.parent / 'source'
  subprocess.run([sys.executable, 'setup.py', '-q', 'sdist', '-d', tmp_path], cwd=source, check=True)
  archive, = tmp_path.glob('*.tar.gz')
  subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path,
                  archive], check=True)
  rebuilt, = tmp_path.glob('*.whl')
  assert sorted(zipfile.ZipFile(rebuilt).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_installed_wheel_trains_the_demo_from_an_empty_directory(wheel, tmp_path):
  site, here = tmp_path / 'site', tmp_path / 'empty'
  here.mkdir()
  subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', site, wheel], check=True)
  environ = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}  # One device, as a user has.
  environ.update(PYTHONPATH=str(site), JAX_PLATFORMS='cpu')
  modules = subprocess.run(
      [sys.executable, '-c', 'import openmoe_jax.tasks as a, openmoe_jax.tools as b; print(a.__file__, b.__file__)'],
      cwd=here, env=environ, text=True, capture_output=True, check=True).stdout.split()
  assert modules == [str(site / 'openmoe_jax' / folder / '__init__.py') for folder in ('tasks', 'tools')]
  train = subprocess.run(
      [site / 'bin' / 'openmoe-train', '--gin_file=recipes/demo.gin', '--model_dir=run', '--gin.TRAIN_STEPS=2',
       '--gin.OptimizerConfig.warmup_steps=1', '--gin.EVAL_PERIOD=2', '--gin.DataConfig.eval_batches=1'],
      cwd=here, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
  assert train.returncode == 0, train.stdout
  assert (here / 'run' / 'checkpoints' / '2').is_dir(), sorted(map(str, here.rglob('*')))[:50]
  assert list((here / 'run').glob('*.png')), 'no picture of the loss curve'
