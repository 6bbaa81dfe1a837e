"""Checkpoints made of others, part by part: a dense model becomes sparse, a vocabulary grows, models are averaged.

Every function is a `Source` around other sources, so that `transfer` can write it in any format. Only parameters are
passed on: what an optimizer remembers of one model says nothing about another. Random numbers are addressed by seed,
tensor and row, so a tensor has the same values however its reads are cut.
"""

import collections
import functools
import math
import numbers
import threading
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple
import zlib

import numpy as np

from openmoe_jax import names
from openmoe_jax.config import ModelConfig, require, to_dict
from openmoe_jax.convert.tensors import PARAMS, Source, TensorInfo, part_rows, sum_bits

_EXPERTS = ('behind', 'copies')
_EMBEDDING, _LOGITS = PARAMS + 'token_embedder/embedding', PARAMS + 'decoder/logits_dense/kernel'
_GROWING_AXIS = {_EMBEDDING: 0, _LOGITS: 1}
_ROUTER_STD = 0.02  # that of moe.RouterWeights
_NEW_ROW_STD = 0.01  # relative to that of the old rows

_DENSE_MATHS = ('vocab_size', 'emb_dim', 'mlp_dim', 'num_heads', 'head_dim', 'num_layers', 'mlp_activations',
                'layer_norm_epsilon', 'inputs_bidirectional_attention')
_SPARSE_MATHS = ('moe_interval', 'num_experts', 'num_selected_experts', 'router', 'extra_mlp', 'parallel_moe', 'parallel_attention',
                 'num_shared_experts', 'normalize_gates', 'num_expert_groups', 'num_selected_groups', 'hash_seed')


