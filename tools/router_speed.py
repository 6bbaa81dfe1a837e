"""How long a training step of each variant of tools/router_study takes.

The variants take turns, so that what else the machine does meets them alike, and are compared within a round.
CPU-seconds are those of the whole process; where other programs run, they are steadier than the clock.
"""

import itertools
import json
import time
from typing import Any, Callable, Dict, List, Sequence

import jax

from openmoe_jax import data as data_lib, paths
from openmoe_jax.analysis import flops
from openmoe_jax.config import RunConfig
from openmoe_jax.optimizers import make_optimizer
from openmoe_jax.tools.bench_timing import cpu_seconds
from openmoe_jax.tools.router_variants import VARIANTS, model_of
from openmoe_jax.train_state import init_params, init_train_state
from openmoe_jax.train_step import make_train_step

STEPS = 3  # of a variant in a round
FILE = 'speed.json'


def measured(folder: paths.PathLike, names: Sequence[str], rounds: int) -> List[Dict[str, Any]]:
  """What was measured before, if it has all these variants and as many rounds; else nothing."""
  file = paths.path(folder) / FILE
  found = json.loads(file.read_text()) if file.exists() else []
  there = {(result['variant'], result['seed']) for result in found}
  return found if all((name, number) in there for name in names for number in range(rounds)) else []


def measure(run: RunConfig, names: Sequence[str], batches: Sequence[data_lib.Batch], rounds: int,
            advance: Callable[[int], None]) -> List[Dict[str, Any]]:
  """Times the steps and writes `FILE` into the run's folder.

  Args:
    batches: [1, rows, length] each, used over and over.
    advance: is told how many steps were made.

  Returns:
    For each variant and round 'variant', 'seed' (number of the round), 'cpu_seconds' and 'seconds' of a step, 'mflops'
    (useful FLOPs of training a token), 'parameters' and 'mlp_dim'.
  """
  optimizer = make_optimizer(run.optimizer, run.train.train_steps)
  configs = {name: model_of(run, VARIANTS[name]) for name in names}
  configs.update({name: configs[name].replace(router='frozen') for name in names if VARIANTS[name].freeze})
  steps = {name: make_train_step(config, optimizer) for name, config in configs.items()}
  states = {name: init_train_state(config, optimizer, jax.jit(init_params, static_argnums=0)(config, 0))
            for name, config in configs.items()}
  about = {name: {
      'variant': name, 'mlp_dim': config.mlp_dim,
      'parameters': sum(x.size for x in jax.tree.leaves(states[name].params)),
      'mflops': flops.train_flops_per_token(config, run.data.row_length, run.data.batch_size) / 1e6}
      for name, config in configs.items()}
  results: List[Dict[str, Any]] = []
  endless = itertools.cycle(batches)
  for number in range(-1, rounds):  # in round -1 everything is compiled
    some = list(itertools.islice(endless, STEPS))
    for name in names:
      cpu, wall = cpu_seconds(), time.perf_counter()
      for batch in some:
        states[name], metrics = steps[name](states[name], batch)
      jax.block_until_ready(metrics)
      if number >= 0:
        results.append({**about[name], 'seed': number, 'cpu_seconds': (cpu_seconds() - cpu) / STEPS,
                        'seconds': (time.perf_counter() - wall) / STEPS})
      advance(STEPS)
  paths.write_text(paths.path(run.model_dir) / FILE, json.dumps(results, indent=1) + '\n')
  return results
