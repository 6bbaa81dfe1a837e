"""Prompts from a file of JSON lines, continuations into another one, with which a later start goes on."""

import fcntl
import json
import os
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from openmoe_jax import paths
from openmoe_jax import text_decoding
from openmoe_jax.bar import Bar
from openmoe_jax.config import ConfigError, require
from openmoe_jax.progress import short_number

FIELD = 'prompt'
RESULT = 'output'
SETTINGS = '.settings.json'
# Prompts of similar length share a batch; what is sorted together is written together.
_BATCHES_A_BLOCK = 4


class Job(NamedTuple):
  """What is to be done.

  Attributes:
    records: one a line of the input, with `prompt`.
    input: where they come from.
    output: local file; lines are the records in the same order, with `output`: a text, or a list of them if
      options['num_samples'] was given.
    settings: everything that a result depends on, as plain data; kept beside the output.
  """
  records: Sequence[Dict[str, Any]]
  input: str
  output: str
  settings: Mapping[str, Any]


def read_prompts(file: paths.PathLike) -> List[Dict[str, Any]]:
  """The records of a file of JSON lines, local or gs://.

  Raises:
    ConfigError: no such file, or a line that is no object with a text `prompt`, or that has an `output` already.
  """
  require(paths.path(file).exists() and not paths.path(file).is_dir(), f'--input={file}: there is no such file')
  records = []
  with paths.path(file).open('rb') as stream:
    for number, line in enumerate(stream, 1):
      if not line.strip():
        continue
      try:
        record = json.loads(line)
      except ValueError as error:
        raise ConfigError(f'{file}, line {number} is not JSON ({error})') from error
      require(isinstance(record, dict) and isinstance(record.get(FIELD), str) and record[FIELD],
              f'{file}, line {number} must be an object with a text "{FIELD}" that is not empty, such as '
              f'{{"{FIELD}": "Once upon a time"}}')
      require(RESULT not in record, f'{file}, line {number} has a field "{RESULT}", which is where results go')
      records.append(record)
  require(records, f'--input={file} has no lines')
  return records


def check_output(output: str, settings: Mapping[str, Any], count: int) -> Tuple[int, int]:
  """How many results there are already, and their bytes; behind them, a killed process may have left part of a line.

  Raises:
    ConfigError: the output lies elsewhere than on a local disk, has other settings or is not the result of such a job.
  """
  require(paths.is_local(output), f'--output={output} must be a local file: an object store cannot add lines to one')
  file, beside = paths.path(output), paths.path(output + SETTINGS)
  if not file.exists() or not file.stat().length:
    return 0, 0
  advice = 'give another --output, or delete the file to begin anew'
  require(beside.exists(), f'--output={output} exists, but not {beside.name} beside it, so openmoe-infer has not begun '
          f'it; {advice}')
  try:
    old = json.loads(beside.read_text())
  except ValueError as error:
    raise ConfigError(f'{beside} is not JSON ({error}); {advice}') from error
  for name, value in json.loads(json.dumps(settings)).items():
    require(old.get(name) == value, f'--output={output} was begun with {name} = {old.get(name)!r}, now it is '
            f'{value!r}; {advice}')
  text = file.read_bytes()
  lines = text.count(b'\n')
  require(lines <= count, f'--output={output} has {lines} lines, but the input {count}; {advice}')
  return lines, text.rfind(b'\n') + 1


def run(job: Job, model: Any, max_new_tokens: int, prompt_of: Callable[[str], str], batch_size: int,
        say: Callable[[str], None] = print, **options) -> int:
  """Continues the prompts that have no result yet; gives their number.

  Args:
    job: see there.
    model: of `loading.load`.
    max_new_tokens: see `text_decoding.generate_texts`.
    prompt_of: from a record's text to what the model continues.
    batch_size: most continuations at a time. Changes no result, so it may differ from start to start.
    say: prints a line.
    **options: of `text_decoding.generate_texts`.

  Raises:
    ConfigError: as `check_output`; another process writes the same file; a prompt is too long for options['window'].
  """
  texts = [prompt_of(record[FIELD]) for record in job.records]
  window = options.get('window')
  for number, ids in enumerate(text_decoding.encode(model, texts), 1):
    require(ids and (window is None or len(ids) < window), f'{job.input}: prompt {number} has {len(ids)} tokens; with '
            f'the start id in front, 1 to {(window or 0) - 1} fit the window of {window} positions (--window)')
  paths.path(job.output).parent.mkdir(parents=True, exist_ok=True)
  with open(job.output, 'ab') as stream:
    try:
      fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise ConfigError(f'--output={job.output} is being written by another process') from error
    done, size = check_output(job.output, job.settings, len(texts))
    stream.truncate(size)
    if not done:
      paths.write_text(job.output + SETTINGS, json.dumps(job.settings, indent=1) + '\n')
    block = max(batch_size // (options.get('num_samples') or 1), 1) * _BATCHES_A_BLOCK
    with Bar(len(texts), say, 'generating', lambda n: f'{short_number(n)} prompts') as bar:
      bar.advance(done)
      for start in range(done, len(texts), block):
        part = range(start, min(start + block, len(texts)))
        results = text_decoding.generate_texts(model, [texts[i] for i in part], max_new_tokens, batch_size=batch_size,
                                               row_ids=list(part), **options)
        for i, result in zip(part, results):
          stream.write(json.dumps({**job.records[i], RESULT: result}, ensure_ascii=False).encode() + b'\n')
        stream.flush()
        os.fsync(stream.fileno())
        bar.advance(len(part))
  return len(texts) - done
