"""What evaluations found, kept on disk while they go on: a file for each step and task, written once it is whole.

    OUTPUT/results/<step>/<task>.json            figures and settings
    OUTPUT/predictions/<step>/<task>.jsonl       a line a question
"""

import json
import re
from typing import Any, Dict, List, Mapping, Optional

from openmoe_jax import paths
from openmoe_jax.config import EvalConfig, require, to_dict
from openmoe_jax.task_eval.suite import Result

# Where things lie, and what only decides how fast an answer comes.
_WITHOUT_EFFECT = ('tasks', 'perplexity', 'period', 'checkpoint', 'output_dir', 'data_dir', 'bigbench_data')
_ONLY_SPEED = ('batch_size',)


def settings_of(settings: EvalConfig, **more: Any) -> Dict[str, Any]:
  """Everything of the settings that a result depends on; `more` is what else does."""
  left_out = _WITHOUT_EFFECT + (_ONLY_SPEED if settings.capacity_mode == 'none' else ())
  return {**{name: value for name, value in to_dict(settings).items() if name not in left_out}, **more}


class Results:
  """The folder of results.

  Args:
    folder: local or gs://.
    model: what tells the evaluated model from another one, as plain data; a folder holds results of one model.

  Raises:
    ConfigError: the folder holds results of another model.
  """

  def __init__(self, folder: paths.PathLike, model: Mapping[str, Any]):
    self.folder = paths.path(folder)
    file = self.folder / 'model.json'
    if file.exists():
      known = json.loads(file.read_text())
      require(known == json.loads(json.dumps(model)), f'EvalConfig.output_dir = {str(folder)!r} holds results of another '
              f'model ({known.get("checkpoint")}); give another folder, or delete it')
    self._model = model

  def find(self, step: int, name: str, settings: Mapping[str, Any]) -> Optional[Dict[str, Any]]:
    """The record of an earlier evaluation with the same settings, or None."""
    file = self._file('results', step, name, '.json')
    if not file.exists():
      return None
    record = json.loads(file.read_text())
    return record if record['settings'] == json.loads(json.dumps(settings)) else None

  def add(self, step: int, tokens: Optional[int], result: Result, settings: Mapping[str, Any], write: bool = True
          ) -> Dict[str, Any]:
    """Writes a result (if `write`), in place of one with other settings, and returns its record."""
    record = {'task': result.name, 'step': step, 'tokens': tokens, 'figures': result.figures,
              'num_examples': result.num_examples, 'num_cut': result.num_cut, 'seconds': round(result.seconds, 2),
              'settings': dict(settings)}
    if not write:
      return record
    if not (self.folder / 'model.json').exists():
      paths.write_text(self.folder / 'model.json', json.dumps(self._model, indent=1) + '\n')
    if result.predictions:
      lines = ''.join(json.dumps(prediction, ensure_ascii=False) + '\n' for prediction in result.predictions)
      paths.write_text(self._file('predictions', step, result.name, '.jsonl'), lines)
    paths.write_text(self._file('results', step, result.name, '.json'), json.dumps(record, indent=1) + '\n')
    return record

  def all(self) -> List[Dict[str, Any]]:
    """All records, by step and task."""
    records = []
    for step in sorted((name for name in paths.entries(self.folder / 'results') if name.isdigit()), key=int):
      for name in paths.entries(self.folder / 'results' / step):
        if name.endswith('.json'):
          records.append(json.loads((self.folder / 'results' / step / name).read_text()))
    return records

  def _file(self, kind: str, step: int, name: str, ending: str) -> Any:
    return self.folder / kind / str(step) / (re.sub(r'[^\w.-]+', '_', name) + ending)
