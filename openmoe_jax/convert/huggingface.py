"""Hugging Face folders, the released ones and ours: config.json, weights in shards, tokenizer, model code."""

import json
import os
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple
import zlib

from etils import epath
import numpy as np
import sentencepiece

from openmoe_jax import names
from openmoe_jax import paths
from openmoe_jax.config import ConfigError, ModelConfig, require, to_dict
from openmoe_jax.convert import hf_config
from openmoe_jax.convert import hf_tokenizer
from openmoe_jax.convert import model_card
from openmoe_jax.convert import weight_files
from openmoe_jax.convert.int8 import SCALE, is_quantized, quantize, scale_shape
from openmoe_jax.convert.tensors import PARAMS, Sink, Source, TensorInfo, require_same
from openmoe_jax.convert.torch_names import TorchName, torch_names

MANIFEST, RUN = 'openmoe_manifest.json', 'openmoe_run.json'
_INDEXES = ('model.safetensors.index.json', 'model.safetensors', 'pytorch_model.bin.index.json', 'pytorch_model.bin')
_MODEL_CODE = ('configuration_openmoe.py', 'feedforward_openmoe.py', 'modeling_openmoe.py')
_IGNORED = '.rotary_emb.inv_freq'  # a constant that some versions of the PyTorch code save


class HuggingFaceSource(Source):
  """A folder with config.json and weights, in safetensors or in PyTorch's format.

  Links are followed (a download cache keeps its files elsewhere); names in an index may not lead out of the folder.

  Raises:
    ConfigError: something is missing, damaged, or not what config.json says.
  """

  def __init__(self, directory: paths.PathLike):
    self._folder = paths.path(directory)
    self.where = str(self._folder)
    config = _json(self._folder / 'config.json')
    try:
      self.model = hf_config.from_hf_config(config)
    except ConfigError as error:
      raise ConfigError(f'{self._folder / "config.json"}: {error}') from error
    self._places = self._find()
    self._names = torch_names(self.model)
    shapes = names.t5x_shapes(self.model)
    wanted = {t.name: _torch_shape(shapes[n], t) for n, t in self._names.items()}
    self._int8 = {name for name, place in self._places.items() if place.dtype == np.int8}
    wanted.update({name + SCALE: scale_shape(wanted[name]) for name in self._int8 if name in wanted})
    require_same(self.where, {name: place.shape for name, place in self._places.items()}, wanted)
    self.tensors = {}
    for name, torch_name in self._names.items():
      dtype = np.dtype(np.float32) if torch_name.name in self._int8 else self._places[torch_name.name].dtype
      self.tensors[PARAMS + name] = TensorInfo(shapes[name], dtype)
    self._reader = weight_files.Reader()
    self._crc: Dict[str, Tuple[int, int]] = {}  # torch name -> (checksum of the first rows, how many)
    saved = _json(self._folder / RUN) if (self._folder / RUN).exists() else {}
    self.run, self.step = saved.get('run', {}), saved.get('step', 0)
    self._manifest = _json(self._folder / MANIFEST)['tensors'] if (self._folder / MANIFEST).exists() else {}
    self.checksums = (f'they have the checksums of {MANIFEST}' if self._manifest else
                      f'there is no {MANIFEST} to compare them with')
    files = sorted({place.file for place in self._places.values()})
    self.fingerprint = {'config': config, 'files': {f.name: [f.stat().length, f.stat().mtime] for f in files}}

  def _find(self) -> Dict[str, weight_files.Place]:
    index = next((name for name in _INDEXES if (self._folder / name).exists()), None)
    require(index is not None, f'{self._folder} holds no weights: expected one of {", ".join(_INDEXES)}')
    places = weight_files.safetensors_places if 'safetensors' in index else weight_files.torch_places
    if not index.endswith('.json'):
      found = places(self._folder / index)
    else:
      weight_map = _json(self._folder / index).get('weight_map')
      require(isinstance(weight_map, dict) and all(isinstance(f, str) for f in weight_map.values()),
              f'{self._folder / index} has no weight_map from tensors to files')
      for file in sorted(set(weight_map.values())):
        require(file == os.path.basename(file) and file not in ('', '.', '..') and '\\' not in file,
                f'{self._folder / index} names the file {file!r}; only names of files in the folder are read')
      found = {}
      for file in sorted(set(weight_map.values())):
        of_file = places(self._folder / file)
        absent = sorted(n for n, f in weight_map.items() if f == file and n not in of_file)
        require(not absent, f'{self._folder / index} says that {absent[:3]} are in {file}, which has them not')
        found.update({n: place for n, place in of_file.items() if weight_map.get(n) == file})
    return {name: place for name, place in found.items() if not name.endswith(_IGNORED)}

  def axis(self, name: str) -> int:
    return int(self._names[name.removeprefix(PARAMS)].transposed)

  def read(self, name: str, axis: int = 0, start: int = 0, stop: Optional[int] = None) -> np.ndarray:
    torch_name = self._names[name.removeprefix(PARAMS)]
    place = self._places[torch_name.name]
    length = place.shape[0]
    ours = self.axis(name)
    if axis == ours:
      part = self._rows(torch_name.name, place, start, length if stop is None else stop)
    else:
      part = self._rows(torch_name.name, place, 0, length)[:, start:stop]
    return part.T if torch_name.transposed else part

  def _rows(self, name: str, place: weight_files.Place, start: int, stop: int) -> np.ndarray:
    part = self._reader.read(place, start, stop)
    crc, rows = self._crc.get(name, (0, 0)) if start else (0, 0)
    if start == rows:
      self._crc[name] = zlib.crc32(part, crc), stop
    if name not in self._int8:
      return part
    scale = self._reader.read(self._places[name + SCALE], start, stop)
    return part.astype(np.float32) * scale

  def check(self, sums: Mapping[str, int]) -> None:
    """Against the manifest that our own exports have; only what was read from its beginning to its end."""
    del sums
    for name, (crc, rows) in self._crc.items():
      if name in self._manifest and rows == self._places[name].shape[0]:
        require(self._manifest[name]['crc32'] == f'{crc:08x}', f'{self._places[name].file}: {name} does not have the '
                f'checksum of {MANIFEST}; the file is damaged')


