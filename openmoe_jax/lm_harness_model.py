"""A trained model as lm-evaluation-harness knows models; needs the package lm-eval, and no PyTorch.

  lm_eval.simple_evaluate(HarnessModel(openmoe_jax.load('runs/demo')), tasks=['piqa'])

Every sequence begins with the id 0, as in training: it is what an empty context leaves to condition on, and it stays in
front of contexts that are cut from the left and of every window of a rolling log-likelihood.
"""

import collections
import logging
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple
import zlib

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
import numpy as np
from tqdm import tqdm

from openmoe_jax import sampling as sampling_lib
from openmoe_jax import scoring, text_decoding
from openmoe_jax.config import require
from openmoe_jax.sampling import Sampling

START_ID = 0  # put in front by `scoring.score` and `decoding.generate`
DEFAULT_WINDOW = 2048  # positions, for a checkpoint that does not say how long its rows were
DEFAULT_MAX_GEN_TOKS = 256  # of lm-eval, for tasks that do not say
# Settings of other back ends, at the values where they do nothing.
_NEUTRAL = {'num_beams': 1, 'num_return_sequences': 1, 'repetition_penalty': 1}

_log = logging.getLogger('lm_eval.openmoe')


class Settings(NamedTuple):
  """How a prompt is continued; prompts share a batch if these are equal."""
  max_new_tokens: int
  sampling: Sampling
  stop: Tuple[str, ...]


