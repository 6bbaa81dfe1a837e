"""Whether two checkpoints compute the same: logits of both on the same tokens, one model in memory at a time."""

import os
from typing import Any, Dict, NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np

from openmoe_jax import names
from openmoe_jax import paths
from openmoe_jax.config import ConfigError, ModelConfig, require
from openmoe_jax.convert.tensors import PARAMS, Source
from openmoe_jax.model import OpenMoE

_ROWS, _LENGTH = 2, 64  # of random tokens


class Difference(NamedTuple):
  """Attributes:

    largest: of the absolute differences of logits.
    scale: largest absolute logit of the first side.
    agreement: fraction of positions with the same most probable token.
    sides: what was compared with what.
  """
  largest: float
  scale: float
  agreement: float
  sides: str

  def __str__(self) -> str:
    return (f'{self.sides}: the logits (up to {self.scale:.3g}) differ by {self.largest:.3g} at most; the most '
            f'probable token is the same at {100 * self.agreement:.2f} % of the positions')


def difference(first: np.ndarray, second: np.ndarray, sides: str) -> Difference:
  """Of two float32 [B, L, V]."""
  return Difference(float(np.max(np.abs(first - second))), float(np.max(np.abs(first))),
                    float(np.mean(first.argmax(-1) == second.argmax(-1))), sides)


def random_tokens(model: ModelConfig, seed: int = 0) -> np.ndarray:
  """int32 [B, L], any ids but padding."""
  return np.random.default_rng(seed).integers(1, model.vocab_size, (_ROWS, _LENGTH)).astype(np.int32)


def read_tokens(text: str, model: ModelConfig) -> np.ndarray:
  """int32 [B, L] from '5,17,3' or a file of rows of numbers, padding behind shorter rows.

  Raises:
    ConfigError: no such tokens in this model's vocabulary.
  """
  if os.path.exists(text):
    with open(text, encoding='utf-8') as file:
      lines = [line for line in file.read().splitlines() if line.strip()]
  else:
    lines = [text]
  try:
    rows = [[int(token) for token in line.replace(',', ' ').split()] for line in lines]
  except ValueError as error:
    raise ConfigError(f'--tokens={text!r}: neither a file nor numbers such as 5,17,3 ({error})') from error
  require(bool(rows) and all(rows), f'--tokens={text!r} holds no tokens')
  valid = all(0 < token < model.vocab_size for row in rows for token in row)
  require(valid, f'--tokens={text!r}: every token must be from 1 to {model.vocab_size - 1}')
  length = max(map(len, rows))
  return np.asarray([row + [0] * (length - len(row)) for row in rows], np.int32)


def jax_logits(source: Source, tokens: np.ndarray) -> np.ndarray:
  """float32 [B, L, V] of a checkpoint, in float32 and without dropped tokens; 0 at padding."""
  config = source.model.replace(dtype='float32', residual_dtype='float32', capacity_mode='none', scan_blocks=False,
                                remat='none')
  params = jax.tree.map(jnp.asarray, names.from_t5x_names(config, _Lazily(source)))
  inputs = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
  batch = {'decoder_input_tokens': jnp.asarray(inputs), 'decoder_target_tokens': jnp.asarray(tokens)}
  if config.inputs_bidirectional_attention:
    batch['decoder_causal_attention'] = jnp.zeros_like(batch['decoder_input_tokens'])
  logits = np.asarray(jax.jit(lambda p: OpenMoE(config).apply({'params': p}, batch))(params))
  return np.where(tokens[..., None] != 0, logits, 0)


class _Lazily(Dict[str, Any]):
  """T5X names -> arrays, each read when it is asked for."""

  def __init__(self, source: Source):
    super().__init__({name.removeprefix(PARAMS): info for name, info in source.tensors.items() if
                      name.startswith(PARAMS)})
    self._source = source

  def __getitem__(self, name: str) -> Any:
    return self._source.read(PARAMS + name)


def torch_logits(folder: paths.PathLike, tokens: np.ndarray) -> Optional[np.ndarray]:
  """The same of a Hugging Face folder, by PyTorch; None where PyTorch or transformers is not installed."""
  try:
    import torch
    import transformers
  except ImportError:
    return None
  transformers.utils.logging.disable_progress_bar()
  model = transformers.AutoModelForCausalLM.from_pretrained(
      str(paths.path(folder)), trust_remote_code=True, capacity_mode='none').float().eval()
  inputs = torch.from_numpy(np.pad(tokens, ((0, 0), (1, 0)))[:, :-1].astype(np.int64))
  mask = torch.from_numpy((tokens != 0).astype(np.int64))
  with torch.no_grad():
    logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits.float().numpy()
  return np.where(tokens[..., None] != 0, logits, 0)
