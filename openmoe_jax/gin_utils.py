"""Reads gin files and command-line settings into a `RunConfig`.

gin's own parser reads the syntax; what the statements mean is decided here, in about a hundred lines, instead of in
gin's process-wide registry. So reading a configuration has no side effect, runs no code, cannot clash with the gin
classes that other libraries register under the same names, and every mistake is one line that says where it is.

  NAME = value                 a macro, used elsewhere as %NAME; the last value given counts, wherever it is used
  ModelConfig.emb_dim = 768    a setting: a field of a dataclass of `openmoe_jax.config`
  ModelConfig:                 the same for several settings, indented below it
  include 'models/demo.gin'    statements of another file, as if they stood here
  NAME = %gin.REQUIRED         has to be given by a later file or on the command line

Scopes, `@references` and `import` of gin are refused. Nothing is ever evaluated beyond Python literals.
"""

import dataclasses
import difflib
import importlib.util  # gin 0.5.0 uses importlib.util without importing it
import io
import math
import os
import re
import tokenize
import typing
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

from openmoe_jax import config as config_lib
from openmoe_jax.config import ConfigError, require

MARKER = 'openmoe.gin'  # tells the package's gin folder from others named gin, such as gin-config's own
REQUIRED = 'gin.REQUIRED'
COMMAND_LINE = 'command line'

SECTIONS = {  # class -> field of RunConfig that holds it
    config_lib.ModelConfig: 'model', config_lib.DataConfig: 'data', config_lib.MeshConfig: 'mesh',
    config_lib.OptimizerConfig: 'optimizer', config_lib.CheckpointConfig: 'checkpoint', config_lib.TrainConfig: 'train',
    config_lib.EvalConfig: 'eval'}
CLASSES = {cls.__name__: cls for cls in (*SECTIONS, config_lib.RunConfig)}


class Reference(NamedTuple):
  """%NAME in a value."""
  name: str


class Unsupported(NamedTuple):
  """@NAME or @NAME() in a value."""
  name: str


class Setting(NamedTuple):
  """One right-hand side: its parsed value, where it stands, and how it was typed if on the command line."""
  value: Any
  where: str
  text: Optional[str] = None


def setting_names(cls: type) -> List[str]:
  """The fields of `cls` that a gin file may set."""
  return [f.name for f in dataclasses.fields(cls) if f.type not in SECTIONS]


def load_run_config(gin_files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = (),
                    check_required: bool = True) -> config_lib.RunConfig:
  """Builds the configuration that gin files and command-line settings describe.

  Args:
    gin_files: read in this order; later statements win. Each is looked for in the current folder, in `search_paths`,
      then in the package's gin folder; so are the files they include.
    bindings: 'NAME=VALUE' or 'Class.field=VALUE'; they win over the files. VALUE is a literal or %MACRO where it can
      be read as one, and a string otherwise.
    search_paths: further folders.
    check_required: False lets settings that are %gin.REQUIRED and not given keep the dataclass's default, to look at
      a recipe without filling it in.

  Raises:
    ConfigError: in one line; unknown file, class, field or macro, a value of the wrong type, a setting that is not
      used or is missing, or values that do not go together.
  """
  require(gin_files, 'no gin file given: --gin_file=recipes/demo.gin, for example')
  return _read_all(gin_files, bindings, search_paths).build(check_required)


def load_settings(gin_files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = (),
                  check_required: bool = True) -> Dict[str, Dict[str, Any]]:
  """Only what gin files and the command line say, for a program whose model comes from a checkpoint.

  Args: as `load_run_config`; there may be no gin file.

  Returns:
    {field of RunConfig: {setting: value}}, with 'run' for the settings of RunConfig itself.

  Raises:
    ConfigError: as `load_run_config`, as far as it can be told without a model.
  """
  values = _read_all(gin_files, bindings, search_paths).values(check_required)
  return {**{section: values[cls] for cls, section in SECTIONS.items()}, 'run': values[config_lib.RunConfig]}


def _read_all(gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]) -> '_Statements':
  statements = _Statements(search_paths)
  for name in gin_files:
    statements.read_file(name)
  for binding in bindings:
    statements.read_binding(binding)
  return statements


def _import_parser():
  """gin's parser module.

  Raises:
    ConfigError: gin-config is not installed. A folder named gin makes `import gin` succeed even then.
  """
  assert importlib.util
  try:
    from gin import config_parser
    assert hasattr(config_parser, 'ConfigParser')
    return config_parser
  except (ImportError, AssertionError) as error:
    raise ConfigError('gin-config is not installed, so gin files cannot be read: pip install gin-config') from error


