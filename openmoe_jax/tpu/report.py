"""A run on a slice as plain data: does it fit, what does it compute, move and keep, and how fast can it be at best."""

import dataclasses
import math
from typing import Any, Dict, List, Optional

from jax.sharding import Mesh

from openmoe_jax import splash, tpu_slices
from openmoe_jax.analysis import flops, memory
from openmoe_jax.config import ModelConfig, RunConfig
from openmoe_jax.tpu import hlo
from openmoe_jax.tpu.collectives import by_kind, collectives
from openmoe_jax.tpu.hlo import Module
from openmoe_jax.tpu.operations import work
from openmoe_jax.tpu.parts import part_of, parts
from openmoe_jax.tpu.programs import Program
from openmoe_jax.tpu.roofline import roofline
from openmoe_jax.tpu_slices import Slice


def describe(run: RunConfig, slice_: Slice, mesh: Mesh) -> Dict[str, Any]:
  """What is compiled, and for what."""
  model = run.model
  return {
      'topology': slice_.name, 'libtpu_topology': slice_.topology, 'slices': slice_.slices, 'chips': slice_.chips,
      'devices': slice_.devices, 'hbm_bytes_per_device': slice_.device_hbm_bytes, 'mesh': dict(mesh.shape),
      'fsdp': list(run.mesh.fsdp), 'shard_optimizer': list(run.mesh.shard_optimizer), 'batch_size': run.data.batch_size,
      'row_length': run.data.row_length, 'num_microbatches': run.train.num_microbatches, 'remat': model.remat,
      'dispatch': model.dispatch, 'dtype': model.dtype, 'train_steps': run.train.train_steps,
  }


def train_report(run: RunConfig, slice_: Slice, mesh: Mesh, program: Program) -> Dict[str, Any]:
  """Figures of the train step; of one that does not fit, how much it lacks and what would help."""
  rows, length = run.data.batch_size // run.train.num_microbatches, run.data.row_length
  tokens = run.data.batch_size * length
  model_flops = tokens * flops.train_flops_per_token(run.model, length, rows)
  report = _report(run, program, slice_, mesh, model_flops, tokens, tokens * run.train.train_steps)
  if not program.fits:
    report['advice'] = advice(run, slice_, mesh, program.needed)
    return report
  if program.memory.total > slice_.device_hbm_bytes:
    report['advice'] = advice(run, slice_, mesh, program.memory.total)
  report['memory'] = {**state_bytes(run, mesh), **report['memory']}
  report['memory']['other arguments'] = max(report['memory'].pop('arguments') - sum(
      report['memory'][name] for name in ('parameters', 'optimizer state')), 0)
  model = run.model if splash.runs_on(slice_.chip.kind) else run.model.replace(attention='blocked')
  waste = expected_waste(model, length, rows)
  known = {name: tokens * per_token for name, per_token in waste.items()}
  known['other'] = report['flops']['compiled'] - model_flops - sum(known.values())
  report['flops']['waste'] = known
  return report


def decode_report(run: RunConfig, slice_: Slice, mesh: Mesh, program: Program, rows: int, positions: int
                  ) -> Dict[str, Any]:
  """Figures of one step of generation with a cache of `positions`, half of them filled on average."""
  parts = flops.forward_flops_per_token(run.model.replace(capacity_mode='none'), positions, None, train=False)
  return _report(run, program, slice_, mesh, rows * sum(parts.values()), rows, 0)


def _report(run: RunConfig, program: Program, slice_: Slice, mesh: Mesh, model_flops: float, tokens: float,
            budget: float) -> Dict[str, Any]:
  report = {'program': program.name, 'fits': program.fits, 'compile_seconds': program.seconds}
  if not program.fits:
    return {**report, 'error': program.error, 'needed_bytes': program.needed,
            'flops': {'model': model_flops}}
  module = hlo.parse(program.text)
  of = part_of(run.model)
  done = work(module, of)
  moved = collectives(module, dict(mesh.shape), list(mesh.devices.flat), slice_)
  bounds = roofline(done, moved, slice_, model_flops, tokens, budget)
  compiled = done.flops * slice_.devices
  kept = min(kept_bytes(module), program.memory.temporaries)
  return {
      **report,
      'memory': {'arguments': program.memory.arguments, 'activations': kept,
                 'temporaries': program.memory.temporaries - kept, 'outputs': program.memory.outputs,
                 'code': program.memory.code},
      'memory_peak': program.memory.peak, 'memory_total': program.memory.total, 'host_memory': program.memory.host,
      'flops': {'model': model_flops, 'compiled': compiled, 'ratio': compiled / model_flops if model_flops else math.nan,
                'kernels': done.kernel_flops * slice_.devices, 'unknown_kernels': done.unknown,
                'unknown_loops': list(module.unknown_loops)},
      'main_memory_bytes': done.bytes,
      'collectives': [dict(zip(('network', 'kind', 'axes', 'executions', 'bytes', 'seconds', 'hidden_seconds'), row))
                      for row in by_kind(moved)],
      'parts': [part._asdict() for part in parts(done, moved, of, slice_)],
      'roofline': {'terms': bounds.terms, 'limited_by': bounds.limited_by, 'overlap': bounds.overlap._asdict(),
                   'no_overlap': bounds.no_overlap._asdict()},
      'tokens': tokens, 'token_budget': budget,
  }


