"""The loss of a batch and the one jitted, donated training step (SPEC 3, 4, 15.2)."""

from typing import Any, Callable, Mapping, Optional, Tuple

import jax
from jax.sharding import Mesh
import jax.numpy as jnp
import optax

from openmoe_jax import compiler_options
from openmoe_jax import metrics as metrics_lib
from openmoe_jax import partitioning
from openmoe_jax import pipeline
from openmoe_jax.config import MeshConfig, ModelConfig, require
from openmoe_jax.losses import chunked_cross_entropy
from openmoe_jax.metrics import Metrics
from openmoe_jax.model import OpenMoE, random_keys, variables
from openmoe_jax.moe import RoutingRecord
from openmoe_jax.optimizers import global_norm, updates_done
from openmoe_jax.routers import state as router_state_lib
from openmoe_jax.train_state import TrainState, keep_sharded

Batch = Mapping[str, jax.Array]


def target_weights(batch: Batch) -> jax.Array:
  """float32 [.., L]: decoder_loss_weights, or 1 on every target that is not padding."""
  if 'decoder_loss_weights' in batch:
    return jnp.asarray(batch['decoder_loss_weights'], jnp.float32)
  return (jnp.asarray(batch['decoder_target_tokens']) > 0).astype(jnp.float32)


def loss_and_metrics(config: ModelConfig, params: Any, batch: Batch, train: bool = True,
                     dropout_key: Optional[jax.Array] = None, router_state: Optional[Any] = None
                     ) -> Tuple[jax.Array, Metrics]:
  """Total loss (SPEC 3) and metrics of one batch of [B, L] arrays.

  Args:
    params: in the layout of `config.scan_blocks`; or what `model.variables` gives of them and a router state.
    train: capacity factor, dropout and routers' noise of training.
    dropout_key: needed if `train` and there is dropout, or a router that draws.
    router_state: of routers that have one, see `routers.state`.

  Returns:
    float32 []: sum_t w_t (CE_t + z_loss * logZ_t^2) / sum_t w_t + aux_loss_factor * mean over layers of the
    load-balance loss + router_z_loss_factor * mean over layers of the router z-loss (with `loss_normalization` 'sum' not
    divided by sum_t w_t); and metrics as `batch_means`, which carry no gradient.

  Raises:
    ConfigError: parameters or a batch that do not fit, or no key for dropout.
  """
  if partitioning.num_shards('layers') > 1:
    keys = None if dropout_key is None else dropout_key[None]
    batch = {name: jnp.asarray(x)[None] for name, x in batch.items()}
    return pipelined_loss_and_metrics(config, params, batch, train, keys, router_state)
  hidden, kernel, record = OpenMoE(config).apply(variables(params, router_state), batch, train,
                                                 rngs=random_keys(dropout_key), method='features')
  extra = 0. if record is None else auxiliary_losses(config, record)
  return _total(config, hidden, kernel, jnp.asarray(batch['decoder_target_tokens']), target_weights(batch), record, extra)


def pipelined_loss_and_metrics(config: ModelConfig, params: Any, batch: Batch, train: bool, keys: Optional[jax.Array],
                               router_state: Optional[Any] = None) -> Tuple[jax.Array, Metrics]:
  """Loss and metrics of microbatches [m, B, L] that pass through a pipeline together, weighted as in `gradients`.

  `keys` [m] are the microbatches' dropout keys.
  """
  hidden, kernel, records = pipeline.features(config, variables(params, router_state), batch, train, keys)
  weights = target_weights(batch)
  share, extra, record = microbatch_shares(config, weights), 0., None
  if records is not None:
    extra = jnp.sum(share * auxiliary_losses(config, records))
    of_tokens = microbatch_shares(config.replace(loss_normalization='target_tokens'), weights)
    record = metrics_lib.mean_record(records, of_tokens)
  # A row of a microbatch stays on its device: rows lead, and what they have in all microbatches follows.
  in_rows = lambda x: x.swapaxes(0, 1).reshape(x.shape[1], x.shape[0] * x.shape[2], *x.shape[3:])
  return _total(config, in_rows(hidden), kernel, in_rows(jnp.asarray(batch['decoder_target_tokens'])), in_rows(weights),
                record, extra)


def auxiliary_losses(config: ModelConfig, record: RoutingRecord) -> jax.Array:
  """The routers' losses, scaled: float32 [..] of arrays [.., sparse layers]."""
  return (config.aux_loss_factor * jnp.mean(record.auxiliary_loss, axis=-1) +
          config.router_z_loss_factor * jnp.mean(record.router_z_loss, axis=-1))


