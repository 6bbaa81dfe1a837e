"""What int8 kernels cost and save: perplexity and memory of a trained model with and without them.

  python -m openmoe_jax.tools.quantization_study CHECKPOINT [--mixture=NAME] [--batches=N]

Evaluates on the validation data of the checkpoint's run, without dropping tokens, and prints a Markdown table.
"""

import dataclasses
import math
from typing import Any, Dict, Mapping, Optional, Sequence

import jax

from openmoe_jax import command_line, decoding, loading, partitioning, paths, quantization
from openmoe_jax.config import MeshConfig, RunConfig, from_dict, require


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  parser = command_line.Parser(configured=False, prog='quantization_study', description=__doc__)
  parser.add_argument('checkpoint', metavar='CHECKPOINT')
  parser.add_argument('--mixture', default='', help="default: the validation data of the checkpoint's run")
  parser.add_argument('--batches', type=int, help='of each source; default: as in training; 0 for all')
  parser.add_argument('--tfds_data_dir', help='where TFDS data sets lie')
  args = parser.parse_args(argv)
  require(args.batches is None or args.batches >= 0, f'--batches={args.batches} must not be negative')
  rows = study(loading.load(args.checkpoint), args.mixture, args.batches, args.tfds_data_dir)
  print('\n'.join(table(rows)))


def study(model: Any, mixture: str = '', batches: Optional[int] = None, tfds_data_dir: Optional[str] = None
          ) -> Dict[str, Mapping[str, float]]:
  """{'float32': .., 'int8': ..}: perplexity and loss of every source, bytes of all parameters and of the kernels."""
  from openmoe_jax.evaluation import Evaluator
  from openmoe_jax.train_step import make_eval_step
  changes = {'eval_mixture_or_task': mixture, 'eval_batches': batches, 'tfds_data_dir': tfds_data_dir}
  run = from_dict(RunConfig, model.run)
  data = dataclasses.replace(run.data, **{name: value for name, value in changes.items() if value not in (None, '')})
  config = decoding.dropless(model.config)
  mesh = partitioning.make_mesh(MeshConfig(), jax.local_devices()[:1])
  evaluator = Evaluator(dataclasses.replace(run, model=config, data=data), mesh, make_eval_step(config, mesh=mesh))
  rows = {}
  small = quantization.quantize_model(model)
  for name, params in (('float32', model.variables), ('int8', small.variables)):
    figures = {'bytes': _bytes(params), 'kernel_bytes': _bytes(params, kernels=True)}
    for source, record in evaluator(params).items():
      figures[f'{source} loss'] = record['loss']
      figures[f'{source} perplexity'] = math.exp(record['loss'])
    rows[name] = figures
  return rows


def _bytes(params: Any, kernels: bool = False) -> int:
  """Of all parameters, or of those that become int8."""
  is_leaf = lambda x: isinstance(x, quantization.Int8Kernel)
  leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf)
  return sum(array.nbytes for path, x in leaves if not kernels or quantization.is_quantized(path)
             for array in jax.tree.leaves(x))


def table(rows: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
  """The figures as a Markdown table, with the change from the first row to the last."""
  (first, before), (last, after) = rows.items()
  lines = [f'| | {first} | {last} | change |', '|---|---|---|---|']
  for name, old in before.items():
    new = after[name]
    show = paths.human_bytes if name.endswith('bytes') else '{:.4f}'.format
    label = {'bytes': 'all parameters', 'kernel_bytes': 'kernels that become int8'}.get(name, name)
    lines.append(f'| {label} | {show(old)} | {show(new)} | {100 * (new / old - 1):+.2f} % |')
  return lines


if __name__ == '__main__':
  main()
