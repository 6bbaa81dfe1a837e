"""Freezes the routing that a checkpoint has learnt into a table by token id, from which training goes on.

  python -m openmoe_jax.tools.freeze_router runs/demo runs/demo_frozen
  openmoe-train --gin_file=recipes/demo.gin --gin.ModelConfig.router="'frozen'" --model_dir=runs/demo_frozen

Batches of the run's own training data are routed, and every token id gets the experts to which the router gives the
largest mean probability; an id that does not come up gets those of hash routing. OUT is a model_dir with one step:
parameters, optimizer state and data position of the checkpoint, and the table. It is resumed as the run was, or named
as INITIAL_CHECKPOINT_PATH.
"""

import argparse
import dataclasses
import functools
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from openmoe_jax import checkpoints, command_line, data, paths, resume, vocabulary
from openmoe_jax.attention import make_logit_mask
from openmoe_jax.config import ConfigError, MeshConfig, ModelConfig, RunConfig, from_dict, require
from openmoe_jax.model import OpenMoE
from openmoe_jax.optimizers import make_optimizer
from openmoe_jax.partitioning import make_mesh
from openmoe_jax.routers import frozen
from openmoe_jax.routers.groups import group_tokens, ungroup
from openmoe_jax.train import born_sharded
from openmoe_jax.train_state import TrainState
from openmoe_jax.writers import sparse_layers

FREEZABLE = ('top_k', 'switch')  # routers whose gates are those of 'frozen': softmax probabilities


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Entry point; mistakes end in one line and exit status 2."""
  command_line.run_main(_main, argv)


def _main(argv: Optional[Sequence[str]]) -> None:
  flags = command_line.Parser(configured=False, prog='freeze_router', description=__doc__)
  flags.add_argument('checkpoint', metavar='CHECKPOINT', help='a model_dir, its checkpoints folder, or one step in it')
  flags.add_argument('out', metavar='OUT', help='a new folder')
  flags.add_argument('--batches', type=int, default=50, help='training batches that are routed; default 50')
  args = flags.parse_args(argv)
  print(freeze(args), flush=True)


def freeze(args: argparse.Namespace) -> str:
  """Does it; returns what was found, as text.

  Raises:
    ConfigError: no such checkpoint, a router that cannot be frozen, or an OUT that is not new.
  """
  require(args.batches >= 1, f'--batches={args.batches} must be at least 1')
  directory = checkpoints.resolve(args.checkpoint)
  run = _run_of(directory)
  out = dataclasses.replace(run, model_dir=args.out, model=run.model.replace(router='frozen'))
  require(not resume.claim_model_dir(out), f'OUT = {args.out!r} holds checkpoints already; give a new folder')
  state, data_state, progress = _read(directory, run)
  vocabulary.configure(run.data.vocabulary, run.data.extra_ids)
  streams = data.TrainStreams(run.data)
  if data_state:
    streams.restore(data_state)
  experts, lines = make_table(run.model, state.params, streams, args.batches)

  checkpointer = checkpoints.Checkpointer(out)
  checkpointer.save(state.replace(router_state={'experts': experts}), data_state, progress, wait=True)
  checkpointer.close()
  resume.write_config(out)
  how = f'--model_dir={args.out}' if state.opt_state else f'--gin.INITIAL_CHECKPOINT_PATH="{args.out!r}"'
  lines.append(f"step {int(state.step)} is in {args.out}; training goes on with the run's own command, "
               f"""--gin.ModelConfig.router="'frozen'" and {how}""")
  return '\n'.join(lines)


def _run_of(directory: epath.Path) -> RunConfig:
  """The checkpoint's run, if its router can be frozen."""
  try:
    run = from_dict(RunConfig, checkpoints.read_config(directory))
  except ConfigError:
    raise
  except Exception as error:
    raise ConfigError(f'{directory} is not a complete checkpoint: {checkpoints.one_line(error)}') from error
  require(run.model.num_experts > 0, f'{directory} has no sparse layers, so there is no router to freeze')
  require(run.model.router in FREEZABLE, f'{directory} has the router {run.model.router!r}; what can be frozen is '
          f'{" and ".join(map(repr, FREEZABLE))}')
  return run