def microbatch_shares(config: ModelConfig, weights: jax.Array) -> jax.Array:
  """What each microbatch's loss counts in a step's: float32 [m] of target weights [m, B, L]."""
  weights = weights.sum(axis=(1, 2))
  return jnp.ones_like(weights) if config.loss_normalization == 'sum' else weights / jnp.maximum(weights.sum(), 1e-8)


def _total(config, hidden, kernel, targets, weights, record, extra) -> Tuple[jax.Array, Metrics]:
  with jax.named_scope('loss'):  # a name that profiles and tpu.parts go by, as 'optimizer'
    sums = chunked_cross_entropy(hidden, kernel, targets, weights, z_loss=config.z_loss,
                                 label_smoothing=config.label_smoothing, chunk_tokens=config.loss_chunk_tokens,
                                 matmul_dtype=config.logits_matmul_dtype)
  num_targets = jnp.sum(weights)
  loss = sums.loss
  if config.loss_normalization == 'target_tokens':
    loss = loss / jnp.maximum(num_targets, 1e-8)
  loss += extra
  return loss, jax.lax.stop_gradient(metrics_lib.batch_means(sums, num_targets, loss, record))


def split_microbatches(batch: Batch, num_microbatches: int) -> Batch:
  """[B, L] arrays as [m, B/m, L], runs of consecutive rows; arrays of that shape are passed on.

  Raises:
    ConfigError: the rows do not divide, or the batch already has another number of microbatches.
  """
  require(num_microbatches > 0, f'num_microbatches = {num_microbatches} must be positive')
  require('decoder_target_tokens' in batch, f'the batch lacks decoder_target_tokens; it has {", ".join(sorted(batch))}')

  def split(name, x):
    if x.ndim == 3:
      require(x.shape[0] == num_microbatches, f'{name} has {x.shape[0]} microbatches, num_microbatches = '
              f'{num_microbatches}')
      return x
    require(x.ndim == 2, f'{name} has the shape {x.shape}; [batch, length] or [microbatch, rows, length] is needed')
    require(x.shape[0] % num_microbatches == 0, f'{name} has {x.shape[0]} rows: not a multiple of num_microbatches = '
            f'{num_microbatches}')
    return x.reshape(num_microbatches, x.shape[0] // num_microbatches, *x.shape[1:])

  return {name: split(name, jnp.asarray(x)) for name, x in batch.items()}


def gradients(config: ModelConfig, params: Any, batch: Batch, dropout_key: Optional[jax.Array] = None,
              router_state: Optional[Any] = None) -> Tuple[Any, Metrics]:
  """Mean gradient and metrics over microbatches [m, rows, L], weighted by their target tokens (SPEC 15.2).

  With `loss_normalization` 'sum' gradients and `loss` add up, as the token losses do.
  """
  grad_fn = jax.value_and_grad(lambda *args: loss_and_metrics(config, *args, router_state), has_aux=True)
  count = jax.tree.leaves(batch)[0].shape[0]
  key = lambda i: None if dropout_key is None else jax.random.fold_in(dropout_key, i)
  if partitioning.num_shards('layers') > 1:
    keys = None if dropout_key is None else jax.vmap(key)(jnp.arange(count))
    loss = lambda params: pipelined_loss_and_metrics(config, params, batch, True, keys, router_state)
    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, metrics
  if count == 1:
    (_, metrics), grads = grad_fn(params, jax.tree.map(lambda x: x[0], batch), True, key(0))
    return grads, metrics

  share = microbatch_shares(config, target_weights(batch))

  def step(carry, microbatch):
    i, share_i, arrays = microbatch
    (loss, metrics), grads = grad_fn(params, arrays, True, key(i))
    total, sums = carry
    total = jax.tree.map(lambda t, x: t + share_i * x, total, (loss, grads))
    return (total, jax.tree.map(jnp.add, sums, metrics_lib.to_sums(metrics))), None

  shapes = jax.eval_shape(lambda b: grad_fn(params, b, True, key(0))[0][1], jax.tree.map(lambda x: x[0], batch))
  zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
  total = (jnp.zeros((), jnp.float32), zeros(params))
  ((loss, grads), sums), _ = jax.lax.scan(step, (total, zeros(shapes)), (jnp.arange(count), share, batch))
  return grads, {**metrics_lib.to_means(sums), 'loss': loss}


def update(config: ModelConfig, optimizer: optax.GradientTransformation, state: TrainState, grads: Any, metrics: Metrics,
           mesh_config: MeshConfig = MeshConfig(), schedule: Optional[Callable] = None) -> Tuple[TrainState, Metrics]:
  """The new state of a step, split as `mesh_config` says, and `metrics` with what `make_train_step` adds to them."""
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  metrics = {**metrics, 'grad_norm': global_norm(grads), 'param_norm': global_norm(state.params)}
  if schedule is not None:
    metrics['learning_rate'] = jnp.asarray(schedule(updates_done(state.opt_state, state.step)), jnp.float32)
  finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['grad_norm'])
  metrics['skipped'] = 1. - finite.astype(jnp.float32)
  new = state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state,
                      router_state=router_state_lib.update_state(config, state.router_state, metrics))
  # Selected where it is written, array by array: XLA makes one loop of update and selection.
  new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
  return keep_sharded(new.replace(step=state.step + 1), mesh_config), metrics


