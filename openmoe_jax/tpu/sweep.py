"""Tries mesh shapes and numbers of microbatches on a slice."""

import dataclasses
from typing import Any, Callable, Dict, List, Sequence

from openmoe_jax import partitioning
from openmoe_jax.analysis import memory
from openmoe_jax.config import ConfigError, RunConfig, require
from openmoe_jax.tpu import programs, report
from openmoe_jax.tpu_slices import Slice


def candidates(run: RunConfig, slice_: Slice) -> List[RunConfig]:
  """Every mesh data x expert x model (the stages of a pipeline are the run's) and number of microbatches with which the
  run can be split over the slice.

  Those that are expected to fit come first; among them the fewest parts of the axis `model`, whose layers wait for each
  other, then the fewest microbatches, then the most experts apart. Others follow in the order of their expected memory.
  """
  found, most = [], 64
  devices = slice_.devices // run.mesh.pipe
  for model in _divisors(devices):
    for expert in _divisors(devices // model):
      if expert > max(run.model.num_experts, 1) or model > most:
        continue
      mesh = dataclasses.replace(run.mesh, data=devices // model // expert, expert=expert, model=model)
      for count in _divisors(run.data.batch_size):
        try:
          changed = dataclasses.replace(run, mesh=mesh, train=dataclasses.replace(run.train, num_microbatches=count))
          partitioning.validate_mesh(run.model, memory.mesh_shape(mesh), run.data.batch_size // count,
                                     mesh.optimizer_fsdp)
        except ConfigError:
          continue
        found.append(changed)
  size = {id(c): memory.memory_table(c, run.data.row_length, memory.mesh_shape(c.mesh))['sum'][1] for c in found}

  def order(c: RunConfig):
    fits = size[id(c)] < slice_.device_hbm_bytes
    return (not fits, 0 if fits else size[id(c)], c.mesh.model, c.train.num_microbatches, -c.mesh.expert)

  return sorted(found, key=order)


def _divisors(n: int) -> List[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


def sweep(run: RunConfig, slice_: Slice, devices: Sequence[Any], limit: int, say: Callable[[str], None]
          ) -> List[Dict[str, Any]]:
  """Reports of the first `limit` candidates, those that fit first, the fastest (without overlap) first.

  Raises:
    ConfigError: no mesh divides the model and the batch.
  """
  require(limit > 0, f'--sweep_limit={limit} must be positive')
  tried = candidates(run, slice_)
  require(bool(tried), f'no mesh of {slice_.devices} devices divides {run.model.num_experts} experts and '
          f'{run.data.batch_size} rows')
  found = []
  for number, changed in enumerate(tried[:limit]):
    mesh = programs.make_mesh(changed, devices)
    figures = report.train_report(changed, slice_, mesh, programs.compile_train(changed, mesh))
    found.append({'mesh': dict(mesh.shape), 'num_microbatches': changed.train.num_microbatches, **figures})
    what = f'{1e3 * figures["roofline"]["no_overlap"]["step_seconds"]:.1f} ms' if figures['fits'] else 'does not fit'
    say(f'{number + 1} of {min(limit, len(tried))}: {" x ".join(map(str, mesh.shape.values()))} in '
        f'{changed.train.num_microbatches}: {what} ({figures["compile_seconds"]:.0f} s)')
  return sorted(found, key=lambda f: (not f['fits'], f['roofline']['no_overlap']['step_seconds'] if f['fits'] else 0))
