"""Context-independence: what tells a token's expert, and how even the experts of a position, a token id are (figures 9,
10, 13 and 14)."""

from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np

from openmoe_jax.analysis import routing_statistics
from openmoe_jax.analysis.figures import draw, draw_lines
from openmoe_jax.analysis.figures.report import Report, mean_of, percent
from openmoe_jax.analysis.figures.selection import Selection
from openmoe_jax.analysis.figures.specialisation import UNIT, relative_shares
from openmoe_jax.analysis.resampling import Estimate
from openmoe_jax.analysis.routing_statistics import Dependence
from openmoe_jax.config import ConfigError, require

POSITION_BINS = 64  # for mutual information
ROWS = 16  # of the heat maps of positions and token ids
MIN_TOKENS = 128  # of a token id in figure 14, as in the paper
_WORK = 8_000_000  # tokens that are shuffled for a figure, in all shuffles together
_MOST_TOKENS = 65_536  # for what is added to the token id, which takes longer


class Settings(NamedTuple):
  """Attributes:
    positions: of figure 9; empty for bins along the row.
    token_ids: of figures 10 and 11; empty for the most frequent.
    piece: token id -> its text.
  """
  positions: Sequence[int]
  token_ids: Sequence[int]
  piece: Callable[[int], str]


class Variable(NamedTuple):
  """name in findings, in pictures, in sentences, and its values [N] from the columns."""
  name: str
  label: str
  phrase: str
  values: Callable[[Mapping[str, np.ndarray]], np.ndarray]


