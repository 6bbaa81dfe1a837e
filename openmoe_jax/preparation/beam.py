"""Pieces of work under Apache Beam, on one machine or many: pip install 'openmoe_jax[beam]'.

A piece is the same work as in a process of this machine, and writes the same files. All workers must see the input and
the output folder (gs://, or a disk that they share).
"""

from typing import Any, Sequence

from openmoe_jax.config import ConfigError
from openmoe_jax.preparation import pieces
from openmoe_jax.preparation.plan import Plan


def run(plan: Plan, todo: Sequence[int], max_malformed: int, context: Any, options: Sequence[str]) -> None:
  """Does the pieces `todo`; their shards are in the work folder then.

  Args:
    plan: of the data set.
    todo: numbers of pieces.
    max_malformed: records that may be skipped in a piece.
    context: of `DataSet.context`.
    options: of the pipeline, such as '--runner=DirectRunner'.

  Raises:
    ConfigError: Beam is not installed, or the pipeline failed.
  """
  try:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise ConfigError(f"--beam needs Apache Beam ({error}): pip install 'openmoe_jax[beam]'") from error
  try:
    with apache_beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
      _ = (pipeline | 'pieces' >> apache_beam.Create(list(todo)) | 'spread' >> apache_beam.Reshuffle()
           | 'shards' >> apache_beam.Map(_work, plan=plan, max_malformed=max_malformed, context=context))
  except Exception as error:  # A runner wraps what a worker raised, each in its own way.
    lines = [line for line in str(error).splitlines() if line.strip()]
    own = [line.partition('ConfigError: ')[2] or line.partition('TooManyMalformed: ')[2] for line in lines]
    message = next(filter(None, own), f'the Beam pipeline failed: {lines[-1] if lines else error!r}')
    raise ConfigError(message) from error


def _work(piece: int, plan: Plan, max_malformed: int, context: Any) -> int:
  pieces.work(plan, piece, max_malformed, context=context)
  return piece
