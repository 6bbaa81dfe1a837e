"""The study of memory: its raw files are what their names say, and it measures what it starts."""

from pyarrow import parquet
import pytest

from openmoe_jax.tools import preparation_study

pytestmark = pytest.mark.slow  # many programs are compiled, or processes started


@pytest.mark.parametrize('kind, groups', [('parquet', 3), ('parquet, one row group', 1)])
def test_parquet_files(tmp_path, kind, groups):
  metadata = parquet.read_metadata(preparation_study.write(tmp_path, kind, 15e6))
  assert metadata.num_row_groups == groups and 2000 < metadata.num_rows < 3000


def test_it_measures_processes(capsys):
  preparation_study.main(['--gigabytes=.004', '--processes=2', '--formats=jsonl;jsonl.zst'])
  *_, plain, zipped = [line.split(' | ') for line in capsys.readouterr().out.splitlines()]
  assert plain[0] == '| .jsonl' and zipped[0] == '| .jsonl.zst'
  for row in (plain, zipped):
    size, unit = row[-1].strip(' |').split()
    assert unit == 'MB' and 30 < float(size) < 600, 'a Python process with pyarrow, or three'