def _read(directory: epath.Path, run: RunConfig) -> Tuple[TrainState, Dict[int, bytes], Dict[str, Any]]:
  """State on the first device, data positions and progress; of a converted checkpoint only what there is."""
  mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
  template, _ = born_sharded(run, make_optimizer(run.optimizer, run.train.train_steps), mesh)
  try:
    progress = checkpoints.read_progress(directory)
    if 'opt_state' not in progress['checksums']:
      template = template.replace(opt_state={})
    positions = any(name.startswith('stream_') for name in paths.entries(directory / 'data'))
    streams = range(run.data.num_streams) if positions else ()
    return checkpoints.read_step(directory, run.model, template, streams)
  except ConfigError:
    raise
  except Exception as error:
    raise ConfigError(f'{directory} cannot be read: {checkpoints.one_line(error)}') from error


def make_table(model: ModelConfig, params: Any, batches: Iterator[Any], count: int) -> Tuple[jax.Array, list]:
  """Routes batches by the routers of a model.

  Args:
    params: its parameters.
    batches: of [microbatch, rows, length] arrays; `count` of them make the table, a fifth as many more test it.

  Returns:
    int32 [sparse layers, V, S], and lines about how well the table says what the router would do.
  """
  shape = (model.num_sparse_layers, model.vocab_size)
  totals = jnp.zeros((*shape, model.num_experts)), jnp.zeros(model.vocab_size)

  merged = lambda batch: {name: np.concatenate(list(x)) for name, x in batch.items()}
  for _ in range(count):
    probs, _, ids, is_token = _routing(model, params, merged(next(batches)))
    totals = _add(totals, probs, ids, is_token)
  experts = _table(model, totals)
  same, tests = np.zeros(shape[0]), max(count // 5, 1)
  for _ in range(tests):
    _, chosen, ids, is_token = _routing(model, params, merged(next(batches)))
    same += np.asarray(_agreement(experts, chosen, ids, is_token)) / tests
  seen = np.asarray(totals[1])
  by_chance = model.num_selected_experts / model.num_experts
  lines = [f'{int(seen.sum())} tokens of {(seen > 0).sum()} different ids were routed; the other '
           f'{(seen == 0).sum()} ids go by hash',
           f"share of the router's choices that the table names, in {tests} further batches (by chance {by_chance:.1%}):"]
  lines += [f'  layer {layer}: {share:.1%}' for layer, share in zip(sparse_layers(model), same)]
  return experts, lines


_add = jax.jit(frozen.count_probabilities, donate_argnums=0)
_table = jax.jit(frozen.table, static_argnums=0)
_agreement = jax.jit(frozen.agreement)


@functools.partial(jax.jit, static_argnums=0)
def _routing(model: ModelConfig, params: Any, batch: Any):
  """Router probabilities [layers, N, E], choices [layers, N, S], ids and which are tokens [N], of rows [R, L]."""
  record = OpenMoE(model, record_routing=True).apply({'params': params}, batch, method='features')[2]
  ids = batch['decoder_input_tokens']
  rows = lambda x: _ungrouped(model, x, *ids.shape)
  return (rows(jax.nn.softmax(record.router_logits)), rows(record.assignment.expert_index), ids.reshape(-1),
          make_logit_mask(ids).reshape(-1))


def _ungrouped(model: ModelConfig, x: jax.Array, rows: int, length: int) -> jax.Array:
  """[layers, G, T, ..] as it was cut into groups -> [layers, rows * length, ..] without the padding."""
  grouping = group_tokens(model, rows, length, train=False)
  x = ungroup(x, grouping, rows, length)
  return x.reshape(x.shape[0], rows * length, *x.shape[3:])


if __name__ == '__main__':
  main()
