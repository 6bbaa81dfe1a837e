"""The tasks of lm-evaluation-harness that `openmoe-lm-eval` is asked for: by name, from YAML files, with local data.

The paper's 13 tasks are the group `openmoe_13`. lm-eval brings the tasks' definitions, not their data, which come from
the Hugging Face hub, or from files in its published layout:

  DATA_DIR/piqa/validation.jsonl      the fields and splits of the data set that lm-eval's task `piqa` names
"""

import re
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

from openmoe_jax import checkpoints, gin_utils, paths
from openmoe_jax.config import ConfigError, require

GROUP = 'openmoe_13'


class Published(NamedTuple):
  """Accuracies in percent, from the paper's table of lm-evaluation-harness."""
  title: str
  tiny_llama_1b: float
  open_llama_3b: float
  openmoe_8b: float


# By lm-eval's names. The paper's averages are the plain means of these columns, to 0.1.
PAPER = {
    'anli_r1': Published('ANLI-R1', 34.2, 33.0, 32.7),
    'anli_r2': Published('ANLI-R2', 32.4, 36.0, 33.2),
    'anli_r3': Published('ANLI-R3', 35.1, 38.0, 33.9),
    'hellaswag': Published('HellaSwag', 59.2, 52.0, 45.5),
    'winogrande': Published('WinoGrande', 59.1, 63.0, 60.3),
    'piqa': Published('PIQA', 73.3, 77.0, 74.2),
    'arc_easy': Published('ARC-Easy', 55.2, 68.0, 64.1),
    'arc_challenge': Published('ARC-Challenge', 30.1, 34.0, 30.3),
    'boolq': Published('BoolQ', 57.8, 66.0, 61.2),
    'truthfulqa_mc2': Published('TruthfulQA', 37.6, 35.0, 36.0),
    'openbookqa': Published('OpenbookQA', 21.8, 26.0, 24.6),
    'rte': Published('RTE', 51.9, 55.0, 53.4),
    'wic': Published('WiC', 50.1, 50.0, 49.8),
}
AVERAGE = Published('average', 45.9, 48.7, 46.1)


class Loaded(NamedTuple):
  """Arguments of `lm_eval.simple_evaluate`: Task and Group objects that hold their data, and what knows their names."""
  tasks: List[Any]
  task_manager: Any


def load(names: Sequence[str], include_path: Optional[str] = None, data_dir: Optional[str] = None) -> Loaded:
  """Tasks and groups with their data.

  Args:
    names: of lm-eval's tasks, groups and tags, which may hold * and ?; `openmoe_13`; or YAML files.
    include_path: a folder with more YAML files; they win over lm-eval's own of the same name.
    data_dir: see the module; a task without a folder there reads what its definition says.

  Raises:
    ConfigError: a name that nobody knows or that is given twice, or data that cannot be read.
  """
  from lm_eval.api.group import AggMetricConfig, Group
  from lm_eval.tasks import TaskManager
  for option, folder in (('--include_path', include_path), ('--data_dir', data_dir)):
    require(folder is None or paths.path(folder).is_dir(), f'{option}={folder} is not a folder')
  is_file = lambda name: name.endswith(('.yaml', '.yml'))
  for name in filter(is_file, names):
    require(paths.path(name).is_file(), f'--tasks: there is no file {name}')
    require(not re.search(r'^group\s*:', paths.path(name).read_text(), re.MULTILINE), f'--tasks: {name} defines a '
            'group, which lm-eval finds by name only: --include_path=DIR --tasks=GROUP')
  manager = TaskManager(include_path=include_path)
  wanted: Dict[str, None] = {}  # in order, each once
  for name in names:
    found = [name] if is_file(name) or name == GROUP else manager.match_tasks([name])
    require(found, f'--tasks: {name!r} is no task, group or tag of lm-eval, and no YAML file'
            f'{gin_utils.suggest(name, [GROUP, *manager.all_tasks])}')
    wanted.update(dict.fromkeys(found))
  tasks: List[Any] = []
  for name in wanted:
    if name == GROUP:
      group = Group(GROUP, aggregate_metric_list=[AggMetricConfig('acc', weight_by_size=False)])
      for task in PAPER:
        group.add(*_load(manager, task, data_dir))
      tasks.append(group)
    else:
      tasks += _load(manager, name, data_dir)
  try:
    manager.load(tasks)
  except ValueError as error:  # a task that is asked for twice
    raise ConfigError(f'--tasks: {checkpoints.one_line(error)}') from error
  return Loaded(tasks, manager)


def _load(manager: Any, name: str, data_dir: Optional[str]) -> List[Any]:
  """A task, a group, or the tasks of a tag."""
  spec: Any = name
  if name in manager.all_subtasks:  # within a group, for that is where settings of a known task can be changed
    spec = {'group': 'one', 'task': [_with_data(manager.task_index[name], data_dir)]}
  try:
    got = manager.load([spec])
  except Exception as error:  # pylint: disable=broad-exception-caught  # of datasets, yaml, jinja2 and lm-eval
    reason = checkpoints.one_line(error)
    if isinstance(error, (ConnectionError, FileNotFoundError)):
      reason += f'; local files go to --data_dir: DIR/{name}/SPLIT.jsonl'
    raise ConfigError(f'--tasks: {name} cannot be loaded: {reason}') from error
  if spec is not name:
    return list(got['tasks'].values())
  inner = {child for children in got['group_map'].values() for child in children}
  return [item for key, item in {**got['groups'], **got['tasks']}.items() if key not in inner]


def _with_data(entry: Any, data_dir: Optional[str]) -> Dict[str, Any]:
  """The task as lm-eval takes it, reading the .json and .jsonl files of its folder, if it has one."""
  folder = paths.path(data_dir) / entry.name if data_dir is not None else None
  if folder is None or not folder.is_dir():
    return {'task': entry.name}
  files = {file.rpartition('.')[0]: str(folder / file) for file in paths.entries(folder)
           if file.endswith(('.json', '.jsonl'))}
  wanted = entry.cfg.get('test_split') or entry.cfg.get('validation_split')
  require(wanted in files, f'--data_dir: {folder} has no {wanted}.jsonl, the split that {entry.name} is evaluated on')
  # The other splits only serve worked examples; those that are not there are not asked for.
  absent = {key: None for key in ('training_split', 'validation_split', 'test_split')
            if entry.cfg.get(key) not in files}
  return {'task': entry.name, 'dataset_path': 'json', 'dataset_name': None, 'dataset_kwargs': {'data_files': files},
          **absent}


def paper_table(results: Mapping[str, Any]) -> str:
  """A Markdown table of the 13 tasks beside the paper's figures.

  Args:
    results: those of `lm_eval.simple_evaluate`, of a run of the group.
  """
  def row(published, accuracy):
    return (f'| {published.title} | {100 * accuracy:.1f} | {published.openmoe_8b:.1f} | {published.open_llama_3b:.1f} '
            f'| {published.tiny_llama_1b:.1f} |')

  accuracies = {task: results['results'][task]['acc,none'] for task in PAPER}
  return '\n'.join(['| accuracy, % | this model | OpenMoE-8B (paper) | OpenLLaMA-3B (paper) | TinyLLaMA-1.1B (paper) |',
                    '|---|---|---|---|---|', *(row(PAPER[task], value) for task, value in accuracies.items()),
                    row(AVERAGE, sum(accuracies.values()) / len(accuracies))])
