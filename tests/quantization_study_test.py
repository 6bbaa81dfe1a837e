"""The study of int8 kernels: the same data with and without, and honest sizes."""

import jax
import numpy as np
import pytest

from openmoe_jax import loading, quantization
from openmoe_jax.tools import quantization_study
from tests import tiny_checkpoint


@pytest.mark.slow  # four programs are compiled
def test_perplexity_and_memory(tmp_path, capsys):
  path = tiny_checkpoint.write(tmp_path / 'run')
  quantization_study.main([path, '--mixture=demo_code_full_lm', '--batches=1'])
  text = capsys.readouterr().out
  model = loading.load(path)
  rows = quantization_study.study(model, 'demo_code_full_lm', 1)
  before, after = rows['float32'], rows['int8']
  assert before['bytes'] == sum(x.nbytes for x in jax.tree.leaves(model.params))
  assert after['bytes'] == sum(x.nbytes for x in jax.tree.leaves(quantization.quantize_model(model).params))
  assert before['bytes'] - after['bytes'] == before['kernel_bytes'] - after['kernel_bytes'] > 0
  loss = 'demo_code_full_lm loss'
  assert 0 < abs(before[loss] - after[loss]) < .05
  np.testing.assert_allclose(np.exp(before[loss]), before['demo_code_full_lm perplexity'])
  assert f'| {loss} | {before[loss]:.4f} | {after[loss]:.4f} |' in text
