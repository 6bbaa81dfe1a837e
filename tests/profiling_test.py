"""Profiles of some training steps: which, and files that TensorBoard and Perfetto read."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from openmoe_jax.config import ConfigError
from openmoe_jax.profiling import StepProfiler, parse_steps


def test_steps():
  assert parse_steps('100:105') == (100, 105) and parse_steps('7') == (7, 7)


@pytest.mark.parametrize('text', ('', '0:3', '5:4', '1:2:3', 'a:b', '3:'))
def test_steps_that_cannot_be(text):
  with pytest.raises(ConfigError, match=f'--profile_steps={text} must be a step or FIRST:LAST'):
    parse_steps(text)


def test_nothing_on_an_object_store():
  with pytest.raises(ConfigError, match='--profile_steps writes to a local folder, not to gs://bucket/run'):
    StepProfiler('gs://bucket/run', (1, 2))
  StepProfiler('gs://bucket/run', None)


def test_a_profile_holds_the_steps_it_is_of(tmp_path):
  said = []
  profiler = StepProfiler(tmp_path, (2, 3), said.append)
  for step in range(1, 6):
    profiler.before(step)
    jax.block_until_ready(jax.jit(lambda x: x * step + 1, keep_unused=True)(jnp.ones(4)))
    with jax.profiler.TraceAnnotation(f'this is step {step}'):
      pass
    assert profiler.due(step) == (step == 3)
    profiler.after(step)
  assert len(said) == 1 and str(tmp_path) in said[0]
  assert len(list(tmp_path.rglob('*.xplane.pb'))) == 1
  trace = json.loads(gzip.decompress(next(tmp_path.rglob('perfetto_trace.json.gz')).read_bytes()))
  names = {event.get('name') for event in trace['traceEvents']}
  assert {step for step in range(1, 6) if f'this is step {step}' in names} == {2, 3}
