"""OpenMoE in PyTorch for Hugging Face transformers 4.50 to 5.

This file lies in the model's folder and is used by `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)`. It needs torch, transformers and the other files beside it, nothing else.

Two things about the input. Every sequence begins with id 0, which is also the padding id: what is padding is said by
`attention_mask` alone, and the 0 at the beginning is not. And positions are counted over what is not padding, so that
padding on either side changes nothing.
"""

from dataclasses import dataclass, fields
import math
from typing import Any, NamedTuple, Optional, Tuple, Union

import torch
from torch import nn
import torch.nn.functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .configuration_openmoe import OpenMoeConfig
from .feedforward_openmoe import (OpenMoeExperts, OpenMoeInt8Linear, OpenMoeMLP, OpenMoeSparseMLP, dropout,
                                  float32_linear, linear)

_TRUNCATION = 0.87962566103423978  # standard deviation of a standard normal variable that is cut at +-2
_ROUTER_STD = 0.02
_ROPE_BASE = 10000.

# What outputs call the cache of keys and values; the latest transformers say 'cache'.
_CACHE = 'cache' if 'cache' in {field.name for field in fields(MoeModelOutputWithPast)} else 'past_key_values'


class OpenMoeRMSNorm(nn.Module):
  """x / rms(x) in float32, then times a scale in the type of the weights."""

  def __init__(self, config: OpenMoeConfig):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(config.hidden_size))
    self.epsilon = config.layer_norm_epsilon

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)
    return x.to(self.weight.dtype) * self.weight


class OpenMoeHead(nn.Linear):
  """Output matrix; logits are float32 also where the weights are not."""

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return float32_linear(x, self.weight)


class _Context(NamedTuple):
  """What all layers share besides their input.

  Attributes:
    visible: bool [B or 1, 1 or H, L, K], which of the K keys each query sees; None for all up to itself.
    num_keys: K, cached tokens and new ones.
    token_mask: bool [B, L], False for padding; None where there is none.
    rope: float32 sin and cos [B or 1, L, head_dim].
    cache: of keys and values, or None.
    slots: int64 [L], the columns of the new tokens among the keys.
    output_attentions, losses: what to compute besides.
  """
  visible: Optional[torch.Tensor]
  num_keys: int
  token_mask: Optional[torch.Tensor]
  rope: Tuple[torch.Tensor, torch.Tensor]
  cache: Any
  slots: torch.Tensor
  output_attentions: bool
  losses: bool


