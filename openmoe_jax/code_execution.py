"""HumanEval: whether programs that a model wrote pass their tests, and pass@k (Chen et al., 2021, arXiv 2107.03374).

    problems = read_problems('HumanEval.jsonl.gz')
    print(isolation().sentence())
    results = run_samples([(problems['HumanEval/0'], '    return True\\n')], allow_code_execution=True)
    pass_rates(results)

Model output never runs in the calling process: see `sandbox`.
"""

import concurrent.futures
import gzip
import json
import os
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from rich import progress
from rich.console import Console

from openmoe_jax import paths
from openmoe_jax.config import ConfigError, require
from openmoe_jax.sandbox import running
from openmoe_jax.sandbox.isolation import Isolation, isolation
from openmoe_jax.sandbox.running import Limits, PASSED

# A function has come to its end where one of these begins (Chen et al., 2021).
STOPS = ('\nclass', '\ndef', '\n#', '\nif', '\nprint')


class Problem(NamedTuple):
  """A problem, under the names of the published file."""
  task_id: str
  prompt: str
  entry_point: str
  canonical_solution: str
  test: str


class Result(NamedTuple):
  """How one completion of a problem did.

  Attributes:
    task_id: of the problem.
    status: one of `running.STATUSES`: 'passed', 'failed', 'timed out', 'out of memory'.
    error: last line of the error; '' if it passed.
    seconds: that it ran.
  """
  task_id: str
  status: str
  error: str
  seconds: float

  @property
  def passed(self) -> bool:
    return self.status == PASSED


def read_problems(file: paths.PathLike) -> Dict[str, Problem]:
  """Problems by their task_id, in the order of a file of JSON lines, which may be gzipped.

  Raises:
    ConfigError: there is no such file, or a line is not a problem.
  """
  file = paths.path(file)
  require(file.is_file(), f'{file}: no such file of HumanEval problems')
  problems: Dict[str, Problem] = {}
  try:
    text = file.read_bytes()
    text = gzip.decompress(text) if text[:2] == b'\x1f\x8b' else text
    lines = text.decode('utf-8').splitlines()
  except (OSError, EOFError, UnicodeDecodeError) as error:
    raise ConfigError(f'{file} cannot be read: {error}') from error
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except ValueError as error:
      raise ConfigError(f'{file}, line {number}: not JSON ({error})') from error
    for field in Problem._fields:
      require(isinstance(record, dict) and isinstance(record.get(field), str), f'{file}, line {number}: no text '
              f'{field!r}; a problem has {", ".join(Problem._fields)}')
    problem = Problem(*(record[field] for field in Problem._fields))
    require(problem.entry_point.isidentifier(), f'{file}, line {number}: entry_point = {problem.entry_point!r} is not '
            'the name of a function')
    require(problem.task_id not in problems, f'{file}, line {number}: {problem.task_id} is there twice')
    problems[problem.task_id] = problem
  require(bool(problems), f'{file} has no problems')
  return problems


def program(problem: Problem, completion: str) -> str:
  """The program that comes to its end if a completion is right."""
  return f'{problem.prompt}{completion}\n{problem.test}\ncheck({problem.entry_point})\n'


def run_samples(samples: Sequence[Tuple[Problem, str]], *, allow_code_execution: bool, workers: Optional[int] = None,
                limits: Limits = Limits(), within: Optional[Isolation] = None,
                console: Optional[Console] = None) -> List[Result]:
  """Runs completions against the tests of their problems, several at a time, with a bar on a terminal.

  Args:
    samples: (problem, completion), also several of one problem.
    allow_code_execution: whether the user has agreed to run code that nobody has read.
    workers: programs at a time; as many as this process may use cores, by default.
    limits: of each program.
    within: what to run them in; the strongest isolation of this machine by default. Print its `sentence` beforehand.
    console: where the bar appears.

  Returns:
    a result for each sample, in their order.

  Raises:
    ConfigError: code may not be executed, or a sample is not text.
  """
  require(allow_code_execution is True, 'HumanEval runs code that a model wrote: say --allow_code_execution '
          '(allow_code_execution=True) if it may run on this machine')
  workers = len(os.sched_getaffinity(0)) if workers is None else workers
  require(workers >= 1, f'workers = {workers} must be at least 1')
  for problem, completion in samples:
    require(isinstance(completion, str), f'{problem.task_id}: a completion is a {type(completion).__name__}, not a '
            'string')
  tools = (within or isolation()).tools
  console = console or Console()

  def check(sample: Tuple[Problem, str]) -> Result:
    outcome = running.run(program(*sample), tools, limits)
    return Result(sample[0].task_id, outcome.status, outcome.error, outcome.seconds)

  results: List[Optional[Result]] = [None] * len(samples)
  with progress.Progress(*progress.Progress.get_default_columns(), progress.MofNCompleteColumn(), console=console,
                         transient=True, disable=not console.is_terminal) as bar:
    task = bar.add_task('running programs', total=len(samples))
    pool = concurrent.futures.ThreadPoolExecutor(workers, 'sandbox')  # threads: each waits for a process of its own
    try:
      futures = {pool.submit(check, sample): number for number, sample in enumerate(samples)}
      for future in concurrent.futures.as_completed(futures):
        results[futures[future]] = future.result()
        bar.advance(task)
    finally:
      pool.shutdown(cancel_futures=True)
  return results


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
  """Chance that one of k samples passes, estimated without bias from more: 1 - C(n - c, k) / C(n, k).

  Args:
    num_samples: n, samples of the problem.
    num_passed: c, those that passed.
    k: at most n.

  Raises:
    ConfigError: numbers that cannot be.
  """
  require(1 <= k <= num_samples and 0 <= num_passed <= num_samples, f'pass@{k} of {num_passed} passed in {num_samples} '
          'samples: k must be between 1 and the number of samples, and no more can pass than there are')
  left = np.arange(num_samples - num_passed + 1, num_samples + 1)
  return 1. if num_samples - num_passed < k else float(1 - np.prod(1 - k / left))


def pass_rates(results: Sequence[Result], ks: Sequence[int] = (1, 10, 100)) -> Dict[str, float]:
  """{'pass@1': ..}: means over problems; without a k that a problem has too few samples for.

  Raises:
    ConfigError: there are no results.
  """
  require(bool(results), 'there are no results to take pass@k of')
  counts: Dict[str, List[int]] = {}
  for result in results:
    count = counts.setdefault(result.task_id, [0, 0])
    count[0] += 1
    count[1] += result.passed
  fewest = min(n for n, _ in counts.values())
  return {f'pass@{k}': float(np.mean([pass_at_k(n, c, k) for n, c in counts.values()])) for k in ks if k <= fewest}
