"""The environment report: on a good installation, and on installations broken in the ways that happen."""

import importlib.util
import os
import subprocess
import sys
from importlib import metadata

from openmoe_jax import environment
import pytest


def distribution(site, name, version, files):
  """Writes an installed package's metadata and files into a site-packages folder."""
  folder = site / f'{name.replace("-", "_")}-{version}.dist-info'
  folder.mkdir(parents=True)
  (folder / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
  (folder / 'RECORD').write_text(''.join(f'{file},,\n' for file in files))
  for file in files:
    (site / file).parent.mkdir(parents=True, exist_ok=True)
    (site / file).write_text('')


@pytest.fixture(name='site')
def only_this_site(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, 'path', [str(tmp_path)])
  return tmp_path


def test_good_installation():
  text = environment.report()
  lines = text.splitlines()
  for name in ('jax', 'flax', 'tensorflow', 'seqio', 't5', 'gin-config'):
    assert any(line.split()[:2] == [name, metadata.version(name)] for line in lines), text
  assert 'devices (cpu)' in text and '1 host; this is host 0' in text
  assert lines[-1] == 'Nothing is missing.', text


def test_shared_folders_are_reported_with_their_repair(site):
  distribution(site, 'seqio', '0.0.20', ['seqio/__init__.py', 'seqio/utils.py'])
  distribution(site, 'seqio-nightly', '0.0.18.dev1', ['seqio/__init__.py', 'seqio/utils.py'])
  distribution(site, 'tensorflow-datasets', '4.9.10', ['tensorflow_datasets/__init__.py'])
  distribution(site, 'tfds_nightly', '4.9.2.dev2', ['tensorflow_datasets/__init__.py'])
  assert sorted(environment.owners('seqio')) == ['seqio', 'seqio-nightly']
  problem, = environment.ownership_problems()
  assert 'seqio 0.0.20 and seqio-nightly 0.0.18.dev1 write the same folder seqio/ (2 files)' in problem
  assert problem.splitlines()[-2:] == [
      f'{sys.executable} -m pip uninstall --yes seqio-nightly tfds-nightly',
      f'{sys.executable} -m pip install --no-deps --force-reinstall seqio==0.0.20 tensorflow-datasets==4.9.10']


def test_files_gone_after_removing_a_nightly(site):
  distribution(site, 'seqio', '0.0.20', ['seqio/__init__.py', 'seqio/utils.py'])
  (site / 'seqio' / 'utils.py').unlink()
  problem, = environment.ownership_problems()
  assert problem.splitlines()[-1].endswith('--force-reinstall seqio==0.0.20') and 'uninstall' not in problem


def test_one_owner_is_no_problem(site):
  distribution(site, 'seqio', '0.0.20', ['seqio/__init__.py'])
  distribution(site, 'other', '1.0', ['notseqio/__init__.py', 'other/seqio/file.py'])
  assert environment.ownership_problems() == []


@pytest.mark.parametrize('missing, said', [
    ('tensorflow', 'training and evaluation need it'), ('gin-config', 'find an empty namespace'),
    ('t5', '-m pip install --no-deps ')])
def test_missing_package(monkeypatch, missing, said):
  find = metadata.version

  def version(name):
    if name == missing:
      raise metadata.PackageNotFoundError(name)
    return find(name)
  monkeypatch.setattr(metadata, 'version', version)
  text = environment.report()
  assert f'missing: {missing}.' in text and said in text and '1 problem' in text


def test_empty_gin_namespace_is_not_gin(tmp_path, monkeypatch):
  """Metadata present, module replaced by the folder gin/ of a checkout: `import gin` works, gin does not."""
  (tmp_path / 'gin' / 'models').mkdir(parents=True)
  monkeypatch.setattr(sys, 'path', [str(tmp_path)])
  for name in [name for name in sys.modules if name.partition('.')[0] == 'gin']:
    monkeypatch.delitem(sys.modules, name)
  assert importlib.util.find_spec('gin') is not None
  package = environment.inspect_package('gin-config', 'gin.config', True, 'configuration files', {})
  assert package.version is None or package.note.startswith('BROKEN')


def test_version_outside_the_range():
  package = environment.inspect_package('jax', 'jax', True, 'the model', {'jax': '<0.1'})
  assert package.note == 'OUTSIDE the tested range <0.1'


def test_import_costs_nothing():
  """It must run where anything is missing, so it may import the standard library only."""
  command = ('import sys; import openmoe_jax.environment; '
             'print([m for m in sys.modules if m in ("jax", "tensorflow", "gin", "seqio", "numpy")])')
  result = subprocess.run([sys.executable, '-c', command], check=True, text=True, capture_output=True,
                          env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)})
  assert result.stdout.strip() == '[]'