class _Reader:
  """Reads one source and remembers the sums of what came, so that it can be checked whatever is made of it."""

  def __init__(self, source: Source):
    self._source = source
    # (tensor, axis, index) -> the sum of everything before that index; of a whole tensor in `_sums`.
    self._before: Dict[Tuple[str, int, int], int] = {}
    self._sums: Dict[str, int] = {}
    self._moments: Dict[Tuple[str, int], Tuple[np.ndarray, np.ndarray]] = {}
    self._lock = threading.Lock()

  def read(self, name: str, axis: int = 0, start: int = 0, stop: Optional[int] = None) -> np.ndarray:
    length = self._source.tensors[name].shape[axis]
    stop = length if stop is None else stop
    part = self._source.read(name, axis, start, stop)
    before = self._before.get((name, axis, start)) if start else 0
    if before is not None and name not in self._sums:
      total = (before + sum_bits(part)) % 2**32
      if stop == length:
        self._sums[name] = total
      else:
        self._before[name, axis, stop] = total
    return part

  def _parts(self, name: str) -> Iterator[Tuple[int, int, int, np.ndarray]]:
    """axis, start, stop and values of all parts of a tensor."""
    info, axis = self._source.tensors[name], self._source.axis(name)
    rows, length = part_rows(info, axis), info.shape[axis]
    for start in range(0, length, rows):
      stop = min(start + rows, length)
      yield axis, start, stop, self.read(name, axis, start, stop)

  def moments(self, name: str, over: int) -> Tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of a matrix over one axis, float64; computed on first use, by one thread."""
    with self._lock:
      if (name, over) not in self._moments:
        shape = self._source.tensors[name].shape
        total, squares = np.zeros((2, shape[1 - over]))
        for axis, start, stop, part in self._parts(name):
          part = part.astype(np.float64)
          at = slice(None) if axis == over else slice(start, stop)
          total[at] += part.sum(axis=over)
          squares[at] += np.square(part, out=part).sum(axis=over)
        mean = total / shape[over]
        self._moments[name, over] = mean, np.sqrt(np.maximum(squares / shape[over] - mean**2, 0))
      return self._moments[name, over]

  def check(self) -> None:
    """Checks the source; what was not read from beginning to end, because a conversion was resumed, is read again."""
    parameters = _parameters(self._source)
    for name in parameters:
      if name not in self._sums:
        collections.deque(self._parts(name), maxlen=0)
    self._source.check({name: self._sums[name] for name in parameters})


def _parameters(source: Source) -> List[str]:
  return [name for name in source.tensors if name.startswith(PARAMS)]


def _with_model(run: Mapping[str, Any], model: ModelConfig) -> Mapping[str, Any]:
  return {**run, 'model': to_dict(model)} if run else {}


def _require_equal(what: str, first: ModelConfig, second: ModelConfig, fields: Sequence[str]) -> None:
  pairs = {field: (getattr(first, field), getattr(second, field)) for field in fields}
  differ = [f'{field} {one!r} and {other!r}' for field, (one, other) in pairs.items() if one != other]
  require(not differ, f'{what}: these settings of ModelConfig must be the same: {"; ".join(differ)}')


def _require_seed(seed: int) -> None:
  require(isinstance(seed, numbers.Integral) and 0 <= seed < 2**64, f'seed = {seed!r} must be an integer from 0 to '
          '2**64 - 1')


def _normal(seed: int, name: str, matrix: int, row: int, width: int) -> np.ndarray:
  """Standard normal float32 [width], the same whenever and wherever it is asked for.

  Philox is a function of key and counter. Rows count in the upper words, so that no two of them meet.
  """
  generator = np.random.Philox(key=np.array([seed, zlib.crc32(name.encode())], np.uint64),
                               counter=np.array([0, 0, row, matrix], np.uint64))
  return np.random.Generator(generator).standard_normal(width, np.float32)


class _Grown(Source):
  """Made of the parameters of other sources, which are read through `_readers`."""
  _readers: Sequence[_Reader]

  def check(self, sums: Mapping[str, int]) -> None:
    """Checks the other sources, by what was read of them."""
    del sums
    for reader in self._readers:
      reader.check()


class UpcycledSource(_Grown):
  """A dense checkpoint as the start of a sparse model (sparse upcycling; Komatsuzaki et al. 2022, arXiv 2212.05055).

  Layer i of the sparse model takes attention, norms and, where it is not sparse, the FFN of layer i of the dense one.
  In a sparse layer, x being its normalised input, FFN_e expert e with gate g_e (the router's raw probability, 0 where
  the expert was not chosen or was full), the layer computes sum_e g_e(x) FFN_e(x) + FFN_extra(x). (Without
  parallel_moe, FFN_extra has the experts' output in its input; at the start one of the two is 0.)

  'behind': FFN_extra is the dense FFN, with a copy of its norm, and the experts are copies of the dense FFN with
    wo = 0. The sum over experts is exactly 0, whatever is chosen or dropped: the logits are those of the dense model
    in every capacity mode. Training starts at the experts' wo, whose gradient is that of hidden units the dense model
    has learnt, scaled by g_e; wi_0, wi_1 and the router (but for its auxiliary losses) follow once wo has moved.
    Experts come to differ by the tokens that reach them.
  'copies': the paper's way. FFN_e is the dense FFN, and FFN_extra, if the model has one, a copy of it with wo = 0. The
    sum is FFN(x) sum_e g_e(x): the dense model's logits, to rounding, if the gates of every token sum to 1, that is
    with num_selected_experts == num_experts and capacity_mode 'none'. Otherwise FFN(x) is scaled down by the sum of
    its gates, which are not renormalised: at least num_selected_experts / num_experts, unless an expert is full.

  Noise: every kernel copied into an expert gets `noise` times the standard deviation of that kernel times standard
  normal numbers, others for every expert; a wo that is 0 stays 0. The router is float32, normal with standard deviation
  0.02 as in a new model. All else has the dtype of the dense checkpoint.

  Args:
    dense: parameters of a model with num_experts == 0.
    model: the sparse model.
    experts: 'behind' or 'copies'.
    noise: see above; not negative.
    seed: of router and noise.

  Raises:
    ConfigError: the two models do not fit together, or an option is not valid.
  """

  def __init__(self, dense: Source, model: ModelConfig, experts: str = 'behind', noise: float = 0., seed: int = 0):
    require(experts in _EXPERTS, f'experts = {experts!r} is not known; valid: {", ".join(map(repr, _EXPERTS))}')
    require(isinstance(noise, numbers.Real) and math.isfinite(noise) and noise >= 0,
            f'noise = {noise!r} must be a number that is not negative')
    _require_seed(seed)
    require(not dense.model.num_experts, f'{dense.where} has num_experts = {dense.model.num_experts}; upcycling starts '
            'from a dense checkpoint, with num_experts = 0')
    require(model.num_experts > 0, 'upcycling leads to a sparse model, but ModelConfig.num_experts = 0')
    _require_equal(f'upcycling {dense.where}, dense model and sparse', dense.model, model, _DENSE_MATHS)
    require(not model.parallel_attention and not model.num_shared_experts, 'upcycling leads to a model without '
            f'parallel_attention and num_shared_experts, not to {model.parallel_attention} and {model.num_shared_experts}')
    require(model.extra_mlp or experts != 'behind', "experts = 'behind' needs ModelConfig.extra_mlp = True, which "
            "takes the dense FFN; without it, experts = 'copies' is what can be done")
    self.where, self.model, self.run = dense.where, model, _with_model(dense.run, model)
    self.fingerprint = {'upcycled': dense.fingerprint, 'model': to_dict(model), 'experts': experts,
                        'noise': float(noise), 'seed': int(seed)}
    self._dense, self._noise, self._seed = dense, float(noise), int(seed)
    self._reader, = self._readers = [_Reader(dense)]
    self._zero = '/expert/wo/' if experts == 'behind' else '/extra_mlp/wo/'
    self.tensors = {PARAMS + name: self._info(PARAMS + name, shape) for name, shape in names.t5x_shapes(model).items()}

  def _info(self, name: str, shape: Tuple[int, ...]) -> TensorInfo:
    if _is_router(name):
      return TensorInfo(shape, np.dtype(np.float32))
    info = self._dense.tensors[_dense_name(name)]
    # An expert costs the whole dense kernel.
    return TensorInfo(shape, info.dtype, (1, *info.shape)) if '/expert/' in name else info

  def axis(self, name: str) -> int:
    # Expert by expert, although that reads the dense kernel once for each: so do formats keep them, and meshes read.
    return 0 if _is_router(name) or '/expert/' in name else self._dense.axis(_dense_name(name))

  def read(self, name: str, axis: int = 0, start: int = 0, stop: Optional[int] = None) -> np.ndarray:
    info = self.tensors[name]
    index = [range(size) for size in info.shape]
    index[axis] = index[axis][start:stop]
    if _is_router(name):
      return np.stack([_ROUTER_STD * _normal(self._seed, name, 0, row, info.shape[1])[index[1].start:index[1].stop]
                       for row in index[0]])
    if self._zero in name:
      return np.zeros([len(indices) for indices in index], info.dtype)
    if '/expert/' not in name:
      return self._reader.read(_dense_name(name), axis, start, stop)
    kernel = self._reader.read(_dense_name(name), *((axis - 1, start, stop) if axis else ()))
    if not self._noise:
      return np.broadcast_to(kernel, [len(indices) for indices in index])  # without copies
    return self._noisy(name, kernel, *index)

  def _noisy(self, name: str, kernel: np.ndarray, experts: range, rows: range, columns: range) -> np.ndarray:
    mean, std = self._reader.moments(_dense_name(name), 0)
    scale = np.float32(self._noise * math.sqrt(np.mean(std**2) + np.var(mean)))  # of the whole kernel
    noisy = np.empty((len(experts), *kernel.shape), kernel.dtype)
    for i, expert in enumerate(experts):
      for j, row in enumerate(rows):
        noise = _normal(self._seed, name, expert, row, self.tensors[name].shape[2])[columns.start:columns.stop]
        noisy[i, j] = kernel[j].astype(np.float32) + scale * noise
    return noisy


def _is_router(name: str) -> bool:
  return '/router/' in name


def _dense_name(name: str) -> str:
  """Where in the dense model a tensor of the sparse one comes from."""
  return name.replace('/mlp/expert/', '/mlp/').replace('/extra_mlp/', '/mlp/').replace('/pre_extra_', '/pre_')


class ExtendedVocabularySource(_Grown):
  """A model with more tokens than it was trained with; old tokens keep their ids and their parameters, bit by bit.

  A new row of the embedding is the mean of the old rows plus noise, for each feature a hundredth of the old rows'
  standard deviation: an input the model is used to, and no two the same. A new column of the output matrix is the mean
  of the old columns, so a new token's logit is the mean m of the old tokens' logits. With Z the sum of exp(logit) over
  the V old tokens, exp(m) <= Z / V (Jensen), so k new tokens together get a probability of k exp(m) / (Z + k exp(m)) <=
  k / (V + k), and an old token's log-probability falls by log(1 + k / V) at most; a column of zeros has no such bound.
  Old logits stay what they are; only the softmax has more terms.

  Args:
    source: any checkpoint; its optimizer state is left behind.
    vocab_size: rows of the embedding afterwards.
    seed: of the noise.

  Raises:
    ConfigError: `vocab_size` is not larger than before, or the seed is not valid.
  """

  def __init__(self, source: Source, vocab_size: int, seed: int = 0):
    _require_seed(seed)
    self.model = source.model.replace(vocab_size=vocab_size)
    self._old = source.model.vocab_size
    require(self.model.vocab_size > self._old, f'vocab_size = {vocab_size} must be larger than that of {source.where}, '
            f'which is {self._old}')
    self.where, self.step, self.run = source.where, source.step, _with_model(source.run, self.model)
    self.fingerprint = {'extended': source.fingerprint, 'vocab_size': self.model.vocab_size, 'seed': int(seed)}
    self._source, self._seed = source, int(seed)
    self._reader, = self._readers = [_Reader(source)]
    self.tensors = {name: source.tensors[name] for name in _parameters(source)}
    for name in _GROWING_AXIS:
      self.tensors[name] = self.tensors[name]._replace(shape=names.t5x_shapes(self.model)[name.removeprefix(PARAMS)])

  def axis(self, name: str) -> int:
    return self._source.axis(name)

  def read(self, name: str, axis: int = 0, start: int = 0, stop: Optional[int] = None) -> np.ndarray:
    if name not in _GROWING_AXIS:
      return self._reader.read(name, axis, start, stop)
    growing = _GROWING_AXIS[name]
    tokens, features = range(self.model.vocab_size), range(self.model.emb_dim)
    if axis != growing:
      old = self._reader.read(name, axis, start, stop)
      return np.concatenate([old, self._new(name, tokens[self._old:], features[start:stop])], growing)
    tokens, parts = tokens[start:stop], []
    if tokens.start < self._old:
      parts.append(self._reader.read(name, axis, tokens.start, min(tokens.stop, self._old)))
    if tokens.stop > self._old:
      parts.append(self._new(name, range(max(tokens.start, self._old), tokens.stop), features))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, growing)

  def _new(self, name: str, tokens: range, features: range) -> np.ndarray:
    """Rows, or columns, of new tokens."""
    mean, std = self._reader.moments(name, _GROWING_AXIS[name])
    at = slice(features.start, features.stop)
    rows = np.tile(mean[at].astype(self.tensors[name].dtype), (len(tokens), 1))
    if name == _EMBEDDING:
      for i, token in enumerate(tokens):
        noise = _normal(self._seed, name, 0, token, len(mean))
        rows[i] = mean[at] + _NEW_ROW_STD * std[at] * noise[at]
    return rows if name == _EMBEDDING else rows.T


class AveragedSource(_Grown):
  """The weighted mean of the parameters of several checkpoints, such as the last ones of a run.

  Sums are float64 and rounded once, to the widest of the checkpoints' dtypes: the mean of equal checkpoints is that
  checkpoint, bit by bit. The step is the largest; model and run are the last one's.

  Args:
    sources: checkpoints of the same function of its parameters. Settings that only decide which tokens experts have no
      room for (capacity, groups, priorities), and those of loss and precision, may differ.
    weights: positive, one for each source; equal ones if None. Only their ratios matter.

  Raises:
    ConfigError: no source, models that differ, or weights that do not fit.
  """

  def __init__(self, sources: Sequence[Source], weights: Optional[Sequence[float]] = None):
    require(len(sources) > 0, 'an average needs at least one checkpoint')
    weights = [1.] * len(sources) if weights is None else list(weights)
    require(len(weights) == len(sources), f'{len(weights)} weights for {len(sources)} checkpoints; give one for each')
    require(all(isinstance(w, numbers.Real) and math.isfinite(w) and w > 0 for w in weights),
            f'weights = {weights}: all must be positive numbers')
    last = sources[-1]
    for source in sources:
      sparse = _SPARSE_MATHS if source.model.num_experts or last.model.num_experts else ()
      _require_equal(f'the average of {source.where} and {last.where}', source.model, last.model,
                     (*_DENSE_MATHS, *sparse))
    self.where, self.model, self.run = ', '.join(source.where for source in sources), last.model, last.run
    self.step = max(source.step for source in sources)
    self._weights = [float(weight) / math.fsum(weights) for weight in weights]
    self.fingerprint = {'averaged': [source.fingerprint for source in sources], 'weights': self._weights}
    self._first, self._readers = sources[0], [_Reader(source) for source in sources]
    self.tensors = {name: _widest([source.tensors[name] for source in sources]) for name in _parameters(last)}

  def axis(self, name: str) -> int:
    return self._first.axis(name)

  def read(self, name: str, axis: int = 0, start: int = 0, stop: Optional[int] = None) -> np.ndarray:
    total = None
    for reader, weight in zip(self._readers, self._weights):
      part = reader.read(name, axis, start, stop)
      if total is None:  # beginning with zeros would turn -0 into 0
        total = np.multiply(part, weight, dtype=np.float64)
        continue
      for block in _blocks(part.shape):
        total[block] += np.multiply(part[block], weight, dtype=np.float64)
    return total.astype(self.tensors[name].dtype)


def _widest(infos: Sequence[TensorInfo]) -> TensorInfo:
  """The first one's shape, the dtype that holds all values, the chunk that takes most memory."""
  dtype = functools.reduce(np.promote_types, [info.dtype for info in infos])
  return TensorInfo(infos[0].shape, dtype, max((i.chunk for i in infos if i.chunk), key=math.prod, default=None))


def _blocks(shape: Tuple[int, ...], most: int = 1 << 20) -> Iterator[Tuple[slice, ...]]:
  """Cuts an array along its longest axis, so that a float64 copy of a block is small."""
  longest = int(np.argmax(shape))
  rows = max(most * shape[longest] // max(math.prod(shape), 1), 1)
  for start in range(0, shape[longest], rows):
    yield (*(slice(None),) * longest, slice(start, start + rows))