def gin_folder() -> str:
  """The folder of the gin files that come with the package, found by its marker file."""
  here = os.path.dirname(os.path.abspath(__file__))
  for folder in (os.path.join(here, 'gin'), os.path.join(os.path.dirname(here), 'gin')):  # wheel; checkout, editable
    if os.path.exists(os.path.join(folder, MARKER)):
      return folder
  raise ConfigError(f'the gin files of openmoe_jax are missing: no folder gin with {MARKER} beside or in {here}')


def package_gin_files() -> List[str]:
  """Names, such as 'recipes/demo.gin', of all gin files of the package."""
  root, names = gin_folder(), []
  for folder, _, files in os.walk(root):
    names += [os.path.relpath(os.path.join(folder, f), root).replace(os.sep, '/') for f in files if f.endswith('.gin')]
  return sorted(names)


def suggest(name: str, known: Iterable[str]) -> str:
  """'; did you mean a or b?' for names like `name`, or ''."""
  known = list(known)
  lower = {k.lower(): k for k in known}
  close = [lower[m] for m in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.6)]
  return f'; did you mean {" or ".join(close)}?' if close else ''


def read_literal(text: str) -> Any:
  """`text` as a gin value (literal or %MACRO) if it is one, else as the string it is; never evaluated."""
  parser_lib = _import_parser()
  try:
    parser = parser_lib.ConfigParser(text, _delegate(parser_lib))
    value = parser.parse_value()
    if not list(_parts(value, Unsupported)) and parser.current_token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
      return value
  except (SyntaxError, ValueError, TypeError, tokenize.TokenError, StopIteration):
    pass
  return text


def _delegate(parser_lib):
  class Delegate(parser_lib.ParserDelegate):

    def configurable_reference(self, scoped_configurable_name, evaluate):
      return Unsupported(f'@{scoped_configurable_name}{"()" if evaluate else ""}')

    def macro(self, scoped_name):
      return Reference(scoped_name)

  return Delegate()


