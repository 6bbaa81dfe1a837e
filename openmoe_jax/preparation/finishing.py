"""The data set that finished shards make: files by the names of TFDS, what TFDS wants to know, and what was done."""

import collections
import concurrent.futures
import json
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from openmoe_jax import paths
from openmoe_jax.config import require
from openmoe_jax.preparation.pieces import Shard, Split, data_file
from openmoe_jax.preparation.plan import Plan
from openmoe_jax.tensorflow_setup import import_tfds

RECORD_FILE, MALFORMED_FILE = 'preparation.json', 'malformed_records.txt'
_THREADS = 16  # that move files


class Summary(NamedTuple):
  """Attributes:
    examples, example_bytes, shards: {split: how many}.
    left_out: {why: how many records}.
    malformed: how many records were skipped.
    input_bytes: of the raw files.
  """
  examples: Dict[str, int]
  example_bytes: Dict[str, int]
  shards: Dict[str, int]
  left_out: Dict[str, int]
  malformed: int
  input_bytes: int


def _of_split(shards: Sequence[Shard], split: str) -> List[Tuple[Shard, Split]]:
  return [(shard, shard.splits[split]) for shard in shards if split in shard.splits]


def _left_out(shards: Sequence[Shard]) -> Dict[str, int]:
  total: Dict[str, int] = collections.Counter()
  for shard in shards:
    total.update(shard.left_out)
  return dict(sorted(total.items()))


def require_examples(plan: Plan, shards: Sequence[Shard]) -> None:
  """Raises `ConfigError` if a split has no examples."""
  name = plan.builder.name
  for split in plan.builder.splits:
    if _of_split(shards, split):
      continue
    skipped = sum(len(shard.malformed) for shard in shards)
    reasons = [f'{count:,} {why}' for why, count in _left_out(shards).items()]
    reasons += [f'{skipped:,} malformed'] if skipped else []
    others = sum(content.examples for shard in shards for content in shard.splits.values())
    require(others > 0, f'{name} has no examples: ' + (
        f'all records are left out ({", ".join(reasons)})' if reasons else
        f'{len(plan.files)} files, and no records in them'))
    require(False, f'{name} has no examples in its split {split!r}, and {others:,} in the other; change --validation')


def move(plan: Plan, shards: Sequence[Shard]) -> None:
  """Gives the files of shards the names by which TFDS finds them; those that have been moved are left alone."""
  plan.folder.mkdir(parents=True, exist_ok=True)
  moves = []
  for split in plan.builder.splits:
    files = _of_split(shards, split)
    for i, (shard, _) in enumerate(files):
      target = _names(plan, split).sharded_filepath(shard_index=i, num_shards=len(files))
      moves.append((data_file(plan, shard.piece, shard.number, split), target))
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    list(threads.map(_move, moves))


def _names(plan: Plan, split: str) -> Any:
  """TFDS's names of the files of a split."""
  return import_tfds().core.ShardedFileTemplate(data_dir=plan.folder, dataset_name=plan.builder.name, split=split,
                                                filetype_suffix='tfrecord')


def _move(files: Tuple[Any, Any]) -> None:
  source, target = files
  if source.exists():
    source.replace(target)
  require(target.exists(), f'{source} is gone; remove {source.parent} and {target.parent} and begin anew')


def describe(plan: Plan, shards: Sequence[Shard]) -> Summary:
  """Writes dataset_info.json and features.json, and for us what was prepared from what."""
  tfds = import_tfds()
  builder = plan.builder
  splits = {split: [content for _, content in _of_split(shards, split)] for split in builder.splits}
  malformed = [f'{where}: {why}' for shard in shards for where, why in shard.malformed]
  summary = Summary(
      examples={split: sum(shard.examples for shard in files) for split, files in splits.items()},
      example_bytes={split: sum(shard.example_bytes for shard in files) for split, files in splits.items()},
      shards={split: len(files) for split, files in splits.items()}, left_out=_left_out(shards),
      malformed=len(malformed), input_bytes=sum(file.size for file in plan.files))
  if malformed:
    paths.write_text(plan.folder / MALFORMED_FILE, '\n'.join(malformed) + '\n')
  record = {'plan': plan.identity(), 'summary': summary._asdict()}
  paths.write_text(plan.folder / RECORD_FILE, json.dumps(record, indent=1))
  text = tfds.features.Text()
  features = {name: text for name in builder.features}
  features.update({name: tfds.features.Sequence(text) for name in builder.lists})
  infos = [tfds.core.SplitInfo(
      name=split, shard_lengths=[shard.examples for shard in files], num_bytes=summary.example_bytes[split],
      filename_template=_names(plan, split)) for split, files in splits.items()]
  tfds.folder_dataset.write_metadata(
      data_dir=plan.folder, features=tfds.features.FeaturesDict(features), split_infos=infos, version=builder.version,
      description=f'{builder.layout}; {len(plan.files):,} files, prepared by openmoe_jax.', check_data=False)
  return summary


def read(plan: Plan) -> Optional[Tuple[Mapping[str, Any], Summary]]:
  """(plan's identity, summary) of what lies in the plan's folder; None if it is not from here, or not finished."""
  if not {RECORD_FILE, 'dataset_info.json', 'features.json'} <= set(paths.entries(plan.folder)):
    return None
  record = json.loads((plan.folder / RECORD_FILE).read_text())
  return record['plan'], Summary(**record['summary'])
