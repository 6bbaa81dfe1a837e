"""Times the training step and says what share of a matrix product's speed it reaches.

  python -m openmoe_jax.tools.bench_train_step            # or: make bench

The figure of merit is the model's arithmetic (matrix products of the forward and backward pass over tokens and filled
expert slots; not dispatch, not recomputation) per second, divided by what a 2048-cubed float32 matrix product reaches
in the same process, timed before, between and after the steps, the best of them counted. Once by wall clock, once by
CPU-seconds of the whole process: the latter is the steadier on shared machines.

Allocator settings that help on CPU are in docs/benchmarks.md. Needs no TensorFlow.
"""

import argparse
import json
import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np

from openmoe_jax.analysis.flops import train_flops_per_token
from openmoe_jax.config import ModelConfig
from openmoe_jax.optimizers import adafactor
from openmoe_jax.tools.bench_timing import Timer
from openmoe_jax.train_state import init_params, init_train_state
from openmoe_jax.train_step import make_train_step

CONFIG = ModelConfig(vocab_size=32128, emb_dim=256, mlp_dim=1024, num_heads=8, head_dim=32, num_layers=8,
                     moe_interval=4, num_experts=16, group_size=4096, dtype='float32', scan_blocks=False)
MATMUL = 2048


def make_batch(config: ModelConfig, rows: int, length: int) -> dict:
  """Random tokens without padding."""
  tokens = np.random.RandomState(0).randint(3, config.vocab_size, (rows, length + 1)).astype(np.int32)
  return {'decoder_input_tokens': tokens[:, :-1], 'decoder_target_tokens': tokens[:, 1:],
          'decoder_loss_weights': np.ones((rows, length), np.float32)}


def run(args) -> dict:
  """Runs the benchmark; returns its figures."""
  config = CONFIG.replace(dtype=args.dtype, scan_blocks=args.scan, dispatch=args.dispatch)
  optimizer = adafactor(learning_rate=1e-2)
  state = init_train_state(config, optimizer, jax.jit(init_params, static_argnums=0)(config, 0))
  parameters = sum(x.size for x in jax.tree.leaves(state.params))
  batch = jax.device_put(make_batch(config, args.rows, args.length))
  step = make_train_step(config, optimizer)

  matmul, steps, compile_timer = Timer(), Timer(), Timer()
  a = jnp.asarray(np.random.RandomState(1).randn(MATMUL, MATMUL), jnp.float32)
  product = jax.jit(jnp.dot)
  jax.block_until_ready(product(a, a))
  time_matmul = lambda: [matmul(product, a, a) for _ in range(8)]

  state, metrics = compile_timer(step, state, batch)
  state, metrics = step(state, batch)
  jax.block_until_ready(metrics)
  time_matmul()
  for i in range(args.steps):
    state, metrics = steps(step, state, batch)
    if i % 4 == 3:
      time_matmul()
  time_matmul()

  tokens = args.rows * args.length
  flops = tokens * train_flops_per_token(config, args.length, args.rows)
  peak_wall, peak_cpu = (2 * MATMUL**3 / min(times) for times in (matmul.wall, matmul.cpu))
  wall, cpu = float(np.median(steps.wall)), float(np.median(steps.cpu))
  return {
      'device': jax.devices()[0].device_kind, 'jax': jax.__version__, 'dtype': config.dtype,
      'dispatch': config.dispatch, 'scan_blocks': config.scan_blocks, 'parameters': parameters, 'loss':
      float(metrics['loss']), 'gflop_per_step': flops / 1e9, 'seconds_per_step': wall, 'best_seconds_per_step':
      min(steps.wall), 'tokens_per_second': tokens / wall, 'cpu_seconds_per_step': cpu, 'matmul_gflop_per_second':
      peak_wall / 1e9, 'matmul_gflop_per_cpu_second': peak_cpu / 1e9, 'share_by_wall': flops / wall / peak_wall,
      'share_by_cpu_seconds': flops / cpu / peak_cpu, 'first_step_seconds': compile_timer.wall[0],
      'peak_memory_gb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
  }


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--steps', type=int, default=12, help='timed steps; the median is reported')
  parser.add_argument('--rows', type=int, default=8)
  parser.add_argument('--length', type=int, default=512)
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--dispatch', default='sort', choices=('sort', 'einsum'))
  parser.add_argument('--scan', action='store_true', help='scan over stacked blocks instead of unrolling them')
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  args = parser.parse_args(argv)
  figures = run(args)
  if args.json:
    print(json.dumps(figures))
  else:
    for name, value in figures.items():
      print(f'{name:30s} {value:,.3f}' if isinstance(value, float) else f'{name:30s} {value}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
