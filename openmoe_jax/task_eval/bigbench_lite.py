"""BIG-bench-Lite, asked of a model."""

from typing import Any, Dict, List, Mapping, Optional, Sequence

from openmoe_jax.bigbench import lite, prompting, requests
from openmoe_jax.bigbench.reading import Task
from openmoe_jax.config import EvalConfig, require
from openmoe_jax.task_eval.answers import Answerer

NAME = 'bigbench_lite'


def read(settings: EvalConfig) -> Dict[str, Task]:
  """All 24 tasks.

  Raises:
    ConfigError: no data, or a task with fewer examples than the shots need.
  """
  require(settings.bigbench_data, f"EvalConfig.tasks names {NAME!r}, but EvalConfig.bigbench_data is not set: give the "
          'source distribution of bigbench 1.0.0, or a folder of its tasks')
  tasks = lite.read_lite(settings.bigbench_data)
  lite.check(tasks, settings.shots, _limit(settings))
  return tasks


def count(tasks: Mapping[str, Task], settings: EvalConfig) -> int:
  """Answers that are asked for: generated texts, and possible answers whose likelihood is taken."""
  limit = _limit(settings)
  total = 0
  for task in tasks.values():
    for part in map(lite.only_preferred, task.parts):
      asked = prompting.examples(part, settings.shots, max_examples=limit and limit // len(task.parts))
      total += sum(len(request.continuations) if isinstance(request, requests.Choose) else 1
                   for request in requests.requests(part, list(asked)))
  return total


def _limit(settings: EvalConfig) -> Optional[int]:
  return settings.max_examples or None


def evaluate(tasks: Mapping[str, Task], answerer: Answerer) -> Dict[str, Any]:
  """`figures`: the aggregate as `normalised`, and every task's normalised score under its name; `predictions`: a
  dictionary a request."""
  settings = answerer.settings
  predictions: List[Dict[str, Any]] = []

  def respond(asked: Sequence[requests.Request]) -> List[requests.Response]:
    responses = _respond(asked, answerer)
    for request, response in zip(asked, responses):
      choices = {'choices': list(request.continuations)} if isinstance(request, requests.Choose) else {}
      predictions.append({'input': request.prompt, **choices, 'response': response})
    return responses

  report = lite.evaluate(tasks, respond, shots=settings.shots, max_examples=_limit(settings), preferred_only=True)
  figures = {'normalised': report.normalised, **{name: task.normalised for name, task in report.tasks.items()}}
  return {'figures': figures, 'predictions': predictions}


def _respond(asked: Sequence[requests.Request], answerer: Answerer) -> List[requests.Response]:
  responses: List[Any] = [None] * len(asked)
  choose = [i for i, request in enumerate(asked) if isinstance(request, requests.Choose)]
  if choose:
    pairs = [(i, choice) for i in choose for choice in asked[i].continuations]
    questions = {i: answerer.encode(asked[i].prompt) for i in choose}
    scores, _ = answerer.score([questions[i] for i, _ in pairs], [answerer.encode(choice) for _, choice in pairs], NAME)
    for (i, _), value in zip(pairs, scores):
      responses[i] = [*(responses[i] or ()), float(value)]
  generate = [i for i, request in enumerate(asked) if isinstance(request, requests.Generate)]
  if generate:
    # A question without text (some tasks have one at 0 shots) begins behind an end of sequence, as a document does.
    prompts = [answerer.encode(asked[i].prompt) or [answerer.model.vocabulary.eos_id] for i in generate]
    most = min(asked[generate[0]].max_tokens, answerer.settings.max_new_tokens)
    answers = answerer.generate(prompts, NAME, most, num_samples=1, greedy=True,
                                finished=lambda row, text: asked[generate[row]].finished(text))
    for i, answer in zip(generate, answers):
      responses[i] = answer[0].text
  return responses
