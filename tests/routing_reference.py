"""Routing as SPEC 2 puts it into words, in plain Python and numpy: slow, and written without a look at the library."""

import fractions
from typing import NamedTuple

import numpy as np


class Routed(NamedTuple):
  """Arrays [G, T, S] (expert, gate, slot, kept) and figures; `slot` is -1 where nothing was asked for."""
  expert: np.ndarray
  gate: np.ndarray
  slot: np.ndarray
  kept: np.ndarray
  auxiliary_loss: float
  router_z_loss: float
  fraction_tokens_left_behind: float
  expert_usage: float
  router_confidence: float
  asked: np.ndarray


def padded_shape(batch, length, multiple):
  """SPEC 2.1: adds the fewest tokens as rows or as columns; columns on a tie."""
  p = q = 0
  while (batch * length + p * length) % multiple:
    p += 1
  while (batch * length + q * batch) % multiple:
    q += 1
  return (batch + p, length) if p * length < q * batch else (batch, length + q)


def number_of_groups(tokens, max_group_size, multiple):
  """SPEC 2.2."""
  g = max(tokens // max_group_size, multiple)
  while tokens % g or g % multiple:
    g += 1
    if g > tokens:
      raise ValueError('no number of groups divides')
  return g


def half_to_even(x: fractions.Fraction) -> int:
  """Banker's rounding of an exact number."""
  floor = x.numerator // x.denominator
  rest = x - floor
  half = fractions.Fraction(1, 2)
  return floor + (rest > half or (rest == half and floor % 2 == 1))


def capacity(factor, group_size, experts, least=4):
  """SPEC 2.3."""
  return max(half_to_even(fractions.Fraction(factor) * group_size / experts), least)


def softmax(logits):
  e = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def route(logits, selected, slots, is_token=None, batch_prioritized=False) -> Routed:
  """SPEC 2.4 to 2.11.

  Args:
    logits: [G, T, E].
    selected: choices of a token.
    slots: capacity.
    is_token: bool [G, T] to ignore padding; None treats all alike.
    batch_prioritized: tokens ask in the order of descending first probability.
  """
  logits = np.asarray(logits, np.float64)
  groups, tokens, experts = logits.shape
  if is_token is not None:
    logits = logits * is_token[..., None]
  probs = softmax(logits)
  expert = np.zeros((groups, tokens, selected), int)
  slot = np.full((groups, tokens, selected), -1)
  kept = np.zeros((groups, tokens, selected), bool)
  gate = np.zeros((groups, tokens, selected))
  aux = []
  asked = np.zeros(experts)
  for g in range(groups):
    present = [t for t in range(tokens) if is_token is None or is_token[g, t]]
    best = [sorted(range(experts), key=lambda e, t=t: (-probs[g, t, e], e))[:selected] for t in range(tokens)]
    order = sorted(present, key=lambda t: (-probs[g, t].max(), t)) if batch_prioritized else present
    queue = [0] * experts
    for choice in range(selected):
      for t in order:
        e = best[t][choice]
        slot[g, t, choice] = queue[e]
        queue[e] += 1
        kept[g, t, choice] = slot[g, t, choice] < slots
        gate[g, t, choice] = probs[g, t, e] * kept[g, t, choice]
    expert[g] = best
    f = np.array([sum(e in best[t] for t in present) / tokens for e in range(experts)])
    mean_prob = sum((probs[g, t] for t in present), np.zeros(experts)) / tokens
    aux.append(experts * (f * mean_prob).sum())
    asked += f * tokens
  present = groups * tokens if is_token is None else is_token.sum()
  log_z = np.log(np.exp(logits).sum(axis=-1))
  served = kept.any(axis=-1).sum()
  return Routed(expert, gate, slot, kept, np.mean(aux), np.mean(log_z ** 2), 1 - served / present if present else 0,
                kept.sum() / (experts * slots * groups), gate.sum() / max(kept.sum(), 1), asked)
