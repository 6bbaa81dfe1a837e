"""The notebook in docs/ runs: the source of its code cells, one after the other, on a tiny model."""

import ast
import json
import pathlib

import pandas
import pytest

from tests import tiny_checkpoint

NOTEBOOK = pathlib.Path(__file__).resolve().parents[1] / 'docs' / 'routing.ipynb'


def sources():
  cells = json.loads(NOTEBOOK.read_text())['cells']
  return [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']


@pytest.mark.slow
def test_the_code_cells_run(tmp_path, monkeypatch):
  monkeypatch.setenv('MODEL_DIR', tiny_checkpoint.write(tmp_path / 'run'))
  names, shown = {}, []
  for source in sources():
    tree = ast.parse(source)
    if isinstance(tree.body[-1], ast.Expr):  # what a cell ends with is shown
      tree.body[-1] = ast.Assign([ast.Name('shown_by_cell', ast.Store())], tree.body[-1].value)
    exec(compile(ast.fix_missing_locations(tree), str(NOTEBOOK), 'exec'), names)  # pylint: disable=exec-used
    shown.append(names.pop('shown_by_cell', None))
  tables = [table for table in shown if isinstance(table, (pandas.DataFrame, pandas.Series))]
  assert len(tables) == 5 and all(len(table) and table.notna().all(axis=None) for table in tables)


def test_its_outputs_are_small():
  assert NOTEBOOK.stat().st_size < 30_000
