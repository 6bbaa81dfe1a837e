"""openmoe-convert: checkpoints from one format into another, and into larger models.

  openmoe-convert t5x-to-orbax  gs://bucket/checkpoint_500000 runs/openmoe_8b --gin_file=models/openmoe_8b.gin
  openmoe-convert orbax-to-hf   runs/demo exports/demo --verify
  openmoe-convert hf-to-orbax   openmoe-base runs/openmoe_base
  openmoe-convert orbax-to-t5x  runs/demo exports/demo_t5x
  openmoe-convert t5x-to-hf     checkpoint_500000 exports/openmoe_8b --gin_file=models/openmoe_8b.gin --dtype=bfloat16
  openmoe-convert upcycle       runs/dense runs/sparse --gin_file=models/my_sparse.gin
  openmoe-convert extend-vocabulary runs/demo runs/larger --vocab_size=8704
  openmoe-convert average       runs/a runs/b runs/mean
  openmoe-convert check         exports/demo

Everything streams: memory stays at a few hundred megabytes plus the largest chunk of the source. A conversion that was
stopped goes on when the same command is started again; until it is complete the folder is called DESTINATION.partial.
"""

import argparse
import dataclasses
import json
import re
import shutil
from typing import Any, Optional, Sequence
import zlib

import numpy as np

from openmoe_jax import command_line
from openmoe_jax import paths
from openmoe_jax.config import ConfigError, ModelConfig, RunConfig, from_dict, require, to_dict

_FORMATS = ('t5x', 'orbax', 'hf')
_BETWEEN = tuple(f'{a}-to-{b}' for a in _FORMATS for b in _FORMATS)
_GROWING = ('upcycle', 'extend-vocabulary', 'average')
CONVERSIONS = (*_BETWEEN, *_GROWING, 'check')
_DTYPES = ('float32', 'bfloat16', 'float16')
_SIZES = {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9}


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point; mistakes end in one line and exit status 2."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  args = parser().parse_args(argv)
  if args.conversion == 'check':
    require(len(args.paths) == 1, f'check takes one folder, {len(args.paths)} are given')
    _check(args)
    return
  least = 3 if args.conversion == 'average' else 2
  require(len(args.paths) == 2 or args.conversion == 'average' and len(args.paths) >= least,
          f'{args.conversion} takes {"at least two sources" if least == 3 else "a source"} and a destination; given: '
          f'{" ".join(args.paths) or "nothing"}')
  convert(args)


def parser() -> command_line.Parser:
  """The program's flags."""
  flags = command_line.Parser(prog='openmoe-convert', description=__doc__)
  flags.add_argument('conversion', choices=CONVERSIONS, metavar='CONVERSION', help=', '.join(CONVERSIONS))
  flags.add_argument('paths', nargs='*', metavar='PATH', help='source, or sources, and destination')
  flags.add_argument('--to', choices=_FORMATS, help='format that upcycle, extend-vocabulary and average write; '
                      'default orbax')
  flags.add_argument('--dtype', choices=_DTYPES, help='of the parameters written; default: as they are. Optimizer '
                      'state is kept as it is')
  flags.add_argument('--params_only', action='store_true', help='leave the optimizer state behind')
  flags.add_argument('--workers', type=int, default=0, help='tensors under way at a time; default: cores, at most 4')
  flags.add_argument('--verify', action='store_true', help='compare logits of both sides afterwards; holds one model '
                      'in memory at a time')
  flags.add_argument('--tokens', help='for --verify: 5,17,3 or a file of rows of numbers; default: random ones')
  hf = flags.add_argument_group('to Hugging Face')
  hf.add_argument('--int8', action='store_true', help='kernels as int8 with a scale for each output')
  hf.add_argument('--shard_size', default='5GB', help='largest file of weights; default 5GB')
  hf.add_argument('--vocabulary', help='sentencepiece model whose tokenizer goes into a Hugging Face folder, and that is '
                  "kept with the run; default: the one of the run's configuration; 'none' writes no tokenizer")
  hf.add_argument('--extra_ids', type=int, help='sentinels above its pieces; default: those of the run, or 300')
  hf.add_argument('--chat', action='store_true', help="write the released chat model's template")
  hf.add_argument('--max_length', type=int, default=0, help='max_position_embeddings of config.json; default: the row '
                  'length of the run, or 2048')
  grow = flags.add_argument_group('growing')
  grow.add_argument('--experts', choices=('behind', 'copies'), default='behind', help='upcycle: the dense FFN stays as '
                    'the always-on one, behind experts that add nothing yet; or becomes every expert')
  grow.add_argument('--noise', type=float, default=0., help='upcycle: noise on the copies, relative to each kernel')
  grow.add_argument('--vocab_size', type=int, help='extend-vocabulary: rows of the embedding afterwards')
  grow.add_argument('--weights', help='average: 0.7,0.3; default: equal ones')
  grow.add_argument('--seed', type=int, default=0, help='of new random numbers')
  return flags


