"""The flags of programs that run a trained model, and the model they describe."""

import argparse
from typing import Any, Dict

from openmoe_jax.config import ConfigError, MeshConfig, require

DTYPES = ('float32', 'bfloat16')


def add_flags(parser: argparse.ArgumentParser, capacity_mode: bool = True) -> None:
  """CHECKPOINT and the flags about how it runs; `capacity_mode` may be left out where a program decides it."""
  parser.add_argument('checkpoint', metavar='CHECKPOINT', help='a model_dir, its checkpoints folder, one step in it, or a '
                      'Hugging Face folder; local or gs://')
  group = parser.add_argument_group('the model')
  group.add_argument('--dtype', choices=DTYPES, help='of the activations; default: as in training')
  group.add_argument('--int8', action='store_true', help='keep kernels as int8 with a scale for each output')
  if capacity_mode:
    group.add_argument('--capacity_mode', choices=('none', 't5x'), default='none', help='none (default): no token is ever '
                       "dropped; t5x: routing groups and capacities of the original's evaluation")
  group.add_argument('--vocabulary', metavar='FILE', help="sentencepiece model; default: that of the checkpoint's run")
  group.add_argument('--extra_ids', type=int, help="sentinels above its pieces; default: those of the checkpoint's run")
  group.add_argument('--mesh', metavar='DATA,EXPERT,MODEL', help='how to split the model over all devices, for example '
                     '1,4,2; default: the first device alone')
  group.add_argument('--batch_size', type=int, default=16, help='sequences at a time; default 16')


def load_model(args: argparse.Namespace) -> Any:
  """The `loading.Model` that the flags describe, with a vocabulary that was read and fits.

  Raises:
    ConfigError: a value that cannot be, no checkpoint, a vocabulary that is missing or has more ids than the model.
  """
  require(args.batch_size >= 1, f'--batch_size={args.batch_size} must be at least 1')
  mesh_config = _mesh_config(args.mesh)
  from openmoe_jax import loading, partitioning, vocabulary
  mesh = partitioning.make_mesh(mesh_config) if mesh_config else None
  changes: Dict[str, Any] = {'dtype': args.dtype} if args.dtype else {}
  model = loading.load(args.checkpoint, mesh, **changes)
  data = dict(model.run['data'])
  if args.vocabulary is not None:
    data['vocabulary'] = args.vocabulary
  if args.extra_ids is not None:
    data['extra_ids'] = args.extra_ids
  model.run = {**model.run, 'data': data}
  try:
    model.vocabulary  # pylint: disable=pointless-statement  # read now: a mistake should not wait for the first prompt
    vocabulary.check_fits(model.config.vocab_size)
  except ConfigError as error:
    advice = '' if args.vocabulary else '; --vocabulary=FILE gives another one'
    raise ConfigError(f'{args.checkpoint}: {error}{advice}') from error
  if args.int8:
    from openmoe_jax import quantization
    model = quantization.quantize_model(model)
  return model


def _mesh_config(text: Any) -> Any:
  if text is None:
    return None
  try:
    data, expert, model = map(int, text.split(','))
  except ValueError as error:
    raise ConfigError(f'--mesh={text!r} must be three numbers of devices: data,expert,model, such as 1,4,2') from error
  return MeshConfig(data, expert, model)
