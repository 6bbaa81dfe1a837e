"""Recordings of routers whose answers are known, written without any model."""

from typing import Any, Sequence

import numpy as np

from openmoe_jax.config import ModelConfig, to_dict
from openmoe_jax.recording import files, policies
from openmoe_jax.routers.groups import group_tokens

IDS = 60
TOGETHER = 4  # rows that the policies t5x_* route together


def config(**changes) -> ModelConfig:
  settings = {'vocab_size': 8576, 'emb_dim': 8, 'mlp_dim': 8, 'num_heads': 2, 'head_dim': 4, 'num_layers': 4,
              'moe_interval': 2, 'num_experts': 8, 'group_size': 64, 'dtype': 'float32', **changes}
  return ModelConfig(**settings)


def write(folder: Any, kind: str = 'mixed', steps: Sequence[int] = (100,), names: Sequence[str] = ('none',),
          domains: Sequence[str] = ('demo_code_full_lm', 'demo_prose_full_lm'), rows: int = 40, length: int = 64,
          seed: int = 0, alike: bool = False, **model) -> str:
  """A recording; `kind` is what decides the expert: 'token', 'position', 'domain', 'random', or 'mixed': the token, but
  chance in a share of cases that falls to a half at the last step, and towards expert 0 along the row. Domains differ
  in the frequencies of ids unless they are `alike`."""
  model_config = config(**model)
  layers = [i for i in range(model_config.num_layers) if model_config.is_sparse(i)]
  files.begin(folder, {'checkpoint': 'synthetic', 'model': to_dict(model_config), 'split': 'validation',
                       'task_feature_lengths': {'targets': length}, 'batch_size': TOGETHER, 'pack': True,
                       'vocabulary': {'path': '', 'extra_ids': 300, 'fingerprint': '5aef2c6343845f98'}})
  for number, domain in enumerate(domains):
    rng = np.random.default_rng([seed, number])
    frequency = 1 / (1 + (np.arange(IDS) + (0 if alike else 7 * number)) % IDS)
    token_id = 300 + rng.choice(IDS, (rows, length), p=frequency / frequency.sum())
    token_id[:, 0] = 0
    position = np.broadcast_to(np.arange(length), (rows, length))
    for age, step in enumerate(steps):
      chosen = [_choices(kind, model_config, token_id, position, number, 1 - .5 * (age + 1) / len(steps),
                         np.random.default_rng([seed, number, age, layer])) + [layer] for layer in layers]
      for name in names:
        _write_key(folder, files.Key(step, name, domain), model_config, token_id, position, chosen, step, seed)
  return str(folder)


def _choices(kind, model_config, token_id, position, domain, noise, rng):
  experts = model_config.num_experts
  first = {'token': token_id % experts, 'position': position * experts // position.shape[1],
           'domain': np.full_like(token_id, domain), 'random': rng.integers(0, experts, token_id.shape),
           'mixed': token_id % experts}[kind]
  if kind == 'mixed':
    drawn = np.where(rng.random(token_id.shape) < 1.6 * position / position.shape[1], 0, rng.integers(0, experts,
                                                                                                  token_id.shape))
    first = np.where(rng.random(token_id.shape) < noise, drawn, first)
  return [np.stack([first, (first + rng.integers(1, experts, first.shape)) % experts], axis=-1)]


def _write_key(folder, key, model_config, token_id, position, chosen, step, seed):
  rows, length = token_id.shape
  applied = policies.configure(model_config, key.policy)
  together = policies.POLICIES[key.policy].rows_together or TOGETHER
  grouping = group_tokens(applied, together, length, train=False)
  place = np.arange(rows * length)
  group, group_position = np.divmod(place, grouping.group_size)
  writer = files.KeyWriter(folder, key, [layer for _, layer in chosen], 10 ** 9)
  columns, lost = [], np.zeros(rows * length)
  for expert, _ in chosen:
    expert = expert.reshape(-1, expert.shape[-1])
    slot, token_slot = queue(expert, group, True), queue(expert, group, False)
    kept = slot < grouping.capacity
    lost += .2 * (~kept).sum(axis=1)
    columns.append({f'{name}_{rank}': values[:, rank] for name, values in (
        ('expert', expert.astype(np.int16)), ('gate', np.where(kept, [.6, .3][:expert.shape[1]], 0).astype(np.float32)),
        ('slot', slot), ('kept', kept), ('token_slot', token_slot)) for rank in range(expert.shape[1])})
  log_prob = -3 + step / 1000 - lost - np.random.default_rng(seed).random(rows * length)
  flat = lambda x: np.asarray(x, np.int32).ravel()
  tokens = {'row': flat(place // length), 'position': flat(position), 'segment': flat(np.ones_like(position)),
            'segment_position': flat(position), 'group': flat(group), 'group_position': flat(group_position),
            'token_id': flat(token_id), 'target_id': flat(np.roll(token_id, -1, axis=1)),
            'log_prob': log_prob.astype(np.float32)}
  writer.add(tokens, columns)
  writer.finish(grouping._asdict())


def queue(expert: np.ndarray, group: np.ndarray, by_rank: bool) -> np.ndarray:
  """Place of each choice [N, S] in its expert's queue of its group: all first choices first, or token after token."""
  tokens, selected = expert.shape
  own = (group[:, None] * (expert.max() + 1) + expert)
  flat = own.T.ravel() if by_rank else own.ravel()
  order = np.argsort(flat, kind='stable')
  starts = np.flatnonzero(np.r_[True, np.diff(flat[order]) > 0])
  places = np.empty(len(flat), np.int32)
  places[order] = np.arange(len(flat)) - np.repeat(starts, np.diff(np.r_[starts, len(flat)]))
  return places.reshape(selected, tokens).T if by_rank else places.reshape(tokens, selected)
