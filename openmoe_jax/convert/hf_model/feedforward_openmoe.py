"""Feed-forward networks of OpenMoE, dense and sparse: routing, experts, int8 weights.

A part of modeling_openmoe.py, which lies in the same folder.
"""

import math
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import nn
import torch.nn.functional as F

from .configuration_openmoe import OpenMoeConfig

_ACTIVATIONS = {
    'silu': F.silu, 'gelu': lambda x: F.gelu(x, approximate='tanh'), 'relu': F.relu, 'linear': lambda x: x,
    'swiglu': lambda x: x.chunk(2, dim=-1)[0] * F.silu(x.chunk(2, dim=-1)[1]),
}


def dropout(x: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
  """Dropout with one mask for all rows of the last but one axis, the positions."""
  if not training or not rate:
    return x
  return x * F.dropout(torch.ones_like(x[..., :1, :]), rate)


def float32_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
  """x @ weight.T in float32, whatever the types and autocast say."""
  with torch.autocast(x.device.type, enabled=False):
    return F.linear(x.float(), weight.float())


class OpenMoeInt8Linear(nn.Module):
  """x @ (weight * weight_scale).T with int8 weights [out, in] and float32 scales [out, 1]; loaded, not trained."""

  def __init__(self, in_features: int, out_features: int):
    super().__init__()
    self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=torch.int8), requires_grad=False)
    self.register_buffer('weight_scale', torch.ones(out_features, 1, dtype=torch.float32))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    # Every activation type holds all int8 values exactly; a scale for each output can be applied to the output.
    return (F.linear(x, self.weight.to(x.dtype)) * self.weight_scale[:, 0]).to(x.dtype)


def linear(config: OpenMoeConfig, in_features: int, out_features: int, scale: float, truncated: bool) -> nn.Module:
  """A matrix without bias whose initial values have the variance scale / in_features."""
  if config.weight_format == 'int8':
    return OpenMoeInt8Linear(in_features, out_features)
  layer = nn.Linear(in_features, out_features, bias=False)
  layer.init_std, layer.init_truncated = math.sqrt(scale / in_features), truncated
  return layer


def _hidden_widths(config: OpenMoeConfig) -> Tuple[int, int]:
  """Output width of the two input matrices of a feed-forward network."""
  first, second = (config.intermediate_size * (2 if name == 'swiglu' else 1) for name in config.mlp_activations)
  return first, second