def convert(args: argparse.Namespace) -> None:
  """Runs one conversion as `parser` describes it."""
  from openmoe_jax.convert import transfer
  *sources, destination = args.paths
  _same_place(sources, destination)
  transfer.check_free(paths.path(destination))
  kind = 'orbax' if args.conversion in _GROWING else args.conversion.split('-to-')[0]
  target = (args.to or 'orbax') if args.conversion in _GROWING else args.conversion.split('-to-')[1]
  require(args.to in (None, target), f'--to={args.to} and {args.conversion} contradict each other')
  require(target == 'hf' or not args.int8, '--int8 is a format of Hugging Face folders only')
  with_state = target != 'hf' and args.conversion in _BETWEEN and not args.params_only
  opened = [open_source(path, args, with_state, kind if args.conversion in _BETWEEN else None) for path in sources]
  source = _grown(opened, args)
  if target == 't5x' and getattr(source, 'has_other_state', False):
    raise ConfigError(f'{source.where} has the state of the optimizer {source.run["optimizer"]["name"]!r}, which T5X '
                      'checkpoints of OpenMoE do not hold; --params_only leaves it behind')
  sink = _sink(target, source, args)
  tokens = _tokens(args, source.model)
  staging = paths.path(destination)
  if target == 'hf' and not paths.is_local(destination):  # its files are written piecemeal, which objects cannot be
    mark = zlib.crc32(json.dumps([source.fingerprint, sink.describe(), args.dtype]).encode())
    staging = paths.path(f'{staging.name}.{mark:08x}.upload')
    print(f'the folder is made in {staging} first')
  if not (staging != paths.path(destination) and staging.exists()):
    transfer.transfer(source, sink, staging, args.dtype and dtype_of(args.dtype), args.workers)
  if staging != paths.path(destination):
    transfer.upload(staging, paths.path(destination))
    shutil.rmtree(staging)
  print(f'{args.conversion}: {destination} is complete, '
        f'{len(source.tensors)} tensors of {", ".join(sources)} at step {source.step}')
  if args.verify:
    _verify(source, target, destination, args, tokens)


def _same_place(sources: Sequence[str], destination: str) -> None:
  for name in sources:
    require(paths.path(name) != paths.path(destination), f'{name} cannot be source and destination at once')


def dtype_of(name: str) -> np.dtype:
  """A dtype by name, bfloat16 too."""
  import ml_dtypes
  return np.dtype(getattr(ml_dtypes, name, None) or name)


def format_of(path: str) -> str:
  """'t5x', 'orbax' or 'hf': what kind of checkpoint a folder holds.

  Raises:
    ConfigError: none of them.
  """
  folder = paths.path(path)
  names = set(paths.entries(folder))
  if 'checkpoint' in names or any(re.fullmatch(r'checkpoint_\d+', name) for name in names):
    return 't5x'
  if 'checkpoints' in names or 'params' in names or any(name.isdigit() for name in names):
    return 'orbax'
  if 'config.json' in names:
    return 'hf'
  require(folder.exists(), f'{path} does not exist')
  raise ConfigError(f'{path} is no checkpoint: neither of T5X (a file `checkpoint`), nor ours (a folder `checkpoints`), '
                    'nor of Hugging Face (config.json)')


def open_source(path: str, args: argparse.Namespace, with_state: bool, kind: Optional[str] = None) -> Any:
  """The Source of a checkpoint; `kind` insists on a format."""
  found = format_of(path)
  require(kind in (None, found), f'{path} is a checkpoint in the format {found}, not {kind}')
  if found == 'orbax':
    from openmoe_jax.convert.orbax import OrbaxSource
    return OrbaxSource(path, with_state)
  if found == 'hf':
    from openmoe_jax.convert.huggingface import HuggingFaceSource
    return HuggingFaceSource(path)
  from openmoe_jax.convert.t5x import T5XSource
  require(bool(args.gin_file) or bool(args.gin_bindings), f'{path}: a T5X checkpoint does not say what model it is of; '
          'give --gin_file=models/NAME.gin')
  run = _run_of_flags(args)
  source = T5XSource(path, run.model, with_state)
  source.run = to_dict(run)
  return source


def _run_of_flags(args: argparse.Namespace) -> RunConfig:
  return dataclasses.replace(command_line.run_config(args, check_required=False), model_dir='')


def _grown(opened: Sequence[Any], args: argparse.Namespace) -> Any:
  """What is written, made of what is read."""
  if args.conversion in _BETWEEN:
    return opened[0]
  from openmoe_jax.convert import growing
  if args.conversion == 'upcycle':
    require(bool(args.gin_file) or bool(args.gin_bindings), 'upcycle needs the sparse model: '
            '--gin_file=models/NAME.gin')
    return growing.UpcycledSource(opened[0], _run_of_flags(args).model, args.experts, args.noise, args.seed)
  if args.conversion == 'extend-vocabulary':
    require(args.vocab_size is not None, 'extend-vocabulary needs --vocab_size=ROWS')
    return growing.ExtendedVocabularySource(opened[0], args.vocab_size, args.seed)
  try:
    weights = [float(w) for w in args.weights.split(',')] if args.weights else None
  except ValueError as error:
    raise ConfigError(f'--weights={args.weights!r}: numbers separated by commas are expected') from error
  return growing.AveragedSource(opened, weights)


