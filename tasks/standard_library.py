"""Text that every Python installation already has, as documents of two kinds.

* code: the sources of the standard library.
* prose: the language topics of `pydoc_data.topics`, and the docstrings of each source file (one document a file).

A source file belongs to one split, chosen by a hash of its name; its code and its docstrings go there together, and
`pydoc_data/topics.py` is one file, so all topics are in the training split. Nothing is downloaded. The text is that of
the running Python version, so another version gives (slightly) different documents.
"""

import functools
import hashlib
import importlib
import inspect
import os
import re
import sysconfig
from typing import List, NamedTuple, Tuple

from openmoe_jax.config import ConfigError

SPLITS = ('train', 'validation')
KINDS = ('code', 'prose')
TOPICS_FILE = 'pydoc_data/topics.py'

# Not read as code: what is not the library's own text (site-packages), test suites (larger than everything else
# together, and full of data), generated character tables (encodings), and the topics, which are prose.
SKIPPED_FOLDERS = frozenset(['site-packages', 'dist-packages', '__pycache__', 'lib-dynload', 'test', 'tests',
                             'idle_test', 'encodings', 'pydoc_data'])
# One file in this many is validation.
_VALIDATION_ONE_IN = 10


class Document(NamedTuple):
  """One text and the file it comes from (relative to the standard library, with forward slashes)."""
  file: str
  text: str


def digest(name: str) -> int:
  """A number that a name alone decides, to choose and to order by."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], 'big')


def split_of(file: str) -> str:
  """The split that a file, and everything taken from it, belongs to."""
  if file == TOPICS_FILE:
    return 'train'
  return 'validation' if digest(file) % _VALIDATION_ONE_IN == 0 else 'train'


@functools.lru_cache(maxsize=None)
def _sources() -> Tuple[Document, ...]:
  """Every source file, in an order that is random but always the same, so that any prefix is a fair sample."""
  root = sysconfig.get_paths()['stdlib']
  found = []
  for folder, subfolders, files in os.walk(root):
    subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
    for name in files:
      if name.endswith('.py'):
        path = os.path.join(folder, name)
        try:
          with open(path, encoding='utf-8', newline='') as f:
            text = f.read()
        except (UnicodeDecodeError, OSError):  # A source in an older encoding, or a dangling link.
          continue
        found.append(Document(os.path.relpath(path, root).replace(os.sep, '/'), text))
  if not found:
    raise ConfigError(f'the demo tasks read the sources of the standard library, but {root} holds none; '
                      'use a Python installation that has its .py files')
  return tuple(sorted(found, key=lambda document: digest(document.file)))


# Comments and strings, so that a quote inside one of them never opens another. Far quicker than parsing the sources.
_STRING_OR_COMMENT = re.compile(
    r'''\#[^\n]*
      | (?P<prefix>\b[rRuUbBfF]{1,2})?(?P<quote>"""|\'\'\')(?P<body>(?:\\.|[^\\])*?)(?P=quote)
      | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' ''', re.VERBOSE | re.DOTALL)


def docstrings(source: str) -> List[str]:
  """The triple-quoted docstrings of a module, of its classes and of its functions, in order, with indentation removed.

  A docstring is a string that stands alone at the start of the file or right after a colon at the end of a line.
  """
  found = []
  end_of_code = 0  # Where the text before the current string or comment, comments not counted, was last not blank.
  opens_block = True
  for match in _STRING_OR_COMMENT.finditer(source):
    between = source[end_of_code:match.start()]
    if between.strip():
      opens_block = between.rstrip().endswith(':')
    end_of_code = match.end()
    if match.group().startswith('#'):
      continue
    body, prefix = match.group('body'), match.group('prefix') or ''
    starts_line = not source[source.rfind('\n', 0, match.start()) + 1:match.start()].strip()
    if body is not None and opens_block and starts_line and prefix.lower() in ('', 'r', 'u') and body.strip():
      found.append(inspect.cleandoc(body))
    opens_block = False
  return found


@functools.lru_cache(maxsize=None)
def documents(kind: str, split: str) -> Tuple[Document, ...]:
  """The documents of one kind ('code' or 'prose') in one split ('train' or 'validation'); none is empty."""
  if kind not in KINDS or split not in SPLITS:
    raise ConfigError(f'no documents of kind {kind!r} in split {split!r}; kinds: {KINDS}, splits: {SPLITS}')
  sources = [source for source in _sources() if split_of(source.file) == split and source.text.strip()]
  if kind == 'code':
    return tuple(sources)
  prose = [Document(source.file, '\n\n'.join(docstrings(source.text)) + '\n') for source in sources]
  prose = [document for document in prose if document.text.strip()]
  if split == split_of(TOPICS_FILE):
    prose += [Document(TOPICS_FILE, text) for text in _topics()]
    # Each topic is a document, mixed among the files' docstrings by a hash of its own text.
    prose.sort(key=lambda document: digest(document.text))
  return tuple(prose)


def _topics() -> List[str]:
  try:
    topics = importlib.import_module('pydoc_data.topics').topics
  except ImportError:  # Some distributions package the documentation separately.
    return []
  return [text for _, text in sorted(topics.items()) if text.strip()]
