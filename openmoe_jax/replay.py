"""Looks at one training step again: its batch as text, its loss and its routing (`openmoe-train --replay_step=N`)."""

from typing import Any, Callable, List, Mapping, Tuple

from etils import epath
import jax
import numpy as np

from openmoe_jax import checkpoints, data, metrics as metrics_lib, paths, resume, vocabulary
from openmoe_jax.config import ConfigError, RunConfig, require
from openmoe_jax.iterator_state import batches_before
from openmoe_jax.loading import state_template
from openmoe_jax.model import OpenMoE, random_keys, variables
from openmoe_jax.partitioning import make_mesh, tree_shardings, validate_mesh
from openmoe_jax.routers.state import init_state
from openmoe_jax.train_state import init_params
from openmoe_jax.train_step import loss_and_metrics
from openmoe_jax.writers import sparse_layers

_TEXT = 300   # characters shown of a row
_TOKENS = 24  # tokens whose experts are shown


def replay(run: RunConfig, step: int) -> str:
  """A description of step `step` as the log counts: the first is 1.

  Args:
    run: the settings of the run; its model_dir gives parameters and data positions, as far as they are kept.

  Raises:
    ConfigError: no such step, or settings that differ from the run's.
  """
  require(jax.process_count() == 1, '--replay_step works in one process')
  require(1 <= step <= run.train.train_steps, f'--replay_step={step}: the first step is 1, the last one '
          f'{run.train.train_steps}')
  steps = resume.claim_model_dir(run)
  folder = paths.path(run.model_dir) / checkpoints.CHECKPOINTS
  for saved in steps[-1:]:
    resume.check_changes(_read(saved, lambda: checkpoints.read_config(folder / str(saved))), run, run.model_dir)
  mesh = make_mesh(run.mesh)
  validate_mesh(run.model, mesh.shape, run.data.batch_size // run.train.num_microbatches, run.mesh.optimizer_fsdp)
  vocabulary.configure(run.data.vocabulary, run.data.extra_ids)
  vocabulary.check_fits(run.model.vocab_size)
  batch = _batch(run, folder, steps, step)
  params, whose = _parameters(run, mesh, folder, steps, step)
  lines = [f'step {step}: {run.data.batch_size} rows of {run.data.row_length} tokens, '
           f'num_microbatches = {run.train.num_microbatches}']
  lines += _describe_rows(batch)
  lines += [f'{whose}:']
  lines += _describe_loss(run, params, batch, step, mesh)
  return '\n'.join(lines)


def _read(step: int, read: Callable[[], Any]) -> Any:
  """What `read` gives; whatever it raises for a damaged checkpoint becomes one line."""
  try:
    return read()
  except ConfigError:
    raise
  except Exception as error:
    raise checkpoints.CheckpointError(f'checkpoint {step} cannot be read: {checkpoints.one_line(error)}') from error


def _batch(run: RunConfig, folder: epath.Path, steps: List[int], step: int) -> Mapping[str, np.ndarray]:
  """The batch of a step: counted from the nearest saved position before it, since a run need not begin with step 1 nor
  with the first batch (a warm start, data that were changed)."""
  def position(saved):
    streams = _read(saved, lambda: checkpoints.read_streams(folder / str(saved), range(run.data.num_streams)))
    return streams, batches_before(streams[0])

  earlier, later = [s for s in steps if s < step], [s for s in steps if s >= step]
  state = None
  if earlier:
    state, batches = position(earlier[-1])
    batches += step - 1 - earlier[-1]
  else:
    began = later[0] - position(later[0])[1] if later else resume.first_step(run)
    batches = step - 1 - began
    require(batches >= 0, f'--replay_step={step}: the run in {run.model_dir} began after step {began}')
  return data.batch_at(run.data, run.train.num_microbatches, batches, state)


def _parameters(run: RunConfig, mesh: jax.sharding.Mesh, folder: epath.Path, steps: List[int], step: int
                ) -> Tuple[Any, str]:
  """`model.variables` as close to those before the step as are kept, and whose they are."""
  shapes = jax.eval_shape(lambda: init_params(run.model, run.train.seed))
  where = tree_shardings(shapes, mesh, run.mesh.fsdp)
  earlier, later = [s for s in steps if s < step], [s for s in steps if s >= step]
  if not steps or (step == 1 and 0 not in steps and not run.checkpoint.initial_checkpoint_path):
    with jax.set_mesh(mesh):
      params = jax.jit(lambda: init_params(run.model, run.train.seed), out_shardings=where)()
    return variables(params, init_state(run.model)), 'with the random parameters that a new run begins with'
  chosen = earlier[-1] if earlier else later[0]
  template = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
  read = lambda item, template: _read(chosen, lambda: checkpoints.read_item(folder / str(chosen), item, run.model, template))
  params = variables(read('params', template), read('router_state', state_template(run.model, mesh)))
  if chosen == step - 1:
    return params, f'with the parameters of checkpoint {chosen}, the very ones of this step'
  return params, (f'with the parameters of checkpoint {chosen}, the nearest that is kept (those of the step itself would '
                  f'be of checkpoint {step - 1})')


def _describe_rows(batch: Mapping[str, np.ndarray]) -> List[str]:
  lines = []
  for microbatch, rows in enumerate(batch['decoder_target_tokens']):
    for row, targets in enumerate(rows):
      at = microbatch, row
      scored = np.asarray(batch['decoder_loss_weights'][at] > 0) if 'decoder_loss_weights' in batch else targets > 0
      segments = int(batch['decoder_segment_ids'][at].max()) if 'decoder_segment_ids' in batch else 1
      text = vocabulary.decode(targets.tolist())
      lines.append(f'microbatch {microbatch} row {row}: {int((targets > 0).sum())} tokens, {int(scored.sum())} scored, '
                   f'{segments} segments')
      lines.append(f'  {text[:_TEXT]!r}{" ..." if len(text) > _TEXT else ""}')
  return lines


def _describe_loss(run: RunConfig, params: Any, batch: Mapping[str, np.ndarray], step: int, mesh: jax.sharding.Mesh
                   ) -> List[str]:
  model = run.model

  @jax.jit
  def evaluate(params, rows, key):
    rngs = random_keys(key)
    _, metrics = loss_and_metrics(model, params, rows, True, key)
    record = OpenMoE(model, record_routing=True).apply(params, rows, True, rngs=rngs, method='features')[2]
    return metrics_lib.to_sums(metrics), None if record is None else record.assignment

  step_key = jax.random.fold_in(jax.random.key(run.train.seed), step - 1)
  total, first = None, None
  with jax.set_mesh(mesh):
    for i in range(run.train.num_microbatches):
      rows = data.to_global({name: x[i] for name, x in batch.items()}, mesh, microbatched=False)
      sums, assignment = jax.device_get(evaluate(params, rows, jax.random.fold_in(step_key, i)))
      total = sums if total is None else jax.tree.map(np.add, total, sums)
      first = assignment if i == 0 else first
  metrics = metrics_lib.to_means(total)
  names = ('loss', 'cross_ent_loss', 'z_loss', 'auxiliary_loss', 'router_z_loss', 'accuracy')
  lines = ['  ' + '  '.join(f'{name} {float(metrics[name]):.6f}' for name in names if name in metrics)]
  for i, layer in enumerate(sparse_layers(model)):
    load = ' '.join(f'{x:.2f}' for x in metrics['expert_load'][i])
    left = 100 * metrics['fraction_tokens_left_behind_per_layer'][i]
    lines.append(f'  layer {layer}: expert load {load}; {left:.1f}% of tokens left behind')
  return lines + _describe_tokens(model, batch, first)


def _describe_tokens(model: Any, batch: Mapping[str, np.ndarray], assignment: Any) -> List[str]:
  """Where the first tokens of the first row went; an expert in brackets was full."""
  if assignment is None:
    return []
  tokens = np.asarray(batch['decoder_input_tokens'][0, 0])[:_TOKENS]
  layers, _, _, selected = assignment.expert_index.shape
  experts = np.asarray(assignment.expert_index).reshape(layers, -1, selected)
  kept = np.asarray(assignment.kept).reshape(layers, -1, selected)
  lines = ['  experts of the first tokens (in brackets: the expert was full), by layer '
           + ', '.join(map(str, sparse_layers(model)))]
  full = '' if model.router == 'expert_choice' else '({})'  # where experts choose, the others were not asked
  choice = lambda e, k: str(e) if k else full.format(e)
  for t, token in enumerate(tokens):
    places = '   '.join(' '.join(filter(None, map(choice, experts[layer, t], kept[layer, t]))) for layer in range(layers))
    lines.append(f'    {vocabulary.decode([int(token)])!r:>16}  {places}')
  return lines
