"""Results as text: a Markdown table beside the paper's figures, and one line a task."""

from typing import Any, List, Mapping, Sequence

from openmoe_jax.task_eval.published import PUBLISHED, bigbench_tasks

# The figure that stands for a task, where it has several: the first of these that it has.
MAIN_FIGURES = ('pass@1', 'em', 'accuracy', 'bleu', 'normalised', 'perplexity', 'exact_match')


def main_figure(record: Mapping[str, Any]) -> str:
  """Name of the figure that stands for a task."""
  figures = record['figures']
  if record['task'].startswith('perplexity'):
    return 'perplexity'
  return next((name for name in MAIN_FIGURES if name in figures), next(iter(figures)))


def line(record: Mapping[str, Any]) -> str:
  """'boolq: accuracy 61.2, auc-pr 0.7 (3,270 questions, 41 s)'."""
  main = main_figure(record)
  others = [name for name in record['figures'] if name != main and name not in bigbench_tasks()]
  figures = ', '.join(f'{name} {record["figures"][name]:.4g}' for name in (main, *others))
  cut = f', {record["num_cut"]:,} of them cut to fit the window' if record['num_cut'] else ''
  kind = 'target tokens' if record['task'].startswith('perplexity') else 'questions'
  return f'{record["task"]}: {figures} ({record["num_examples"]:,} {kind}{cut}, {record["seconds"]:.0f} s)'


def markdown(records: Sequence[Mapping[str, Any]], name: str) -> str:
  """The newest step's results as a Markdown table, published figures beside them, and all steps below.

  Args:
    records: of `results.Results.all`.
    name: of the model.
  """
  last = max(record['step'] for record in records)
  newest = [record for record in records if record['step'] == last]
  models = list(dict.fromkeys(model for record in newest for model in PUBLISHED.get(record['task'], ('', {}))[1]))
  lines = [f'# {name}, step {last:,}', '', f'Shares are in percent. Published: the OpenMoE paper (arXiv 2402.01739), whose '
           'prompts and numbers of examples may differ.' if models else 'Shares are in percent.', '']
  lines += _table(['task', 'figure', f'step {last:,}', 'questions', *models],
                  [[record['task'], figure, f'{record["figures"][figure]:.2f}', _questions(record),
                    *_published(record['task'], figure, models)]
                   for record in newest for figure in record['figures'] if figure not in bigbench_tasks()])
  for record in newest:
    own = {task: score for task, score in record['figures'].items() if task in bigbench_tasks()}
    if own:
      known = bigbench_tasks()
      columns = list(next(iter(known.values())))
      lines += ['', '## BIG-bench-Lite by task', '',
                f'Normalised: 0 is guessing, 100 perfect; {record["settings"]["shots"]} shots, published figures 3.', '']
      lines += _table(['task', f'step {last:,}', *columns],
                      [[task, f'{score:.2f}', *(f'{known[task][model]:.2f}' for model in columns)]
                       for task, score in own.items()])
  steps = sorted({record['step'] for record in records})
  if len(steps) > 1:
    tasks = list(dict.fromkeys(record['task'] for record in records))
    by_place = {(record['step'], record['task']): record for record in records}
    lines += ['', '## By step', '']
    lines += _table(['step', 'tokens', *tasks],
                    [[f'{step:,}', next((f'{r["tokens"]:,}' for r in records if r['step'] == step and r['tokens']), ''),
                      *(_main(by_place.get((step, task))) for task in tasks)] for step in steps])
  return '\n'.join(lines) + '\n'


def _questions(record: Mapping[str, Any]) -> str:
  return f'{record["num_examples"]:,}' + (f' ({record["num_cut"]:,} cut)' if record['num_cut'] else '')


def _main(record: Any) -> str:
  return '' if record is None else f'{record["figures"][main_figure(record)]:.2f}'


def _published(task: str, figure: str, models: Sequence[str]) -> List[str]:
  name, figures = PUBLISHED.get(task, ('', {}))
  return [f'{figures[model]:.2f}' if figure == name and model in figures else '' for model in models]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
  return [f'| {" | ".join(cells)} |' for cells in (header, ['---'] * len(header), *rows)]