def make_train_step(config: ModelConfig, optimizer: optax.GradientTransformation, num_microbatches: int = 1, *,
                    mesh: Optional[Mesh] = None, mesh_config: MeshConfig = MeshConfig(), seed: int = 0,
                    schedule: Optional[Callable] = None, routing_metrics: bool = True
                    ) -> Callable[[TrainState, Batch], Tuple[TrainState, Metrics]]:
  """The training step: loss, gradients, optimizer; jitted, and the state is donated (do not use it again).

  Args:
    num_microbatches: gradients are accumulated over this many; routing groups are formed within one.
    mesh: devices; state and batch are expected to be sharded over it already. Without one, a single device.
    mesh_config: how finely the state is split (`train_state.state_shardings`).
    seed: of dropout and of what routers draw; the key of a step follows from it and the step counter, so a resumed run
      draws the same.
    schedule: number of updates done -> learning rate, only to report it.
    routing_metrics: whether metrics have the shares of `routers.online`.

  Returns:
    (state, batch) -> (state, metrics); batch leaves are [B, L] or [m, B/m, L]. Metrics are those of
    `loss_and_metrics`, and `grad_norm`, `param_norm` (before the update), `skipped` and, with a schedule,
    `learning_rate`. Where loss or gradient norm are not finite, `skipped` is 1, else 0, and the new state is the old one
    but for its step counter: parameters, the optimizer's memory and its count of updates, and router state.
  """
  def step(state: TrainState, batch: Batch):
    batch = split_microbatches(batch, num_microbatches)
    draws = config.dropout_rate or config.router_draws
    key = jax.random.fold_in(jax.random.key(seed), state.step) if draws else None
    grads, metrics = gradients(config, state.params, batch, key, state.router_state)
    with jax.named_scope('optimizer'):
      new, metrics = update(config, optimizer, state, grads, metrics, mesh_config, schedule)
    return new, metrics_lib.with_shares(config, metrics, routing_metrics)

  options = compiler_options.of(mesh_config, mesh)
  return _under_mesh(jax.jit(step, donate_argnums=0, compiler_options=options), mesh, mesh_config)


def make_eval_step(config: ModelConfig, *, mesh: Optional[Mesh] = None, mesh_config: MeshConfig = MeshConfig()
                   ) -> Callable[[Any, Batch], Metrics]:
  """(params, batch) -> metrics as sums (`metrics.to_means` after adding them up), with the capacity of evaluation;
  `params` as for `loss_and_metrics`.

  What is reported is the data's own cross-entropy per token, whatever the training loss makes of it: without label
  smoothing, and not as a sum, logits in float32.
  """
  config = config.replace(label_smoothing=0., loss_normalization='target_tokens', logits_matmul_dtype='float32')

  def step(params, batch):
    return metrics_lib.to_sums(loss_and_metrics(config, params, batch, train=False)[1])

  return _under_mesh(jax.jit(step), mesh, mesh_config)


def _under_mesh(function: Callable, mesh: Optional[Mesh], config: MeshConfig = MeshConfig()) -> Callable:
  """Calls `function` with the mesh set: without it, constraints on activations would silently do nothing."""
  if mesh is None:
    return function

  def call(*args):
    with partitioning.use(mesh, config):
      return function(*args)

  def lower(*args):
    with partitioning.use(mesh, config):
      return function.lower(*args)

  call.lower = lower
  return call
