"""Files that a vocabulary can be read from, each as the sentencepiece model that training runs.

* a sentencepiece model: umT5's `sentencepiece.model`, Hugging Face's `spiece.model` or `tokenizer.model`. Sentinels
  <extra_id_N> that some of these have as their last pieces are taken off, since seqio puts its own there;
* Hugging Face's `tokenizer.json`, where it describes what sentencepiece does: Unigram models, and BPE models with byte
  fallback (LLaMA 1 and 2). Byte-level BPE (GPT-2, LLaMA 3) is refused;
* a folder with one of these, such as a downloaded repository or an exported model.

Local or gs://. Pieces, scores and normalisation of a `tokenizer.json` are taken over exactly, so ids are those of the
sentencepiece model that it was made from; where the `tokenizers` library differs from sentencepiece (composed
characters, ties), sentencepiece counts.
"""

import base64
import functools
import hashlib
import json
import os
import re
import tempfile
from typing import Any, Dict, Iterator, List, Mapping, Tuple

from openmoe_jax import paths
from openmoe_jax.config import ConfigError, require

FILES = ('sentencepiece.model', 'spiece.model', 'tokenizer.model', 'tokenizer.json')
_SENTINEL = re.compile('\u2581?<extra_id_(\\d+)>')
_SPACE = '\u2581'


def sentencepiece_file(path: str, extra_ids: int, where: str) -> str:
  """The path of a sentencepiece model without sentinels that does what the file or folder `path` describes.

  Args:
    path: local or gs://.
    extra_ids: number of sentinels that are to come behind its pieces; a file that has sentinels must have as many.
    where: the setting and its value, for error messages.

  Returns:
    `path` itself if it is such a model, else a file in a private temporary folder whose name tells its contents.

  Raises:
    ConfigError: no such file, not a vocabulary, or one that sentencepiece cannot run.
  """
  path = _find(path, where)
  data = paths.path(path).read_bytes()
  if path.endswith('.json'):
    model = _from_tokenizer_json(data, f'{where} ({path})' if path not in where else where)
  else:
    model = _parse(data, where)
  sentinels = _take_off_sentinels(model)
  require(sentinels in (0, extra_ids), f'{where} holds {sentinels} sentinels <extra_id_N>, but DataConfig.extra_ids = '
          f'{extra_ids}; set it to {sentinels}')
  if not sentinels and not path.endswith('.json'):
    return path
  return _keep(model.SerializeToString(deterministic=True))


@functools.lru_cache(maxsize=None)
def fingerprint(model: bytes, extra_ids: int) -> str:
  """A short name of what a sentencepiece model does, whatever else is written in it."""
  parsed = _parse(model, 'the vocabulary')
  normalizer = parsed.normalizer_spec
  digest = hashlib.sha256(normalizer.precompiled_charsmap)
  digest.update(repr((parsed.trainer_spec.model_type, extra_ids, normalizer.add_dummy_prefix,
                      normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces)).encode())
  for piece in parsed.pieces:
    digest.update(f'{piece.piece}\0{piece.score if piece.type == piece.NORMAL else 0.}\0{piece.type}\0'.encode())
  return digest.hexdigest()[:16]


def _find(path: str, where: str) -> str:
  """The file that `path` means."""
  try:
    exists, folder = paths.path(path).exists(), paths.path(path).is_dir()
    inside = [name for name in FILES if folder and (paths.path(path) / name).exists()]
  except Exception as error:  # A bucket that cannot be reached raises whatever its client library raises.
    raise ConfigError(f'{where} cannot be read: {error}') from error
  require(exists, f"{where}: no such file; give the path of a sentencepiece model or tokenizer.json (local or gs://), "
          "or '' for the small one in the package")
  require(not folder or inside, f'{where} is a folder that holds none of {", ".join(FILES)}')
  return os.path.join(path, inside[0]) if folder else path


def _parse(data: bytes, where: str) -> Any:
  from sentencepiece import sentencepiece_model_pb2  # protobuf, which a plain import of this module should not need
  try:
    model = sentencepiece_model_pb2.ModelProto.FromString(data)
  except Exception as error:  # protobuf's implementations raise different classes.
    raise ConfigError(f'{where} is not a sentencepiece model: {error}') from error
  require(len(model.pieces) > 0, f'{where} is not a sentencepiece model: it holds no pieces')
  return model


def _take_off_sentinels(model: Any) -> int:
  """Removes the sentinels at the end of a model (the last one is <extra_id_0>) and returns their number."""
  count = 0
  while count < len(model.pieces):
    match = _SENTINEL.fullmatch(model.pieces[-1 - count].piece)
    if not match or int(match[1]) != count:
      break
    count += 1
  del model.pieces[len(model.pieces) - count:]
  return count


def _keep(model: bytes) -> str:
  folder = os.path.join(tempfile.gettempdir(), f'openmoe_jax_vocabularies_{os.getuid()}')
  os.makedirs(folder, mode=0o700, exist_ok=True)
  require(os.stat(folder).st_uid == os.getuid(), f'{folder} belongs to somebody else; set TMPDIR to another folder')
  path = os.path.join(folder, hashlib.sha256(model).hexdigest()[:32] + '.model')
  if not os.path.exists(path):
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
      file.write(model)
    os.replace(file.name, path)
  return path