class _Statements:
  """What has been read so far: the last value of every macro and setting, and the macros named anywhere."""

  def __init__(self, search_paths: Sequence[str]):
    self._search_paths = tuple(search_paths)
    self._parser_lib = _import_parser()
    self._delegate = _delegate(self._parser_lib)
    self._macros: Dict[str, Setting] = {}
    self._fields: Dict[Tuple[type, str], Setting] = {}
    self._mentioned: Set[str] = set()  # macros that any statement refers to, overridden ones included
    self._open_files: List[str] = []

  def read_file(self, name: str, where: str = '') -> None:
    """Reads one file and what it includes; `where` is the place of the include statement."""
    path, shown = self._find(name, where)
    require(path not in self._open_files, f'{where}gin file {shown} includes itself')
    self._open_files.append(path)
    try:
      self._read_text(_read(path), shown)
    finally:
      self._open_files.pop()

  def _find(self, name: str, where: str) -> Tuple[str, str]:
    """The file's path, and a short form of it for messages."""
    if os.path.isabs(name) or '://' in name:
      require(_exists(name), f'{where}gin file {name} does not exist')
      return name, name
    for folder in (os.curdir, *self._search_paths):
      path = os.path.join(folder, name)
      if _exists(path):
        return (path if '://' in path else os.path.abspath(path)), name
    path = os.path.join(gin_folder(), name)
    if os.path.isfile(path):
      return path, name
    places = ', '.join(['the current folder', *self._search_paths, "the package's gin folder"])
    known = package_gin_files()
    close = [k for k in known if os.path.basename(k) == os.path.basename(name)]
    hint = f'; did you mean {" or ".join(close)}?' if close else suggest(name, known)
    raise ConfigError(f'{where}gin file {name!r} not found in {places}{hint}')

  def _read_text(self, text: str, shown: str) -> None:
    lib, where = self._parser_lib, f'{shown}: '
    try:
      for statement in lib.ConfigParser(io.StringIO(text), self._delegate):
        where = f'{shown}:{statement.location.line_num}: '
        if isinstance(statement, lib.IncludeStatement):
          self.read_file(statement.filename, where)
        elif isinstance(statement, lib.ImportStatement):
          raise ConfigError(f'{where}import is not supported; modules that register tasks go into '
                            'DataConfig.module_imports')
        elif isinstance(statement, lib.BlockDeclaration):
          _find_class(statement.scope, statement.selector, where)
        else:
          self._bind(statement.scope, statement.selector, statement.arg_name, Setting(statement.value, where))
    except SyntaxError as error:
      place = f'{shown}:{error.lineno}: ' if error.lineno else where
      raise ConfigError(f'{place}cannot be read as gin: {_explain(error)}') from error
    except (tokenize.TokenError, StopIteration) as error:
      raise ConfigError(f'{where}cannot be read as gin: a bracket or a string is not closed') from error
    except TypeError as error:  # a list as the key of a dictionary
      raise ConfigError(f'{where}cannot be read as gin: {error}') from error

  def read_binding(self, binding: str) -> None:
    """Reads 'NAME=VALUE' of the command line."""
    name, equals, text = binding.partition('=')
    name, text = name.strip(), text.strip()
    require(equals and name, f'--gin.{binding} must have the form --gin.NAME=VALUE')
    where = f'{COMMAND_LINE}: '
    scope, _, selector = name.rpartition('/')
    cls, _, field = selector.rpartition('.')
    setting = Setting(read_literal(text), where, text)
    self._bind(scope, cls or field, field if cls else '', setting)

  def _bind(self, scope: str, selector: str, field: str, setting: Setting) -> None:
    """Takes one statement: a macro if there is no `field`, else a setting of the class `selector`."""
    for part in _parts(setting.value, Unsupported):
      raise ConfigError(f'{setting.where}{part.name} is not supported: settings are numbers, strings, tuples and '
                        'dictionaries')
    self._mentioned |= {part.name for part in _parts(setting.value, Reference)}
    if not field:
      require(not scope, f'{setting.where}scopes are not supported: {scope}/{selector}')
      require(selector not in CLASSES, f'{setting.where}{selector} is a group of settings, not a macro; set '
              f'{selector}.NAME')
      self._macros[selector] = setting
      return
    cls = _find_class(scope, selector, setting.where)
    names = setting_names(cls)
    require(field in names, f'{setting.where}{cls.__name__} has no setting {field!r}' +
            (suggest(field, names) or f'; it has {", ".join(names)}'))
    self._fields[cls, field] = setting

  def build(self, check_required: bool) -> config_lib.RunConfig:
    """The configuration; the statements are final."""
    values = self.values(check_required, with_model=True)
    parts = {section: cls(**values[cls]) for cls, section in SECTIONS.items()}
    return config_lib.RunConfig(**parts, **values[config_lib.RunConfig])

  def values(self, check_required: bool, with_model: bool = False) -> Dict[type, Dict[str, Any]]:
    """Every setting that has been given; the statements are final."""
    values: Dict[type, Dict[str, Any]] = {cls: {} for cls in CLASSES.values()}
    used: Set[str] = set()
    missing: List[str] = []
    for (cls, field), setting in self._fields.items():
      name = f'{cls.__name__}.{field}'
      resolved, lacking = self._resolve(setting, used, ())
      if lacking is None:
        values[cls][field] = coerce(name, resolved.value, typing.get_type_hints(cls)[field], resolved)
      else:
        missing.append(lacking or name)
    if with_model:
      self._check_model(values[config_lib.ModelConfig])
    self._check_macros(used)
    if check_required and missing:
      flags = [f'--gin.{name}=...' for name in dict.fromkeys(missing)]
      raise ConfigError(f'not set, and without a default: {", ".join(dict.fromkeys(missing))}; give '
                        + ' '.join('--model_dir=...' if f.startswith('--gin.MODEL_DIR=') else f for f in flags))
    return values

  def _resolve(self, setting: Setting, used: Set[str], chain: Tuple[str, ...]) -> Tuple[Setting, Optional[str]]:
    """Puts macros in place of references.

    Returns:
      The setting with the final value, and None; or, where that is gin.REQUIRED, the name of the macro that lacks a
      value ('' if it is the setting itself).
    """
    value = setting.value
    if isinstance(value, Reference):
      if value.name == REQUIRED:
        return setting, (chain[-1] if chain else '')
      require(value.name not in chain, f'{setting.where}the macros {" -> ".join((*chain, value.name))} refer to each '
              'other')
      if value.name not in self._macros:
        raise ConfigError(f'{setting.where}macro %{value.name} has no value; set {value.name} = ... in a gin file or '
                          f'--gin.{value.name}=...{suggest(value.name, self._macros)}')
      used.add(value.name)
      return self._resolve(self._macros[value.name], used, (*chain, value.name))
    if isinstance(value, dict):
      pairs = [(key, *self._resolve(setting._replace(value=v, text=None), used, chain)) for key, v in value.items()]
      lacking = [lack for _, _, lack in pairs if lack is not None]
      return setting._replace(value={k: s.value for k, s, _ in pairs}), lacking[0] if lacking else None
    if isinstance(value, (tuple, list)):
      parts = [self._resolve(setting._replace(value=v, text=None), used, chain) for v in value]
      lacking = [lack for _, lack in parts if lack is not None]
      return setting._replace(value=type(value)(s.value for s, _ in parts)), lacking[0] if lacking else None
    return setting, None

  def _check_macros(self, used: Set[str]) -> None:
    """A macro without effect is a mistake: misspelled, or for a file that was not given."""
    for name, setting in self._macros.items():
      if name in used:
        continue
      if setting.text is not None:
        if name in self._mentioned:
          raise ConfigError(f'--gin.{name}={setting.text} would have no effect: these gin files set what {name} stands '
                            'for directly (see --print_config)')
        raise ConfigError(f'--gin.{name}={setting.text}: nothing in these gin files refers to the macro {name}'
                          + (suggest(name, used) or f'; known: {", ".join(sorted(used)) or "none"}'))
      require(name in self._mentioned, f'{setting.where}nothing refers to the macro {name}{suggest(name, used)}')

  def _check_model(self, values: Dict[str, Any]) -> None:
    lacking = [f.name for f in dataclasses.fields(config_lib.ModelConfig)
               if f.default is dataclasses.MISSING and f.name not in values]
    if lacking:
      raise ConfigError(f'the gin files name no model: ModelConfig.{", ".join(lacking)} not set; give a file of '
                        'models/ too, --gin_file=models/openmoe_base.gin for example')


