"""Writes the tables of docs/configuration.md from the dataclasses and the gin files; a test holds them together.

  python -m openmoe_jax.tools.document_configuration docs/configuration.md

Text between `<!-- generated: NAME -->` and `<!-- end -->` is replaced, the rest of the file is left as it is.
"""

import dataclasses
import inspect
import os
import re
import sys
from typing import Dict, List, Optional, Sequence

from openmoe_jax import command_line, config, gin_utils
from openmoe_jax.analysis.parameters import count_parameters

_BLOCK = re.compile(r'(<!-- generated: (\w+) -->\n).*?(<!-- end -->)', re.DOTALL)
EVALUATIONS = 'recipes/eval_'  # recipes of openmoe-eval, which name no model
_WIRING = ('models/openmoe.gin', 'runs/pretrain.gin', 'runs/continue.gin', 'runs/finetune.gin', 'runs/eval.gin')


def main(argv: Optional[Sequence[str]] = None) -> None:
  (path,) = sys.argv[1:] if argv is None else argv
  with open(path, encoding='utf-8') as file:
    text = file.read()
  with open(path, 'w', encoding='utf-8') as file:
    file.write(fill(text))


def fill(text: str) -> str:
  """`text` with every generated part made anew."""
  makers = {'macros': macros, 'settings': settings, 'models': models, 'recipes': recipes,
            'evaluations': evaluations}
  return _BLOCK.sub(lambda found: found[1] + makers[found[2]]() + found[3], text)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [header, ['---'] * len(header), *rows]
  return ''.join(f'| {" | ".join(cell.replace("|", chr(92) + "|") for cell in line)} |\n' for line in lines)


def _gin_text(name: str) -> str:
  with open(os.path.join(gin_utils.gin_folder(), name), encoding='utf-8') as file:
    return file.read()


def macros() -> str:
  """Every macro of the models and runs: what it sets, its value there, and the comment behind it."""
  values: Dict[str, List[str]] = {}
  comments: Dict[str, str] = {}
  targets: Dict[str, List[str]] = {}
  for file in _WIRING:
    group = ''
    for line in _gin_text(file).splitlines():
      defined = re.match(r'([A-Z_]+) = (.*?)(?:\s+# (.*))?$', line)
      if defined:
        name, value, comment = defined.groups()
        where = '' if name not in values else f' in {file}'
        values.setdefault(name, []).append(('required' if value == '%gin.REQUIRED' else f'`{value}`') + where)
        comments.setdefault(name, comment or '')
      group = line[:-1] if re.match(r'\w+:$', line) else group if line.startswith(' ') else ''
      used = re.match(r'\s*([\w.]+) = %([A-Z_]+)', line)
      if used:
        targets.setdefault(used[2], []).append(f'{group}.{used[1]}' if group else used[1])
  rows = [(f'`{name}`', '; '.join(values[name]), ', '.join(f'`{t}`' for t in targets.get(name, ())), comments[name])
          for name in values]
  return _table(('macro', 'default', 'sets', ''), rows)


def setting_docs(cls: type) -> Dict[str, str]:
  """{field: what the `Attributes:` of the class's docstring say about it}; one entry may be about several."""
  entries: List[str] = []
  for line in inspect.cleandoc(cls.__doc__ or '').partition('Attributes:')[2].splitlines():
    if re.match(r' {2}\S', line):
      entries.append(line.strip())
    elif entries:
      entries[-1] += f' {line.strip()}'
  name = r'\w+(?: \([^)]*\))?'  # eval_batch_size (0: batch_size)
  docs = {}
  for entry in entries:
    names, text = re.match(rf'({name}(?:, {name})*): (.*)', entry).groups()
    docs.update(dict.fromkeys(re.findall(r'\w+', re.sub(r'\([^)]*\)', '', names)), text.strip()))
  return docs


def settings() -> str:
  """A table for every class of settings."""
  text = ''
  for name, cls in gin_utils.CLASSES.items():
    docs = setting_docs(cls)
    summary = (cls.__doc__ or '').strip().splitlines()[0]
    rows = []
    for field in dataclasses.fields(cls):
      if field.name in gin_utils.setting_names(cls):
        default = command_line.field_default(field)
        shown = 'required' if default is dataclasses.MISSING else f'`{command_line.literal(config.to_dict(default))}`'
        rows.append((f'`{field.name}`', shown, docs.get(field.name, '')))
    text += f'\n### {name}\n\n{summary}\n\n' + _table(('setting', 'default', ''), rows)
  return text + '\n'


def _load(name: str) -> Optional[config.RunConfig]:
  try:
    return gin_utils.load_run_config([name], check_required=False)
  except config.ConfigError:
    return None  # a part of other files, without a model


def models() -> str:
  """Every model with its counts."""
  rows = []
  for name in gin_utils.package_gin_files():
    run = _load(name) if name.startswith('models/') else None
    if run:
      counts, model = count_parameters(run.model), run.model
      experts = f'{model.num_experts} in every {_ordinal(model.moe_interval)} layer' if model.num_experts else '-'
      rows.append((f'`{name}`', f'{model.emb_dim} / {model.mlp_dim} / {model.num_heads} x {model.head_dim} / '
                   f'{model.num_layers}', experts, f'{counts.total:,}', f'{counts.active:,}',
                   f'{counts.active_without_input_embedding:,}'))
  return _table(('file', 'emb / mlp / heads / layers', 'experts', 'parameters', 'active', 'without input embedding'),
                rows)


def _ordinal(number: int) -> str:
  return {1: '', 2: '2nd', 3: '3rd'}.get(number, f'{number}th')


def recipes() -> str:
  """Every recipe with what it trains on."""
  rows = []
  for name in gin_utils.package_gin_files():
    if name.startswith('recipes/') and not name.startswith(EVALUATIONS):
      head, original = describe(name)
      run = _load(name)
      lengths = ' + '.join(f'{length}' for length in run.data.task_feature_lengths.values())
      mesh = f'{run.mesh.expert} x {run.mesh.model}'
      rows.append((f'`{name}`', head, f'`{run.data.mixture_or_task}`', lengths,
                   f'{run.data.batch_size} / {run.train.num_microbatches}', f'{run.train.train_steps:,}', mesh,
                   original))
  return _table(('recipe', 'what', 'mixture or task', 'lengths', 'batch / microbatches', 'steps', 'expert x model',
                 'original'), rows)


def evaluations() -> str:
  """Every recipe of openmoe-eval with its tasks."""
  rows = []
  for name in gin_utils.package_gin_files():
    if name.startswith(EVALUATIONS):
      tasks = gin_utils.load_settings([name])['eval']['tasks']
      rows.append((f'`{name}`', describe(name)[0], ', '.join(f'`{task}`' for task in tasks)))
  return _table(('recipe', 'what', 'tasks'), rows)


def describe(name: str) -> Sequence[str]:
  """A recipe's first comment line, and the name of the original's gin file if one is given."""
  comment: List[str] = []
  for line in _gin_text(name).splitlines():
    if not line.startswith('#'):
      break
    comment.append(line[1:].strip())
  original = re.search(r'Original: (\S+\.gin)', ' '.join(comment))
  return comment[0], f'`{original[1]}`' if original else ''


if __name__ == '__main__':
  main()
