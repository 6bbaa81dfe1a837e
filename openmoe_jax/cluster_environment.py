"""What the environment says about other processes of a run: the variables of schedulers, and what is wrong with them.

A variable that is left over from another job, or that an allocation sets without a launcher, makes a process wait for
others that never come. That is found here before anything waits. Standard library alone: `openmoe-inspect --environment`
prints it on machines where anything may be missing.
"""

import glob
import os
import socket
from typing import Dict, List, Mapping, NamedTuple, Optional

JAX = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')
OPEN_MPI = ('OMPI_MCA_orte_hnp_uri', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK')
TPU = ('TPU_WORKER_HOSTNAMES', 'TPU_PROCESS_ADDRESSES', 'TPU_WORKER_ID')
MEGASCALE = ('MEGASCALE_COORDINATOR_ADDRESS', 'MEGASCALE_NUM_SLICES', 'MEGASCALE_SLICE_ID')
NAMES = JAX + SLURM + OPEN_MPI + TPU + MEGASCALE


class Flags(NamedTuple):
  """What `jax.distributed.initialize` needs to know where no scheduler tells it."""
  coordinator_address: str
  num_processes: int
  process_id: int


def variables(env: Mapping[str, str] = os.environ) -> Dict[str, str]:
  """The variables that say something about other processes, as far as they are set."""
  return {name: env[name] for name in NAMES if env.get(name)}


def on_tpu(env: Mapping[str, str] = os.environ) -> bool:
  """Whether this machine has a TPU and JAX is not told to leave it alone."""
  chips = glob.glob('/dev/accel*') + glob.glob('/dev/vfio/[0-9]*')
  return bool(chips) and 'cpu' not in env.get('JAX_PLATFORMS', '')


def several_processes(env: Mapping[str, str] = os.environ) -> bool:
  """Whether a variable says that this process is one of several."""
  if env.get('JAX_COORDINATOR_ADDRESS') or env.get('MEGASCALE_COORDINATOR_ADDRESS'):
    return True
  return any(count > 1 for count in _counts(env).values())


def jax_flags(env: Mapping[str, str] = os.environ) -> Optional[Flags]:
  """JAX's three variables, where all are set and good; JAX itself reads only the first."""
  if not all(env.get(name) for name in JAX) or _jax_problems(env):
    return None
  return Flags(env[JAX[0]], int(env[JAX[1]]), int(env[JAX[2]]))


def problems(env: Mapping[str, str] = os.environ, tpu: Optional[bool] = None) -> List[str]:
  """One line for each thing that cannot be, with its remedy; looks names of hosts up.

  Args:
    tpu: whether this machine has a TPU; None looks.
  """
  tpu = on_tpu(env) if tpu is None else tpu
  found = _jax_problems(env) + _slurm_problems(env) + _mpi_problems(env) + _tpu_problems(env, tpu)
  counts = {name: count for name, count in _counts(env).items() if count > 1}
  if len(set(counts.values())) > 1:
    found.append(f'{_listed(counts)} contradict each other: one of them is left over from another job; unset it')
  for name in (JAX[0], MEGASCALE[0]):
    host = env.get(name, '').rpartition(':')[0] or env.get(name, '')
    if host and not found and not _is_known(host):
      found.append(f'{name} = {env[name]!r}: there is no host of that name (any more); {_unset(name)}')
  return found


def _counts(env: Mapping[str, str]) -> Dict[str, int]:
  """{variable: number of processes that it claims}."""
  counts = {name: int(env[name]) for name in (JAX[1], 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
            if env.get(name, '').isdigit()}
  for name in TPU[:2]:
    if ',' in env.get(name, ''):
      slices = env.get('MEGASCALE_NUM_SLICES', '')
      counts[name] = len(env[name].split(',')) * (int(slices) if slices.isdigit() else 1)
  return counts


def _jax_problems(env: Mapping[str, str]) -> List[str]:
  given = [name for name in JAX if env.get(name)]
  scheduled = _complete(env, SLURM) or _complete(env, OPEN_MPI) or any(env.get(name) for name in TPU + MEGASCALE)
  missing = [name for name in JAX if name not in given]
  if given and given != [JAX[1]] and missing and not scheduled:
    return [f'{" and ".join(given)} set, but not {" and ".join(missing)}: set all three, or {_unset(*given)}']
  address, count, index = (env.get(name, '') for name in JAX)
  if address and not (address.rpartition(':')[0] and address.rpartition(':')[2].isdigit()):
    return [f'{JAX[0]} = {address!r} must be HOST:PORT of process 0']
  if any(text and not text.isdigit() for text in (count, index)) or count and index and int(index) >= int(count):
    return [f'{JAX[2]} = {index!r} must be from 0 to {JAX[1]} = {count!r} minus 1']
  return []


def _slurm_problems(env: Mapping[str, str]) -> List[str]:
  if not env.get('SLURM_NTASKS', '').isdigit() or int(env['SLURM_NTASKS']) < 2:
    return []
  if not _complete(env, SLURM):
    missing = [name for name in SLURM if not env.get(name)]
    return [f'SLURM_NTASKS = {env["SLURM_NTASKS"]!r}, but {" and ".join(missing)} not set: this is a shell in an '
            f'allocation of SLURM, not a task of it. Start with srun, or {_unset("SLURM_NTASKS")}']
  if not env['SLURM_PROCID'].isdigit() or int(env['SLURM_PROCID']) >= int(env['SLURM_NTASKS']):
    return [f'SLURM_PROCID = {env["SLURM_PROCID"]!r} is not below SLURM_NTASKS = {env["SLURM_NTASKS"]!r}: one of them is '
            f'left over from another job; start with srun, or {_unset("SLURM_NTASKS")}']
  return []


def _mpi_problems(env: Mapping[str, str]) -> List[str]:
  if not env.get('OMPI_COMM_WORLD_SIZE', '').isdigit() or int(env['OMPI_COMM_WORLD_SIZE']) < 2 or _complete(env, OPEN_MPI):
    return []
  if all(env.get(name) for name in JAX):
    return []
  return [f'OMPI_COMM_WORLD_SIZE = {env["OMPI_COMM_WORLD_SIZE"]!r}, but '
          f'{" and ".join(name for name in OPEN_MPI if not env.get(name))} not set, by which JAX finds process 0 (Open MPI 5 '
          f'no longer sets it): set {", ".join(JAX)}, or {_unset("OMPI_COMM_WORLD_SIZE")}']


def _tpu_problems(env: Mapping[str, str], tpu: bool) -> List[str]:
  found = []
  for name in TPU[:2]:
    hosts = env.get(name, '').split(',') if ',' in env.get(name, '') else []
    if hosts and not tpu:
      found.append(f'{name} names {len(hosts)} hosts of a TPU slice, but this machine has no TPU (or JAX_PLATFORMS keeps '
                   f'JAX from it); {_unset(name)}')
    elif hosts and not (env.get('TPU_WORKER_ID', '').isdigit() and int(env['TPU_WORKER_ID']) < len(hosts)):
      found.append(f'TPU_WORKER_ID = {env.get("TPU_WORKER_ID", "")!r} must be from 0 to {len(hosts) - 1}, the hosts in '
                   f'{name}; set it, or {_unset(name)}')
    elif hosts and not _is_known(hosts[0].split(':')[0]):
      found.append(f'{name}: there is no host {hosts[0]!r} (any more), as after a preemption; {_unset(name)}')
  if env.get(MEGASCALE[0]) and not tpu:
    found.append(f'{MEGASCALE[0]} = {env[MEGASCALE[0]]!r} joins slices of TPUs, but this machine has no TPU (or '
                 f'JAX_PLATFORMS keeps JAX from it); {_unset(*MEGASCALE)}')
  elif env.get(MEGASCALE[0]):
    count, index = env.get(MEGASCALE[1], ''), env.get(MEGASCALE[2], '')
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
      found.append(f'{MEGASCALE[0]} is set, but {MEGASCALE[2]} = {index!r} is not from 0 to {MEGASCALE[1]} = {count!r} minus '
                   f'1, as after a preemption; {_unset(*MEGASCALE)}')
  return found


def _complete(env: Mapping[str, str], names) -> bool:
  return all(env.get(name) for name in names)


def _is_known(host: str) -> bool:
  try:
    socket.getaddrinfo(host.strip('[]'), None)
    return True
  except OSError:
    return False


def _listed(values: Mapping[str, object]) -> str:
  return ' and '.join(f'{name} = {value}' for name, value in values.items())


def _unset(*names: str) -> str:
  return f'for a process of its own: unset {" ".join(names)}'