def _torch_shape(shape: Tuple[int, ...], torch_name: TorchName) -> Tuple[int, ...]:
  return tuple(reversed(shape)) if torch_name.transposed else tuple(shape)


def _json(file: epath.Path) -> Dict[str, Any]:
  require(file.exists(), f'{file} is missing')
  try:
    content = json.loads(file.read_text())
  except ValueError as error:
    raise ConfigError(f'{file} is not JSON: {error}') from error
  require(isinstance(content, dict), f'{file} is not a JSON object')
  return content


class Tokenizer(NamedTuple):
  """Attributes:

    model: the bytes of a sentencepiece model.
    extra_ids: sentinels on top of it.
    chat_template: such as `hf_tokenizer.RELEASED_CHAT_TEMPLATE`; None for none.
  """
  model: bytes
  extra_ids: int
  chat_template: Optional[str] = None

  @property
  def eos_id(self) -> int:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(self.model)
    return processor.eos_id()


class _Slot(NamedTuple):
  """Where a tensor of the sink lies."""
  shard: int
  begin: int
  shape: Tuple[int, ...]
  dtype: np.dtype


class HuggingFaceSink(Sink):
  """A folder, on a local disk, that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads.

  Args:
    model: what is exported.
    run, step: for the model card and for the way back; {} where nobody knows.
    source: where the weights come from, for the model card.
    shard_bytes: largest file, unless one tensor is larger.
    tokenizer: its files are written too.
    int8: kernels of experts and dense layers as int8 with scales (`convert.int8`), the rest as it comes.
    config: fields that go into config.json as they are.
  """

  def __init__(self, model: ModelConfig, run: Mapping[str, Any], step: int, source: str = '',
               shard_bytes: int = 5 * 10**9, tokenizer: Optional[Tokenizer] = None, int8: bool = False,
               config: Mapping[str, Any] = {}):
    self._model, self._run, self._step, self._source = model, run, step, source
    self._shard_bytes, self._tokenizer, self._int8, self._config = shard_bytes, tokenizer, int8, dict(config)
    self._names = torch_names(model)
    hf_config.to_hf_config(model, 'float32', **self._config)  # what PyTorch cannot do is refused before any work

  def describe(self) -> Any:
    tokenizer = self._tokenizer and [zlib.crc32(self._tokenizer.model), *self._tokenizer[1:]]
    return ['huggingface', to_dict(self._model), dict(self._run), self._step, self._shard_bytes, tokenizer, self._int8,
            self._config]

  def axis(self, name: str) -> int:
    return int(self._names[name.removeprefix(PARAMS)].transposed)

  def begin(self, directory: epath.Path, tensors: Mapping[str, TensorInfo], axes: Mapping[str, int],
            resumed: bool) -> None:
    del resumed  # files that are there keep their content
    self._folder = directory
    self._dtype = tensors[PARAMS + 'decoder/logits_dense/kernel'].dtype
    stored: Dict[str, Tuple[Tuple[int, ...], np.dtype]] = {}
    for name, torch_name in self._names.items():
      info = tensors[PARAMS + name]
      shape = _torch_shape(info.shape, torch_name)
      if self._quantizes(name):
        stored[torch_name.name] = shape, np.dtype(np.int8)
        stored[torch_name.name + SCALE] = scale_shape(shape), np.dtype(np.float32)
      else:
        stored[torch_name.name] = shape, info.dtype
    shards = _shards(stored, self._shard_bytes)
    self._files = [_file_name(i, len(shards)) for i in range(len(shards))]
    self._slots, self._descriptors = {}, []
    directory.mkdir(parents=True, exist_ok=True)
    for i, shard in enumerate(shards):
      header, begins = weight_files.safetensors_header({name: stored[name] for name in shard})
      descriptor = os.open(directory / self._files[i], os.O_RDWR | os.O_CREAT, 0o644)
      last = shard[-1]
      os.truncate(descriptor, begins[last] + int(np.prod(stored[last][0])) * stored[last][1].itemsize)
      os.pwrite(descriptor, header, 0)
      self._descriptors.append(descriptor)
      self._slots.update({name: _Slot(i, begins[name], *stored[name]) for name in shard})
    self._crc: Dict[str, int] = {}

  def _quantizes(self, name: str) -> bool:
    return self._int8 and is_quantized(name)

  def write(self, name: str, start: int, part: np.ndarray) -> None:
    name = name.removeprefix(PARAMS)
    torch_name = self._names[name]
    part = part.T if torch_name.transposed else part
    if self._quantizes(name):
      part, scale = quantize(part)
      self._put(torch_name.name + SCALE, start, scale)
    self._put(torch_name.name, start, part)

  def _put(self, name: str, start: int, rows: np.ndarray) -> None:
    slot = self._slots[name]
    data = memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
    self._crc[name] = zlib.crc32(data, self._crc.get(name, 0) if start else 0)
    at = slot.begin + start * (int(np.prod(slot.shape[1:], dtype=np.int64)) * slot.dtype.itemsize)
    while data:
      written = os.pwrite(self._descriptors[slot.shard], data, at)
      data, at = data[written:], at + written

  def close(self, name: str) -> Dict[str, Any]:
    torch_name = self._names[name.removeprefix(PARAMS)].name
    return {'crc32': {part: f'{self._crc[part]:08x}' for part in (torch_name, torch_name + SCALE) if part in self._crc}}

  def finish(self, records: Mapping[str, Mapping[str, Any]]) -> None:
    for descriptor in self._descriptors:
      os.close(descriptor)
    crc = {part: value for record in records.values() for part, value in record['crc32'].items()}
    slots = sorted(self._slots)
    total = sum(int(np.prod(s.shape, dtype=np.int64)) * s.dtype.itemsize for s in self._slots.values())
    write = lambda name, content: paths.write_text(self._folder / name, json.dumps(content, indent=2) + '\n')
    write(MANIFEST, {'version': 1, 'tensors': {name: {'file': self._files[self._slots[name].shard], 'crc32': crc[name]}
                                               for name in slots}})
    write(RUN, {'step': self._step, 'run': _public(self._run)})
    code = epath.Path(__file__).parent / 'hf_model'
    for name in _MODEL_CODE:
      paths.write_text(self._folder / name, (code / name).read_text())
    eos_id = self._tokenizer.eos_id if self._tokenizer else 1
    write('generation_config.json', hf_config.to_generation_config(self._model, eos_id))
    if self._tokenizer:
      hf_tokenizer.write_tokenizer(self._folder, self._tokenizer.model, self._tokenizer.extra_ids,
                                   self._model.vocab_size, self._tokenizer.chat_template,
                                   self._config.get('max_position_embeddings', hf_config.DEFAULT_MAX_LENGTH))
    dtype = self._dtype.name
    paths.write_text(self._folder / 'README.md', model_card.model_card(
        self._model, self._run, self._step, self._source, weights='int8' if self._int8 else dtype,
        tokenizer=bool(self._tokenizer), chat=bool(self._tokenizer and self._tokenizer.chat_template)))
    more = {'weight_format': 'int8'} if self._int8 else {}
    if len(self._files) > 1:
      write('model.safetensors.index.json', {'metadata': {'total_size': total}, 'weight_map': {
          name: self._files[self._slots[name].shard] for name in slots}})
    write('config.json', hf_config.to_hf_config(self._model, dtype, eos_token_id=eos_id, **more, **self._config))


def _public(run: Mapping[str, Any]) -> Dict[str, Any]:
  """Settings as they may leave this machine: of local paths only the last part."""
  last = lambda text: text if '://' in text else os.path.basename(text.rstrip('/'))
  run = {section: dict(values) if isinstance(values, Mapping) else values for section, values in run.items()}
  run.update({'model_dir': ''} if run else {})
  for section, name in (('data', 'vocabulary'), ('data', 'tfds_data_dir'), ('checkpoint', 'initial_checkpoint_path')):
    if name in run.get(section, {}):
      run[section][name] = last(run[section][name])
  return run


def _shards(stored: Mapping[str, Tuple[Tuple[int, ...], np.dtype]], most: int) -> List[List[str]]:
  """Names of the tensors in each file; a tensor and its scale stay together."""
  shards, size = [[]], 0
  for name, (shape, dtype) in stored.items():
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if shards[-1] and size + nbytes > most and not name.endswith(SCALE):
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += nbytes
  return shards


def _file_name(number: int, count: int) -> str:
  return 'model.safetensors' if count == 1 else f'model-{number + 1:05d}-of-{count:05d}.safetensors'
