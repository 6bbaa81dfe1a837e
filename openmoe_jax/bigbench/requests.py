"""What a part asks of a model, and the marks for its answers.

Two kinds of request, each with its kind of answer:

* `Choose`: the natural log-likelihood of every continuation after the prompt, summed over its tokens, not divided by
  their number.
* `Generate`: the text generated after the prompt, greedily in published figures.

Prompts and continuations are tokenized each on its own, as seqio tokenizes inputs and targets; no end-of-sequence token
is added to either. A prompt longer than a model's window loses its beginning in the benchmark's own wrapper of models;
in its seqio tasks the feature lengths cut its end, question and all.
"""

import dataclasses
import re
from typing import Dict, Iterator, List, Sequence, Tuple, Union

from openmoe_jax.bigbench import metrics
from openmoe_jax.bigbench.prompting import Example
from openmoe_jax.bigbench.reading import DEFAULT_OUTPUT_REGEX, Part

DEFAULT_STOPS = ('.', '?', '!', ';', '\n')


@dataclasses.dataclass(frozen=True)
class Choose:
  """How likely is each of `continuations` after `prompt`? Answer: one log-likelihood each."""
  prompt: str
  continuations: Tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Generate:
  """What follows `prompt`? Answer: the generated text, without the prompt.

  Attributes:
    max_tokens: how much to generate at most.
    stop: as soon as the text has one of these behind something else, the rest of it has no influence (`finished`).
      Generating further is never wrong.
  """
  prompt: str
  max_tokens: int
  stop: Tuple[str, ...] = ()

  def finished(self, text: str) -> bool:
    """Whether generation may end with `text`."""
    text = text.removeprefix(' ')
    return not text.startswith(self.stop) and any(stop in text for stop in self.stop)


Request = Union[Choose, Generate]
Response = Union[Sequence[float], str]


@dataclasses.dataclass(frozen=True)
class Score:
  """What a model achieved in a part.

  Attributes:
    name: of the part.
    shots: worked examples in each prompt.
    examples: number of questions.
    preferred_score, low_score, high_score: as in `reading.Part`.
    figures: all its figures, on the scale of `metrics.RANGES`.
  """
  name: str
  shots: int
  examples: int
  preferred_score: str
  low_score: float
  high_score: float
  figures: Dict[str, float]

  @property
  def normalised(self) -> float:
    """The preferred score, with 0 for guessing (or no success) and 100 for the best possible."""
    return 100 * (self.figures[self.preferred_score] - self.low_score) / (self.high_score - self.low_score)


def requests(part: Part, examples: Sequence[Example], max_tokens: int = 256) -> List[Request]:
  """What to ask for the part's metrics: all questions of one kind after the other.

  A part with metrics of several kinds asks each question once for every kind.
  """
  return [request for kind in _kinds(part) for request in _requests(part, kind, examples, max_tokens)]


def _kinds(part: Part) -> List[str]:
  return list(dict.fromkeys(metrics.METRICS[name].kind for name in part.metrics))


def _requests(part: Part, kind: str, examples: Sequence[Example], max_tokens: int) -> Iterator[Request]:
  if part.stop_string:
    stop = (part.stop_string,)
  else:
    stop = DEFAULT_STOPS if part.output_regex == DEFAULT_OUTPUT_REGEX else ()
  for example in examples:
    if kind == 'text':
      yield Generate(example.prompt, max_tokens, stop)
    else:
      yield Choose(example.prompt, example.choices if kind == 'choice' else example.targets)


def answer(part: Part, text: str) -> str:
  """The answer in a generated text: up to and with the stop string, thereof the regular expression's first match.

  A text that begins with the stop string is not cut. No match is an empty answer.
  """
  if part.stop_string and text.find(part.stop_string) > 0:
    text = text[:text.find(part.stop_string) + len(part.stop_string)]
  if part.output_regex:
    text = next(iter(re.findall(part.output_regex, text)), '')
  return text


def score(part: Part, examples: Sequence[Example], responses: Sequence[Response], shots: int = 0) -> Score:
  """Marks for the responses to `requests(part, examples)`.

  A space in front of a generated text is dropped: a prompt without white space at its end leaves it to the model.

  Raises:
    ValueError: the responses are not those that were asked for.
  """
  kinds = _kinds(part)
  if len(responses) != len(kinds) * len(examples):
    raise ValueError(f'{part.name}: {len(kinds) * len(examples)} requests, {len(responses)} responses')
  figures: Dict[str, float] = {}
  targets = [example.targets for example in examples]
  for i, kind in enumerate(kinds):
    got = responses[i * len(examples):(i + 1) * len(examples)]
    if kind == 'choice':
      questions = [metrics.Choice.create(example.choices, example.scores, values, part.absolute_normalization)
                   for example, values in zip(examples, got)]
      figures |= metrics.choice_figures(part.metrics, questions)
    elif kind == 'text':
      answers = []
      for example, text in zip(examples, got):
        if not isinstance(text, str):
          raise ValueError(f'{part.name}: a generated text is expected, got {type(text).__name__}')
        answers.append(answer(part, text if example.prompt.endswith(' ') else text.removeprefix(' ')))
      figures |= metrics.text_figures(part.metrics, targets, answers)
    else:
      figures |= metrics.likelihood_figures(targets, got)
  return Score(part.name, shots, len(examples), part.preferred_score, part.low_score, part.high_score, figures)
