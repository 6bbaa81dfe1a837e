"""Generation and scoring by two processes that share a mesh: both get what one device alone gets."""

import functools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from openmoe_jax import decoding, partitioning, scoring
from openmoe_jax.config import MeshConfig, ModelConfig
from openmoe_jax.names import from_t5x_names
from tests import numpy_reference, tiny_run

ROUNDING = 5e-6  # of log-probabilities: sums over devices in another order
CONFIG = ModelConfig(vocab_size=48, emb_dim=16, mlp_dim=16, num_heads=4, head_dim=4, num_layers=2, moe_interval=2,
                     num_experts=4, group_size=16, dtype='float32', scan_blocks=False)


def figures(mesh=None):
  """Everything that the processes must agree on, as lists."""
  params = jax.tree.map(np.asarray, from_t5x_names(CONFIG, numpy_reference.random_params(CONFIG, 0)))
  if mesh is not None:
    put = lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    params = jax.tree.map(put, params, partitioning.tree_shardings(params, mesh))
  rng = np.random.RandomState(0)
  lengths = np.asarray([3, 20, 7, 1, 12])
  tokens = np.where(np.arange(20) < lengths[:, None], rng.randint(1, 48, (5, 20)), 0)
  run = functools.partial(decoding.generate, CONFIG, params, tokens, lengths, 8, eos_id=None, mesh=mesh)
  drawn = dict(temperature=1., top_k=10, top_p=.9, num_samples=2)
  got = {'greedy': run(), 'drawn': run(**drawn), 't5x': run(capacity_mode='t5x')}
  exact = {name: [g.tokens.tolist(), g.lengths.tolist()] for name, g in got.items()}
  generation = decoding.Generation(CONFIG, params, tokens, lengths, 8, eos_id=None, mesh=mesh)
  generation.advance(3)
  generation.finish(np.arange(5)[:, None] == 1)
  generation.advance(8)
  exact['finished'] = generation.result().lengths.tolist()
  rounded = {name: g.log_probs.tolist() for name, g in got.items()}
  rounded['scores'] = scoring.score(CONFIG, params, tokens, lengths, lengths // 2, mesh=mesh).log_probs.tolist()
  return exact, rounded


def one_of_two(port, process, out):
  """What each process runs, with two devices of its own."""
  jax.distributed.initialize(f'localhost:{port}', 2, int(process))
  pathlib.Path(out).write_text(json.dumps(figures(partitioning.make_mesh(MeshConfig(2, 2, 1)))), encoding='utf-8')


@pytest.mark.slow
def test_two_processes_equal_one_device(tmp_path):
  port = tiny_run.free_port()
  outs = [tmp_path / f'{i}.json' for i in range(2)]
  code = 'import sys; from tests.decoding_processes_test import one_of_two; one_of_two(*sys.argv[1:])'
  logs = [out.with_suffix('.log') for out in outs]
  processes = [subprocess.Popen([sys.executable, '-c', code, str(port), str(i), str(out)], stdout=log.open('w'),
                                stderr=subprocess.STDOUT, env=tiny_run.environment(devices=2))
               for i, (out, log) in enumerate(zip(outs, logs))]
  try:
    for process, log in zip(processes, logs):
      assert process.wait(300) == 0, log.read_text()
  finally:
    for process in processes:
      process.kill()
  want_exact, want_rounded = figures()
  for out in outs:
    exact, rounded = json.loads(out.read_text(encoding='utf-8'))
    assert exact == want_exact
    for name, want in want_rounded.items():
      np.testing.assert_allclose(rounded[name], want, rtol=0, atol=ROUNDING)
