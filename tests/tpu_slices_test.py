"""Names of TPU slices, against the examples of Google's documentation, and the figures of chips."""

import pytest

from openmoe_jax import tpu_slices
from openmoe_jax.config import ConfigError


@pytest.mark.parametrize('name, topology, chips, devices', (
    # v2 and v3 count cores, which are devices of their own.
    ('v2-8', 'v2:2x2', 4, 8), ('v3-32', 'v3:4x4', 16, 32), ('v3-512', 'v3:16x16', 256, 512), ('v3-2048', 'v3:32x32', 1024, 2048),
    # v4 and v5p count cores, two of which are one device.
    ('v4-8', 'v4:2x2x1', 4, 4), ('v4-128', 'v4:4x4x4', 64, 64), ('v5p-256', 'v5p:4x4x8', 128, 128),
    ('v5p-12288', 'v5p:16x16x24', 6144, 6144),
    # v5e and v6e have one core a chip.
    ('v5e-256', 'v5e:16x16', 256, 256), ('v5litepod-8', 'v5e:2x4', 8, 8), ('v6e-64', 'v6e:8x8', 64, 64),
    # tpu7x counts cores, which are devices.
    ('tpu7x-128', 'tpu7x:4x4x4', 64, 128),
    ('v4:4x4x8', 'v4:4x4x8', 128, 128), ('2*v5e-256', 'v5e:16x16', 512, 512), (' V4-128 ', 'v4:4x4x4', 64, 64)))
def test_names(name, topology, chips, devices):
  slice_ = tpu_slices.parse(name)
  assert (slice_.topology, slice_.chips, slice_.devices) == (topology, chips, devices)


def test_every_name_is_its_own():
  names = tpu_slices.names()
  assert len(set(names)) == len(names)
  for name in names:
    assert tpu_slices.parse(name).name == name


@pytest.mark.parametrize('name, message', (
    ('v4-100', r"--topology='v4-100': v4 has no such slice; nearest: v4-128 \(4x4x4\), v4-64 \(2x4x4\)"),
    ('v5e-512', r'v5e has no such slice; nearest: v5e-256 \(16x16\)'),
    ('v4:3x3x3', r'nearest: v4-64 \(2x4x4\)'),
    ('v9-128', r"there is no TPU 'v9'; there are v2, v3, v4, v5e, v5p, v6e, tpu7x"),
    ('v4', r"'v4' is not the name of a slice, such as v4-128, v5p:4x4x8 or 2\*v5e-256; near: v4-"),
    ('0*v4-128', 'no slice at all')))
def test_slices_that_are_not_there(name, message):
  with pytest.raises(ConfigError, match=message):
    tpu_slices.parse(name)


@pytest.mark.parametrize('name, rings', (
    ('v4-128', (True, True, True)), ('v4-64', (False, False, False)), ('v4-8', (False, False, False)),
    ('v5e-256', (True, True)), ('v5e-128', (False, True)), ('v5e-64', (False, False)), ('v3-512', (False, False)),
    ('v3-1024', (False, True)), ('v3-2048', (True, True)), ('v2-512', (True, True))))
def test_rings(name, rings):
  """A dimension is closed where the optical switches (v4 and later) or the pod's own cables do it."""
  slice_ = tpu_slices.parse(name)
  assert tuple(slice_.ring(d) for d in range(len(slice_.shape))) == rings


def test_published_bandwidths():
  """Of all links of a chip in both directions, GB/s; and of a whole pod's all-reduce, TB/s: all links, one way each."""
  both_ways = lambda name: 4 * tpu_slices.CHIPS[name].torus * tpu_slices.CHIPS[name].link_bandwidth / 1e9
  assert (both_ways('v5e'), both_ways('v5p'), both_ways('v6e'), both_ways('tpu7x')) == (400, 1200, 800, 1200)
  pod = lambda name, chips: chips * both_ways(name) / 2 / 1e3
  assert pod('v5e', 256) == 51.2
  assert pod('v6e', 256) == 102.4
  assert pod('v3', 1024) == pytest.approx(340, rel=0.02)
  assert pod('v4', 4096) == pytest.approx(1100, rel=0.12)  # published as 1.1 PB/s


def test_devices_share_a_chip():
  assert tpu_slices.parse('v3-8').device_hbm_bytes == 16 * 2 ** 30
  assert tpu_slices.parse('v4-8').device_hbm_bytes == 32 * 2 ** 30
