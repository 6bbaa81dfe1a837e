"""The comparison with the original once more, in programs that are compiled with all optimizations, as users' are."""

import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parent
FILES = ('golden_forward_test.py', 'golden_train_test.py')


@pytest.mark.slow
def test_golden_numbers_with_all_optimizations():
  flags = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=3'
  process = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', 'not slow',
                            *(str(TESTS / name) for name in FILES)], cwd=TESTS.parent, capture_output=True, text=True,
                           env={**os.environ, 'XLA_FLAGS': flags}, check=False)
  assert process.returncode == 0, process.stdout[-5000:]
  assert ' passed' in process.stdout
