"""Text of many kinds that a machine with Python has, to see how a model's routing differs from one to the other.

* module_*: the standard library's sources by package (the demo's own text);
* part_*: comments, docstrings, interactive sessions and headings of definitions in those sources;
* language_*: sources in other programming languages among the packages that are installed beside this one;
* manual_*: the system's translated manual pages by natural language.

The first two have the splits train, validation and all. The others are in no demo model's training data and have all. Nothing is downloaded; a task whose text this
machine does not have says so when it is read, and `available` names the others. Tasks are called NAME_OBJECTIVE.
"""

import functools
import gzip
import inspect
import os
import re
import sysconfig
from typing import List, Sequence, Tuple

from openmoe_jax.config import ConfigError
from openmoe_jax.tasks import demo, standard_library
from openmoe_jax.tasks.standard_library import Document
from openmoe_jax.tensorflow_setup import import_seqio

seqio = import_seqio()

ALL = 'all'
# Packages of every supported Python version with at least 170,000 characters.
MODULES = ('asyncio', 'email', 'http', 'idlelib', 'importlib', 'logging', 'multiprocessing', 'tkinter', 'unittest', 'xml')
LANGUAGES = {'c': ('.c',), 'c_header': ('.h',), 'cpp': ('.cpp', '.cc', '.cu'), 'cython': ('.pyx', '.pxd'),
             'javascript': ('.js',), 'protobuf': ('.proto',), 'markdown': ('.md',)}
MANUALS = ('de', 'es', 'fr', 'it', 'ja', 'ko', 'pl', 'ru', 'zh_CN')
_MANUAL_FOLDER = '/usr/share/man'
_LEAST_CHARACTERS = 100_000
_MOST_CHARACTERS = 1_000_000
_LONGEST_FILE = 200_000  # bytes; longer ones are generated


def _sample(files: Sequence[str]) -> List[str]:
  """Files in an order that is random but always the same."""
  return sorted(files, key=lambda name: standard_library.digest(os.path.basename(name)))


def _read(files: Sequence[str], root: str, read) -> Tuple[Document, ...]:
  """Documents of files until there is enough text."""
  found, total = [], 0
  for file in _sample(files):
    try:
      text = read(file)
    except (OSError, EOFError, UnicodeDecodeError):  # in another encoding, or a dangling link
      continue
    if text.strip():
      found.append(Document(os.path.relpath(file, root).replace(os.sep, '/'), text))
      total += len(text)
    if total >= _MOST_CHARACTERS:
      break
  return tuple(found)


def module_documents(name: str, split: str) -> Tuple[Document, ...]:
  """Sources of one package of the standard library."""
  splits = standard_library.SPLITS if split == ALL else (split,)
  return tuple(document for own in splits for document in standard_library.documents('code', own)
               if document.file.startswith(name + '/'))


def _sessions(source: str) -> str:
  """The interactive sessions in docstrings: prompts, what is typed, and what is printed."""
  blocks = re.findall(r'^[ \t]*>>> .*(?:\n[ \t]*\S.*)*', '\n'.join(standard_library.docstrings(source)), re.MULTILINE)
  return '\n\n'.join(inspect.cleandoc(block) for block in blocks)


PARTS = {
    'comments': lambda source: '\n'.join(re.findall(r'^[ \t]*# ?(.*)', source, re.MULTILINE)),
    'docstrings': lambda source: '\n\n'.join(standard_library.docstrings(source)),
    'sessions': _sessions,
    'headings': lambda source: '\n'.join(line.strip() for line in re.findall(r'^[ \t]*(?:class|def) .*:$', source,
                                                                              re.MULTILINE)),
}


@functools.lru_cache(maxsize=None)
def part_documents(name: str, split: str) -> Tuple[Document, ...]:
  """One part of every source of the standard library that has it."""
  splits = standard_library.SPLITS if split == ALL else (split,)
  texts = (Document(document.file, PARTS[name](document.text) + '\n') for own in splits
           for document in standard_library.documents('code', own))
  return tuple(document for document in texts if document.text.strip())


