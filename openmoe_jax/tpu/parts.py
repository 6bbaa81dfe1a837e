"""What of a step is spent on which part of the model: attention, experts, loss, optimizer.

The compiler keeps for most instructions the place in the traced program that they come from. A fusion has the place of
one of the things fused, and what the compiler adds by itself has none, so these are good figures, not exact ones.
"""

import collections
import re
from typing import Callable, Dict, List, NamedTuple, Sequence

from openmoe_jax.config import ModelConfig
from openmoe_jax.tpu.collectives import Collective
from openmoe_jax.tpu.operations import Work
from openmoe_jax.tpu_slices import Slice

OTHER = 'other'
UNITS = ('compute', 'memory', 'links')  # of a Part, each with its seconds
# Names of modules and scopes in the traced program; the first that is found counts.
_BY_NAME = {'optimizer': 'optimizer', 'loss': 'loss', 'self_attention': 'attention', 'extra_mlp': 'always-on FFN',
            'token_embedder': 'embedding'}


class Part(NamedTuple):
  """Seconds that one device's units need at least for a part of the model in one step.

  Attributes:
    name: of the part.
    compute, memory, links: of the matrix unit, of main memory, and of links and data centre network.
    share: of the sum of all three over all parts, which is the step without overlap.
  """
  name: str
  compute: float
  memory: float
  links: float
  share: float


def part_of(config: ModelConfig) -> Callable[[str], str]:
  """Place in the traced program -> name of the part."""
  sparse = {f'layers_{i}' for i in range(config.num_layers) if config.is_sparse(i)}  # of a scanned block, too

  def part(source: str) -> str:
    names = re.split(r'[/()]+', source)
    for name, of in _BY_NAME.items():
      if name in names:
        return of
    if 'mlp' in names:
      return 'experts and routing' if sparse & set(names) else 'dense FFN'
    if any(name.endswith('_norm') or re.fullmatch(r'layers_\d+', name) for name in names):
      return 'norms and residuals'
    return OTHER

  return part


def parts(work: Work, moved: Sequence[Collective], part: Callable[[str], str], slice_: Slice) -> List[Part]:
  """All parts of a program, the longest first."""
  links: Dict[str, float] = collections.Counter()
  for c in moved:
    links[part(c.source)] += c.times * c.seconds
  seconds_of = lambda sums, rate: {name: value / rate for name, value in sums.items()}
  columns = (seconds_of(work.flops_of, slice_.chip.device_flops),
             seconds_of(work.bytes_of, slice_.chip.device_hbm_bandwidth), links)
  whole = sum(sum(column.values()) for column in columns)
  found = []
  for name in dict.fromkeys(name for column in columns for name in column):
    seconds = [column.get(name, 0.) for column in columns]
    found.append(Part(name, *seconds, sum(seconds) / whole if whole else 0.))
  return sorted(found, key=lambda p: -p.share)
