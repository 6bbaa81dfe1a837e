"""Files and folders by path, on local disks and on gs:// alike; every path of the library goes through here."""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import tempfile
from typing import Iterator, List, Optional, Union

from etils import epath

from openmoe_jax.config import ConfigError

PathLike = Union[str, os.PathLike]
_FULL = ('no space left on device', 'disk quota exceeded', 'file too large', 'enospc', 'edquot', 'efbig')


def path(name: PathLike) -> epath.Path:
  """`name` as a path object; `~` and relative local names are resolved, gs:// names are left alone."""
  text = os.fspath(name)
  if '://' in text:
    return epath.Path(text)
  return epath.Path(os.path.abspath(os.path.expanduser(text)))


def is_local(name: PathLike) -> bool:
  return '://' not in os.fspath(name)


def entries(directory: PathLike) -> List[str]:
  """Sorted names of what lies in a folder; empty where there is no folder."""
  directory = path(directory)
  if not directory.is_dir():
    return []
  return sorted(p.name for p in directory.iterdir())


def write_text(file: PathLike, text: str) -> None:
  """Writes a whole file so that a reader sees the old text or the new, whenever this process dies."""
  write_bytes(file, text.encode())


def write_bytes(file: PathLike, content: bytes) -> None:
  """As `write_text`, of bytes."""
  file = path(file)
  file.parent.mkdir(parents=True, exist_ok=True)
  if not is_local(file):  # an object store replaces an object at once
    file.write_bytes(content)
    return
  temporary = file.parent / f'.{file.name}.{os.getpid()}.tmp'
  try:
    temporary.write_bytes(content)
    temporary.replace(file)
  finally:
    temporary.unlink(missing_ok=True)


def append_text(file: PathLike, text: str) -> None:
  """Appends to a file, which is made where it is missing."""
  with path(file).open('a') as stream:
    stream.write(text)


def require_writable(directory: PathLike) -> None:
  """Raises `OSError` if a local folder, which need not exist yet, cannot be written to."""
  if not is_local(directory):
    return
  folder = os.path.abspath(os.path.expanduser(os.fspath(directory)))
  while not os.path.lexists(folder):
    folder = os.path.dirname(folder)
  if not os.path.isdir(folder):
    raise NotADirectoryError(f'{folder} is not a folder')
  with tempfile.TemporaryFile(dir=folder):
    pass


@contextlib.contextmanager
def locked(file: PathLike, busy: str) -> Iterator[None]:
  """Holds a lock of the operating system on a file, which is made; it is gone with the process, however that ends.

  Places that cannot be locked (gs://, some network disks) are not guarded.

  Args:
    file: the file.
    busy: what is said, with the other process's number and host, when another process holds it.

  Raises:
    ConfigError: another process holds it.
  """
  if not is_local(file):
    yield
    return
  with open(file, 'a+', encoding='utf-8') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      lock.seek(0)
      raise ConfigError(f'{busy} by another process ({lock.read().strip()}); stop that one, or choose another folder'
                        ) from error
    except OSError:
      pass  # not a disk that can lock
    lock.truncate(0)
    lock.write(f'pid {os.getpid()} on {socket.gethostname()}\n')
    lock.flush()
    yield


def free_bytes(directory: PathLike) -> Optional[int]:
  """Bytes that can still be written where `directory` is, or will be; None where nobody knows (gs://)."""
  if not is_local(directory):
    return None
  folder = os.path.abspath(os.path.expanduser(os.fspath(directory)))
  while not os.path.isdir(folder):
    folder = os.path.dirname(folder)
  return shutil.disk_usage(folder).free


def is_disk_full(error: BaseException) -> bool:
  """Whether an exception, or one that caused it, says that there is no room for a file."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      return True
    if any(sign in str(error).lower() for sign in _FULL):
      return True
    error = error.__cause__ or error.__context__
  return False


def human_bytes(count: float) -> str:
  """1536 -> '1.5 KB'."""
  for unit in ('bytes', 'KB', 'MB', 'GB', 'TB'):
    if count < 1024 or unit == 'TB':
      return f'{count:.0f} {unit}' if unit == 'bytes' else f'{count:.1f} {unit}'
    count /= 1024
  raise AssertionError
