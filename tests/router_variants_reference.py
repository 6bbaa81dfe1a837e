"""The routers besides top-k as their papers put them, in plain Python and numpy, token by token."""

import math

import numpy as np

from tests.routing_reference import softmax


def sigmoid(x):
  return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def largest(values, count):
  """Indices of the largest values, ties to the lower index."""
  return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def serve(wants, orders, capacity, experts):
  """Who gets a slot.

  Args:
    wants: [G][T] lists of experts, most wanted first.
    orders: [G] lists of token numbers: who comes first within a rank; whoever is not in it asks for nobody.

  Returns:
    slot int [G, T, S], -1 where nothing was asked for, and kept bool [G, T, S].
  """
  shape = (len(wants), len(wants[0]), len(wants[0][0]))
  slot, kept = np.full(shape, -1), np.zeros(shape, bool)
  for g, order in enumerate(orders):
    queue = [0] * experts
    for rank in range(shape[2]):
      for t in order:
        slot[g, t, rank] = queue[wants[g][t][rank]]
        queue[wants[g][t][rank]] += 1
        kept[g, t, rank] = slot[g, t, rank] < capacity
  return slot, kept


def chosen(scores, selected):
  """[G][T] lists of the experts with the largest scores [G, T, E]."""
  return [[largest(token, selected) for token in group] for group in scores]


def pick(values, wants):
  """values [G, T, E] at the chosen experts: [G, T, S]."""
  return np.array([[[values[g, t, e] for e in token] for t, token in enumerate(group)] for g, group in enumerate(wants)])


def balance(shares, wants, present=None):
  """Load-balance loss of Switch, of probabilities [G, T, E] and choices, averaged over groups."""
  groups, tokens, experts = shares.shape
  losses = []
  for g in range(groups):
    there = [t for t in range(tokens) if present is None or present[g][t]]
    f = [sum(e in wants[g][t] for t in there) / tokens for e in range(experts)]
    losses.append(experts * sum(f[e] * sum(shares[g, t, e] for t in there) / tokens for e in range(experts)))
  return np.mean(losses)


def expert_choice(logits, capacity):
  """Zhou et al. 2022: expert e takes the `capacity` tokens of the group that have the largest probability of e.

  Returns:
    token [G, E, C] and gate [G, E, C].
  """
  probs = softmax(np.asarray(logits, np.float64))
  token = np.array([[largest(group[:, e], capacity) for e in range(group.shape[1])] for group in probs])
  gate = np.array([[[probs[g, t, e] for t in token[g, e]] for e in range(probs.shape[2])] for g in range(len(probs))])
  return token, gate


def hierarchical(logits, group_logits, per_group, selected_groups):
  """Shazeer et al. 2017, appendix B without noise.

  Args:
    logits: [G, T, E], group_logits: [G, T, A].
    per_group, selected_groups: how many experts of each of how many groups.

  Returns:
    [G][T] lists of experts, most probable first, and the probabilities of all experts [G, T, E].
  """
  logits, group_logits = np.asarray(logits, np.float64), np.asarray(group_logits, np.float64)
  size = logits.shape[2] // group_logits.shape[2]
  probs, wants = np.zeros(logits.shape), []
  for g in range(logits.shape[0]):
    wants.append([])
    for t in range(logits.shape[1]):
      primary, found = softmax(group_logits[g, t]), []
      for a in range(len(primary)):
        probs[g, t, a * size:(a + 1) * size] = primary[a] * softmax(logits[g, t, a * size:(a + 1) * size])
      for a in largest(primary, selected_groups):
        found += [a * size + e for e in largest(probs[g, t, a * size:(a + 1) * size], per_group)]
      wants[-1].append(sorted(found, key=lambda e, g=g, t=t: -probs[g, t, e]))
  return wants, probs


def noisy_top_k(logits, raw_scale, noise, selected):
  """Shazeer et al. 2017, equations 3 to 11, token by token.

  Args:
    logits, raw_scale, noise: [G, T, E]: x W, x W_noise, and the normal numbers that were drawn.

  Returns:
    [G][T] lists of experts, gates [G, T, S], importance loss and load loss.
  """
  logits, noise = np.asarray(logits, np.float64), np.asarray(noise, np.float64)
  scale = np.log1p(np.exp(np.asarray(raw_scale, np.float64))) + 0.01
  h = logits + noise * scale
  wants = chosen(h, selected)
  gates = softmax(pick(h, wants))
  experts = h.shape[2]
  importance, load = np.zeros(experts), np.zeros(experts)
  for g, group in enumerate(wants):
    for t, token in enumerate(group):
      for e, gate in zip(token, gates[g, t]):
        importance[e] += gate
      for i in range(experts):
        others = sorted((h[g, t, e] for e in range(experts) if e != i), reverse=True)
        load[i] += normal_cdf((logits[g, t, i] - others[selected - 1]) / scale[g, t, i])
  return wants, gates, importance.var() / importance.mean() ** 2, load.var() / load.mean() ** 2


def normal_cdf(x):
  return (1 + math.erf(x / math.sqrt(2))) / 2