def _find_class(scope: str, selector: str, where: str) -> type:
  require(not scope, f'{where}scopes are not supported: {scope}/{selector}')
  for name, cls in CLASSES.items():
    if f'.openmoe_jax.config.{name}'.endswith(f'.{selector}'):
      return cls
  raise ConfigError(f'{where}{selector} is not a group of settings'
                    + (suggest(selector, CLASSES) or f'; known: {", ".join(CLASSES)}'))


def _parts(value: Any, kind: type) -> Iterable[Any]:
  """The objects of type `kind` in a value, at any depth."""
  if isinstance(value, kind):
    yield value
  elif isinstance(value, (tuple, list, dict)):
    for part in (value.values() if isinstance(value, dict) else value):
      yield from _parts(part, kind)


def _explain(error: SyntaxError) -> str:
  """gin's complaint in one line."""
  token = re.search(r"Failed to parse token '(.*)'", str(error.msg))
  if token:
    return f'{token[1]} is not a value; strings need quotes, macros a %'
  line = f' in {error.text.strip()!r}' if error.text else ''
  return str(error.msg).strip().splitlines()[0].strip().rstrip('.') + line


def _exists(path: str) -> bool:
  if '://' in path:
    from etils import epath  # only for buckets: local files need no library
    return epath.Path(path).exists()
  return os.path.isfile(path)


def _read(path: str) -> str:
  try:
    if '://' in path:
      from etils import epath
      return epath.Path(path).read_text()
    with open(path, encoding='utf-8') as file:
      return file.read()
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f'gin file {path} cannot be read: {error}') from error


def coerce(name: str, value: Any, kind: Any, setting: Setting) -> Any:
  """`value` as the type of the field `name`.

  Whole floats count as integers (1e6). What was typed on the command line is read with the type in mind, so that
  nothing needs quotes: text that looks like a number stays text for a string, `true` is a bool, `silu,linear` a tuple
  and `inputs:512,targets:512` a dictionary.

  Raises:
    ConfigError: it is of another type.
  """
  typed = setting.text is not None
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  origin = typing.get_origin(kind)
  if kind is int and number and math.isfinite(value) and value == int(value):
    return int(value)
  if kind is float and number:
    return float(value)
  if kind is bool and isinstance(value, bool):
    return value
  if kind is bool and typed and str(value).lower() in ('true', 'false'):
    return str(value).lower() == 'true'
  if kind is str and isinstance(value, str):
    return value
  if kind is str and typed:
    return setting.text
  if origin is tuple:
    if isinstance(value, str):
      value = tuple(part.strip(' \'"') for part in value.strip('()[] ').split(',') if part.strip())
    if isinstance(value, (tuple, list)) and all(isinstance(part, str) for part in value):
      return tuple(value)
  elif origin is not None:  # Mapping[str, int]
    if isinstance(value, str) and typed:
      value = _read_mapping(value)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
      return {key: coerce(f'{name}[{key!r}]', part, int, setting._replace(text=None)) for key, part in value.items()}
  raise ConfigError(f'{setting.where}{name} = {value!r} must be {_kind_name(kind)}')


def _read_mapping(text: str) -> Any:
  """'{inputs: 512, targets: 512}', with or without braces and quotes, or with = for :, as a dictionary; anything else
  unchanged."""
  pairs = [part.replace('=', ':').partition(':') for part in text.strip('{} ').split(',') if part.strip()]
  if not all(colon and key.strip() for key, colon, _ in pairs) or len({key.strip() for key, _, _ in pairs}) < len(pairs):
    return text
  return {key.strip(' \'"'): read_literal(value.strip()) for key, _, value in pairs}


def _kind_name(kind: Any) -> str:
  names = {int: 'an integer', float: 'a number', bool: 'True or False', str: 'a string'}
  if kind in names:
    return names[kind]
  return "several strings, like ('a', 'b')" if typing.get_origin(kind) is tuple else (
      "a dictionary of integers, like {'inputs': 1024, 'targets': 1024}")
