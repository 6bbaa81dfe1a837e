"""One forward pass that returns its routing, token by token."""

import functools
from typing import Any, Mapping, NamedTuple, Optional

import jax
from jax.sharding import Mesh
import jax.numpy as jnp
import numpy as np

from openmoe_jax import decoding, scoring
from openmoe_jax.attention import make_logit_mask
from openmoe_jax.config import ModelConfig
from openmoe_jax.model import OpenMoE, variables
from openmoe_jax.routers.groups import Grouping, group_tokens, ungroup
from openmoe_jax.routers.slots import in_token_order


class Routing(NamedTuple):
  """Routing of a batch as NumPy arrays: N sparse layers, B rows, L positions, S choices of a token.

  Attributes:
    expert: int16 [N, B, L, S]; E where a choice asks for nobody.
    gate: float32 [N, B, L, S], the factor of the expert's output, 0 where not kept.
    slot: int32 [N, B, L, S], place in the expert's queue: all first choices of the group in order, then all second ones.
    kept: bool [N, B, L, S].
    token_slot: int32 [N, B, L, S], the place if all choices of a token came before those of the next token. It does
      not depend on later tokens; `slot` of a second choice does.
    group, group_position: int32 [B, L], number of the routing group in the batch, and place in it.
    is_token: bool [B, L], False for padding, which may have been routed all the same.
    log_prob: float32 [B, L], of the target; NaN where there is none.
    grouping: sizes of groups, and the capacity.
  """
  expert: np.ndarray
  gate: np.ndarray
  slot: np.ndarray
  kept: np.ndarray
  token_slot: np.ndarray
  group: np.ndarray
  group_position: np.ndarray
  is_token: np.ndarray
  log_prob: np.ndarray
  grouping: Grouping


def forward(config: ModelConfig, params: Any, batch: Mapping[str, np.ndarray], mesh: Optional[Mesh] = None) -> Routing:
  """Runs a model over a batch.

  Args:
    config: of `policies.configure`.
    params: in the layout of `config.scan_blocks`, or `Model.variables`.
    batch: int32 [B, L] arrays, the features that `OpenMoE` takes.
    mesh: devices, those of `params`.
  """
  rows, length = np.shape(batch['decoder_input_tokens'])
  grouping = group_tokens(config, rows, length, train=False)
  features = {name: value for name, value in batch.items() if name in FEATURES}
  with decoding.mesh_scope(mesh):
    out = _run(decoding.for_prompts(config, length), params, {k: decoding.place(mesh, v) for k, v in features.items()})
    out = jax.tree.map(functools.partial(decoding.fetch, mesh), out)
  number = np.arange(grouping.batch * grouping.length, dtype=np.int32).reshape(grouping.batch, -1)[:rows, :length]
  return Routing(*out[:5], *np.divmod(number, np.int32(grouping.group_size)), *out[5:], grouping)


FEATURES = ('decoder_input_tokens', 'decoder_target_tokens', 'decoder_segment_ids', 'decoder_causal_attention')


@functools.partial(jax.jit, static_argnums=(0,))
def _run(config: ModelConfig, params: Any, batch: Mapping[str, jax.Array]):
  """The arrays of `Routing` but for those that follow from its shape."""
  tokens, targets = batch['decoder_input_tokens'], batch['decoder_target_tokens']
  rows, length = tokens.shape
  model = OpenMoE(config, record_routing=True)
  hidden, kernel, record = model.apply(variables(params), batch, False, method='features')
  log_probs, _ = scoring.log_likelihoods(hidden, kernel, targets, config.loss_chunk_tokens)
  assignment = record.assignment
  grouping = group_tokens(config, rows, length, train=False)

  own = lambda x: ungroup(x, grouping, rows, length)
  token_slot = jax.vmap(functools.partial(in_token_order, num_experts=config.num_experts))(assignment.expert_index)
  return (own(assignment.expert_index).astype(jnp.int16), own(assignment.gate), own(assignment.slot),
          own(assignment.kept), own(token_slot), make_logit_mask(tokens),
          jnp.where(targets > 0, log_probs, jnp.nan))