def _gate(config: OpenMoeConfig, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
  """The product of both activations; 'swiglu' is its input's first half times silu of the second: three factors."""
  activations = [_ACTIVATIONS[name] for name in config.mlp_activations]
  return activations[0](first) * activations[1](second)


class OpenMoeMLP(nn.Module):
  """Gated feed-forward network: [..., D] -> [..., D]."""

  def __init__(self, config: OpenMoeConfig):
    super().__init__()
    self.config = config
    emb, mlp, (first, second) = config.hidden_size, config.intermediate_size, _hidden_widths(config)
    self.gate_proj = linear(config, emb, first, config.init_scale, truncated=True)
    self.up_proj = linear(config, emb, second, config.init_scale, truncated=True)
    self.down_proj = linear(config, mlp, emb, config.init_scale, truncated=True)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    h = _gate(self.config, self.gate_proj(x), self.up_proj(x))
    return self.down_proj(dropout(h, self.config.dropout_rate, self.training))


class OpenMoeExperts(nn.Module):
  """E feed-forward networks, each applied to the tokens that chose it."""

  def __init__(self, config: OpenMoeConfig):
    super().__init__()
    self.config = config
    emb, mlp, (first, second) = config.hidden_size, config.intermediate_size, _hidden_widths(config)
    for name, in_features, out_features in (('wi_gate', emb, first), ('wi_up', emb, second), ('wo', mlp, emb)):
      shape = (config.num_experts, in_features, out_features)
      if config.weight_format == 'int8':
        setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=torch.int8), requires_grad=False))
        self.register_buffer(f'{name}_scale', torch.ones(shape[0], 1, shape[2], dtype=torch.float32))
      else:
        setattr(self, name, nn.Parameter(torch.empty(shape)))

  def forward(self, x: torch.Tensor, index: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x [N, D], experts [N, S] (num_experts: none) and gates [N, S] -> float32 [N, D], sum of gate * expert(x)."""
    config = self.config
    experts = config.num_experts
    flat, order = index.flatten().sort(stable=True)
    counts = torch.bincount(flat, minlength=experts + 1)[:experts].tolist()
    token, gate = order // index.shape[1], gate.flatten()[order]
    # Not w[e]: the gradient of each such access is as large as all experts together.
    kernels = [self._kernels(name) for name in ('wi_gate', 'wi_up', 'wo')]
    # A token is with an expert at most once, so that the sums below are in the same order every time.
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
      if not count:
        continue
      rows = token[start:start + count]
      chosen = x.index_select(0, rows)
      wi_gate, wi_up, wo = (kernel[expert] for kernel in kernels)
      h = _gate(config, _product(chosen, *wi_gate), _product(chosen, *wi_up))
      y = _product(dropout(h, config.dropout_rate, self.training), *wo)
      out.index_add_(0, rows, y.float() * gate[start:start + count, None])
      start += count
    return out

  def _kernels(self, name: str) -> List[Tuple[torch.Tensor, Optional[torch.Tensor]]]:
    """(kernel, scale or None) of every expert."""
    kernels = getattr(self, name).unbind(0)
    scales = getattr(self, f'{name}_scale').unbind(0) if self.config.weight_format == 'int8' else (None,) * len(kernels)
    return list(zip(kernels, scales))


def _product(x: torch.Tensor, kernel: torch.Tensor, scale: Optional[torch.Tensor]) -> torch.Tensor:
  """x @ kernel, or x @ (kernel * scale) of an int8 kernel."""
  return x @ kernel if scale is None else ((x @ kernel.to(x.dtype)) * scale).to(x.dtype)


class Routing(NamedTuple):
  """Attributes:

    index: int64 [B, L, S], the experts of each token; num_experts where the expert was full.
    gate: float32 [B, L, S], their probabilities, not renormalised.
    aux_loss, z_loss: float32 [], unscaled; None unless asked for.
  """
  index: torch.Tensor
  gate: torch.Tensor
  aux_loss: Optional[torch.Tensor]
  z_loss: Optional[torch.Tensor]


def padded_groups(config: OpenMoeConfig, batch: int, length: int) -> Tuple[int, int, int]:
  """Rows and columns after padding, and the number of groups that the padded tokens, row by row, are cut into.

  Whichever adds fewer tokens is padded, rows or columns, until replicas * experts divides the number of tokens. Groups
  are as large as `group_size` allows, by the original's rule, which rounds down before it looks for a divisor.
  """
  if config.capacity_mode == 'colossalai':
    return batch, length, 1
  multiple = config.num_expert_replicas * config.num_experts
  rows = next(p for p in range(multiple) if (batch + p) * length % multiple == 0)
  columns = next(p for p in range(multiple) if batch * (length + p) % multiple == 0)
  if rows * length < columns * batch:
    batch += rows
  else:
    length += columns
  tokens = batch * length
  least = max(tokens // config.group_size, multiple)
  return batch, length, next(g for g in range(least, tokens + 1) if tokens % g == 0 and g % multiple == 0)


def expert_capacity(config: OpenMoeConfig, group_size: int, training: bool) -> Optional[int]:
  """Slots of each expert in each group, or None for no limit."""
  factor = config.capacity_factor_train if training else config.capacity_factor_eval
  if config.capacity_mode == 'none':
    return None
  if config.capacity_mode == 'colossalai':
    capacity = math.floor(config.topk * factor * group_size / config.num_experts)
    capacity += capacity % 2
  else:
    capacity = round(factor * group_size / config.num_experts)
  return max(capacity, config.min_capacity)


def route(config: OpenMoeConfig, logits: torch.Tensor, is_token: Optional[torch.Tensor], training: bool,
           losses: bool) -> Routing:
  """Chooses experts: logits float32 [B, L, E], is_token bool [B, L] or None, read if `ignore_padding_tokens`."""
  batch, length, experts = logits.shape
  rows, columns, groups = batch, length, 1
  if losses or config.capacity_mode != 'none':
    rows, columns, groups = padded_groups(config, batch, length)
  grid = (0, columns - length, 0, rows - batch)
  logits = F.pad(logits, (0, 0, *grid)).view(groups, -1, experts)
  probs = logits.softmax(-1)
  capacity = expert_capacity(config, logits.shape[1], training)
  # topk does not promise that the lower index wins a tie, as it must where padding has equal logits.
  gate, index = (x[..., :config.topk] for x in probs.sort(dim=-1, descending=True, stable=True))
  if config.ignore_padding_tokens:
    is_token = logits.new_ones(batch, length, dtype=torch.bool) if is_token is None else is_token
    is_token = F.pad(is_token, grid).view(groups, -1, 1)
    probs, index = probs * is_token, index.masked_fill(~is_token, experts)
  if losses or capacity is not None:
    chosen = F.one_hot(index, experts + 1)[..., :experts]  # [G, T, S, E]

  aux_loss = z_loss = None
  if losses:
    share = chosen.sum(2).float().mean(1) * probs.mean(1)
    aux_loss, z_loss = experts * share.sum(-1).mean(), logits.logsumexp(-1).square().mean()

  if capacity is not None:
    # All first choices of a group are served before its second choices.
    queue = chosen.transpose(1, 2).flatten(1, 2)
    slot = ((queue.cumsum(1) - 1) * queue).sum(-1).view(groups, config.topk, -1).transpose(1, 2)
    index = index.masked_fill(slot >= capacity, experts)

  def rectangle(x):
    return x.reshape(rows, columns, config.topk)[:batch, :length]

  return Routing(rectangle(index), rectangle(gate), aux_loss, z_loss)


class OpenMoeSparseMLP(nn.Module):
  """Router and experts: x [B, L, D], token_mask bool [B, L] or None -> float32 [B, L, D], router logits, losses."""

  def __init__(self, config: OpenMoeConfig):
    super().__init__()
    self.config = config
    self.gate_weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
    self.experts = OpenMoeExperts(config)

  def forward(self, x: torch.Tensor, token_mask: Optional[torch.Tensor], losses: bool):
    logits = float32_linear(x, self.gate_weight)
    routing = route(self.config, logits, token_mask, self.training, losses)
    index = routing.index
    if token_mask is not None:  # a zero vector's result is zero
      index = index.masked_fill(~token_mask[..., None], self.config.num_experts)
    y = self.experts(x.flatten(0, 1), index.flatten(0, 1), routing.gate.flatten(0, 1))
    return y.view(x.shape), logits, routing.aux_loss, routing.z_loss