class HarnessModel(TemplateLM):
  """See the module.

  Args:
    model: of `loading.load`; on a mesh if it was loaded on one.
    batch_size: most sequences at a time; does not change a result in capacity_mode 'none'.
    window: most positions of a sequence, the start id included; default: the row length of training, or 2048.
    capacity_mode: as for `scoring.score`.
    seed: of sampled continuations, which also depend on the context and on how often it was asked before.

  Attributes:
    truncated: {kind of request: contexts that were cut from the left because they did not fit the window}.
  """

  def __init__(self, model: Any, batch_size: int = 16, window: Optional[int] = None, capacity_mode: str = 'none',
               seed: int = 0):
    super().__init__()
    require(batch_size >= 1, f'batch_size = {batch_size} must be at least 1')
    self.model, self.batch_size, self.capacity_mode, self.seed = model, batch_size, capacity_mode, seed
    self.window = window or sum(model.run['data'].get('task_feature_lengths', {}).values()) or DEFAULT_WINDOW
    require(self.window >= 2, f'window = {window} must be at least 2 positions: the start id and a token')
    self.truncated: Dict[str, int] = collections.Counter()

  @property
  def eot_token_id(self) -> int:
    return self.model.vocabulary.eos_id

  @property
  def prefix_token_id(self) -> int:
    return START_ID

  @property
  def max_length(self) -> int:
    return self.window

  def get_model_info(self) -> Dict[str, Any]:
    """What lm-eval adds to the configuration in its results."""
    return {'model': 'openmoe_jax', 'model_step': self.model.step, 'model_dtype': self.model.config.dtype,
            'model_num_parameters': sum(x.size for x in jax.tree.leaves(self.model.params)), 'window': self.window,
            'capacity_mode': self.capacity_mode, 'truncated_contexts': dict(self.truncated)}

  def tok_encode(self, string: str, add_special_tokens: Optional[bool] = None, **kwargs) -> List[int]:
    """Ids of a text; the vocabulary adds none of its own."""
    del add_special_tokens, kwargs
    return text_decoding.encode(self.model, [string])[0]

  def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> List[Tuple[float, bool]]:
    """Log-likelihood of each continuation given its context, and whether it is what greedy decoding gives.

    Raises:
      ConfigError: a continuation without tokens, or with more than the window.
    """
    pairs, cut = [], 0
    for request in requests:
      context, continuation = request.args
      start, end = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
      require(len(end) > 0, f'the continuation {_shown(continuation)!r} of the context {_shown(context)!r} has no '
              'token of its own: there is nothing to score')
      room = self.window - len(end)
      require(room >= 0, f'the continuation {_shown(continuation)!r} has {len(end)} tokens: more than the window of '
              f'{self.window} positions')
      cut += len(start) > room
      pairs.append((request.args, start[max(len(start) - room, 0):], end))
    self._count('loglikelihood', cut, len(pairs))
    return self._loglikelihood_tokens(pairs, disable_tqdm)

  def _loglikelihood_tokens(self, requests: Sequence[Tuple[Any, List[int], List[int]]], disable_tqdm: bool = False,
                            **kwargs) -> List[Tuple[float, bool]]:
    """As `loglikelihood`, of (key in the cache or None, ids of the context, ids of the continuation) that fit."""
    del kwargs
    rows = [context + continuation for _, context, continuation in requests]
    results: List[Any] = [None] * len(rows)
    with tqdm(total=len(rows), desc='log-likelihoods', disable=disable_tqdm) as bar:
      for numbers, ids, lengths in text_decoding.batches(rows, self.batch_size):
        prefixes = np.asarray([len(requests[i][1]) for i in numbers])
        got = scoring.score(self.model.config, self.model.variables, ids, lengths, prefixes, self.capacity_mode,
                            mesh=self.model.mesh)
        for row, i in enumerate(numbers):
          results[i] = float(got.log_probs[row]), bool(got.greedy[row])
          if requests[i][0] is not None:
            self.cache_hook.add_partial('loglikelihood', requests[i][0], results[i])
        bar.update(len(numbers))
    return results

  def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> List[float]:
    """Log-likelihood of each whole text, which is cut into disjoint windows; from the second one on they begin with the
    start id and at least one token of the window before, the last one with as many as fit."""
    windows, owners = [], []
    for number, request in enumerate(requests):
      rolling = get_rolling_token_windows(self.tok_encode(request.args[0]), START_ID, max_seq_len=self.window - 1,
                                          context_len=1)
      for context, continuation in map(make_disjoint_window, rolling):
        windows.append((None, [] if context == [START_ID] else context, continuation))
        owners.append(number)
    totals = [0.] * len(requests)
    for number, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
      totals[number] += log_prob
    for request, total in zip(requests, totals):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
    return totals

  def settings(self, gen_kwargs: Dict[str, Any]) -> Settings:
    """lm-eval's generation settings: until, max_gen_toks (or max_new_tokens, max_tokens), do_sample, temperature,
    top_k, top_p.

    Raises:
      ConfigError: a setting that is not known, a value out of range, max_gen_toks that leave no room for a context.
    """
    known = {**normalize_gen_kwargs(gen_kwargs, DEFAULT_MAX_GEN_TOKS)}
    # Without a temperature, sampling is at 1; lm-eval fills in 0 where it does not sample.
    temperature = float(known.pop('temperature', 1.))
    sampling = Sampling(temperature if known.pop('do_sample') else 0., known.pop('top_k', 0), known.pop('top_p', 1.))
    stop, most = known.pop('until'), known.pop('max_gen_toks')
    require(all(isinstance(text, str) for text in stop), f'until = {stop!r} must be strings')
    for name, value in known.items():
      require(_NEUTRAL.get(name) == value, f'the generation setting {name} = {value!r} is not known; valid: until, '
              'max_gen_toks, do_sample, temperature, top_k, top_p')
    require(1 <= most < self.window, f'max_gen_toks = {most} must be from 1 to {self.window - 1}: a context needs '
            f'room, too, in the window of {self.window} positions')
    return Settings(most, sampling_lib.check(sampling, self.model.config.vocab_size), tuple(filter(None, stop)))

  def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> List[str]:
    """Continuations of contexts, cut in front of the first stop string.

    Raises:
      ConfigError: as `settings`; a context without tokens.
    """
    groups: Dict[Settings, List[int]] = {}
    for number, request in enumerate(requests):
      groups.setdefault(self.settings(request.args[1]), []).append(number)
    texts = [request.args[0] for request in requests]
    draws, contexts, cut = _draws(texts), text_decoding.encode(self.model, texts, 'contexts'), 0
    require(all(contexts), 'the context of a continuation is an empty string: there is nothing to continue')
    for chosen, members in groups.items():
      room = self.window - chosen.max_new_tokens
      cut += sum(len(contexts[i]) > room for i in members)
      for i in members:
        contexts[i] = contexts[i][-room:]
    self._count('generate_until', cut, len(texts))
    results: List[Any] = [None] * len(texts)
    with tqdm(total=len(texts), desc='continuations', disable=disable_tqdm) as bar:
      for chosen, members in groups.items():
        for rows, _, _ in text_decoding.batches([contexts[i] for i in members], self.batch_size):
          numbers = [members[row] for row in rows]
          made = text_decoding.generate_texts(
              self.model, [contexts[i] for i in numbers], chosen.max_new_tokens, stop=chosen.stop, seed=self.seed,
              row_ids=[draws[i] for i in numbers], batch_size=self.batch_size, window=self.window,
              capacity_mode=self.capacity_mode, mesh=self.model.mesh, **chosen.sampling._asdict())
          for number, text in zip(numbers, made):
            results[number] = text
            self.cache_hook.add_partial('generate_until', requests[number].args, text)
          bar.update(len(numbers))
    return results

  def _count(self, kind: str, cut: int, total: int) -> None:
    if cut:
      self.truncated[kind] += cut
      _log.warning('%s: %d of %d contexts do not fit the window of %d positions and are cut from the left', kind, cut,
                   total, self.window)


def _draws(contexts: Sequence[str]) -> List[int]:
  """A number for the random keys of each context, another one each time that the same context is asked."""
  asked = collections.Counter()
  numbers = []
  for context in contexts:
    numbers.append((zlib.crc32(context.encode()) + asked[context]) % 2**32)
    asked[context] += 1
  return numbers


def _shown(text: str) -> str:
  return text if len(text) <= 60 else f'{text[:20]} .. {text[-36:]}'