@functools.lru_cache(maxsize=None)
def _installed_files() -> Tuple[str, ...]:
  """Files of the installed packages that may be in one of `LANGUAGES`."""
  endings = tuple(ending for own in LANGUAGES.values() for ending in own)
  found = []
  for folder, _, names in os.walk(sysconfig.get_paths()['purelib']):
    found += [os.path.join(folder, name) for name in names if name.endswith(endings)]
  return tuple(found)


@functools.lru_cache(maxsize=None)
def language_documents(name: str, split: str = ALL) -> Tuple[Document, ...]:
  """Sources in one programming language."""
  files = [file for file in _installed_files() if file.endswith(LANGUAGES[name])]

  def read(file):
    if os.path.getsize(file) > _LONGEST_FILE:
      return ''
    with open(file, encoding='utf-8', newline='') as stream:
      return stream.read()

  return _read(files, sysconfig.get_paths()['purelib'], read)


@functools.lru_cache(maxsize=None)
def manual_documents(name: str, split: str = ALL) -> Tuple[Document, ...]:
  """Manual pages in one natural language, as text."""
  files = []
  for folder, _, names in os.walk(os.path.join(_MANUAL_FOLDER, name)):
    files += [os.path.join(folder, file) for file in names if file.endswith('.gz')]

  def read(file):
    with gzip.open(file, 'rt', encoding='utf-8') as stream:
      return manual_text(stream.read())

  return _read(files, _MANUAL_FOLDER, read)


def manual_text(page: str) -> str:
  """The words of a manual page: the macros of troff at the beginnings of its lines and within them are taken out."""
  lines = []
  for line in page.splitlines():
    if re.match(r"""[.'](\\"|\s*(TH|if|ie|el|de|ds|nr|so|pc|ft|ad|nh|hy)\b)""", line):
      continue
    line = re.sub(r"^[.']\s*[A-Za-z]{0,3}\b ?", '', line)
    line = re.sub(r'\\(\*?\([A-Za-z]{2}|f\[?[A-Z]{1,2}\]?|s[-+]?\d|[&|^/,:])', '', line)
    lines.append(re.sub(r'\\([-e .])', lambda match: {'e': '\\'}.get(match[1], match[1]), line).strip('"'))
  return '\n'.join(lines).strip() + '\n'


KINDS = {**{f'module_{name}': functools.partial(module_documents, name) for name in MODULES},
         **{f'part_{name}': functools.partial(part_documents, name) for name in PARTS},
         **{f'language_{name}': functools.partial(language_documents, name) for name in LANGUAGES},
         **{f'manual_{name}': functools.partial(manual_documents, name) for name in MANUALS}}


def available(kind: str) -> List[str]:
  """The names in `KINDS` that begin with `kind` and of which this machine has enough text."""
  return [name for name, documents in KINDS.items() if name.startswith(kind)
          and sum(len(document.text) for document in documents(ALL)) >= _LEAST_CHARACTERS]


class DomainSource(demo.DocumentSource):
  """The documents of one domain, of which there must be some."""

  def __init__(self, name: str):
    self._name = name
    splits = (*standard_library.SPLITS, ALL) if name.startswith(('module_', 'part_')) else (ALL,)
    super().__init__(KINDS[name], splits)

  def get_dataset(self, split: str = ALL, shuffle: bool = True, seed=None, shard_info=None):
    if not self._documents(split):
      raise ConfigError(f'{self._name}: this machine has no such text in the split {split!r}; it has '
                        f'{", ".join(available(self._name.partition("_")[0])) or "none of its kind"}')
    return super().get_dataset(split, shuffle, seed, shard_info)


def register() -> None:
  """Adds the tasks to seqio's registry; those already there stay as they are."""
  for objective, (preprocessor, features) in demo.OBJECTIVES.items():
    for name in KINDS:
      if f'{name}_{objective}' not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(f'{name}_{objective}', source=DomainSource(name), preprocessors=[preprocessor],
                               output_features=features, shuffle_buffer_size=demo.SHUFFLE_BUFFER)


register()
