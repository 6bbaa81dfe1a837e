"""A training run of seconds: settings, and ways to start it as a process of its own."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from typing import Any, Dict, Sequence

from openmoe_jax.config import (CheckpointConfig, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, RunConfig,
                                TrainConfig, flatten)

TESTS = pathlib.Path(__file__).resolve().parent
SPEED = ('tokens_per_second', 'seconds_per_step', 'flops_per_second', 'mfu')

MODEL = ModelConfig(vocab_size=8576, emb_dim=32, mlp_dim=32, num_heads=2, head_dim=16, num_layers=2, moe_interval=2,
                    num_experts=4, group_size=32, dtype='float32', scan_blocks=False, loss_chunk_tokens=512)
DATA = DataConfig(mixture_or_task='tiny_task', task_feature_lengths={'targets': 32}, batch_size=8, num_streams=4,
                  eval_batches=2, module_imports=('tiny_task',))


def tiny_run(model_dir: Any, model: Dict[str, Any] = {}, data: Dict[str, Any] = {}, train: Dict[str, Any] = {},
             checkpoint: Dict[str, Any] = {}, optimizer: Dict[str, Any] = {}, mesh: Dict[str, Any] = {}) -> RunConfig:
  """The tiny run, with other settings where given."""
  import dataclasses
  return RunConfig(
      model=MODEL.replace(**model), data=dataclasses.replace(DATA, **data),
      train=TrainConfig(**{**dict(train_steps=12, log_period=2, eval_period=6), **train}),
      checkpoint=CheckpointConfig(**{**dict(period=4), **checkpoint}),
      optimizer=OptimizerConfig(**optimizer), mesh=MeshConfig(**mesh), model_dir=str(model_dir))


def gin_text(run: RunConfig) -> str:
  """The settings as a gin file."""
  sections = {'model': 'ModelConfig', 'data': 'DataConfig', 'mesh': 'MeshConfig', 'optimizer': 'OptimizerConfig',
              'checkpoint': 'CheckpointConfig', 'train': 'TrainConfig', 'eval': 'EvalConfig'}
  lines = []
  for name, value in flatten(run).items():
    section, _, field = name.rpartition('.')
    lines.append(f'{sections[section] if section else "RunConfig"}.{field} = {value!r}')
  return '\n'.join(lines) + '\n'


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(('localhost', 0))
    return listener.getsockname()[1]


def command(gin_file: Any, *flags: str) -> Sequence[str]:
  return [sys.executable, '-m', 'openmoe_jax.train', f'--gin_file={gin_file}', *flags]


def environment(devices: int = 1, **more: str) -> Dict[str, str]:
  """One device, this checkout's tests on the path, and compiled programs kept between the starts of one test session."""
  cache = os.path.join(os.environ.get('OPENMOE_TEST_CACHE', tempfile.gettempdir()), f'openmoe_jax_test_cache_{os.getuid()}')
  path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get('PYTHONPATH', '')])
  return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': path,
          'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0',
          'JAX_COMPILATION_CACHE_DIR': cache,
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1', **more}


def start(gin_file: Any, *flags: str, log: Any = None, devices: int = 1, **more: str) -> subprocess.Popen:
  out = open(log, 'a') if log else subprocess.PIPE
  return subprocess.Popen(command(gin_file, *flags), env=environment(devices, **more), stdout=out,
                          stderr=subprocess.STDOUT if log else subprocess.PIPE, text=True)


def run_process(gin_file: Any, *flags: str, devices: int = 1, timeout: float = 600., **more: str
                ) -> subprocess.CompletedProcess:
  return subprocess.run(command(gin_file, *flags), env=environment(devices, **more), capture_output=True, text=True,
                        timeout=timeout, check=False)


def curve(model_dir: Any) -> list:
  """Everything in metrics.jsonl but speeds, which differ from run to run."""
  lines = (pathlib.Path(model_dir) / 'metrics.jsonl').read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if k not in SPEED} for line in lines]
