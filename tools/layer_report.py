"""What a Mixture-of-Experts layer costs on a TPU chip as the number of experts grows, by the TPU compiler; needs no TPU.

  python -m openmoe_jax.tools.layer_report --output=runs/layer_report          # after `make install-tpu`
  python -m openmoe_jax.tools.layer_report --output=runs/layer_report --topology=v6e-1 --backends=sort,dropless

Forward and backward of one layer in bfloat16, all tokens one routing group, as many tokens an expert whatever their
number: the cost of a token would not change if routing and dispatch cost nothing. Counts come from the compiled program,
seconds from the chip's published figures, as in openmoe-compile-report. OUTPUT/layer_report.json and .png; what is
there already is not compiled again.
"""

import argparse
import json
from typing import Any, Dict, List, Optional, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from openmoe_jax import paths, tpu_slices
from openmoe_jax.command_line import run_main
from openmoe_jax.config import DISPATCH_BACKENDS, ConfigError, require
from openmoe_jax.tools import bench_layer, benchmark_plots
from openmoe_jax.tpu import hlo, operations, programs
from openmoe_jax.tpu.roofline import roofline


def report(case: bench_layer.Case, slice_: tpu_slices.Slice, device: Any) -> Dict[str, Any]:
  """A case compiled for one device: what it computes and moves a token, and the seconds that follow."""
  place = SingleDeviceSharding(device)
  shaped = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
  shape = (case.tokens // bench_layer.ROW, bench_layer.ROW, case.emb_dim)
  params = jax.tree.map(lambda a: shaped(a.shape, a.dtype), jax.eval_shape(
      lambda x: bench_layer.init(case, x), jax.ShapeDtypeStruct(shape, case.dtype)))
  program = programs.compile_program('layer', bench_layer.make_step(case).lower, params, shaped(shape, case.dtype),
                                     shaped(shape, jnp.float32))
  found = case._asdict() | {'fits': program.fits}
  if not program.fits:
    return found | {'needed_bytes': program.needed}
  module, model_flops = hlo.parse(program.text), bench_layer.flops_of(case)
  done = operations.work(module)
  bounds = roofline(done, (), slice_, model_flops, case.tokens, 0)
  a_token = lambda value: value / case.tokens
  return found | {
      'flops_per_token': a_token(done.flops), 'model_flops_per_token': a_token(model_flops),
      'bytes_per_token': a_token(done.bytes), 'memory_bytes': program.memory.peak,
      'unknown': [*done.unknown, *module.unknown_loops], 'nanoseconds_overlap': 1e9 * a_token(bounds.overlap.step_seconds),
      'nanoseconds_no_overlap': 1e9 * a_token(bounds.no_overlap.step_seconds)}


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point."""
  args = parse(argv)
  slice_ = tpu_slices.parse(args.topology)
  device = programs.topology_devices(slice_)[0]
  file = paths.path(args.output) / 'layer_report.json'
  result = read(file, slice_.name)
  known = {bench_layer.Case(*(case[name] for name in bench_layer.Case._fields)): case for case in result['cases']}
  found: List[Dict[str, Any]] = []
  for case in bench_layer.over_experts(args.backends, args.experts, args.tokens_per_expert, dtype='bfloat16',
                                       emb_dim=args.emb_dim, mlp_dim=args.mlp_dim):
    if case not in known:
      print(f'{case.dispatch}, {case.experts} experts ...', flush=True)
      known[case] = report(case, slice_, device)
      result['cases'] = list(known.values())
      paths.write_text(file, json.dumps(result, indent=1) + '\n')
    found.append(known[case])
  print(table(found))
  picture = plot({'topology': slice_.name, 'cases': found}, paths.path(args.output) / 'layer_report.png')
  print(f'wrote {file}\nwrote {picture}')


def read(file: Any, topology: str) -> Dict[str, Any]:
  """What was compiled before.

  Raises:
    ConfigError: the file is damaged, or of another chip.
  """
  if not file.exists():
    return {'topology': topology, 'cases': []}
  try:
    result = json.loads(file.read_text())
    there, _ = result['topology'], [case['fits'] for case in result['cases']]
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f'{file} is damaged ({error}): remove it') from error
  require(there == topology, f'{file} is of {there}, this is {topology}; give another --output')
  return result


def growth(cases: Sequence[Dict[str, Any]], name: str) -> Dict[str, List[tuple]]:
  """{back end: [(experts, cost of a token over that of the fewest experts)]} of the cases that fit."""
  return benchmark_plots.growth_of((case for case in cases if case['fits']), lambda case: case[name])


def table(cases: Sequence[Dict[str, Any]]) -> str:
  """All cases as Markdown, costs beside those of the fewest experts."""
  relative = {name: {backend: dict(points) for backend, points in growth(cases, name).items()}
              for name in ('nanoseconds_overlap', 'nanoseconds_no_overlap')}
  lines = ['| back end | experts | tokens | FLOPs / model FLOPs | bytes a token | ns a token, overlap | without | '
           'growth, overlap | without |', '|---|---|---|---|---|---|---|---|---|']
  for case in cases:
    backend, experts = case['dispatch'], case['experts']
    head = f'| {backend} | {experts} | {case["tokens"]:,} |'
    if not case['fits']:
      lines.append(f'{head} does not fit | | | | | |')
      continue
    lines.append(f'{head} {case["flops_per_token"] / case["model_flops_per_token"]:.3f} | {case["bytes_per_token"]:,.0f} | '
                 f'{case["nanoseconds_overlap"]:.1f} | {case["nanoseconds_no_overlap"]:.1f} | '
                 f'{relative["nanoseconds_overlap"][backend][experts]:.3f} | '
                 f'{relative["nanoseconds_no_overlap"][backend][experts]:.3f} |')
    if case['unknown']:
      lines.append(f'| | | | not counted: {", ".join(case["unknown"])} | | | | | |')
  return '\n'.join(lines)


def plot(result: Dict[str, Any], file: paths.PathLike) -> str:
  """Cost of a token over that of the fewest experts, without overlap, over numbers of experts; returns the file."""
  return benchmark_plots.draw_picture(file, growth(result['cases'], 'nanoseconds_no_overlap'), 'experts',
                                      'cost of a token / that of the fewest experts',
                                      f'MoE layer compiled for {result["topology"]}')


def parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
  """The flags, checked."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  numbers = lambda text: [int(number) for number in text.split(',')]
  parser.add_argument('--output', required=True, metavar='DIR')
  parser.add_argument('--topology', default='v5e-1', metavar='NAME', help='a slice; the layer is compiled for one device')
  parser.add_argument('--backends', type=lambda text: text.split(','), default=['sort', 'dropless', 'einsum'],
                      metavar='NAME[,NAME]')
  parser.add_argument('--experts', type=numbers, default=[8, 16, 32, 64, 128, 256], metavar='N[,N]')
  parser.add_argument('--tokens_per_expert', type=int, default=256)
  parser.add_argument('--emb_dim', type=int, default=512)
  parser.add_argument('--mlp_dim', type=int, default=2048)
  args = parser.parse_args(argv)
  for backend in args.backends:
    require(backend in DISPATCH_BACKENDS, f'--backends: {backend!r} is not known; valid: {", ".join(DISPATCH_BACKENDS)}')
  require(min(args.experts) >= 2, f'--experts={args.experts} must be numbers of at least 2')
  for experts in args.experts:
    tokens = experts * args.tokens_per_expert
    require(tokens > 0 and tokens % bench_layer.ROW == 0, f'{tokens} tokens, --experts times --tokens_per_expert, must be '
            f'a multiple of {bench_layer.ROW}')
  return args


if __name__ == '__main__':
  run_main(main)
