"""The one way this library imports TensorFlow and seqio: quietly, and without touching an accelerator.

TensorFlow only reads and prepares data here. Left alone it would claim the memory of every GPU and lock the TPU before
JAX gets to them, and it writes several lines to stderr while it is imported.
"""

import contextlib
import functools
import os
import sys
import tempfile
from typing import Any, Iterator


@contextlib.contextmanager
def _stderr_held_back() -> Iterator[None]:
  """Keeps what native code writes to stderr to itself, unless the block raises."""
  sys.stderr.flush()
  try:
    original = os.dup(2)
  except OSError:  # There is no stderr: nothing to hold back.
    yield
    return
  with tempfile.TemporaryFile() as held:
    os.dup2(held.fileno(), 2)
    try:
      yield
    except BaseException:
      os.dup2(original, 2)
      held.seek(0)
      os.write(2, held.read())
      raise
    finally:
      os.dup2(original, 2)
      os.close(original)


@functools.lru_cache(maxsize=None)
def import_tensorflow() -> Any:
  """The `tensorflow` module. Takes some seconds the first time."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  with _stderr_held_back():
    import tensorflow as tf
    tf.get_logger().setLevel('ERROR')
    for kind in ('GPU', 'TPU'):
      try:
        tf.config.set_visible_devices([], kind)
      except RuntimeError:  # Somebody used TensorFlow on that device before us; it is theirs to manage.
        pass
  return tf


@functools.lru_cache(maxsize=None)
def import_seqio() -> Any:
  """The `seqio` module."""
  import_tensorflow()
  with _stderr_held_back():
    import seqio
  return seqio


@functools.lru_cache(maxsize=None)
def import_tfds() -> Any:
  """The `tensorflow_datasets` module. It imports TensorFlow only where it reads records."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  with _stderr_held_back():
    import tensorflow_datasets
  return tensorflow_datasets
