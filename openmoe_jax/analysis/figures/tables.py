"""The tokens that choose each expert most (tables 9 and 15), and two vocabularies on the recorded text (table 10)."""

from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import numpy as np

from openmoe_jax.analysis.figures.report import Report
from openmoe_jax.analysis.figures.selection import Selection

TOP, LONG = 10, 20  # tokens of an expert in table 9, and in table 15
MIN_TOKENS = 10  # of a token id that is called typical of an expert


def top_tokens(report: Report, chosen: Selection, piece: Callable[[int], str]) -> None:
  """Tables 9 and 15."""
  short, long = [], []
  for layer in chosen.layers:
    tokens = chosen.read(layer, ['expert', 'token_id'])
    for e, (load, frequent, typical) in enumerate(_of_experts(tokens['expert'], tokens['token_id'], chosen.experts)):
      words = lambda own: '  '.join(piece(i) for i, *_ in own[:TOP])
      short.append((chosen.last, layer, e, load, words(frequent), words(typical)))
      for name, own in (('frequent', frequent), ('typical', typical)):
        long += [(chosen.last, layer, e, name, rank + 1, i, piece(i), count, of_expert, of_token)
                 for rank, (i, count, of_expert, of_token) in enumerate(own)]
  report.table(
      'table09_top_tokens', 'table 9', 'tables', 'Top tokens of each expert',
      f'The {TOP} tokens that each expert gets most often, and the {TOP} (of at least {MIN_TOKENS} tokens) the largest '
      f'share of whose choices it gets; step {chosen.last}, first and second choices. ␣ is a space, ⏎ the end '
      'of a line.',
      ['step', 'layer', 'expert', 'relative_load', 'most_frequent_tokens', 'most_typical_tokens'], short)
  report.table(
      'table15_top_tokens', 'table 15', 'tables', 'Top tokens of each expert, with their shares',
      f'The same for {LONG} tokens each, one a line: how many choices of the token the expert gets, their share of all '
      'that the expert gets, and their share of all choices of the token.',
      ['step', 'layer', 'expert', 'by', 'rank', 'token_id', 'token', 'choices', 'share_of_expert', 'share_of_token'],
      long)


def _of_experts(expert: np.ndarray, token_id: np.ndarray, experts: int) -> List[Tuple[float, List, List]]:
  """For each expert its load over an equal share, and (id, choices, share of the expert's, share of the token's) of its
  most frequent and its most typical ids."""
  ids, codes, counts = np.unique(token_id, return_inverse=True, return_counts=True)
  table = sum(np.bincount(codes * experts + column, minlength=len(ids) * experts) for column in expert.T)
  table = table.reshape(len(ids), experts)
  of_token = table / table.sum(axis=1, keepdims=True)
  often = (counts >= MIN_TOKENS) & (ids > 0)
  found = []
  for e in range(experts):
    total = max(int(table[:, e].sum()), 1)
    line = lambda i, e=e, total=total: (int(ids[i]), int(table[i, e]), table[i, e] / total, of_token[i, e])
    frequent = [line(i) for i in np.argsort(-table[:, e], kind='stable')[:LONG] if table[i, e]]
    typical = [line(i) for i in np.lexsort((-table[:, e], -of_token[:, e] * often))[:LONG] if table[i, e] and often[i]]
    found.append((table[:, e].sum() * experts / table.sum(), frequent, typical))
  return found


def vocabularies(report: Report, chosen: Selection, tokenizers: Mapping[str, Any],
                 count: Callable[[Sequence[str], Sequence[Any]], Sequence[Any]]) -> None:
  """Table 10.

  Args:
    report, chosen: see the others.
    tokenizers: {name: sentencepiece processor}, two of them; the first is that of the recording.
    count: `token_counts.count`.
  """
  texts = recorded_texts(chosen, next(iter(tokenizers.values())))
  texts['all'] = [text for own in list(texts.values()) for text in own]
  lines = []
  for name, own in texts.items():
    one, two = count(own, list(tokenizers.values()))
    lines.append((name, one.characters, *one[2:4], one.utf8_bytes / max(one.tokens, 1), *two[2:4],
                  two.utf8_bytes / max(two.tokens, 1), one.tokens / max(two.tokens, 1), one.used / max(two.used, 1)))
  columns = [f'{what}_{name}' for name in tokenizers for what in ('tokens', 'vocabulary_used', 'bytes_a_token')]
  report.table(
      'table10_vocabularies', 'table 10', 'tables', f'Vocabularies: {" and ".join(tokenizers)}',
      'The recorded text in both vocabularies: tokens it becomes, different pieces that it uses, and ratios '
      'first / second.',
      ['domain', 'characters', *columns, 'ratio_of_tokens', 'ratio_of_vocabulary_used'], lines)


def recorded_texts(chosen: Selection, tokenizer: Any) -> Dict[str, List[str]]:
  """{domain: its documents, as far as they are recorded}, from the token ids of the last step."""
  found = {}
  for domain in chosen.all_domains:
    tokens = chosen.read(chosen.layers[0], ['token_id', 'segment'], domains=[domain])
    ids = tokens['token_id']
    starts = np.flatnonzero((np.diff(tokens['row'], prepend=-1) != 0) | (np.diff(tokens['segment'], prepend=-1) != 0))
    plain = (ids > 2) & (ids < tokenizer.get_piece_size())
    parts = (ids[a:b][plain[a:b]].tolist() for a, b in zip(starts, [*starts[1:], len(ids)]))
    found[domain] = [tokenizer.decode(part) for part in parts if part]
  return found
