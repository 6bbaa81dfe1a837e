"""How fast a step can be at best: from what it computes and moves, and from what the chips can do at most.

The step takes at least as long as the busiest of matrix unit, main memory, links and data centre network ("overlap":
all of them work at the same time), and about as long as all of them together where nothing overlaps ("no overlap").
Both are bounds: nothing here knows of latency, of products too small for the matrix unit, or of hosts.
"""

from typing import Dict, NamedTuple, Sequence

from openmoe_jax.tpu.collectives import Collective
from openmoe_jax.tpu.operations import Work
from openmoe_jax.tpu_slices import Slice


class Bound(NamedTuple):
  """What follows from a step time.

  Attributes:
    step_seconds: seconds a step.
    mfu: model FLOPs over what the chips could have done in that time.
    tokens_per_second: of the whole slice.
    days, chip_hours: for the token budget.
  """
  step_seconds: float
  mfu: float
  tokens_per_second: float
  days: float
  chip_hours: float


class Roofline(NamedTuple):
  """Seconds of one step on each resource, and the two bounds.

  Attributes:
    terms: {'compute', 'memory', 'ici', 'dcn'} -> seconds.
    limited_by: the largest of them.
    overlap, no_overlap: see above.
  """
  terms: Dict[str, float]
  limited_by: str
  overlap: Bound
  no_overlap: Bound


def roofline(work: Work, collectives: Sequence[Collective], slice_: Slice, model_flops: float, tokens: float,
             token_budget: float) -> Roofline:
  """Args:

    work: of one device.
    collectives: of one device.
    model_flops: that the mathematics of the step asks for, on all devices.
    tokens: of one step.
    token_budget: of the whole run.
  """
  chip = slice_.chip
  on = lambda network: sum(c.times * c.seconds for c in collectives if c.network == network)
  terms = {'compute': work.flops / chip.device_flops,
           'memory': work.bytes / chip.device_hbm_bandwidth, 'ici': on('ici'), 'dcn': on('dcn')}
  bound = lambda seconds: _bound(seconds, slice_, model_flops, tokens, token_budget)
  return Roofline(terms, max(terms, key=terms.get), bound(max(terms.values())), bound(sum(terms.values())))


def _bound(seconds: float, slice_: Slice, model_flops: float, tokens: float, token_budget: float) -> Bound:
  peak = slice_.chips * slice_.chip.peak_flops
  total = token_budget / tokens * seconds if tokens else 0.
  return Bound(seconds, model_flops / seconds / peak if seconds else 0., tokens / seconds if seconds else 0.,
               total / 86400, total / 3600 * slice_.chips)
