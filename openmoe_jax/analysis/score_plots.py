"""Pictures of evaluation results: the paper's figure 3 with a model of one's own, and scores over training."""

from typing import Any, Dict, List, Mapping, Optional, Sequence

from openmoe_jax.analysis.plots import COLOURS, tokens_unit, styled_pyplot
from openmoe_jax.task_eval.published import FIGURE_3, PublishedModel
from openmoe_jax.task_eval.tables import main_figure

COST_FILE, STEPS_FILE = 'score_over_cost.png', 'scores_over_tokens.png'
_POINTS_PER_BILLION = 45.  # area of a dot


def cost_figure(own: Sequence[PublishedModel] = ()) -> Any:
  """BIG-bench-Lite over training cost, as figure 3 of the paper.

  The cost is activated parameters of the Transformer's blocks times training tokens, relative to the cheapest model.
  A dot's area is the activated parameters, the shadow's around it the total ones.

  Args:
    own: models besides the published ones; score None leaves one out.
  """
  pyplot = styled_pyplot()
  figure, axes = pyplot.subplots(figsize=(6.4, 4.4))
  models = [*FIGURE_3, *own]
  least = min(model.active * model.tokens for model in models)
  for i, model in enumerate(models):
    colour = COLOURS[i % len(COLOURS)]
    x = model.active * model.tokens / least
    area = lambda parameters: max(_POINTS_PER_BILLION * parameters / 1e9, 12.)
    axes.scatter(x, model.score, s=area(model.total), color=colour, alpha=.18, linewidths=0, zorder=2)
    axes.scatter(x, model.score, s=area(model.active), color=colour, zorder=3,
                 edgecolors='black' if i >= len(FIGURE_3) else 'none')
    offset = (area(model.total) ** .5) / 2 + 4
    axes.annotate(model.name, (x, model.score), (offset, 0), textcoords='offset points', va='center', fontsize=9, zorder=4,
                  fontweight='bold' if i >= len(FIGURE_3) else 'normal')
  axes.set_xscale('log')
  axes.margins(.3, .2)
  axes.text(.02, .97, 'area of dot: active parameters; of shadow: all', transform=axes.transAxes, va='top', fontsize=8)
  axes.set(xlabel='relative training cost: active parameters in blocks x tokens', ylabel='BIG-bench-Lite, normalised',
           title='Score over cost')
  return figure


def steps_figure(records: Sequence[Mapping[str, Any]]) -> Optional[Any]:
  """Each task's main figure over training tokens, or steps where the tokens are not known; None for a single step."""
  if len({record['step'] for record in records}) < 2:
    return None
  by_task: Dict[str, List[Mapping[str, Any]]] = {}
  for record in records:
    by_task.setdefault(record['task'], []).append(record)
  known = all(record['tokens'] for record in records)
  scale, unit = tokens_unit(max(record['tokens'] for record in records)) if known else (1., 'steps')
  pyplot = styled_pyplot()
  columns = min(len(by_task), 3)
  rows = -(-len(by_task) // columns)
  figure, grid = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3. * rows), squeeze=False, layout='constrained')
  for axes, (task, own), i in zip(grid.flat, by_task.items(), range(len(by_task))):
    name = main_figure(own[0])
    own = sorted(own, key=lambda record: record['step'])
    axes.plot([(record['tokens'] if known else record['step']) / scale for record in own],
              [record['figures'][name] for record in own], marker='o', color=COLOURS[i % len(COLOURS)])
    axes.set_title(task, fontsize=9)
    axes.set(xlabel=unit, ylabel=name)
  for axes in list(grid.flat)[len(by_task):]:
    axes.set_visible(False)
  return figure
