"""What of a recording is looked at: its layers, steps, policies, and domains in groups; reads it piece by piece."""

import fnmatch
import functools
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from openmoe_jax import paths
from openmoe_jax.config import require
from openmoe_jax.recording.files import Key, Recording
from openmoe_jax.recording.policies import POLICIES

LEAST_ROWS, LEAST_TOKENS = 8, 500  # as in `resampling` and `routing_statistics`
# Policies in the order in which one is taken for figures about what tokens ask for, whoever gets it.
_FOR_CHOICES = ('none', 't5x_eval', 'colossalai', 't5x_train', 'colossalai_train')


class Group(NamedTuple):
  """Domains that are compared with one another.

  Attributes:
    name, what: 'languages', 'programming language'.
    paper: the paper's figure.
    patterns: names of tasks, with * and ?; none for all domains of no other group.
  """
  name: str
  what: str
  paper: str
  patterns: Sequence[str]


GROUPS = (Group('domains', 'domain', 'figure 5', ()),
          Group('languages', 'programming language', 'figure 6', ('language_*',)),
          Group('natural_languages', 'natural language', 'figure 7', ('manual_*',)),
          Group('tasks', 'task', 'figure 8',
                ('part_*', 'mmlu*', 'trivia_qa*', 'human_eval*', 'bigbench*', 'mt_bench*')))


class Wanted(NamedTuple):
  """What is asked for; an empty field means everything there is.

  Attributes:
    layers, steps, policies: see `Recording`.
    groups: `GROUPS` with other patterns.
  """
  layers: Sequence[int] = ()
  steps: Sequence[int] = ()
  policies: Sequence[str] = ()
  groups: Sequence[Group] = GROUPS


class Selection:
  """A recording as far as it is wanted.

  Attributes:
    layers, steps, policies: sorted.
    domains: {group's name: names of its domains}, groups without any left out; all_domains: of all groups.
    labels: {domain: short name}.
    choice_policy: the policy of figures about what tokens ask for.
    drop_policies: those under which tokens can be dropped.
    experts, choices: numbers of them.

  Raises:
    ConfigError: nothing is recorded, or not what is wanted, or not for all steps and policies; a router in which
      experts choose tokens, so that there is no first choice.
  """

  def __init__(self, folder: paths.PathLike, wanted: Wanted = Wanted()):
    self.recording = Recording(folder)
    self.folder = str(folder)
    config = self.recording.config
    require(bool(self.recording.layers),
            f'{folder}: this model has no sparse layers, so that there is no routing')
    require(config.router != 'expert_choice', f"{folder}: in a model with ModelConfig.router = 'expert_choice' experts "
            'choose tokens; these figures are about models whose tokens choose')
    self.experts, self.choices = config.num_experts, config.num_selected_experts
    keys = self.recording.keys()
    require(bool(keys), f'{folder} holds no recording that was finished; repeat the command that began it')
    self.layers = _pick(folder, '--layers', wanted.layers, self.recording.layers)
    self.steps = _pick(folder, '--steps', wanted.steps, sorted({key.step for key in keys}))
    there = {key.policy for key in keys}
    self.policies = _pick(folder, '--policies', wanted.policies, [name for name in POLICIES if name in there])
    self.domains = _grouped(folder, wanted.groups, sorted({key.domain for key in keys}))
    self.all_domains = list(dict.fromkeys(name for names in self.domains.values() for name in names))
    self.labels = {name: label for names in self.domains.values() for name, label in zip(names, short_names(names))}
    for step in self.steps:
      for policy in self.policies:
        missing = [name for name in self.all_domains if Key(step, policy, name) not in keys]
        require(not missing, f'{folder}: step {step} under the policy {policy} has no recording of '
                f'{", ".join(missing)}; record it, or leave out steps, policies or domains by flags')
    self.choice_policy = next(name for name in _FOR_CHOICES if name in self.policies)
    self.drop_policies = [name for name in self.policies if name != 'none']
    self.length = sum(self.recording.about['task_feature_lengths'].values())

  def check_enough(self) -> None:
    """Raises `ConfigError` where there are too few tokens for intervals."""
    for domain in self.all_domains:
      rows = len(np.unique(self.read(self.layers[0], [], domains=[domain])['row']))
      require(rows >= LEAST_ROWS, f'{self.folder}: {domain} has {rows} rows at step {self.last}; statistics need at '
              f'least {LEAST_ROWS} of each domain; record more --tokens, or leave it out by flags such as --domains')
    require(self.tokens() >= LEAST_TOKENS, f'{self.folder} holds {self.tokens()} tokens of step {self.last}; '
            f'statistics need at least {LEAST_TOKENS}; record more --tokens')

  @property
  def last(self) -> int:
    """The last step."""
    return self.steps[-1]

  def tokens(self) -> int:
    """How many are recorded of the last step, under one policy."""
    return sum(self.finished(self.last, self.choice_policy, domain)['tokens'] for domain in self.all_domains)

  def finished(self, step: int, policy: str, domain: str) -> Mapping[str, int]:
    """As `Recording.finished`."""
    return self.recording.finished(Key(step, policy, domain))

  def capacity(self, step: int, policy: str) -> int:
    """Slots of an expert in a group."""
    return self.finished(step, policy, self.all_domains[0])['capacity']

  def read(self, layer: int, columns: Sequence[str], step: Optional[int] = None, policy: Optional[str] = None,
           domains: Optional[Sequence[str]] = None) -> Dict[str, np.ndarray]:
    """Columns of the tokens of some domains, one domain after another.

    Args:
      layer: number of the decoder layer.
      columns: of `recording.tables`, those of choices without a rank: 'expert' gives [N, choices]. 'previous_id' is the
        token before, -1 where the text begins.
      step, policy, domains: the last one, `choice_policy` and all where not given.

    Returns:
      The columns and always 'row', which goes on from one domain to the next, and 'domain', its number in `domains`.

    Raises:
      ConfigError: as `Recording.read`, or the file is of a model with more experts.
    """
    step, policy = self.last if step is None else step, policy or self.choice_policy
    domains = self.all_domains if domains is None else domains
    parts: List[Dict[str, np.ndarray]] = []
    rows = 0
    for number, domain in enumerate(domains):
      part = self._read_domain(Key(step, policy, domain), layer, tuple(columns))
      part['row'] = part['row'] + rows
      part['domain'] = np.full(len(part['row']), number)
      rows = int(part['row'].max()) + 1
      parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

  def _read_domain(self, key: Key, layer: int, columns: Sequence[str]) -> Dict[str, np.ndarray]:
    names = {'layer', 'row', 'expert_0'}
    for column in columns:
      names |= {f'{column}_{rank}' for rank in range(self.choices)} if column in _OF_CHOICES else _NEEDS.get(
          column, {column})
    table = self.recording.read(key, layer, sorted(names))
    of_ranks = lambda name: np.stack([table[f'{name}_{rank}'] for rank in range(self.choices)], axis=-1)
    found = {'row': table['row']}
    for column in columns:
      if column == 'previous_id':
        found[column] = _previous(table)
      else:
        found[column] = of_ranks(column) if column in _OF_CHOICES else table[column]
    if 'expert' in found:
      found['expert'] = found['expert'].astype(np.int64)
    first = table['expert_0']
    require(len(first) > 0, f'{self.folder}: {key.folder()} holds no tokens')
    require((table['layer'] == layer).all() and int(first.max()) <= self.experts, f'{self.folder}: {key.folder()} '
            f'holds files of another model: layer {int(table["layer"][0])}, expert {int(first.max())}, where layer '
            f'{layer} of {self.experts} experts is expected')
    asks = first < self.experts  # a token that asks for nobody is no part of any statistic
    return found if asks.all() else {name: values[asks] for name, values in found.items()}


