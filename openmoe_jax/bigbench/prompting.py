"""Prompts with worked examples ("shots"), chosen exactly as the benchmark's own program chooses them.

Its generator is numpy's RandomState, whose streams are frozen, so prompts are the same to the letter for the same seed.
"""

import dataclasses
from typing import Iterator, Optional, Sequence, Tuple

import numpy as np

from openmoe_jax.bigbench.reading import Part, Sample
from openmoe_jax.config import require

# What TensorFlow's string strip takes away, which the benchmark's seqio tasks use.
WHITE_SPACE = ' \t\n\v\f\r'


@dataclasses.dataclass(frozen=True)
class Example:
  """A question as a model sees it.

  Attributes:
    prompt: task prefix, worked examples, question. It can be empty (a task without questions at 0 shots).
    targets: right answers, at least one.
    choices: possible answers of a multiple-choice question, else empty.
    scores: what each choice is worth.
  """
  prompt: str
  targets: Tuple[str, ...]
  choices: Tuple[str, ...] = ()
  scores: Tuple[float, ...] = ()


def examples(part: Part, shots: int = 0, seed: int = 42, max_examples: Optional[int] = None, strip: bool = True
             ) -> Iterator[Example]:
  """The questions of a part, each after `shots` worked examples from the same part, never itself.

  With shots, or with fewer than all examples, they come in random order.

  Args:
    shots: worked examples per prompt.
    seed: of the choice of questions and shots.
    max_examples: how many questions at most; None for all.
    strip: take white space off both ends of prompts, targets and choices, as the benchmark's seqio tasks do, which the
      original ran; the space between 'A:' and the answer is then the tokenizer's affair. False: as its JSON tasks do,
      where a prompt may end with a space.

  Raises:
    ConfigError: fewer examples than the shots need, or a number below its minimum.
  """
  total = len(part.samples)
  require(shots >= 0, f'shots = {shots} is negative; valid: 0 to {total - 1} for {part.name}')
  require(shots < total, f'shots = {shots} is too many for {part.name} with {total} examples; valid: 0 to {total - 1}')
  require(max_examples is None or max_examples >= 1, f'max_examples = {max_examples} leaves nothing; valid: at least 1')
  return _examples(part, shots, seed, total if max_examples is None else min(max_examples, total), strip)


def _examples(part: Part, shots: int, seed: int, count: int, strip: bool) -> Iterator[Example]:
  total = len(part.samples)
  generator = np.random.RandomState(seed)
  order: Sequence[int] = range(total)
  if shots or count < total:
    order = generator.permutation(total)[:count]
  for index in order:
    prompt = part.samples[index].text
    if shots:
      prompt = _shots(part, index, shots, generator) + prompt
    yield _example(part.samples[index], part.task_prefix + prompt, strip)


def _shots(part: Part, index: int, shots: int, generator: np.random.RandomState) -> str:
  """Worked examples other than number `index`, each with a separator behind it."""
  picked = generator.permutation(len(part.samples) - 1)[:shots]
  samples = [part.samples[i + (i >= index)] for i in picked]
  # Drawn even where there is one answer only, because a draw moves the generator.
  worked = [sample.text + sample.targets[generator.choice(len(sample.targets))] for sample in samples]
  return ''.join(text + part.separator for text in worked)


def _example(sample: Sample, prompt: str, strip: bool) -> Example:
  if not strip:
    return Example(prompt, sample.targets, sample.choices, sample.scores)
  return Example(prompt.strip(WHITE_SPACE), tuple(target.strip(WHITE_SPACE) for target in sample.targets),
                 tuple(choice.strip(WHITE_SPACE) for choice in sample.choices), sample.scores)
