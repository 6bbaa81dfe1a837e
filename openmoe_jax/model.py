"""OpenMoE: decoder layers, blocks scanned or unrolled, the decoder and the whole model (SPEC 1)."""

from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from openmoe_jax.attention import BlockContext, KeysValues, SelfAttention, make_context
from openmoe_jax.config import ModelConfig, require
from openmoe_jax.layers import Dropout, GatedMLP, Kernel, RMSNorm, TokenEmbedder, truncated_normal_init
from openmoe_jax.moe import MoE, RoutingRecord
from openmoe_jax.partitioning import STACKED, all_but_gathered, constrain, gather, is_finely_split
from openmoe_jax.routers.state import State, check_state, init_state
from openmoe_jax.routers.surgery import SURGERY

# Sub-layer outputs that the remat policy 'minimal' keeps; 'offload' keeps them and the layer's input, on the host.
REMAT_NAMES = ('attention_out', 'mlp_out', 'extra_mlp_out')
LAYER_INPUT = 'layer_input'


def _remat(layer: Any, policy: str) -> Any:
  if policy == 'none' and not is_finely_split():
    return layer
  policies = {
      'none': all_but_gathered,
      'full': jax.checkpoint_policies.nothing_saveable,
      'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
      'minimal': jax.checkpoint_policies.save_only_these_names(*REMAT_NAMES),
      'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
          names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT, *REMAT_NAMES], offload_src='device',
          offload_dst='pinned_host'),
  }
  # prevent_cse is only needed outside of scan, but blocks can be unrolled too.
  return nn.remat(layer, policy=policies[policy], static_argnums=(3,), prevent_cse=True)


class DecoderLayer(nn.Module):
  """Pre-norm decoder layer: attention, then an FFN, or experts and an extra FFN: x [B, L, D] -> (x, record, new).

  `new` are the keys and values to keep, see `SelfAttention`.
  """
  config: ModelConfig
  sparse: bool
  record_routing: bool = False
  decoding: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, context: BlockContext, train: bool, cache: Optional[KeysValues] = None,
               router_state: Optional[State] = None
               ) -> Tuple[jax.Array, Optional[RoutingRecord], Optional[KeysValues]]:
    config = self.config
    mask = context.logit_mask[:, :, None]
    x = checkpoint_name(x, LAYER_INPUT)

    def normed(name):
      y = RMSNorm(jnp.dtype(config.dtype), config.layer_norm_epsilon, name=name)(x)
      return constrain(jnp.where(mask, y, 0), 'batch', 'length', 'embed')

    def add(x, y, name):
      y = Dropout(config.dropout_rate)(checkpoint_name(y, name), train)
      return constrain(x + y.astype(x.dtype), 'batch', 'length', 'embed')

    y = normed('pre_self_attention_layer_norm')
    attended = SelfAttention(config, self.decoding, name='self_attention')(y, context, train, cache)
    attended, new = attended if self.decoding else (attended, None)
    x = add(x, attended, 'attention_out')
    parallel = config.parallel_attention and self.sparse  # everything reads the y that attention read
    if not parallel:
      y = normed('pre_mlp_layer_norm')
    if not self.sparse:
      return add(x, GatedMLP(config, name='mlp')(y, train), 'mlp_out'), None, new

    routed, record = MoE(config, self.record_routing, name='mlp')(y, train, context.token_ids, router_state)
    x = add(x, routed, 'mlp_out')
    if config.extra_mlp:
      if not config.parallel_moe and not parallel:  # the former is the paper's equation 4
        y = normed('pre_extra_mlp_layer_norm')
      x = add(x, GatedMLP(config, name='extra_mlp')(y, train), 'extra_mlp_out')
    return x, record, new


class Block(nn.Module):
  """`moe_interval` layers, the last of which is sparse: the unit that is scanned.

  It carries x and, in a step of decoding, the cache of all blocks, of which it writes one slot a layer.
  """
  config: ModelConfig
  record_routing: bool = False
  decoding: bool = False

  @nn.compact
  def __call__(self, carry: Tuple[jax.Array, Optional[Sequence[KeysValues]]], context: BlockContext, train: bool,
               index: Optional[jax.Array] = None, router_state: Optional[State] = None):
    (x, cache), context = carry, context._replace(block=index)
    record, news = None, []
    for i in range(self.config.moe_interval):
      x, record, new = _remat(DecoderLayer, self.config.remat)(
          self.config, self.config.is_sparse(i), self.record_routing, self.decoding, name=f'layers_{i}')(
              x, context, train, None if cache is None else cache[i], router_state)
      news.append(new)
    return (x, tuple(news) if cache is not None else None), (record, tuple(news) if cache is None else None)


