"""Times the training step and says what share of a matrix product's speed it reaches.

  python -m openmoe_jax.tools.bench_train_step            # or: make bench
  python -m openmoe_jax.tools.bench_train_step --profile_steps=3:5

The figure of merit is the model's arithmetic (matrix products of the forward and backward pass over tokens and filled
expert slots; not dispatch, not recomputation) per second, divided by what a 2048-cubed float32 matrix product reaches
in the same process, timed before, between and after the steps, the best of them counted. Once by wall clock, once by
CPU-seconds of the whole process: the latter is the steadier on shared machines. `optimizer_share` is the time of the
optimizer's update alone over that of the whole step.

Allocator settings that help on CPU are in docs/benchmarks.md; `benchmark` varies sizes. Needs no TensorFlow.
"""

import argparse
import functools
import json
from typing import Any, Dict

import jax
import jax.numpy as jnp
import numpy as np

from openmoe_jax import profiling, train_step
from openmoe_jax.analysis.flops import train_flops_per_token
from openmoe_jax.command_line import run_main
from openmoe_jax.config import ModelConfig
from openmoe_jax.optimizers import adafactor
from openmoe_jax.tools.bench_timing import MatrixProduct, Timer, compare, peak_memory_gb, program_memory_gb
from openmoe_jax.train_state import TrainState, init_params, init_train_state

CONFIG = ModelConfig(vocab_size=32128, emb_dim=256, mlp_dim=1024, num_heads=8, head_dim=32, num_layers=8,
                     moe_interval=4, num_experts=16, group_size=4096, dtype='float32', scan_blocks=False)
_STEPS_BETWEEN_PRODUCTS = 4


def make_batch(config: ModelConfig, rows: int, length: int) -> dict:
  """Random tokens without padding."""
  tokens = np.random.RandomState(0).randint(3, config.vocab_size, (rows, length + 1)).astype(np.int32)
  return {'decoder_input_tokens': tokens[:, :-1], 'decoder_target_tokens': tokens[:, 1:],
          'decoder_loss_weights': np.ones((rows, length), np.float32)}


def run(config: ModelConfig, rows: int, length: int, product: MatrixProduct, steps: int, profiler: Any = None
        ) -> Dict[str, Any]:
  """Times steps of a model on [rows, length] tokens, and products between them."""
  profiler = profiler or profiling.StepProfiler('', None)
  optimizer = adafactor(learning_rate=1e-2)
  state = init_train_state(config, optimizer, jax.jit(init_params, static_argnums=0)(config, 0))
  parameters = sum(x.size for x in jax.tree.leaves(state.params))
  batch = jax.device_put(make_batch(config, rows, length))
  timer, first = Timer(), Timer()
  step = first(lambda: train_step.make_train_step(config, optimizer).lower(state, batch).compile())
  state, _ = first(step, state, batch)
  state, metrics = step(state, batch)
  jax.block_until_ready(metrics)
  product()
  for i in range(1, steps + 1):
    profiler.before(i)
    state, metrics = timer(step, state, batch)
    profiler.after(i)
    if i % _STEPS_BETWEEN_PRODUCTS == 0:
      product()
  profiler.stop()
  product()
  tokens, optimizer_seconds = rows * length, time_of_update(config, optimizer, state, steps)
  found = compare(timer, product, tokens * train_flops_per_token(config, length, rows))
  return {'dtype': config.dtype, 'dispatch': config.dispatch, 'scan_blocks': config.scan_blocks, 'rows': rows, 'length':
          length, 'parameters': parameters, 'loss': float(metrics['loss']), **found, 'best_seconds': min(timer.wall),
          'optimizer_share': optimizer_seconds / found['seconds'], 'tokens_per_second': tokens / found['seconds'],
          'first_step_seconds': sum(first.wall), 'program_memory_gb': program_memory_gb(step)}


def time_of_update(config: ModelConfig, optimizer: Any, state: TrainState, repeats: int) -> float:
  """Median seconds of what a step does once it has the gradients; `state` is used up."""
  grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), state.params)
  step, timer = jax.jit(functools.partial(train_step.update, config, optimizer), donate_argnums=0), Timer()
  metrics = {'loss': jnp.float32(1)}
  state, _ = step(state, grads, metrics)
  for _ in range(repeats):
    state, _ = timer(step, state, grads, metrics)
  return float(np.median(timer.wall))


def figures_of(args) -> dict:
  """What `make bench` prints."""
  profiler = profiling.StepProfiler(args.profile_dir, args.profile_steps and profiling.parse_steps(args.profile_steps))
  config = CONFIG.replace(dtype=args.dtype, scan_blocks=args.scan, dispatch=args.dispatch)
  found = run(config, args.rows, args.length, MatrixProduct(), args.steps, profiler)
  shares = {name: found[name] for name in ('share_by_wall', 'share_by_cpu_seconds') if name in found}
  return {
      'device': jax.devices()[0].device_kind, 'jax': jax.__version__,
      **{name: found[name] for name in ('dtype', 'dispatch', 'scan_blocks', 'parameters', 'loss')},
      'gflop_per_step': found['gflop'], 'seconds_per_step': found['seconds'],
      'best_seconds_per_step': found['best_seconds'], 'tokens_per_second': found['tokens_per_second'],
      'cpu_seconds_per_step': found['cpu_seconds'], 'optimizer_share': found['optimizer_share'],
      'matmul_gflop_per_second': found['matmul_gflop_per_second'],
      'matmul_gflop_per_cpu_second': found['matmul_gflop_per_cpu_second'], **shares,
      'first_step_seconds': found['first_step_seconds'], 'peak_memory_gb': peak_memory_gb(),
  }


def main(argv=None) -> None:
  """Entry point."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--steps', type=int, default=12, help='timed steps; the median is reported')
  parser.add_argument('--rows', type=int, default=8)
  parser.add_argument('--length', type=int, default=512)
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--dispatch', default='sort', choices=('sort', 'einsum'))
  parser.add_argument('--scan', action='store_true', help='scan over stacked blocks instead of unrolling them')
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  parser.add_argument('--profile_steps', metavar='FIRST:LAST', help='record these of the timed steps')
  parser.add_argument('--profile_dir', default='profile', metavar='DIR', help='where to; default profile')
  args = parser.parse_args(argv)
  figures = figures_of(args)
  if args.json:
    print(json.dumps(figures))
  else:
    for name, value in figures.items():
      print(f'{name:30s} {value:,.3f}' if isinstance(value, float) else f'{name:30s} {value}')


if __name__ == '__main__':
  run_main(main)
