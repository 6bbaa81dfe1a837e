"""Times everything that costs: the training step, one Mixture-of-Experts layer, and decoding, over their sizes.

  python -m openmoe_jax.tools.benchmark --output=runs/benchmark            # or: make bench-all
  python -m openmoe_jax.tools.benchmark --output=runs/benchmark --sections=experts,backends --repeats=9
  python -m openmoe_jax.tools.benchmark --output=runs/benchmark --sections=step --again --profile_steps=2:3

Every case comes with its share of a matrix product's speed in the same type, timed in between, and the memory that the
compiled program needs. OUTPUT/benchmark.json has everything, OUTPUT/cost_growth.png the costs over sizes; what is there
already is not timed again. The same on CPU, GPU and TPU; needs no TensorFlow.

  experts    the layer over numbers of experts, with as many tokens an expert, in one routing group: cost per token
  tokens     the layer over numbers of tokens, with 16 experts
  backends   the layer over dispatch back ends and types
  step       the training step of the benchmark's model (`make bench`) over back ends and types
  lengths    the training step over row lengths, with as many tokens a step
  decode     128 tokens after a prompt of 128, over batch sizes
"""

import argparse
import functools
import json
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import jax
import numpy as np

from openmoe_jax import decoding, paths, profiling
from openmoe_jax.analysis.flops import forward_flops_per_token
from openmoe_jax.command_line import run_main
from openmoe_jax.config import DISPATCH_BACKENDS, ConfigError, require
from openmoe_jax.tools import bench_layer, bench_train_step, benchmark_plots
from openmoe_jax.tools.bench_timing import MatrixProduct, compare, peak_memory_gb, timed
from openmoe_jax.train_state import init_params

SECTIONS = ('experts', 'tokens', 'backends', 'step', 'lengths', 'decode')
DTYPES = ('float32', 'bfloat16')
_PROMPT = _NEW = 128


