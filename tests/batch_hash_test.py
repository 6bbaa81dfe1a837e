"""Names of batches: what they depend on, and that hosts and meshes are not among it."""

import jax
import numpy as np
import pytest

from openmoe_jax.batch_hash import batch_hash
from openmoe_jax.config import MeshConfig
from openmoe_jax.data import to_global
from openmoe_jax.metric_window import MetricWindow
from openmoe_jax.partitioning import make_mesh


def batch(seed=0, rows=8):
  rng = np.random.RandomState(seed)
  return {name: rng.randint(0, 100, (2, rows, 6)).astype(np.int32) for name in ('decoder_input_tokens', 'other')}


def mixed(x):
  x = ((x ^ (x >> 16)) * 0x85ebca6b) % 2**32
  x = ((x ^ (x >> 13)) * 0xc2b2ae35) % 2**32
  return x ^ (x >> 16)


def test_the_formula():
  """In Python's integers, value by value."""
  total = 0
  for number, name in enumerate(sorted(batch())):
    for place, value in enumerate(batch()[name].reshape(-1).tolist()):
      total += mixed(value ^ mixed((place + 0x9e3779b9 * (number + 1)) % 2**32))
  assert int(batch_hash(batch())) == total % 2**32


@pytest.mark.parametrize('mesh', ((1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)))
def test_no_mesh_changes_it(mesh):
  data, expert, model = mesh
  devices = make_mesh(MeshConfig(data=data, expert=expert, model=model), jax.devices()[:data * expert * model])
  assert int(batch_hash(to_global(batch(), devices))) == int(batch_hash(batch()))


def test_every_change_of_the_batch_changes_it():
  names = {int(batch_hash(batch()))}
  changed = []
  for name in batch():
    one = batch()
    one[name][1, 3, 2] += 1
    changed.append(one)
  swapped, exchanged = batch(), batch()
  swapped['other'][:, [0, 1]] = swapped['other'][:, [1, 0]]
  exchanged['other'], exchanged['decoder_input_tokens'] = exchanged['decoder_input_tokens'], exchanged['other']
  changed += [swapped, exchanged, batch(seed=1)]
  names |= {int(batch_hash(one)) for one in changed}
  assert len(names) == 1 + len(changed)


def test_a_window_keeps_them():
  window = MetricWindow()
  for step in range(3):
    window.add({'num_target_tokens': np.float32(1)}, step + 255)
  again = MetricWindow(window.state())
  again.add({'num_target_tokens': np.float32(1)}, 2**32 - 1)
  assert again.means()['batch_hashes'] == ['000000ff', '00000100', '00000101', 'ffffffff']
  again.restart()
  again.add({'num_target_tokens': np.float32(1)})
  assert 'batch_hashes' not in again.means()