class Decoder(nn.Module):
  """Layers, final norm and the output matrix as it is kept (its product is left to the caller)."""
  config: ModelConfig
  record_routing: bool = False
  decoding: bool = False

  def setup(self):
    config, args = self.config, (self.config, self.record_routing, self.decoding)
    if config.scan_blocks:
      scanned = nn.scan(Block, variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True, 'router': True},
                        in_axes=(nn.broadcast, nn.broadcast, 0, 0), length=config.num_blocks,
                        # The check traces the body twice, and what is drawn depends on how often: initial values are
                        # those of two times for ever, dropout is the same in the stages of a pipeline with one.
                        check_constancy_invariants=self.is_initializing())
      self.blocks = scanned(*args)
    else:
      layer = _remat(DecoderLayer, config.remat)
      self.layers = [layer(config, config.is_sparse(i), *args[1:]) for i in range(config.num_layers)]
    self.decoder_norm = RMSNorm(jnp.dtype(config.dtype), config.layer_norm_epsilon)
    self.logits_dense = Kernel((config.emb_dim, config.vocab_size), truncated_normal_init(config.init_scale))
    self.Dropout_0, self.Dropout_1 = Dropout(config.dropout_rate), Dropout(config.dropout_rate)

  def __call__(self, x: jax.Array, context: BlockContext, train: bool, cache: Optional[Sequence[KeysValues]] = None,
               router_state: State = {}):
    """[B, L, D] -> hidden [B, L, D] in the activation dtype, output kernel [D, V], RoutingRecord or None, new.

    `router_state` holds arrays with a leading axis of sparse layers. `cache` and `new` hold a KeysValues per layer, or
    per layer of a block with a leading axis of blocks if `scan_blocks`; `new` holds None unless `decoding`.
    """
    x = self.enter(x, train)
    run = self._scanned if self.config.scan_blocks else self._unrolled
    x, records, news = run(x, context, train, cache, router_state)
    return *self.leave(x, context, train), records, tuple(news)

  def enter(self, x: jax.Array, train: bool) -> jax.Array:
    """What comes before the blocks."""
    return self.Dropout_0(x, train).astype(self.config.residual_dtype)

  def leave(self, x: jax.Array, context: BlockContext, train: bool) -> Tuple[jax.Array, jax.Array]:
    """What comes behind the blocks: hidden and output kernel."""
    x = self.Dropout_1(jnp.where(context.logit_mask[:, :, None], self.decoder_norm(x), 0), train)
    return constrain(x, 'batch', 'length', 'embed'), self.logits_dense(gathered=False)

  def _scanned(self, x, context, train, cache, router_state):
    index = None if cache is None else jnp.arange(self.config.num_blocks)
    (x, cache), (records, news) = self.blocks((x, cache), context, train, index, router_state)
    return x, records, news if cache is None else cache

  def _unrolled(self, x, context, train, cache, router_state):
    records, news = [], []
    for i, layer in enumerate(self.layers):
      of_layer = jax.tree.map(lambda leaf: leaf[i // self.config.moe_interval], router_state)
      x, record, new = layer(x, context, train, None if cache is None else cache[i], of_layer)
      records += [record] if record is not None else []
      news.append(new)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *records) if records else None, news


ROUTER_STATE = 'router_state'  # the collection beside 'params'


def variables(params: Any, router_state: Optional[State] = None) -> Dict[str, Any]:
  """What `OpenMoE.apply` takes: {'params': .., 'router_state': ..}. Such a dictionary is passed on as it is, so that
  whatever runs a model takes its parameters alone, or with the state of its routers."""
  if 'params' in params:
    return params
  return {'params': params, **({ROUTER_STATE: router_state} if router_state else {})}


def random_keys(key: Optional[jax.Array]) -> Dict[str, jax.Array]:
  """The keys of `OpenMoE.apply` that follow from one key: of dropout, and of what routers draw. {} without a key."""
  return {} if key is None else {'dropout': key, 'router': jax.random.fold_in(key, 1)}


class OpenMoE(nn.Module):
  """A decoder-only language model with interleaved Mixture-of-Experts layers (Xue et al., arXiv 2402.01739).

  `OpenMoE(config).apply({'params': params}, batch, train=False)` gives float32 logits [B, L, V]; `batch` is the feature
  dictionary of SPEC 10 (int32 [B, L] arrays): decoder_input_tokens, decoder_target_tokens (0 marks padding, which
  attends to nothing in particular and is not attended to), and, where the batch is packed or bidirectional,
  decoder_segment_ids and decoder_causal_attention. `train` chooses the capacity factor and turns on dropout
  (`rngs={'dropout': key}`) and what routers draw (`rngs={'router': key}`). Routers with a state of their own need it as
  a second collection, see `variables`. `decoding` is for the method `cached`.
  """
  config: ModelConfig
  record_routing: bool = False
  decoding: bool = False

  def setup(self):
    self.token_embedder = TokenEmbedder(self.config)
    self.decoder = Decoder(self.config, self.record_routing, self.decoding)

  def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> jax.Array:
    hidden, kernel, _ = self.features(batch, train)
    logits = hidden.astype(jnp.float32) @ gather(kernel, 'embed', 'vocab')
    return constrain(logits, 'batch', 'length', 'vocab')

  def features(self, batch: Mapping[str, jax.Array], train: bool = False):
    """What the loss needs without the logits: hidden [B, L, D], output kernel [D, V], RoutingRecord or None.

    The record's arrays have a leading axis of sparse layers. Masked positions of `hidden` are zero, so that their
    logits are exactly 0.

    Raises:
      ConfigError: parameters of the other layout, no key for dropout, or a batch without the features or shapes needed.
    """
    if not self.is_initializing():
      self._check_call(train)
    return self._run(make_context(self.config, batch), train)[:3]

  def cached(self, context: BlockContext, cache: Optional[Sequence[KeysValues]] = None):
    """One pass of decoding: hidden [B, L, D], output kernel [D, V], and what `SelfAttention` gives of every layer.

    Args:
      context: of a whole prompt, or of one position a row.
      cache: for a single position, keys and values of those before it; see `Decoder` for its structure.
    """
    self._check_call(train=False)
    hidden, kernel, _, new = self._run(context, False, cache)
    return hidden, kernel, new

  def enter(self, batch: Mapping[str, jax.Array], train: bool = False) -> Tuple[jax.Array, BlockContext]:
    """`features` up to the first block, for who runs the blocks by themselves (`pipeline`)."""
    self._check_call(train)
    context = make_context(self.config, batch)
    return self.decoder.enter(self._embed(context), train), context

  def leave(self, x: jax.Array, context: BlockContext, train: bool = False) -> Tuple[jax.Array, jax.Array]:
    """`features` from the last block on: hidden and output kernel."""
    return self.decoder.leave(x, context, train)

  def _run(self, context: BlockContext, train: bool, cache: Optional[Sequence[KeysValues]] = None):
    state = init_state(self.config) if self.is_initializing() else dict(self.variables.get(ROUTER_STATE, {}))
    state.update({SURGERY: edits for name, edits in self.variables.items() if name == SURGERY})
    return self.decoder(self._embed(context), context, train, cache, state)

  def _embed(self, context: BlockContext) -> jax.Array:
    return constrain(self.token_embedder(context.token_ids), 'batch', 'length', 'embed')

  def _check_call(self, train: bool) -> None:
    """Says in the terms of this library what Flax would say in its own."""
    config = self.config
    stacked = STACKED in self.variables['params'].get('decoder', {})
    require(stacked == config.scan_blocks, f'ModelConfig.scan_blocks = {config.scan_blocks}, but the blocks of these '
            f'parameters are {"" if stacked else "not "}stacked; names.stack_blocks and names.unstack_blocks convert')
    require(not (train and config.dropout_rate) or self.has_rng('dropout'), f'ModelConfig.dropout_rate = '
            f"{config.dropout_rate}: training needs a random key (dropout_key of loss_and_metrics, rngs={{'dropout': key}} "
            'of apply)')
    require(not (train and config.router_draws) or self.has_rng('router'), 'routing with router_jitter, random priority or '
            "noise needs a random key in training (dropout_key of loss_and_metrics, rngs={'router': key} of apply)")
    check_state(config, self.variables.get(ROUTER_STATE, {}))
