"""The train step and the decode step of a run, compiled for a TPU slice on a machine without one.

libtpu holds the whole compiler; `jax.experimental.topologies` gives devices that can be compiled for and nothing else.
What does not fit in the memory of a chip is refused, as it would be on the chip.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import time
from typing import Any, Iterator, Optional, Tuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import jax.numpy as jnp

from openmoe_jax import compiler_options, decoding, partitioning
from openmoe_jax.attention import FEATURES, KeysValues
from openmoe_jax.config import ConfigError, ModelConfig, RunConfig, require
from openmoe_jax.optimizers import make_optimizer
from openmoe_jax.schedules import learning_rate_schedule
from openmoe_jax.tpu_slices import Slice
from openmoe_jax.train_state import abstract_train_state, state_shardings
from openmoe_jax.train_step import make_train_step

# Without the first two libtpu asks the metadata server of the machine it is on; without the last it takes a lock that is
# for programs which use a TPU, and another compilation, or a run on this machine, would make this one fail.
_ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device's main memory, as the compiler has laid it out.

  Attributes:
    arguments: what the program is given.
    outputs: what it returns, beside those arguments whose place it takes over.
    temporaries: the room for everything else, gaps included.
    code: of the program.
    peak: of all but the code, what is alive at the worst moment. This is what the compiler compares with the memory that
      there is: it refuses a program that has more, and accepts one whose parts, laid out, add up to more (found out with
      libtpu 0.0.42 by programs of growing size).
    host: bytes of the host's memory.
  """
  arguments: float
  outputs: float
  temporaries: float
  code: float
  peak: float
  host: float = 0.

  @property
  def total(self) -> float:
    return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program, or one that does not fit.

  Attributes:
    name: 'train' or 'decode'.
    text: optimised HLO; '' if it does not fit.
    memory: None if it does not fit.
    error: the compiler's reason, in one line; '' if it fits.
    seconds: that lowering and compiling took.
    needed: bytes of main memory that the compiler says it would need, where it does not fit.
  """
  name: str
  text: str
  memory: Optional[Memory]
  error: str
  seconds: float
  needed: float = 0.

  @property
  def fits(self) -> bool:
    return self.memory is not None


def topology_devices(slice_: Slice) -> Tuple[Any, ...]:
  """Devices of a slice that is not there.

  Raises:
    ConfigError: libtpu is not installed, or does not know the slice.
  """
  require(importlib.util.find_spec('libtpu') is not None or 'TPU_LIBRARY_PATH' in os.environ, 'the TPU compiler (libtpu) '
          "is not installed; make install-tpu, or pip install 'openmoe_jax[tpu]', adds it (no TPU is needed)")
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  jax.config.update('jax_platforms', 'cpu')  # or jax would look for a TPU here
  from jax.experimental import topologies
  # libtpu thinks of hosts with four chips, unless it is told.
  alone = {'chips_per_host_bounds': (1, 1, 1)} if math.prod(slice_.shape) == 1 else {}
  with _quiet():
    try:
      found = topologies.get_topology_desc(topology_name=slice_.topology, platform='tpu', num_slices=slice_.slices,
                                           chip_config_name=slice_.chip.config, **alone)
    except Exception as error:
      raise ConfigError(f'--topology={slice_.name}: libtpu does not know {slice_.topology} ({_line(error)})') from error
  return tuple(found.devices)


def make_mesh(run: RunConfig, devices: Tuple[Any, ...]) -> Mesh:
  """The mesh of a run over a slice's devices.

  Raises:
    ConfigError: it does not fit them, the model or the batch cannot be split over it, or the compiler does not take an
      option.
  """
  mesh = partitioning.make_mesh(dataclasses.replace(run.mesh, platform=''), devices)
  partitioning.validate_mesh(run.model, mesh.shape, run.data.batch_size // run.train.num_microbatches,
                             run.mesh.optimizer_fsdp)
  with _quiet():
    compiler_options.check(run.mesh, mesh)
  return mesh


def compile_train(run: RunConfig, mesh: Mesh) -> Program:
  """The very step that `openmoe-train` would run."""
  optimizer = make_optimizer(run.optimizer, run.train.train_steps)
  state = train_state_shapes(run, mesh)
  rows = run.data.batch_size // run.train.num_microbatches
  shape = (run.train.num_microbatches, rows, run.data.row_length)
  where = partitioning.batch_sharding(mesh, microbatched=True)
  batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where) for name in (*FEATURES, 'decoder_positions')}
  step = make_train_step(run.model, optimizer, run.train.num_microbatches, mesh=mesh, mesh_config=run.mesh,
                         seed=run.train.seed, schedule=learning_rate_schedule(run.optimizer, run.train.train_steps))
  return compile_program('train', step.lower, state, batch)


def train_state_shapes(run: RunConfig, mesh: Mesh) -> Any:
  """A TrainState of ShapeDtypeStructs with their shardings."""
  shapes = abstract_train_state(run.model, make_optimizer(run.optimizer, run.train.train_steps))
  return _with_shardings(shapes, state_shardings(shapes, mesh, run.mesh))


def compile_decode(run: RunConfig, mesh: Mesh, rows: int, prompt: int, new_tokens: int) -> Program:
  """A step of greedy generation in mode 'none', `rows` sequences at a time, parameters as training leaves them.

  Args:
    prompt, new_tokens: positions of the cache that the prompt and the generated tokens take.
  """
  config = decoding.for_prompts(decoding.dropless(run.model), prompt)
  # pylint: disable=protected-access
  program = decoding._Program(config, prompt, new_tokens, 1, False, True, 0, False)
  state = train_state_shapes(run, mesh)
  variables = {'params': state.params, **({'router_state': state.router_state} if state.router_state else {})}
  generation = decode_state(config, mesh, rows, prompt, new_tokens)
  options = decoding._Options(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
      ((), jnp.float32), ((), jnp.float32), ((), jnp.int32), ((0, 0), jnp.int32))))

  def lower(*arguments):
    with jax.set_mesh(mesh):
      return decoding.advance.lower(program, *arguments)

  return compile_program('decode', lower, variables, generation, jax.ShapeDtypeStruct((), jnp.int32), options)


def decode_state(config: ModelConfig, mesh: Mesh, rows: int, prompt: int, new_tokens: int) -> decoding.State:
  """Shapes of a generation under way; rows are split as a batch is, heads over 'model' if it divides them."""
  shards = decoding.batch_shards(mesh)
  require(rows % shards == 0, f'--decode_rows={rows} must be a multiple of MeshConfig data x expert = {shards}')
  where = lambda spec: NamedSharding(mesh, PartitionSpec(*spec))
  array = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=where(spec))
  row = lambda dtype, *more: array((rows, *more), dtype, partitioning.BATCH_AXES)
  heads = 'model' if config.num_heads % mesh.shape['model'] == 0 else None
  shape = (rows, config.num_heads, prompt + new_tokens, config.head_dim)
  if config.scan_blocks:
    layer = array((config.num_blocks, *shape), jnp.dtype(config.dtype), None, partitioning.BATCH_AXES, heads)
    layers = config.moe_interval
  else:
    layer, layers = array(shape, jnp.dtype(config.dtype), partitioning.BATCH_AXES, heads), config.num_layers
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
  return decoding.State(
      cache=tuple(KeysValues(layer, layer) for _ in range(layers)), prefilled=row(jnp.int32), fed=array((), jnp.int32),
      count=array((), jnp.int32), token=row(jnp.int32), limits=row(jnp.int32), done=row(jnp.bool_),
      keys=array(keys.shape, keys.dtype), tokens=row(jnp.int32, new_tokens), log_probs=row(jnp.float32, new_tokens),
      lengths=row(jnp.int32))


def _with_shardings(shapes: Any, shardings: Any) -> Any:
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def compile_program(name: str, lower: Any, *arguments: Any) -> Program:
  """What `lower` has lowered for ShapeDtypeStructs, compiled; anything but a lack of memory is raised."""
  started = time.monotonic()
  lowered = lower(*arguments)
  try:
    with _quiet():
      compiled = lowered.compile()
  except Exception as error:
    text = str(error)
    if 'RESOURCE_EXHAUSTED' not in text and 'Ran out of memory' not in text:
      raise
    return Program(name, '', None, _line(error), time.monotonic() - started, needed_bytes(text))
  stats = compiled.memory_analysis()
  memory = Memory(stats.argument_size_in_bytes, max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0),
                  stats.temp_size_in_bytes, stats.generated_code_size_in_bytes, stats.peak_memory_in_bytes,
                  stats.host_temp_size_in_bytes + stats.host_argument_size_in_bytes)
  return Program(name, compiled.as_text(), memory, '', time.monotonic() - started)


def needed_bytes(message: str) -> float:
  """Bytes of a device's main memory that a program would need, by the compiler's complaint; 0 if it does not say.

  It writes 'Used 22.10G of 15.75G hbm.', or '... required for HLO temporaries (22.10G) exceeds ...'; the latter, too, is
  of everything, the program's arguments included.
  """
  found = re.search(r'(?:Used |memory required for HLO temporaries \()([\d.]+)([KMGT])', message)
  return float(found.group(1)) * 2 ** {'K': 10, 'M': 20, 'G': 30, 'T': 40}[found.group(2)] if found else 0.


def _line(error: BaseException) -> str:
  return ' '.join(str(error).split())[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """libtpu writes to the file descriptor of stderr that it found no TPU; nothing of it is news."""
  saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(sink, 2)
    yield
  finally:
    os.dup2(saved, 2)
    os.close(saved)
    os.close(sink)
