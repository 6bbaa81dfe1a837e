"""Routing as a table: a line for each token and sparse layer, in columns that every data-frame library reads."""

from typing import Any, Dict, Mapping, Optional, Sequence

import numpy as np

from openmoe_jax import decoding, text_decoding
from openmoe_jax.config import ModelConfig, require
from openmoe_jax.recording import policies
from openmoe_jax.recording.forward import Routing, forward

# Of a token, the same in every layer.
TOKEN_COLUMNS = ('row', 'position', 'segment', 'segment_position', 'group', 'group_position', 'token_id', 'target_id',
                 'log_prob')
# Of a choice; the table has expert_0, expert_1, ... up to the number of selected experts.
CHOICE_COLUMNS = ('expert', 'gate', 'slot', 'kept', 'token_slot')


def choice_columns(name: str, num_selected: int) -> Sequence[str]:
  """['expert_0', 'expert_1', ...]."""
  return [f'{name}_{rank}' for rank in range(num_selected)]


def sparse_layers(config: ModelConfig) -> Sequence[int]:
  """Numbers of the decoder layers that hold experts."""
  return [layer for layer in range(config.num_layers) if config.is_sparse(layer)]


def token_columns(routing: Routing, batch: Mapping[str, np.ndarray], first_row: int = 0, first_group: int = 0
                  ) -> Dict[str, np.ndarray]:
  """`TOKEN_COLUMNS` of the tokens of a batch, padding left out: 1-D arrays in the order of rows and positions.

  Args:
    routing: of `batch`.
    batch: int32 [B, L] arrays.
    first_row, first_group: what the batch's own numbers are added to.
  """
  inside = np.asarray(routing.is_token)
  tokens = np.asarray(batch['decoder_input_tokens'])
  rows, positions = np.nonzero(inside)
  zeros = np.zeros_like(tokens)
  at_start = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  columns = {
      'row': first_row + rows, 'position': positions, 'segment': batch.get('decoder_segment_ids', zeros + 1)[inside],
      'segment_position': batch.get('decoder_positions', at_start)[inside],
      'group': first_group + routing.group[inside], 'group_position': routing.group_position[inside],
      'token_id': tokens[inside], 'target_id': np.asarray(batch['decoder_target_tokens'])[inside]}
  return {**{name: np.asarray(value, np.int32) for name, value in columns.items()},
          'log_prob': routing.log_prob[inside]}


def layer_columns(routing: Routing, layer: int) -> Dict[str, np.ndarray]:
  """The columns of the choices of one sparse layer (counted from 0), for the tokens of `token_columns`."""
  return {f'{name}_{rank}': getattr(routing, name)[layer][routing.is_token][:, rank]
          for name in CHOICE_COLUMNS for rank in range(routing.expert.shape[-1])}


def to_columns(routing: Routing, batch: Mapping[str, np.ndarray], layers: Sequence[int]) -> Dict[str, np.ndarray]:
  """The whole table: layer by layer, `layer` being the number of the decoder layer."""
  tokens = token_columns(routing, batch)
  count = len(tokens['row'])
  parts = [{'layer': np.full(count, layer, np.int16), **tokens, **layer_columns(routing, i)}
           for i, layer in enumerate(layers)]
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def record_text(model: Any, text: str, policy: str = 'none') -> Any:
  """Routing of every token of a text in every sparse layer; the function behind `Model.record_routing`.

  The row is the id 0 that starts a sequence and the tokens of the text; the last target is EOS.

  Args:
    model: `loading.Model`.
    text: at least one token.
    policy: see `policies`.

  Returns:
    A pandas DataFrame, or a pyarrow Table where pandas is not installed: `token` (its text), `layer`, and the columns of
    `TOKEN_COLUMNS` and `CHOICE_COLUMNS`. `attrs` of a data frame, the schema's metadata of a table: policy, capacity and
    group_size.

  Raises:
    ConfigError: no text, an unknown policy, a model without sparse layers.
  """
  config = policies.configure(model.config, policy)
  ids, = text_decoding.encode(model, [text])
  require(len(ids) > 0, 'the text has no tokens')
  length = decoding.bucket(len(ids) + 1) if policy == 'none' else len(ids) + 1
  batch = {name: np.zeros((1, length), np.int32) for name in ('decoder_input_tokens', 'decoder_target_tokens')}
  batch['decoder_input_tokens'][0, 1:len(ids) + 1] = ids
  batch['decoder_target_tokens'][0, :len(ids) + 1] = [*ids, model.vocabulary.eos_id or 1]
  routing = forward(config, model.variables, batch, model.mesh)
  columns = to_columns(routing, batch, sparse_layers(config))
  names = {i: piece(model.vocabulary, i) for i in {0, *ids}}
  columns = {'token': np.asarray([names[i] for i in columns['token_id'].tolist()], object), **columns}
  about = {'policy': policy, 'capacity': routing.grouping.capacity, 'group_size': routing.grouping.group_size}
  return to_frame(columns, about)


def piece(vocabulary: Any, token_id: int) -> str:
  """A token as it stands in the vocabulary: a word's beginning shows its space as '▁'."""
  tokenizer = vocabulary.tokenizer
  if 0 <= token_id < tokenizer.get_piece_size():
    return tokenizer.id_to_piece(token_id)
  return f'<{token_id}>'


def to_frame(columns: Mapping[str, np.ndarray], about: Optional[Mapping[str, Any]] = None) -> Any:
  """Columns as a pandas DataFrame, or as a pyarrow Table where there is no pandas."""
  try:
    import pandas
  except ImportError:
    import pyarrow
    return pyarrow.table(dict(columns)).replace_schema_metadata({k: str(v) for k, v in (about or {}).items()})
  frame = pandas.DataFrame(dict(columns))
  frame.attrs.update(about or {})
  return frame
