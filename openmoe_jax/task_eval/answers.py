"""Questions as token ids, put to a model in batches of similar length."""

from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from openmoe_jax import decoding, scoring, text_decoding
from openmoe_jax.config import EvalConfig, require

DEFAULT_WINDOW = 2048  # where a checkpoint does not say how long its rows were: what the original trained with
CHUNK = 16  # tokens between two looks at whether an answer is finished
Finished = Callable[[int, str], bool]


class Answer(NamedTuple):
  """A generated answer.

  Attributes:
    ids: up to an end of sequence, which is not included.
    text: as it continues the question, a space at its beginning included.
  """
  ids: List[int]
  text: str


class Answerer:
  """A model that answers questions.

  Args:
    model: `loading.Model`, or anything with its `config`, `params`, `run`, `mesh` and `vocabulary`.
    settings: of the answers.
    advance: called with the number of questions answered, for a progress bar.

  Attributes:
    cut: questions that were cut to fit the window.
  """

  def __init__(self, model: Any, settings: EvalConfig, advance: Callable[[int], None] = lambda count: None):
    self.model = model
    self.settings = settings
    self.window = settings.window or sum(model.run['data']['task_feature_lengths'].values()) or DEFAULT_WINDOW
    self.cut = 0
    self._advance = advance

  def fit(self, ids: Sequence[int], room: int, name: str) -> List[int]:
    """A question with `room` positions behind it in the window, cut as EvalConfig.long_prompts says.

    Raises:
      ConfigError: it does not fit and may not be cut, or an answer alone fills the window.
    """
    most = self.window - 1 - room
    how = self.settings.long_prompts
    require(most > 0, f'{name}: answers of {room} tokens leave no room in the window of {self.window} positions for a '
            'question; set a smaller EvalConfig.max_new_tokens or a larger EvalConfig.window')
    if len(ids) <= most:
      return list(ids)
    require(how != 'refuse', f'{name}: a question of {len(ids)} tokens and an answer of {room} do not fit the window of '
            f"{self.window} positions; set a larger EvalConfig.window, or EvalConfig.long_prompts = 'cut_left' or "
            "'cut_right'")
    self.cut += 1
    return list(ids[-most:] if how == 'cut_left' else ids[:most])

  def generate(self, prompts: Sequence[Sequence[int]], name: str, max_new_tokens: int = 0, num_samples: int = 0,
               greedy: bool = False, finished: Optional[Finished] = None) -> List[List[Answer]]:
    """Answers, [questions][samples].

    Args:
      prompts: ids of each question, at least one.
      name: of the task, for messages.
      max_new_tokens: 0 is that of the settings.
      num_samples: 0 is that of the settings.
      greedy: whatever the settings' temperature.
      finished: (number of the question, text so far) -> whether more text has no influence.
    """
    settings, model = self.settings, self.model
    most, samples = max_new_tokens or settings.max_new_tokens, num_samples or settings.num_samples
    sampling = (0., 0, 1.) if greedy else (settings.temperature, settings.top_k, settings.top_p)
    rows = [self.fit(ids, most, name) for ids in prompts]
    results: List[List[Answer]] = [[] for _ in rows]
    for numbers, ids, lengths in text_decoding.batches(rows, max(settings.batch_size // samples, 1)):
      generation = decoding.Generation(
          model.config, model.variables, ids, lengths, most, *sampling, settings.seed, settings.capacity_mode,
          num_samples=samples, eos_id=model.vocabulary.eos_id, window=self.window, row_ids=numbers, mesh=model.mesh)
      while generation.running and generation.count < most:
        generation.advance(CHUNK if finished else most)
        answers = self._answers(generation.result(), rows, numbers)
        if finished:
          generation.finish(np.asarray([[finished(i, answer.text) for answer in answers[row]]
                                        for row, i in enumerate(numbers)]))
      for row, i in enumerate(numbers):
        results[i] = answers[row]
      self._advance(len(numbers))
    return results

  def _answers(self, got: decoding.Generated, rows: Sequence[Sequence[int]], numbers: Sequence[int]
               ) -> List[List[Answer]]:
    eos = self.model.vocabulary.eos_id
    answers = []
    for row, i in enumerate(numbers):
      answers.append([])
      for sample in range(got.tokens.shape[1]):
        ids = got.tokens[row, sample, :got.lengths[row, sample]].tolist()
        ids = ids[:ids.index(eos)] if eos in ids else ids
        answers[-1].append(Answer(ids, text_decoding.decode(self.model, ids, rows[i])))
    return answers

  def score(self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], name: str
            ) -> Tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods of targets given questions, in nats, summed over their tokens, and whether each is what greedy
    decoding gives: float32 and bool, [pairs]."""
    settings, model = self.settings, self.model
    for target in targets:
      require(len(target) > 0, f'{name}: a possible answer has no tokens, so it cannot be scored')
    # The last target is not fed to the model, so a pair has one position less than start, question and target.
    starts = [self.fit(ids, len(target) - 1, name) for ids, target in zip(prompts, targets)]
    log_probs, greedy = np.zeros(len(starts), np.float32), np.zeros(len(starts), bool)
    rows = [[*start, *target] for start, target in zip(starts, targets)]
    for numbers, ids, lengths in text_decoding.batches(rows, settings.batch_size):
      got = scoring.score(model.config, model.variables, ids, lengths, np.asarray([len(starts[i]) for i in numbers]),
                          settings.capacity_mode, mesh=model.mesh)
      log_probs[numbers], greedy[numbers] = got.log_probs, got.greedy
      self._advance(len(numbers))
    return log_probs, greedy

  def encode(self, text: str) -> List[int]:
    """Ids without an end of sequence."""
    return text_decoding.encode(self.model, [text])[0]