def _run_of(source: Any, args: argparse.Namespace) -> RunConfig:
  """The configuration that is kept beside the parameters: that of the run they come from, as far as it is known."""
  run = from_dict(RunConfig, dict(source.run)) if source.run else RunConfig(model=source.model)
  data = run.data
  if args.vocabulary not in (None, 'none'):
    data = dataclasses.replace(data, vocabulary=args.vocabulary)
  if args.extra_ids is not None:
    data = dataclasses.replace(data, extra_ids=args.extra_ids)
  return dataclasses.replace(run, model=source.model, data=data, model_dir='')


def _sink(target: str, source: Any, args: argparse.Namespace) -> Any:
  if target == 'orbax':
    from openmoe_jax.convert.orbax import OrbaxSink
    return OrbaxSink(_run_of(source, args), source.step)
  if target == 't5x':
    from openmoe_jax.convert.t5x import T5XSink
    return T5XSink(source.model, source.step)
  from openmoe_jax.convert.huggingface import HuggingFaceSink
  lengths = source.run.get('data', {}).get('task_feature_lengths') or {}
  length = args.max_length or sum(lengths.values()) or 2048
  return HuggingFaceSink(source.model, source.run, source.step, paths.path(source.where).name, _bytes(args.shard_size),
                         _tokenizer(source, args), args.int8, {'max_position_embeddings': length})


def _bytes(text: str) -> int:
  found = re.fullmatch(r'(\d+(?:\.\d+)?)\s*(KB|MB|GB|)', text.strip().upper())
  size = int(float(found.group(1)) * _SIZES[found.group(2)]) if found else 0
  require(size > 0, f'--shard_size={text!r} is not a size such as 5GB or 500MB')
  return size


def _tokenizer(source: Any, args: argparse.Namespace) -> Any:
  """The run's vocabulary, if it is known and there, or the one of the flag."""
  from openmoe_jax import vocabulary
  from openmoe_jax.convert.hf_tokenizer import RELEASED_CHAT_TEMPLATE
  from openmoe_jax.convert.huggingface import Tokenizer
  data = source.run.get('data', {})
  if args.vocabulary == 'none':
    return None
  path = args.vocabulary if args.vocabulary is not None else data.get('vocabulary')
  if path is None:
    print('no vocabulary is known, so no tokenizer is written; --vocabulary=PATH writes one')
    return None
  extra_ids = args.extra_ids if args.extra_ids is not None else data.get('extra_ids', 300)
  file = paths.path(path or vocabulary.demo_model_path())
  require(file.exists() and not file.is_dir(), f'the vocabulary {path} cannot be read: no such file; give '
          "--vocabulary=PATH of the sentencepiece model, or --vocabulary=none to write no tokenizer")
  return Tokenizer(file.read_bytes(), extra_ids, RELEASED_CHAT_TEMPLATE if args.chat else None)


def _tokens(args: argparse.Namespace, model: ModelConfig) -> Any:
  from openmoe_jax.convert import verify
  require(args.verify or args.tokens is None, '--tokens is for --verify')
  if not args.verify:
    return None
  return verify.read_tokens(args.tokens, model) if args.tokens else verify.random_tokens(model)


def _verify(source: Any, target: str, destination: str, args: argparse.Namespace, tokens: Any) -> None:
  from openmoe_jax.convert import verify
  first = verify.jax_logits(source, tokens)
  second = verify.jax_logits(open_source(destination, args, False, target), tokens)
  compared = verify.difference(first, second, f'{args.paths[0]} and {destination}, both in JAX')
  print(compared)
  exact = args.dtype is None and not args.int8
  require(not exact or compared.largest == 0, f'{destination} does not compute what {args.paths[0]} computes')
  if target != 'hf':
    return
  third = verify.torch_logits(destination, tokens)
  if third is None:
    print("PyTorch or transformers is not installed, so the PyTorch model was not run: "
          "pip install 'openmoe_jax[torch]'")
    return
  compared = verify.difference(second, third, f'{destination} in JAX and in PyTorch')
  print(compared)
  # Two float32 implementations: sums in another order, through all layers.
  require(compared.largest <= 1e-4 * max(compared.scale, 1.), f'{destination}: the PyTorch model does not compute what '
          'the JAX model computes')


def _check(args: argparse.Namespace) -> None:
  """Reads a whole checkpoint and compares it with the checksums that it holds."""
  from openmoe_jax.convert import transfer
  source = open_source(args.paths[0], args, with_state=not args.params_only)
  transfer.read_all(source, args.workers)
  print(f'{args.paths[0]}: all {len(source.tensors)} tensors of step {source.step} can be read; {source.checksums}')


if __name__ == '__main__':
  main()
