"""The position of a tf.data iterator as bytes.

A small zip archive: header.json, and the files of a TensorFlow checkpoint of the iterator.
"""

import io
import json
import os
import tempfile
import zipfile
from typing import Any, Mapping

from openmoe_jax.config import ConfigError, require
from openmoe_jax.tensorflow_setup import import_tensorflow

_FORMAT = 1


def iterator_to_bytes(iterator: Any, batches: int, settings: Mapping[str, Any]) -> bytes:
  """The position of `iterator`, with the number of batches before it and the settings that it belongs to."""
  tf = import_tensorflow()
  header = json.dumps(dict(format=_FORMAT, batches=batches, settings=settings))
  buffer = io.BytesIO()
  with tempfile.TemporaryDirectory(prefix='openmoe_data_') as folder:
    tf.train.Checkpoint(iterator=iterator).write(os.path.join(folder, 'iterator'))
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
      archive.writestr('header.json', header)
      for name in sorted(os.listdir(folder)):
        archive.write(os.path.join(folder, name), name)
  return buffer.getvalue()


def batches_before(state: bytes) -> int:
  """The number of batches that were read before this position, since the stream began."""
  with zipfile.ZipFile(io.BytesIO(state)) as archive:
    return json.loads(archive.read('header.json'))['batches']


def iterator_from_bytes(iterator: Any, state: bytes, settings: Mapping[str, Any]) -> int:
  """Moves a new `iterator` to the saved position and returns the number of batches before it.

  Raises:
    ConfigError: the position is of other settings, or of another pipeline.
  """
  tf = import_tensorflow()
  with tempfile.TemporaryDirectory(prefix='openmoe_data_') as folder:
    with zipfile.ZipFile(io.BytesIO(state)) as archive:
      header = json.loads(archive.read('header.json'))
      require(header['format'] == _FORMAT, f'the saved data position has format {header["format"]}; this '
              f'version of openmoe_jax reads format {_FORMAT}')
      saved = header['settings']
      # What an older version did not write down counts as unchanged.
      changed = [f'{key}: {saved[key]!r} then, {value!r} now' for key, value in settings.items()
                 if key in saved and saved[key] != value]
      require(not changed, 'the saved data position is of other data settings (' + '; '.join(changed) + ')')
      archive.extractall(folder)
    try:
      tf.train.Checkpoint(iterator=iterator).read(os.path.join(folder, 'iterator')).assert_consumed()
    except (tf.errors.OpError, AssertionError) as error:
      raise ConfigError('the saved data position does not fit these tasks; they, or the version of TensorFlow, '
                        f'changed since it was saved: {str(error).splitlines()[0]}') from error
  return header['batches']