def _rope(x: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
  """Rotates [B, H, L, K] by the tables [B, L, K]; the two halves of K are the pairs."""
  sin, cos = sin[:, None].to(x.dtype), cos[:, None].to(x.dtype)
  x1, x2 = x.chunk(2, dim=-1)
  return x * cos + torch.cat([-x2, x1], dim=-1) * sin


class OpenMoeAttention(nn.Module):
  """Causal attention whose scores are not divided by sqrt(K): the initial query matrix is, instead."""

  def __init__(self, config: OpenMoeConfig, layer: int):
    super().__init__()
    self.config, self.layer = config, layer
    emb, joined, scale = config.hidden_size, config.num_attention_heads * config.head_dim, config.init_scale
    self.q_proj = linear(config, emb, joined, scale / config.head_dim, truncated=False)
    self.k_proj = linear(config, emb, joined, scale, truncated=False)
    self.v_proj = linear(config, emb, joined, scale, truncated=False)
    self.o_proj = linear(config, joined, emb, scale, truncated=False)

  def forward(self, x: torch.Tensor, context: _Context) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """x [B, L, D] -> [B, L, D], attention weights [B, H, L, K] if asked for."""
    config, visible = self.config, context.visible
    split = lambda y: y.unflatten(-1, (config.num_attention_heads, config.head_dim)).transpose(1, 2)
    q, k, v = (split(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
    q, k = _rope(q, *context.rope), _rope(k, *context.rope)
    if context.cache is not None:
      k, v = context.cache.update(k, v, self.layer, {'cache_position': context.slots})
      k, v = k[:, :, :context.num_keys], v[:, :, :context.num_keys]  # a static cache has room behind
    if self.training and config.dropout_rate:  # of weights, one mask of keys for all queries: the same as of values
      v = v * F.dropout(torch.ones_like(v[..., :1]), config.dropout_rate)
    weights = None
    if context.output_attentions or config._attn_implementation == 'eager':
      scores = (q @ k.transpose(-1, -2)).float()
      seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril() if visible is None else visible
      weights = scores.masked_fill(~seen, -math.inf).softmax(-1).to(q.dtype)
      out = weights @ v
    else:
      out = F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None, scale=1.)
    return self.o_proj(out.transpose(1, 2).flatten(2)), weights if context.output_attentions else None


class OpenMoeDecoderLayer(nn.Module):
  """Attention, then a feed-forward network or, in a sparse layer, experts and an extra one."""

  def __init__(self, config: OpenMoeConfig, layer: int):
    super().__init__()
    self.config = config
    self.sparse = config.is_sparse(layer)
    self.self_attn = OpenMoeAttention(config, layer)
    self.input_layernorm = OpenMoeRMSNorm(config)
    self.post_attention_layernorm = OpenMoeRMSNorm(config)
    self.mlp = OpenMoeSparseMLP(config) if self.sparse else OpenMoeMLP(config)
    if self.sparse and config.extra_mlp:
      self.extra_mlp = OpenMoeMLP(config)
      if not config.parallel_moe:
        self.pre_extra_mlp_layernorm = OpenMoeRMSNorm(config)

  def forward(self, x: torch.Tensor, context: _Context) -> Tuple[Optional[torch.Tensor], ...]:
    """x [B, L, D] -> x, attention weights, router logits, load-balance loss, router z-loss; all but x may be None."""
    config, token_mask = self.config, context.token_mask

    def normed(norm):
      y = norm(x)
      return y if token_mask is None else y.masked_fill(~token_mask[..., None], 0)

    def add(x, y):
      return x + dropout(y, config.dropout_rate, self.training).to(x.dtype)

    y, weights = self.self_attn(normed(self.input_layernorm), context)
    x = add(x, y)
    y = normed(self.post_attention_layernorm)
    if not self.sparse:
      return add(x, self.mlp(y)), weights, None, None, None
    routed, logits, aux_loss, z_loss = self.mlp(y, token_mask, context.losses)
    x = add(x, routed)
    if config.extra_mlp:
      x = add(x, self.extra_mlp(y if config.parallel_moe else normed(self.pre_extra_mlp_layernorm)))
    return x, weights, logits, aux_loss, z_loss


class OpenMoePreTrainedModel(PreTrainedModel):
  """What transformers wants to know about the model."""
  config_class = OpenMoeConfig
  base_model_prefix = 'model'
  supports_gradient_checkpointing = True
  _no_split_modules = ['OpenMoeDecoderLayer']
  _skip_keys_device_placement = ['past_key_values', 'cache']
  _supports_sdpa = True
  _supports_cache_class = True
  _supports_static_cache = False  # `generate` would compile, and which experts run depends on data

  def __init__(self, config: OpenMoeConfig, *args, **kwargs):
    config.check()  # it may have been changed since it was made
    super().__init__(config, *args, **kwargs)

  @torch.no_grad()
  def _init_weights(self, module: nn.Module) -> None:
    # torch.nn.init alone: transformers 5 makes it leave loaded parameters as they are.
    scale = self.config.init_scale
    if isinstance(module, nn.Embedding):
      nn.init.normal_(module.weight)
    elif isinstance(module, OpenMoeRMSNorm):
      nn.init.ones_(module.weight)
    elif isinstance(module, nn.Linear):
      std = getattr(module, 'init_std', math.sqrt(scale / module.in_features))
      if getattr(module, 'init_truncated', True):
        std /= _TRUNCATION
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
      else:
        nn.init.normal_(module.weight, std=std)
    elif isinstance(module, OpenMoeSparseMLP):
      nn.init.normal_(module.gate_weight, std=_ROUTER_STD)
    elif isinstance(module, OpenMoeExperts) and self.config.weight_format is None:
      for kernel in (module.wi_gate, module.wi_up, module.wo):
        nn.init.normal_(kernel, std=math.sqrt(scale / kernel.shape[1]))
    elif isinstance(module, (OpenMoeInt8Linear, OpenMoeExperts)):
      for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        (nn.init.ones_ if name.endswith('_scale') else nn.init.zeros_)(tensor)


@dataclass
class OpenMoeModelOutput(MoeModelOutputWithPast):
  """Adds the auxiliary losses, means over sparse layers, unscaled: None in evaluation unless router logits are too."""
  aux_loss: Optional[torch.FloatTensor] = None
  router_z_loss: Optional[torch.FloatTensor] = None


@dataclass
class OpenMoeCausalLMOutput(MoeCausalLMOutputWithPast):
  """Adds the router z-loss to loss, aux_loss, logits and the rest."""
  router_z_loss: Optional[torch.FloatTensor] = None


class OpenMoeModel(OpenMoePreTrainedModel):
  """Embedding, layers and the final norm."""

  def __init__(self, config: OpenMoeConfig):
    super().__init__(config)
    self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    self.layers = nn.ModuleList(OpenMoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
    self.norm = OpenMoeRMSNorm(config)
    self.gradient_checkpointing = False
    self.post_init()

  def get_input_embeddings(self) -> nn.Module:
    return self.embed_tokens

  def set_input_embeddings(self, value: nn.Module) -> None:
    self.embed_tokens = value

  def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
              use_cache=None, output_attentions=None, output_hidden_states=None, output_router_logits=None,
              return_dict=None, cache=None, **kwargs):
    """Hidden states, see `OpenMoeForCausalLM.forward` for the arguments.

    Returns:
      `OpenMoeModelOutput`: last_hidden_state [B, L, D] in the type of the weights, zero where `attention_mask` is (not
      in capacity mode 'colossalai'); hidden_states: what goes into each layer, and last_hidden_state.
    """
    config = self.config
    default = lambda value, name: getattr(config, name, None) if value is None else value
    output_attentions = default(output_attentions, 'output_attentions')
    output_hidden_states = default(output_hidden_states, 'output_hidden_states')
    output_router_logits = default(output_router_logits, 'output_router_logits')
    return_dict = default(return_dict, 'return_dict')
    cache = past_key_values if cache is None else cache
    checkpointing = self.gradient_checkpointing and self.training
    if checkpointing and cache is not None:
      raise ValueError('a cache cannot be given while training with gradient checkpointing, which would fill it twice')
    if (input_ids is None) == (inputs_embeds is None):
      raise ValueError('exactly one of input_ids and inputs_embeds must be given')
    if cache is None and default(use_cache, 'use_cache') and not self.training:
      cache = DynamicCache()
    x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    x = dropout(x, config.dropout_rate, self.training)
    x = x.to(torch.promote_types(x.dtype, getattr(torch, config.residual_dtype)))

    length = x.shape[1]
    past = kwargs.get('cache_position')  # transformers 4; it knows better than a static cache how full that is
    past = (0 if cache is None else int(cache.get_seq_length())) if past is None else int(past[0])
    slots = torch.arange(past, past + length, device=x.device)
    position_ids, token_mask, visible = _positions_and_masks(attention_mask, position_ids, slots, past + length)
    if config.capacity_mode == 'colossalai':  # there padding is a token like any other
      token_mask = None
    losses = self.training or bool(output_router_logits)
    context = _Context(visible, past + length, token_mask, self._rope_tables(position_ids), cache, slots,
                       bool(output_attentions), losses)
    hidden_states, attentions, records = [], [], []
    for layer in self.layers:
      hidden_states += [x] if output_hidden_states else []
      out = self._gradient_checkpointing_func(layer.__call__, x, context) if checkpointing else layer(x, context)
      x, weights, *record = out
      attentions.append(weights)
      records += [record] if record[0] is not None else []
    x = self.norm(x)
    x = x if token_mask is None else x.masked_fill(~token_mask[..., None], 0)
    x = dropout(x, config.dropout_rate, self.training)
    mean = lambda i: torch.stack([r[i].to(x.device) for r in records]).mean() if losses and records else None
    output = OpenMoeModelOutput(
        last_hidden_state=x, **{_CACHE: cache}, aux_loss=mean(1), router_z_loss=mean(2),
        hidden_states=(*hidden_states, x) if output_hidden_states else None,
        attentions=tuple(attentions) if output_attentions else None,
        router_logits=tuple(r[0] for r in records) if output_router_logits else None)
    return output if return_dict else output.to_tuple()

  def _rope_tables(self, position_ids: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """float32 sin and cos [B, L, K] of position times 10000^(-2j/K), the K/2 angles twice."""
    width = self.config.head_dim
    # From Python's numbers, so that all devices have the same, and no buffer has to survive loading.
    frequency = torch.tensor([_ROPE_BASE ** (-j / width) for j in range(0, width, 2)], dtype=torch.float32,
                             device=position_ids.device)
    angle = (position_ids[..., None].float() * frequency).repeat(1, 1, 2)
    return angle.sin(), angle.cos()


def _positions_and_masks(attention_mask, position_ids, slots, keys):
  """Positions [B or 1, L], token_mask bool [B, L] or None, visible bool [B or 1, 1 or H, L, keys] or None (causal).

  Args:
    attention_mask: [B, keys or more], 0 for padding; or [B, 1 or H, L, keys or more], bool, or of float type with 0
      for what is seen; or None.
    position_ids: [B, L] or None.
    slots: [L], the columns among all keys of the tokens that are computed.
    keys: number of tokens so far, these included.
  """
  if attention_mask is not None and (attention_mask.dim() not in (2, 4) or attention_mask.shape[-1] < keys):
    raise ValueError(f'attention_mask has the shape {tuple(attention_mask.shape)}: [batch, {keys}] is needed, for the '
                     f'{keys - len(slots)} tokens in the cache and the {len(slots)} new ones')
  token_mask = visible = None
  causal = slots[:, None] >= torch.arange(keys, device=slots.device)
  if attention_mask is None:
    if len(slots) < keys:
      visible = causal[None, None]
  elif attention_mask.dim() == 2:
    is_token = attention_mask[:, :keys].bool()
    token_mask = is_token[:, slots]
    visible = causal & is_token[:, None, None, :]
    if position_ids is None:
      position_ids = (is_token.long().cumsum(-1) - 1).clamp(min=0)[:, slots]
  else:
    visible = attention_mask[..., :keys]
    visible = visible if visible.dtype == torch.bool else visible == 0
  if visible is not None:  # a query that sees nothing (padding) sees itself, since a softmax of nothing is not a number
    itself = slots[:, None] == torch.arange(keys, device=slots.device)
    visible = visible | (itself & ~visible.any(-1, keepdim=True))
  return slots[None] if position_ids is None else position_ids, token_mask, visible


class OpenMoeForCausalLM(OpenMoePreTrainedModel, GenerationMixin):
  """OpenMoE with its output matrix."""
  accepts_loss_kwargs = True

  def __init__(self, config: OpenMoeConfig):
    super().__init__(config)
    self.model = OpenMoeModel(config)
    self.lm_head = OpenMoeHead(config.hidden_size, config.vocab_size, bias=False)
    self.post_init()

  def get_input_embeddings(self) -> nn.Module:
    return self.model.embed_tokens

  def set_input_embeddings(self, value: nn.Module) -> None:
    self.model.embed_tokens = value

  def get_output_embeddings(self) -> nn.Module:
    return self.lm_head

  def set_output_embeddings(self, value: nn.Linear) -> None:
    """Takes the weight of `value`, whose forward pass would not give float32 logits."""
    self.lm_head = OpenMoeHead(value.in_features, value.out_features, bias=False, device='meta')
    self.lm_head.weight = value.weight

  def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
              labels=None, use_cache=None, output_attentions=None, output_hidden_states=None,
              output_router_logits=None, return_dict=None, logits_to_keep: Union[int, torch.Tensor] = 0, cache=None,
              num_items_in_batch=None, **kwargs):
    """Logits and, with labels, the loss.

    The loss is the mean over all labels that are not -100 of cross-entropy (with `label_smoothing`, less the smoothed
    target's entropy, so that the least possible is 0) + z_loss_factor * logsumexp(logits)^2, in float32. In training
    mode router_aux_loss_factor * aux_loss + router_z_loss_factor * router_z_loss is added, each the mean over sparse
    layers; in evaluation it is not.

    Args:
      input_ids: int64 [B, L], each row beginning with id 0; or inputs_embeds [B, L, D].
      attention_mask: [B, cached tokens + L], 0 for padding, 1 for everything else, the id 0 at the beginning too;
        or a mask of 4 dimensions, for which nothing is padding.
      position_ids: [B, L]; by default counted over what is not padding.
      past_key_values: cache; `cache` is the same.
      labels: int64 [B, L], the ids of `input_ids`, or -100; position t is scored on label t + 1.
      output_router_logits: return them, float32 [B, L, E] of every sparse layer, and the auxiliary losses.
      logits_to_keep: compute only this many last logits (0: all), or those at these indices.
      num_items_in_batch: labels of all batches whose gradients are added up; the loss is then this batch's share of
        the mean over all of them.

    Raises:
      ValueError: a mask of the wrong length; labels where not all logits are computed.
    """
    outputs = self.model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
        past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
        output_attentions=output_attentions, output_hidden_states=output_hidden_states,
        output_router_logits=output_router_logits, return_dict=True, cache=cache, **kwargs)
    return_dict = self.config.return_dict if return_dict is None else return_dict
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = self.lm_head(outputs.last_hidden_state[:, kept])
    loss = None
    if labels is not None:
      if logits.shape[1] != labels.shape[1]:
        raise ValueError(f'logits_to_keep = {logits_to_keep} and labels of the shape {tuple(labels.shape)}: the loss '
                         'needs all logits, logits_to_keep = 0')
      loss = self._loss(logits, labels.to(logits.device), outputs, num_items_in_batch)
    output = OpenMoeCausalLMOutput(
        loss=loss, logits=logits, **{_CACHE: outputs[_CACHE] if _CACHE in outputs else None},
        hidden_states=outputs.hidden_states, attentions=outputs.attentions, router_logits=outputs.router_logits,
        aux_loss=outputs.aux_loss, router_z_loss=outputs.router_z_loss)
    return output if return_dict else output.to_tuple()

  def _loss(self, logits, labels, outputs, num_items_in_batch) -> torch.Tensor:
    config = self.config
    logits, labels = logits[:, :-1], labels[:, 1:]
    scored = labels != -100
    log_z = logits.logsumexp(-1)
    target = logits.gather(-1, labels.masked_fill(~scored, 0)[..., None])[..., 0]
    low = config.label_smoothing / (logits.shape[-1] - 1)
    high = 1 - config.label_smoothing
    losses = log_z - (high - low) * target + config.z_loss_factor * log_z.square()
    if config.label_smoothing:
      entropy = -(high * math.log(high) + config.label_smoothing * math.log(low))
      losses = losses - low * logits.sum(-1) - entropy
    count = scored.sum()
    loss = losses.masked_fill(~scored, 0).sum() / count.clamp(min=1)
    if self.training and outputs.aux_loss is not None:
      loss = loss + config.router_aux_loss_factor * outputs.aux_loss.to(loss.device)
      loss = loss + config.router_z_loss_factor * outputs.router_z_loss.to(loss.device)
    return loss if num_items_in_batch is None else loss * count / num_items_in_batch

  def _prepare_attention_mask_for_generation(self, inputs_tensor, *args, **kwargs) -> torch.Tensor:
    """Called by `generate` where no mask is given, to guess one: that id 0 is padding, which hides the beginning."""
    return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)

  @staticmethod
  def create_masks_for_generate(attention_mask=None, **kwargs):
    """Called by `generate` for caches of fixed size; the mask of 2 dimensions it has says what is padding."""
    return attention_mask

  def _valid_auto_compile_criteria(self, *args, **kwargs) -> bool:
    return False  # which experts run depends on data
