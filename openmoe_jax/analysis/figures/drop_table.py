"""What each policy drops of each data set, and what that costs in loss against the dropless router, as one table."""

from typing import Dict, List, NamedTuple, Optional

import numpy as np

from openmoe_jax.analysis import drop_statistics
from openmoe_jax.analysis.drop_statistics import ByPosition
from openmoe_jax.analysis.figures.drops import describe
from openmoe_jax.analysis.figures.report import Report
from openmoe_jax.analysis.figures.selection import Selection
from openmoe_jax.analysis.resampling import Estimate
from openmoe_jax.config import require

_DROPLESS = 'none'
_BINS = 8


class Line(NamedTuple):
  """Of a policy and a domain (None: all of them), over all sparse layers at the last step.

  Attributes:
    choices, dropped: numbers of them.
    along: share of the choices dropped, along the row.
    loss: nats per token.
    cost: loss minus that without drops; None of the dropless router itself.
  """
  choices: int
  dropped: int
  along: ByPosition
  loss: float
  cost: Optional[Estimate]


def add(report: Report, chosen: Selection) -> None:
  """The table, and its findings."""
  require(_DROPLESS in chosen.policies and len(chosen.policies) > 1, f'{chosen.folder} lacks the policy none, or '
          'others to compare it with; record with --policy=none,t5x_train,t5x_eval,colossalai')
  found = lines(chosen)
  where = {'step': chosen.last}
  for (policy, domain), line in found.items():
    if policy != _DROPLESS and domain:
      report.finding('loss_of_drops', 'drops', f'On {domain}, dropping by {policy} costs {nats(line.cost)} nats of '
                     'loss per token.', line.cost, 'nats per token', chance=0., policy=policy, domain=domain, **where)
  dropless = found[_DROPLESS, None]
  costs = [f'by {nats(found[policy, None].cost)} under {policy}' for policy in chosen.drop_policies]
  report.finding(
      'dropless', 'drops', f'The dropless router (policy none) drops {dropless.dropped:,} of {dropless.choices:,} '
      f'choices; against it dropping changes the loss, in nats per token, {", ".join(costs)}{_extremes(found)}.',
      dropless.along.mean, policy=_DROPLESS, headline=True, **where)
  interval = lambda name: (name, f'{name}_low', f'{name}_high')
  report.table(
      'drops_by_domain', '', 'drops', 'Dropped choices and loss by policy and data set',
      f'Step {chosen.last}, mean of the sparse layers. "first", "last": in the first and the last eighth of the row; '
      '"slope": from its first position to its last; "cost": loss in nats per token minus that of the same tokens when '
      'nobody is dropped. Low and high: 95 % bootstrap intervals over blocks of rows. Policies: '
      f'{"; ".join(f"{policy}: {describe(chosen, policy)}" for policy in chosen.drop_policies)}.',
      ['policy', 'domain', 'choices', 'dropped', *interval('share'), 'first', 'last', *interval('slope'), 'loss',
       *interval('cost')],
      [(policy, domain or 'all', line.choices, line.dropped, *line.along.mean, line.along.curve.value[0],
        line.along.curve.value[-1], *line.along.slope, line.loss, *(line.cost or ('', '', '')))
       for (policy, domain), line in found.items()])


def _extremes(found: Dict) -> str:
  """The data sets on which dropping changes the loss most: ' (from .. on .. to .. on ..)'."""
  costs = [(line.cost.value, f'{line.cost.value:+.4f} on {domain} under {policy}')
           for (policy, domain), line in found.items() if domain and line.cost]
  return f' (from {min(costs)[1]} to {max(costs)[1]})' if costs else ''


def lines(chosen: Selection) -> Dict:
  """{(policy, domain or None): Line}."""
  columns = {policy: _columns(chosen, policy) for policy in [_DROPLESS, *chosen.drop_policies]}
  without = columns[_DROPLESS]['log_prob']
  found = {}
  for policy, own in columns.items():
    domains: List[Optional[str]] = [None, *(chosen.all_domains if len(chosen.all_domains) > 1 else ())]
    for domain in domains:
      inside = own['domain'] == chosen.all_domains.index(domain) if domain else np.ones(len(own['row']), bool)
      dropped, row = own['dropped'][inside], own['row'][inside]
      choices = chosen.choices * len(chosen.layers)
      cost = None
      if policy != _DROPLESS:
        cost = drop_statistics.loss_difference(own['log_prob'][inside], without[inside], row)
      found[policy, domain] = Line(
          choices * len(row), int(dropped.sum()),
          drop_statistics.by_position(dropped / choices, own['position'][inside], row, chosen.length, _BINS),
          float(-np.nanmean(own['log_prob'][inside])), cost)
  return found


def _columns(chosen: Selection, policy: str) -> Dict[str, np.ndarray]:
  """The tokens, with how many choices of each are dropped in all layers together."""
  own = [chosen.read(layer, ['kept', 'position', 'log_prob'], policy=policy) for layer in chosen.layers]
  return {**own[0], 'dropped': np.sum([(~part['kept']).sum(axis=1) for part in own], axis=0)}


def nats(estimate: Estimate) -> str:
  """'+0.0123 [+0.0100, +0.0146]'."""
  value, low, high = (f'{x:+.4f}' for x in estimate)
  return f'{value} [{low}, {high}]'
