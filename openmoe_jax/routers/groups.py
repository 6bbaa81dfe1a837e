"""Padding, groups and expert capacity: how a batch of tokens is cut up before routing (SPEC 2.1 to 2.3, 9 a-b)."""

import math
from typing import Any, NamedTuple

from openmoe_jax.config import ModelConfig


class Grouping(NamedTuple):
  """Static shape of one routing call.

  Attributes:
    batch, length: rows and columns after padding with zero vectors; the padding is at the end of each axis.
    num_groups, group_size: the padded tokens, flattened row by row, as [num_groups, group_size].
    capacity: slots of each expert in each group.
  """
  batch: int
  length: int
  num_groups: int
  group_size: int
  capacity: int


def ungroup(x: Any, grouping: Grouping, rows: int, length: int) -> Any:
  """[layers, G, T, ..], cut into groups, as [layers, rows, length, ..], without the padding of the grouping."""
  return x.reshape(x.shape[0], grouping.batch, grouping.length, *x.shape[3:])[:, :rows, :length]


def _pad_rows_or_columns(batch: int, length: int, multiple: int) -> tuple:
  """Smallest zero padding, of rows or of columns, that makes batch * length a multiple (a tie pads columns)."""
  rows = next(p for p in range(multiple) if (batch + p) * length % multiple == 0)
  columns = next(q for q in range(multiple) if batch * (length + q) % multiple == 0)
  if rows * length < columns * batch:
    return batch + rows, length
  return batch, length + columns


def _count_groups(num_tokens: int, max_group_size: int, multiple: int) -> int:
  """Smallest number of groups from max(num_tokens // max_group_size, multiple) on that divides evenly.

  The floor division is the original's: a group can come out larger than `max_group_size`.
  """
  groups = max(num_tokens // max_group_size, multiple)
  return next(g for g in range(groups, num_tokens + 1) if num_tokens % g == 0 and g % multiple == 0)


def expert_capacity(config: ModelConfig, group_size: int, train: bool) -> int:
  """Slots of one expert in one group.

  't5x': round(factor * tokens / E) half to even, at least `min_expert_capacity`; the factor is multiplied by the number
  of choices only if `capacity_times_k`. 'none': as many as there are tokens, the most that one expert can be asked for. 'colossalai':
  floor(S * factor * tokens / E), made even by adding one, at least `min_expert_capacity`.
  """
  factor = config.train_capacity_factor if train else config.eval_capacity_factor
  if config.capacity_mode == 'none':
    return group_size
  if config.capacity_mode == 'colossalai':
    capacity = math.floor(config.num_selected_experts * factor * group_size / config.num_experts)
    capacity += capacity % 2
  else:
    choices = config.num_selected_experts if config.capacity_times_k else 1
    capacity = int(round(choices * factor * group_size / config.num_experts))
  return max(capacity, config.min_expert_capacity)


def group_tokens(config: ModelConfig, batch: int, length: int, train: bool) -> Grouping:
  """The grouping of a [batch, length] microbatch; depends on the configuration and never on the devices."""
  if config.dispatch == 'dropless':  # without capacity there is nothing that groups could share out
    return Grouping(batch, length, 1, batch * length, batch * length)
  if config.capacity_mode == 'colossalai':  # the PyTorch port routes all tokens as one group
    return Grouping(batch, length, 1, batch * length, expert_capacity(config, batch * length, train))
  multiple = config.num_expert_replicas * config.num_experts
  batch, length = _pad_rows_or_columns(batch, length, multiple)
  num_groups = _count_groups(batch * length, config.group_size, multiple)
  group_size = batch * length // num_groups
  return Grouping(batch, length, num_groups, group_size, expert_capacity(config, group_size, train))