def cases(args: argparse.Namespace) -> Iterator[Tuple[str, str, str, Callable[..., Dict[str, Any]]]]:
  """(section, name, type of the matrix product, function of product, repeats and profiler)."""
  layer = lambda case: functools.partial(bench_layer.run, case)
  for case in bench_layer.over_experts(args.backends, args.experts, args.tokens_per_expert):
    yield 'experts', f'{case.dispatch} {case.experts}', 'float32', layer(case)
  for tokens in args.tokens:
    yield 'tokens', f'sort {tokens}', 'float32', layer(bench_layer.Case(tokens=tokens))
  for dtype in DTYPES:
    for backend in DISPATCH_BACKENDS:
      yield 'backends', f'{backend} {dtype}', dtype, layer(bench_layer.Case(dispatch=backend, dtype=dtype))
  config = bench_train_step.CONFIG
  step = lambda rows, length, **changes: lambda product, repeats, profiler: bench_train_step.run(
      config.replace(**changes), rows, length, product, repeats, profiler)
  for dtype in DTYPES:
    for backend in ('sort', 'einsum'):
      yield 'step', f'{backend} {dtype}', dtype, step(8, 512, dispatch=backend, dtype=dtype)
  for length in args.lengths:
    yield 'lengths', str(length), 'float32', step(max(4096 // length, 1), length)
  for rows in (1, 16):
    yield 'decode', str(rows), 'float32', functools.partial(decode, rows)


def decode(rows: int, product: MatrixProduct, repeats: int, profiler: Any = None) -> Dict[str, Any]:
  """Times greedy generation with the model of the training benchmark, prompt included."""
  config = bench_train_step.CONFIG
  params = jax.jit(init_params, static_argnums=0)(config, 0)
  prompt = np.random.RandomState(rows).randint(3, config.vocab_size, (rows, _PROMPT)).astype(np.int32)
  generate = lambda: decoding.generate(config, params, prompt, np.full(rows, _PROMPT), _NEW, eos_id=None).tokens
  timer = timed(generate, (), product, repeats, profiler)
  flops = rows * (_PROMPT + _NEW) * sum(forward_flops_per_token(
      decoding.dropless(config), _PROMPT + _NEW, rows, train=False).values())
  found = compare(timer, product, flops)
  return {'rows': rows, 'prompt': _PROMPT, 'new': _NEW, **found, 'tokens_per_second': rows * _NEW / found['seconds']}


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point."""
  args = parse(argv)
  file = paths.path(args.output) / 'benchmark.json'
  about = {'device': jax.devices()[0].device_kind, 'jax': jax.__version__}
  done = read(file, about)
  chosen = [case for case in cases(args) if case[0] in args.sections]
  products: Dict[str, MatrixProduct] = {}
  for number, (section, name, dtype, run) in enumerate(chosen, 1):
    known = done['cases'].setdefault(section, {})
    if name in known and not args.again:
      continue
    print(f'{number} of {len(chosen)}: {section}, {name} ...', flush=True)
    if dtype not in products:
      products[dtype] = MatrixProduct(dtype)
    profiler = profiling.StepProfiler(paths.path(args.output) / 'profile' / section / name.replace(' ', '_'),
                                      args.profile_steps)
    known[name] = run(products[dtype], args.repeats, profiler)
    done['host_memory_gb'] = max(peak_memory_gb(), done.get('host_memory_gb', 0.))
    paths.write_text(file, json.dumps(done, indent=1) + '\n')
    jax.clear_caches()  # programs hold their constants
  print(table(done['cases']))
  print(f'{done["device"]}, jax {done["jax"]}; most memory of the host {done.get("host_memory_gb", 0.):.2f} GB')
  for picture in benchmark_plots.write(done, args.output):
    print(f'wrote {picture}')
  print(f'wrote {file}')


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
  """The flags, checked."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  numbers = lambda text: [int(number) for number in text.split(',')]
  words = lambda text: text.split(',')
  parser.add_argument('--output', required=True, metavar='DIR')
  parser.add_argument('--sections', type=words, default=list(SECTIONS), help='of the list above; default all')
  parser.add_argument('--repeats', type=int, default=5, help='timed calls of a case; the median is reported')
  parser.add_argument('--experts', type=numbers, default=[8, 16, 32, 64, 128, 256], metavar='N[,N]')
  parser.add_argument('--tokens_per_expert', type=int, default=256)
  parser.add_argument('--backends', type=words, default=['sort', 'einsum'], metavar='NAME[,NAME]', help='of `experts`')
  parser.add_argument('--tokens', type=numbers, default=[1024, 4096, 16384, 65536], metavar='N[,N]')
  parser.add_argument('--lengths', type=numbers, default=[128, 512, 2048, 4096], metavar='N[,N]')
  parser.add_argument('--again', action='store_true', help='time what is there already, too')
  parser.add_argument('--profile_steps', metavar='FIRST:LAST', help='record these of the timed calls of every case, into '
                      'OUTPUT/profile')
  args = parser.parse_args(argv)
  for name, values, valid in (('sections', args.sections, SECTIONS), ('backends', args.backends, DISPATCH_BACKENDS)):
    for value in values:
      require(value in valid, f'--{name}: {value!r} is not known; valid: {", ".join(valid)}')
  require(args.repeats >= 1, f'--repeats={args.repeats} must be at least 1')
  for name in ('experts', 'tokens', 'lengths'):
    require(min(getattr(args, name)) >= 2, f'--{name} must be numbers of at least 2')
  for tokens in [*args.tokens, *(experts * args.tokens_per_expert for experts in args.experts)]:
    require(tokens > 0 and tokens % bench_layer.ROW == 0, f'{tokens} tokens of the layer must be a multiple of '
            f'{bench_layer.ROW}: --tokens, or --experts times --tokens_per_expert')
  args.profile_steps = args.profile_steps and profiling.parse_steps(args.profile_steps)
  return args


def read(file: Any, about: Dict[str, str]) -> Dict[str, Any]:
  """What was timed before on such a device.

  Raises:
    ConfigError: the file is damaged, or of another device or version.
  """
  if not file.exists():
    return {**about, 'cases': {}}
  try:
    done = json.loads(file.read_text())
    there = {name: done[name] for name in about}
    done['cases'].values()
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise ConfigError(f'{file} is damaged ({error}): remove it') from error
  require(there == about, f'{file} is of {there}, this is {about}; give another --output')
  return done


def table(found: Dict[str, Dict[str, Dict[str, Any]]]) -> str:
  """All cases as Markdown."""
  lines: List[str] = []
  for section, own in found.items():
    first = next(iter(own.values()), None)
    if first is None:
      continue
    cost = 'microseconds_per_token' in first
    lines += [f'\n| {section} | seconds | CPU-s | {"microseconds a token" if cost else "tokens/s"} | share by wall | '
              'share by CPU-s | program\'s memory |', '|---|---|---|---|---|---|---|']
    for name, case in own.items():
      speed = case['microseconds_per_token'] if cost else case['tokens_per_second']
      share = f'{case["share_by_cpu_seconds"]:.3f}' if 'share_by_cpu_seconds' in case else ''
      memory = f'{case["program_memory_gb"]:.2f} GB' if 'program_memory_gb' in case else ''
      lines.append(f'| {name} | {case["seconds"]:.3f} | {case["cpu_seconds"]:.3f} | {speed:,.2f} | '
                   f'{case["share_by_wall"]:.3f} | {share} | {memory} |')
  return '\n'.join(lines)


if __name__ == '__main__':
  run_main(main)