def variables(length: int, domains: int) -> List[Variable]:
  """What may decide an expert; the domain where there are several."""
  bins = min(POSITION_BINS, length)
  found = [Variable('token_id', 'token id', 'the token id', lambda t: t['token_id']),
           Variable('previous_token', 'previous token', 'the previous token', lambda t: t['previous_id']),
           Variable('position', 'position', 'the position in the row', lambda t: t['position'] * bins // length),
           Variable('domain', 'domain', 'the domain', lambda t: t['domain'])]
  return found if domains > 1 else found[:3]


COLUMNS = ['expert', 'token_id', 'previous_id', 'position']


def check(chosen: Selection, settings: Settings) -> None:
  """Raises `ConfigError` for positions or token ids that do not occur."""
  for position in settings.positions:
    require(position < chosen.length,
            f'--positions: {position} is beyond the rows, which have {chosen.length} positions')
  if settings.token_ids:
    ids = chosen.read(chosen.layers[0], ['token_id'])['token_id']
    for i in settings.token_ids:
      require(i in ids, f'--token_ids: {i} does not occur among the {len(ids)} recorded tokens')


def add(report: Report, chosen: Selection, settings: Settings) -> None:
  """All of this section."""
  _information(report, chosen)
  _positions(report, chosen, settings)
  _tokens(report, chosen, settings)
  _deviations(report, chosen)


def _information(report: Report, chosen: Selection) -> None:
  """Mutual information of the expert with each variable, alone and beyond the token id; accuracy from the id alone."""
  own = variables(chosen.length, len(chosen.all_domains))
  alone: Dict[Tuple[str, int], Dependence] = {}
  added: Dict[Tuple[str, int], Dependence] = {}
  guesses = {}
  for layer in chosen.layers:
    tokens = chosen.read(layer, COLUMNS)
    first, rows = tokens['expert'][:, 0], tokens['row']
    permutations = int(np.clip(_WORK // len(first), 20, 100))
    for variable in own:
      alone[variable.name, layer] = routing_statistics.dependence(first, variable.values(tokens), rows,
                                                                  permutations=permutations)
    guesses[layer] = routing_statistics.predictability(first, tokens['token_id'], rows)
    part = _whole_rows(tokens, _MOST_TOKENS)
    for variable in own[1:]:
      try:
        added[variable.name, layer] = routing_statistics.added_dependence(
            part['expert'][:, 0], variable.values(part), part['token_id'], part['row'], permutations=10)
      except ConfigError:  # too few tokens have a pair of values that occurs often
        pass
  for variable in own:
    for layer in chosen.layers:
      if variable.name != 'domain' or len(chosen.domains) > 1:  # else it is said of the group
        _say_alone(report, chosen, variable, layer, alone[variable.name, layer])
      if (variable.name, layer) in added:
        _say_added(report, chosen, variable, layer, added[variable.name, layer])
  for layer, guess in guesses.items():
    _say_accuracy(report, chosen, layer, guess)
  _headline(report, chosen, alone, guesses)
  _draw_information(report, chosen, own, alone, added)
  _draw_accuracy(report, chosen, guesses)


def _whole_rows(tokens: Mapping[str, np.ndarray], most: int) -> Mapping[str, np.ndarray]:
  """At most about `most` tokens, in rows that are evenly spread."""
  keep_every = -(-len(tokens['row']) // most)
  inside = tokens['row'] % keep_every == 0
  return {name: values[inside] for name, values in tokens.items()}


def _say_alone(report: Report, chosen: Selection, variable: Variable, layer: int, found: Dependence) -> None:
  report.finding(
      f'{variable.name}_information', 'context',
      f'In layer {layer} {variable.phrase} tells {percent(found.normalized)} of what decides the first expert (0 % is '
      f'nothing, 100 % all of it; shuffled it would be at most {100 * found.null.high:.1f} %, p = '
      f'{found.p_value:.2g}).',
      found.normalized, chance=0., **_place(chosen, layer))


def _say_added(report: Report, chosen: Selection, variable: Variable, layer: int, found: Dependence) -> None:
  report.finding(
      f'{variable.name}_added_information', 'context',
      f'In layer {layer} {variable.phrase} adds {percent(found.normalized)} to what the token id tells (shuffled among '
      f'tokens of the same id at most {100 * found.null.high:.1f} %).',
      found.normalized, chance=0., **_place(chosen, layer))


def _say_accuracy(report: Report, chosen: Selection, layer: int, found: routing_statistics.Predictability) -> None:
  report.finding(
      'token_id_accuracy', 'context',
      f'In layer {layer} the expert that a token id has most often elsewhere is the right one for '
      f'{percent(found.accuracy)} of the tokens; always guessing the busiest expert is right for '
      f'{percent(found.baseline)}.', found.accuracy, chance=found.baseline.value, **_place(chosen, layer))


def _headline(report: Report, chosen: Selection, alone, guesses) -> None:
  of_layers = lambda name: mean_of([alone[name, layer].normalized for layer in chosen.layers])
  token, position = of_layers('token_id'), of_layers('position')
  accuracy = mean_of([guess.accuracy for guess in guesses.values()])
  baseline = mean_of([guess.baseline for guess in guesses.values()])
  others = f'the position tells {100 * position.value:.1f} %'
  if ('domain', chosen.layers[0]) in alone:
    others += f' and the domain {100 * of_layers("domain").value:.1f} %'
  report.finding(
      'context_independence', 'context',
      f'Context-independence: the token id alone tells {percent(token)} of what decides the first expert, {others}; it '
      f'predicts {percent(accuracy)} of the first experts, where guessing the busiest one gets '
      f'{100 * baseline.value:.1f} % ({_layers(chosen)}).', token, chance=0., step=chosen.last,
      policy=chosen.choice_policy, headline=True)


def _layers(chosen: Selection) -> str:
  return f'mean of {len(chosen.layers)} sparse layers' if len(chosen.layers) > 1 else f'layer {chosen.layers[0]}'


def _place(chosen: Selection, layer: int) -> Dict[str, Any]:
  return {'layer': layer, 'step': chosen.last, 'policy': chosen.choice_policy}


def _draw_information(report: Report, chosen: Selection, own: Sequence[Variable], alone, added) -> None:
  missing = Estimate(np.nan, np.nan, np.nan)
  panels, lines = [], []
  for variable in own:
    series = []
    for name, found in (('alone', alone), ('beyond the token id', added)):
      results = [found.get((variable.name, layer)) for layer in chosen.layers]
      if any(results):
        series.append(draw_lines.Dots(name, draw_lines.estimates([r.normalized if r else missing for r in results]),
                                      np.asarray([r.null.high if r else np.nan for r in results])))
      lines += [(chosen.last, layer, variable.label, name, *r.normalized, r.null.low, r.null.high, r.p_value, r.tokens,
                 r.values) for layer, r in zip(chosen.layers, results) if r]
    panels.append((variable.label, series))
  report.figure(
      'what_decides', '', 'context', 'What decides the expert',
      'Mutual information of the first expert with each variable, over the entropy of the expert: 100 % where the '
      'variable decides it, 0 % where it says nothing. Bars are 95 % intervals (jackknife over blocks of rows); '
      '"chance" is the 97.5 % quantile with shuffled values. Orange: what a variable adds to the token id.',
      lambda: draw_lines.dots(panels, chosen.layers, f'What decides the first expert, step {chosen.last}',
                              'sparse layer', 'mutual information'),
      ['step', 'layer', 'variable', 'given', 'normalized_information', 'low', 'high', 'chance_low', 'chance_high',
       'p_value',
       'tokens', 'values'], lines)


def _draw_accuracy(report: Report, chosen: Selection, guesses) -> None:
  own = list(guesses.values())
  series = draw_lines.Dots('from the token id', draw_lines.estimates([g.accuracy for g in own]),
                           np.asarray([g.baseline.value for g in own]))
  report.figure(
      'token_id_accuracy', '', 'context', 'The expert predicted from the token id alone',
      'How often the first expert is the one that the token id has most often in other rows (five-fold, by blocks of '
      'rows). "chance" is the share of the busiest expert.',
      lambda: draw_lines.dots([('', [series])], chosen.layers,
                              f'First expert predicted from the token id, step {chosen.last}', 'sparse layer', 'right',
                              top=1.),
      ['step', 'layer', 'accuracy', 'low', 'high', 'baseline', 'share_of_unseen_ids'],
      [(chosen.last, layer, *g.accuracy, g.baseline.value, g.unseen) for layer, g in guesses.items()])


def _positions(report: Report, chosen: Selection, settings: Settings) -> None:
  """Figure 9."""
  length, bins = chosen.length, min(ROWS, chosen.length)
  edges = [-(-i * length // bins) for i in range(bins + 1)]
  names = ([str(p) for p in settings.positions] if settings.positions else
           [str(a) if b - a == 1 else f'{a} to {b - 1}' for a, b in zip(edges, edges[1:])])
  panels, lines = [], []
  for layer in chosen.layers:
    tokens = chosen.read(layer, ['expert', 'position'])
    at = tokens['position'] if settings.positions else tokens['position'] * bins // length
    shares = relative_shares(at, tokens['expert'], chosen.experts)
    nobody = np.full(chosen.experts, np.nan)
    own = np.stack([shares.get(v, nobody) for v in (settings.positions or range(bins))])
    panels.append(draw.Map(f'layer {layer}', own, names))
    lines += [(chosen.last, layer, names[i], e, share) for (i, e), share in np.ndenumerate(own)]
  report.figure(
      'fig09_positions', 'figure 9', 'context', 'Experts by position in the row',
      f'Which experts tokens choose at different positions of the row, step {chosen.last}; white is an equal share. '
      'Rows that look alike mean that the position does not decide.',
      lambda: draw.share_maps(panels, f'Experts by position, step {chosen.last}', 'position', UNIT),
      ['step', 'layer', 'positions', 'expert', 'relative_share'], lines)


def shown_ids(chosen: Selection, settings: Settings, count: int) -> List[int]:
  """At most `count` token ids: those asked for, or the most frequent ones."""
  if settings.token_ids:
    return list(settings.token_ids)[:count]
  ids, counts = np.unique(chosen.read(chosen.layers[0], ['token_id'])['token_id'], return_counts=True)
  return [int(i) for i in ids[np.argsort(-counts, kind='stable')] if i > 0][:count]


def _tokens(report: Report, chosen: Selection, settings: Settings) -> None:
  """Figure 10."""
  ids = shown_ids(chosen, settings, ROWS)
  panels, lines = [], []
  for layer in chosen.layers:
    tokens = chosen.read(layer, ['expert', 'token_id'])
    shares = routing_statistics.shares(tokens['token_id'], tokens['expert'], chosen.experts)
    counts = {i: int(np.sum(tokens['token_id'] == i)) for i in ids}
    panels.append(draw.Map(f'layer {layer}', np.stack([shares[i] for i in ids]), [settings.piece(i) for i in ids]))
    lines += [(chosen.last, layer, i, settings.piece(i), counts[i], e, share) for i in ids
              for e, share in enumerate(shares[i])]
  report.figure(
      'fig10_token_ids', 'figure 10', 'context', 'Experts by token id',
      f'Which experts the same token chooses wherever it stands, step {chosen.last}; an equal share is '
      f'{100 / chosen.experts:.3g} %. A row with {chosen.choices} dark cells is a token that goes to the same experts '
      'whatever is around it. ␣ is a space, ⏎ the end of a line.',
      lambda: token_maps(panels, f'Experts by token id, step {chosen.last}', 'token', chosen.choices),
      ['step', 'layer', 'token_id', 'token', 'tokens', 'expert', 'share'], lines)


def token_maps(panels: Sequence[draw.Map], title: str, row_name: str, choices: int) -> Any:
  """Heat maps of shares of choices, of which an expert can have one in `choices` at the most; white is none."""
  return draw.maps(panels, title, row_name, 'expert', 'share of choices', (0., 1 / choices), colour_map='GnBu')


def deviation(variable: np.ndarray, expert: np.ndarray, experts: int, least: int) -> Dict[int, float]:
  """Standard deviation, over the experts, of the share of choices that each gets, for values with `least` tokens."""
  found = routing_statistics.shares(variable, expert, experts, least)
  return {value: float(np.std(own)) for value, own in found.items()}


def _deviations(report: Report, chosen: Selection) -> None:
  """Figures 13 and 14."""
  by_position, by_token, lines = [], [], {'position': [], 'token_id': []}
  for layer in chosen.layers:
    tokens = chosen.read(layer, ['expert', 'position', 'token_id'])
    shuffled = np.random.default_rng(0).permutation(tokens['expert'])
    found = {}
    for name, least in (('position', 1), ('token_id', MIN_TOKENS)):
      own, chance = (deviation(tokens[name], expert, chosen.experts, least) for expert in (tokens['expert'], shuffled))
      found[name] = (own, chance)
      lines[name] += [(chosen.last, layer, value, own[value], chance[value]) for value in own]
    own, chance = found['position']
    x = np.asarray([position for position in own if position > 0])  # 0 is always the start id
    real, drawn = (np.asarray([y[i] for i in x]) for y in (own, chance))
    level = Estimate(*(np.full(len(x), level) for level in (drawn.mean(), *np.quantile(drawn, (.025, .975)))))
    by_position.append(draw_lines.Panel(f'layer {layer}', [
        draw_lines.Curve('by position', x, Estimate(real, real, real)),
        draw_lines.Curve('positions shuffled', x, level, True)]))
    own, chance = found['token_id']
    require(len(own) > 0, f'figure 14: no token id occurs {MIN_TOKENS} times; record more tokens')
    by_token.append((f'layer {layer}', [(name, 100 * np.asarray(list(y.values()))) for name, y in (
        ('token ids', own), ('token ids shuffled', chance))]))
    ids = np.asarray(list(own.values()))
    draws = np.random.default_rng(0).choice(ids, (1000, len(ids))).mean(axis=1)
    value = Estimate(float(ids.mean()), *(float(q) for q in np.quantile(draws, (.025, .975))))
    report.finding(
        'token_id_deviation', 'context', f'In layer {layer} the share of choices per expert deviates by '
        f'{percent(value)} from expert to expert for a token id with at least {MIN_TOKENS} tokens (mean of {len(ids)} '
        f'ids; shuffled {100 * np.mean(list(chance.values())):.1f} %).', value,
        chance=float(np.mean(list(chance.values()))),
        **_place(chosen, layer))
  report.figure(
      'fig13_position_deviation', 'figure 13', 'context', 'How uneven the experts of a position are',
      'Standard deviation, from expert to expert, of the share of choices at each position. Dashed, '
      'with a band that holds 95 % of the positions: positions shuffled, which is what the load of the experts and the '
      'number of tokens give. A line within the band means that positions have no experts of their own. Position '
      '0, always the start id, is left out.',
      lambda: draw_lines.curves(by_position, f'Unevenness of experts by position, step {chosen.last}',
                                'position in the row', 'standard deviation of share'),
      ['step', 'layer', 'position', 'standard_deviation', 'shuffled'], lines['position'])
  report.figure(
      'fig14_token_id_deviation', 'figure 14', 'context', 'How uneven the experts of a token id are',
      f'The same for token ids with at least {MIN_TOKENS} tokens. Far right of the grey: ids that have experts '
      'of their own.',
      lambda: draw_lines.histograms(by_token, f'Unevenness of experts by token id, step {chosen.last}',
                                    'standard deviation of share (%)', 'token ids (%)'),
      ['step', 'layer', 'token_id', 'standard_deviation', 'shuffled'], lines['token_id'])