_OF_CHOICES = ('expert', 'gate', 'slot', 'kept', 'token_slot')
_NEEDS = {'previous_id': {'token_id', 'segment', 'position'}}


def _previous(table: Mapping[str, np.ndarray]) -> np.ndarray:
  """The token before each one in its document."""
  same = (table['row'][1:] == table['row'][:-1]) & (table['segment'][1:] == table['segment'][:-1])
  return np.concatenate([[-1], np.where(same, table['token_id'][:-1], -1)])


def _pick(folder: paths.PathLike, flag: str, wanted: Sequence, there: Sequence) -> List:
  for value in wanted:
    require(value in there, f'{flag}: {value} is not recorded in {folder}; there is {", ".join(map(str, there))}')
  return [value for value in there if not wanted or value in wanted]


def _grouped(folder: paths.PathLike, groups: Sequence[Group], there: Sequence[str]) -> Dict[str, List[str]]:
  matches = lambda group, name: any(fnmatch.fnmatchcase(name, pattern) for pattern in group.patterns)
  found = {}
  for group in groups:
    if group.patterns:
      own = [name for name in there if matches(group, name)]
    else:
      own = [name for name in there if not any(matches(other, name) for other in groups)]
    default = next(known.patterns for known in GROUPS if known.name == group.name)
    require(bool(own) or group.patterns == default, f'--{group.name}: {",".join(group.patterns)} is not recorded in '
            f'{folder}; there is {", ".join(there)}')
    if own:
      found[group.name] = own
  return found


def compared(first: Selection, folder: paths.PathLike, wanted: Wanted) -> Selection:
  """A recording to compare `first` with, at its own last step; ConfigError unless it is of such a model and text."""
  other = Selection(folder, wanted._replace(steps=()))
  for name in ('num_layers', 'num_experts', 'num_selected_experts', 'moe_interval'):
    own, there = (getattr(s.recording.config, name) for s in (first, other))
    require(own == there, f'--compare: {folder} is of another model: ModelConfig.{name} = {there}, that of '
            f'{first.folder} is {own}')
  for name in ('vocabulary', 'task_feature_lengths', 'split'):
    own, there = (s.recording.about.get(name) for s in (first, other))
    require(own == there, f'--compare: {folder} was recorded with {name} = {there}, {first.folder} with {own}')
  require(other.all_domains == first.all_domains, f'--compare: {folder} has the domains '
          f'{", ".join(other.all_domains)}, {first.folder} has {", ".join(first.all_domains)}; choose those of both '
          'by --domains')
  return other


def short_names(names: Sequence[str]) -> List[str]:
  """Names without the words, joined by _, that all have at the beginning or at the end."""
  if len(names) == 1:
    return list(names)
  words = [name.split('_') for name in names]
  least = min(map(len, words)) - 1
  alike = lambda i: len({own[i] for own in words}) == 1
  back = next((i for i in range(least) if not alike(-1 - i)), least)
  front = next((i for i in range(least - back) if not alike(i)), least - back)
  return ['_'.join(own[front:len(own) - back]) for own in words]


@functools.lru_cache(maxsize=8)
def group_named(name: str) -> Group:
  return next(group for group in GROUPS if group.name == name)