def state_bytes(run: RunConfig, mesh: Mesh) -> Dict[str, float]:
  """Bytes of parameters and optimizer state on one device."""
  params, opt_state, _ = memory.state_plan(run, dict(mesh.shape))
  return {'parameters': sum(p.device_bytes for p in params), 'optimizer state': sum(p.device_bytes for p in opt_state)}


def kept_bytes(module: Module) -> float:
  """Bytes of the activations that the forward pass keeps for the backward pass, on one device.

  With scanned blocks these are the arrays that one loop leaves behind and a later one takes in, parameters aside. What is
  kept outside of loops is counted with the temporaries.
  """
  most = 0.
  for body in module.computations.values():
    loops = [i for i in body if i.opcode == 'while']
    if len(loops) < 2:
      continue
    names = {i.name: i for i in body}
    made = {i.name: i for i in body if i.opcode == 'get-tuple-element' and i.operands[0] in {w.name for w in loops}}
    kept = 0.
    for loop in loops:
      taken = names.get(loop.operands[0])
      for name in taken.operands if taken is not None else ():
        source = names.get(name)
        while source is not None and source.opcode in ('bitcast', 'copy', 'copy-done', 'copy-start') and source.operands:
          source = names.get(source.operands[0])
        if source is not None and source.name in made and source.operands[0] != loop.name:
          kept += sum(a.bytes for a in source.arrays if a.space == 0 and a.dims)
    most = max(most, kept)
  return most


def expected_waste(config: ModelConfig, length: int, rows: Optional[int]) -> Dict[str, float]:
  """FLOPs a token that training computes beside the model's own, by cause, as `analysis.flops` expects them."""
  useful = flops.forward_flops_per_token(config, length, rows)
  computed = flops.computed_forward_flops_per_token(config, length, rows)
  more = lambda part: 3 * (computed.get(part, 0.) - useful.get(part, 0.))
  scores = 2 * config.num_layers * config.num_heads * config.head_dim * flops.computed_keys(config, length)
  parts = {
      'remat': flops.recomputed_flops_per_token(config, length, rows),
      'empty expert slots': more('experts'),
      'dispatch': flops.dispatch_flops_per_token(config, length, rows),
      'masked attention': more('attention scores'),
      'attention scores again': scores,
  }
  return {name: value for name, value in parts.items() if value}


def advice(run: RunConfig, slice_: Slice, mesh: Mesh, needed: float) -> List[str]:
  """Single changes that would save memory, with what `openmoe-inspect` expects of them, the greatest first; and the
  next slice whose chips together have what is `needed` [bytes; 0 if unknown] by every device of this one."""
  shape, length = dict(mesh.shape), run.data.row_length
  now = _estimate(run, length, shape)
  candidates = []
  if set(run.mesh.fsdp) != {'data', 'expert'}:
    candidates.append(("MeshConfig.fsdp = ('data', 'expert')",
                       dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, fsdp=('data', 'expert')))))
  if run.model.remat != 'full':
    candidates.append(("ModelConfig.remat = 'full'", dataclasses.replace(run, model=run.model.replace(remat='full'))))
  rows = run.data.batch_size // run.train.num_microbatches
  more = 2 * run.train.num_microbatches
  if rows % (2 * shape['data'] * shape['expert']) == 0 and run.data.batch_size % (more * run.data.num_streams) == 0:
    candidates.append((f'TrainConfig.num_microbatches = {more}', dataclasses.replace(
        run, train=dataclasses.replace(run.train, num_microbatches=more))))
  saved = sorted(((now - _estimate(changed, length, shape), text) for text, changed in candidates), reverse=True)
  lines = [f'{text} saves about {size / 2 ** 30:.1f} GiB a device' for size, text in saved if size > 0]
  larger = tpu_slices.larger(slice_, needed / slice_.device_hbm_bytes) if needed else ''
  if larger:
    lines.append(f'--topology={larger} has the memory, if all is split over its chips')
  return lines or ['a smaller batch or a larger MeshConfig.model']


def _estimate(run: RunConfig, length: int, shape: Dict[str, int]) -> float:
  return memory.memory_table(run, length, shape)['sum'][1]
