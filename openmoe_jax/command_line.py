"""What every program of the library shares: the flags that choose a configuration, one-line errors, its printed form.

  PROGRAM --gin_file=recipes/demo.gin --gin.BATCH_SIZE=16 --gin.OptimizerConfig.learning_rate=0.5 --model_dir=DIR
"""

import argparse
import dataclasses
import sys
from typing import Any, Callable, List, Optional, Sequence, Tuple

from openmoe_jax import config as config_lib
from openmoe_jax import ending
from openmoe_jax import gin_utils
from openmoe_jax.config import ConfigError, RunConfig


class Parser(argparse.ArgumentParser):
  """An ArgumentParser with the shared flags, in which `--gin.NAME=VALUE` may stand anywhere.

  Mistakes raise `ConfigError` (argparse would print its usage first), so that `run_main` makes one line of them.

  Args:
    configured: False for a program that takes its configuration from a checkpoint: it has none of these flags.
    **kwargs: of ArgumentParser.
  """

  def __init__(self, configured: bool = True, **kwargs):
    super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
    if not configured:
      return
    group = self.add_argument_group('configuration')
    group.add_argument('--gin_file', action='append', default=[], metavar='FILE', help='gin file, for example '
                       'recipes/demo.gin; may be given several times. Looked for in the current folder, the search '
                       'paths, then the package.')
    group.add_argument('--gin_search_paths', default='', metavar='DIR[,DIR]', help='more folders with gin files')
    group.add_argument('--gin.NAME', dest='_gin_name', metavar='VALUE', help='set a macro (--gin.BATCH_SIZE=16) or a '
                       'setting (--gin.ModelConfig.emb_dim=256)')
    group.add_argument('--model_dir', metavar='DIR', help='where checkpoints and logs go; the same as '
                       '--gin.MODEL_DIR=DIR')
    group.add_argument('--tfds_data_dir', metavar='DIR', help='where TFDS data sets lie')
    group.add_argument('--print_config', action='store_true', help='print every setting and stop')

  def error(self, message: str):
    raise ConfigError(f'{message} (see --help)')

  def parse_args(self, args=None, namespace=None):
    """As argparse; the gin settings become `namespace.gin_bindings`, a list of 'NAME=VALUE'."""
    rest, bindings = _split_gin_flags(list(sys.argv[1:] if args is None else args))
    # Intermixed: a flag may stand between a program's arguments, also in front of one that may be left out. argparse
    # cannot do that for a program with commands.
    parse = super().parse_known_args if self._subparsers else super().parse_known_intermixed_args
    namespace, unknown = parse(rest, namespace)
    if unknown:
      flags = [option for action in self._actions for option in action.option_strings]
      self.error(f'unknown argument {unknown[0]}{gin_utils.suggest(unknown[0].split("=")[0], flags)}')
    namespace.gin_bindings = bindings
    return namespace


def _split_gin_flags(args: List[str]) -> Tuple[List[str], List[str]]:
  """Separates --gin.NAME=VALUE and --gin.NAME VALUE from the other arguments."""
  rest, bindings = [], []
  args = iter(args)
  for arg in args:
    if not arg.startswith('--gin.'):
      rest.append(arg)
    elif '=' in arg:
      bindings.append(arg[len('--gin.'):])
    else:
      value = next(args, None)
      if value is None or value.startswith('--'):
        raise ConfigError(f'{arg} lacks a value: {arg}=VALUE')
      bindings.append(f'{arg[len("--gin."):]}={value}')
  return rest, bindings


def run_config(args: argparse.Namespace, check_required: bool = True) -> RunConfig:
  """The configuration that parsed flags describe.

  Raises:
    ConfigError: as `gin_utils.load_run_config`.
  """
  bindings = list(args.gin_bindings)
  if args.model_dir is not None:
    bindings.append(f'RunConfig.model_dir={args.model_dir}')
  if args.tfds_data_dir is not None:
    bindings.append(f'DataConfig.tfds_data_dir={args.tfds_data_dir}')
  search_paths = [path for path in args.gin_search_paths.split(',') if path]
  return gin_utils.load_run_config(args.gin_file, bindings, search_paths, check_required and not args.print_config)


def format_config(run: RunConfig) -> str:
  """Every setting of a run on a line of its own, in groups, marked where it is not the default.

  The text is itself a gin file that gives the same configuration.
  """
  groups = [('RunConfig', run)] + [(cls.__name__, getattr(run, section)) for cls, section in gin_utils.SECTIONS.items()]
  rows = []
  for group, values in groups:
    rows.append((f'# {group}', '', ''))
    defaults = {f.name: field_default(f) for f in dataclasses.fields(values)}
    for name in gin_utils.setting_names(type(values)):
      value, default = config_lib.to_dict(getattr(values, name)), config_lib.to_dict(defaults[name])
      if default is dataclasses.MISSING:
        note = ''
      else:
        note = '' if value == default else f'# not the default: {literal(default)}'
      rows.append((f'{group}.{name}', literal(value), note))
    rows.append(('', '', ''))
  name_width = max(len(name) for name, _, _ in rows)
  value_width = min(max(len(value) for _, value, _ in rows), 40)
  return '\n'.join(f'{name:{name_width}} = {value:{value_width}}  {note}'.rstrip() if value else name
                   for name, value, note in rows)


def field_default(field: dataclasses.Field) -> Any:
  """The default value of a field; dataclasses.MISSING if it has none."""
  return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def literal(value: Any) -> str:
  """A plain value (`config.to_dict`) as it is written in a gin file."""
  return repr(tuple(value)) if isinstance(value, list) else repr(value)


def names(text: str) -> List[str]:
  """The value of a flag that takes several: 'a, b' -> ['a', 'b']."""
  return [name.strip() for name in text.split(',') if name.strip()]


def run_main(main: Callable[[Optional[Sequence[str]]], Any], argv: Optional[Sequence[str]] = None) -> Any:
  """Calls `main(argv)`; a `ConfigError` ends the process with one line on stderr and exit status 2, Ctrl-C with 130."""
  try:
    return main(argv)
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    sys.exit(130)
  except ConfigError as error:
    print(f'{ending.program()}: error: {" ".join(str(error).split())}', file=sys.stderr)
    sys.exit(2)
