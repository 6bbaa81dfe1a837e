"""The benchmark of recording: its table, and a pass over a tiny model."""

import numpy as np
import pytest

from openmoe_jax import loading
from openmoe_jax.tools import bench_recording
from openmoe_jax.tools.bench_recording import Cost, Figures
from tests import tiny_checkpoint


def test_its_table_has_the_median_of_the_pairs():
  evaluation, recording = [Cost(1., 2.), Cost(2., 2.), Cost(4., 4.)], [Cost(1.5, 2.2), Cost(2.2, 2.6), Cost(4., 4.8)]
  figures = Figures(evaluation, recording, 3000, 100)
  assert bench_recording.table({'none': figures})[-1] == (
      '| none | 2.00 | 2.60 | +20 % (10 to 30) | +10 % (0 to 50) | 30 |')


@pytest.mark.slow
@pytest.mark.parametrize('policy', ['none', 'colossalai'])
def test_a_pass(tmp_path, policy):
  model = loading.load(tiny_checkpoint.write(tmp_path / 'run', row_length=16))
  targets = np.random.default_rng(0).integers(3, 8000, (4, 16)).astype(np.int32)
  batch = {'decoder_input_tokens': np.roll(targets, 1, axis=1) * (np.arange(16) > 0), 'decoder_target_tokens': targets}
  found = bench_recording.measure(model, policy, [batch], pairs=2)
  assert found.tokens == 64 and found.size > 0
  assert len(found.evaluation) == len(found.recording) == 2 and all(cost.wall > 0 for cost in found.recording)
