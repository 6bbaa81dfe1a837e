"""HumanEval's own figure: whether generated programs pass their tests (`code_execution`)."""

from typing import Any, Dict, List, Mapping, Sequence, Tuple

from openmoe_jax import code_execution, text_decoding
from openmoe_jax.task_eval.answers import Answer

_SENTINEL = '<extra_id_0> '  # of UL2, in front of an answer


def has_programs(examples: Sequence[Mapping[str, Any]]) -> bool:
  """Whether examples carry the tests of HumanEval's problems."""
  return bool(examples) and set(code_execution.Problem._fields) <= set(examples[0])


def completion(text: str) -> str:
  """The function body in an answer: what stands behind a sentinel, up to where a function has come to its end."""
  return text_decoding.cut(text.split(_SENTINEL)[-1], code_execution.STOPS)[0]


def run(examples: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[Answer]]
        ) -> Tuple[Dict[str, float], List[List[str]]]:
  """Runs every answer. Only for users who have allowed it.

  Returns:
    {'pass@1': percent, ..} as far as there are samples, and each answer's status.
  """
  problems = [code_execution.Problem(*(example[field].decode('utf-8') for field in code_execution.Problem._fields))
              for example in examples]
  samples = [(problem, completion(answer.text)) for problem, row in zip(problems, answers) for answer in row]
  results = code_execution.run_samples(samples, allow_code_execution=True)
  rates = code_execution.pass_rates(results)
  status = iter(result.status for result in results)
  return {name: 100 * rate for name, rate in rates.items()}, [[next(status) for _ in row] for row in answers]