# tokenizer.json.


def _from_tokenizer_json(data: bytes, where: str) -> Any:
  from sentencepiece import sentencepiece_model_pb2
  try:
    described = json.loads(data)
    kind, parts = described['model']['type'], described['model']
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f'{where} is not a tokenizer.json: {error!r}') from error
  require(kind in ('Unigram', 'BPE'), f'{where}: a {kind} model; sentencepiece runs Unigram and BPE')
  model = sentencepiece_model_pb2.ModelProto()
  _set_normalizer(model.normalizer_spec, described, where)
  byte_fallback = bool(parts.get('byte_fallback'))
  require(kind == 'Unigram' or byte_fallback, f'{where}: a BPE model without byte fallback is byte-level BPE, which '
          'sentencepiece cannot run')
  scores = _unigram_scores(parts) if kind == 'Unigram' else _bpe_scores(parts)
  model.trainer_spec.model_type = 1 if kind == 'Unigram' else 2
  model.trainer_spec.byte_fallback = byte_fallback
  _add_pieces(model, scores, described, byte_fallback, where)
  return model


def _components(description: Any, inner: str) -> Iterator[Mapping[str, Any]]:
  """A normalizer or pre-tokenizer, or the parts of a sequence of them."""
  if description and description['type'] == 'Sequence':
    for part in description[inner]:
      yield from _components(part, inner)
  elif description:
    yield description


def _set_normalizer(spec: Any, described: Mapping[str, Any], where: str) -> None:
  spec.add_dummy_prefix = spec.remove_extra_whitespaces = False
  spec.escape_whitespaces = True
  for part in [*_components(described.get('normalizer'), 'normalizers'),
               *_components(described.get('pre_tokenizer'), 'pretokenizers')]:
    kind, pattern = part['type'], part.get('pattern', {})
    if kind == 'Precompiled':
      spec.precompiled_charsmap = base64.b64decode(part['precompiled_charsmap'] or '')
    elif kind == 'Prepend' and part['prepend'] == _SPACE:
      spec.add_dummy_prefix = True
    elif kind == 'Metaspace' and part['replacement'] == _SPACE:
      older = 'always' if part.get('add_prefix_space') else 'never'
      spec.add_dummy_prefix |= part.get('prepend_scheme', older) != 'never'
    elif kind == 'WhitespaceSplit' or (kind == 'Replace' and pattern.get('Regex') == ' {2,}'):
      spec.remove_extra_whitespaces = True
    elif kind not in ('Strip',) and not (kind == 'Replace' and pattern.get('String') == ' '):
      raise ConfigError(f'{where}: sentencepiece cannot do what its {kind!r} does; use the sentencepiece model itself')


def _unigram_scores(parts: Mapping[str, Any]) -> List[Tuple[str, float]]:
  return [(piece, float(score)) for piece, score in parts['vocab']]


def _bpe_scores(parts: Mapping[str, Any]) -> List[Tuple[str, float]]:
  """Sentencepiece merges the pair whose result has the best score; here, the one that is merged first."""
  ranks: Dict[str, int] = {}
  for rank, merge in enumerate(parts['merges']):
    ranks.setdefault(''.join(merge.split(' ', 1) if isinstance(merge, str) else merge), rank)
  pieces = sorted(parts['vocab'], key=parts['vocab'].get)
  return [(piece, -float(ranks.get(piece, len(ranks)))) for piece in pieces]


def _add_pieces(model: Any, scores: List[Tuple[str, float]], described: Mapping[str, Any], byte_fallback: bool,
                where: str) -> None:
  """Fills in the pieces with their kinds, those that only stand among the added tokens included."""
  kinds = model.SentencePiece
  added = {token['id']: token for token in described.get('added_tokens', [])}
  pieces = [piece for piece, _ in scores]
  for number in sorted(added):
    if number == len(pieces):
      pieces.append(added[number]['content'])
  unknown = described['model'].get('unk_id')
  if unknown is None:  # BPE names the piece.
    unknown = pieces.index(described['model']['unk_token']) if described['model'].get('unk_token') in pieces else -1
  require(0 <= unknown < len(pieces), f'{where} has no piece for unknown text')
  for number, piece in enumerate(pieces):
    kind = kinds.NORMAL
    if number == unknown:
      kind = kinds.UNKNOWN
    elif byte_fallback and re.fullmatch('<0x[0-9A-F]{2}>', piece):
      kind = kinds.BYTE
    elif number in added:
      kind = kinds.CONTROL if added[number].get('special') else kinds.USER_DEFINED
    model.pieces.add(piece=piece, score=scores[number][1] if number < len(scores) else 0., type=kind)
  spec = model.trainer_spec
  spec.vocab_size, spec.unk_id, spec.unk_piece = len(pieces), unknown, pieces[unknown]
  for name in ('pad', 'eos', 'bos'):
    wanted = {'pad': ('<pad>',), 'eos': ('</s>', '<eos>'), 'bos': ('<s>', '<bos>')}[name]
    found = [n for n, piece in enumerate(model.pieces) if piece.piece in wanted and piece.type == kinds.CONTROL]
    setattr(spec, f'{name}_id', found[0] if found else -1)
    if found:
      setattr(spec, f'{name}_piece', pieces[found[0]])
