"""Variables that tell of other processes: which are believed, and which are told to be wrong."""

import os

import pytest

from openmoe_jax import cluster_environment as cluster
from openmoe_jax import environment

SLURM = {'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '3',
         'SLURM_LOCALID': '0'}
JAX = {'JAX_COORDINATOR_ADDRESS': 'localhost:1234', 'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1'}
TPU = {'TPU_WORKER_HOSTNAMES': 'localhost,localhost', 'TPU_WORKER_ID': '1'}
SLICES = {'MEGASCALE_COORDINATOR_ADDRESS': 'localhost', 'MEGASCALE_NUM_SLICES': '2', 'MEGASCALE_SLICE_ID': '0'}


def without(values, *names):
  return {name: value for name, value in values.items() if name not in names}


@pytest.mark.parametrize('env, several', (
    ({}, False), ({'SLURM_NTASKS': '1'}, False), ({'JAX_NUM_PROCESSES': '1'}, False), ({'TPU_WORKER_HOSTNAMES': 'a'}, False),
    (SLURM, True), (JAX, True), (TPU, True), (SLICES, True), ({'OMPI_COMM_WORLD_SIZE': '3'}, True)))
def test_who_is_one_of_several(env, several):
  assert cluster.several_processes(env) == several


@pytest.mark.parametrize('env', ({}, SLURM, JAX, {'SLURM_NTASKS': '1'}, {'OMPI_COMM_WORLD_SIZE': '1'},
                                 {**JAX, 'OMPI_COMM_WORLD_SIZE': '2'}, {'JAX_COORDINATOR_ADDRESS': 'localhost:1', **SLURM}))
def test_nothing_is_wrong(env):
  assert cluster.problems(env, tpu=False) == []


def test_nothing_is_wrong_on_a_tpu():
  for env in (TPU, SLICES, {**TPU, **SLICES}):
    assert cluster.problems(env, tpu=True) == []


WRONG = (
    (without(JAX, 'JAX_PROCESS_ID'), 'JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES set, but not JAX_PROCESS_ID: set all '
     'three, or for a process of its own: unset JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES'),
    ({'JAX_COORDINATOR_ADDRESS': 'localhost:1'}, 'unset JAX_COORDINATOR_ADDRESS'),
    ({**JAX, 'JAX_COORDINATOR_ADDRESS': 'localhost'}, "= 'localhost' must be HOST:PORT"),
    ({**JAX, 'JAX_PROCESS_ID': '2'}, "JAX_PROCESS_ID = '2' must be from 0 to JAX_NUM_PROCESSES = '2' minus 1"),
    ({**JAX, 'JAX_COORDINATOR_ADDRESS': 'gone.invalid:1'}, "'gone.invalid:1': there is no host of that name (any more)"),
    (without(SLURM, 'SLURM_STEP_NODELIST', 'SLURM_PROCID'), 'SLURM_STEP_NODELIST and SLURM_PROCID not set: this is a shell '
     'in an allocation of SLURM, not a task of it. Start with srun, or for a process of its own: unset SLURM_NTASKS'),
    ({**SLURM, 'SLURM_PROCID': '4'}, "SLURM_PROCID = '4' is not below SLURM_NTASKS = '4'"),
    ({'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': '0'}, 'by which JAX finds process 0'),
    (TPU, 'TPU_WORKER_HOSTNAMES names 2 hosts of a TPU slice, but this machine has no TPU'),
    (SLICES, 'unset MEGASCALE_COORDINATOR_ADDRESS MEGASCALE_NUM_SLICES MEGASCALE_SLICE_ID'),
    ({**SLURM, 'JAX_NUM_PROCESSES': '2'}, 'JAX_NUM_PROCESSES = 2 and SLURM_NTASKS = 4 contradict each other'))


@pytest.mark.parametrize('env, part', WRONG)
def test_what_is_wrong(env, part):
  problem, = cluster.problems(env, tpu=False)
  assert part in problem


@pytest.mark.parametrize('env, part', (
    (without(TPU, 'TPU_WORKER_ID'), "TPU_WORKER_ID = '' must be from 0 to 1"), ({**TPU, 'TPU_WORKER_ID': '2'}, 'from 0 to 1'),
    ({**TPU, 'TPU_WORKER_HOSTNAMES': 'gone.invalid,localhost'}, "there is no host 'gone.invalid' (any more)"),
    (without(SLICES, 'MEGASCALE_NUM_SLICES'), 'as after a preemption'),
    ({**SLICES, 'MEGASCALE_SLICE_ID': '2'}, "MEGASCALE_SLICE_ID = '2' is not from 0 to MEGASCALE_NUM_SLICES = '2'")))
def test_what_is_wrong_on_a_tpu(env, part):
  problem, = cluster.problems(env, tpu=True)
  assert part in problem


def test_jax_variables_are_flags():
  assert cluster.jax_flags(JAX) == ('localhost:1234', 2, 1)
  assert cluster.jax_flags(without(JAX, 'JAX_PROCESS_ID')) is None and cluster.jax_flags({}) is None


def test_the_report_shows_them(monkeypatch):
  for name in cluster.NAMES:
    monkeypatch.delenv(name, raising=False)
  assert environment.cluster_lines() == (['no variable of JAX, SLURM, Open MPI or a TPU slice is set: one process'], [])
  monkeypatch.setattr(os, 'environ', {**os.environ, 'SLURM_NTASKS': '2'})
  lines, problems = environment.cluster_lines(os.environ)
  assert lines == ["SLURM_NTASKS = '2'"] and len(problems) == 1 and 'Start with srun' in problems[0]
