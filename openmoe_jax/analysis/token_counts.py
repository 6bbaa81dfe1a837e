"""How many tokens texts become under several vocabularies, and how much of each is used."""

from typing import Any, Iterable, List, NamedTuple, Sequence, Set


class Counts(NamedTuple):
  """Attributes:
    characters, utf8_bytes: size of the texts.
    tokens: they become.
    used: different ids among them, the bytes of byte fallback included.
    byte_pieces: tokens that are single bytes, or unknown: text that the vocabulary has no piece for.
  """
  characters: int
  utf8_bytes: int
  tokens: int
  used: int
  byte_pieces: int


def distinct_names(first: str, second: str) -> List[str]:
  """Short names of two paths that tell them apart."""
  parts = [[part for part in path.rstrip('/').split('/') if part] or ['package'] for path in (first, second)]
  names = [own[-1] for own in parts]
  for depth in range(2, max(map(len, parts)) + 1):
    if names[0] == names[1]:
      names = ['/'.join(own[-depth:]) for own in parts]
  return names


def count(texts: Iterable[str], models: Sequence[Any]) -> List[Counts]:
  """Counts of every model on the same texts."""
  characters = utf8_bytes = 0
  tokens, odd = [0] * len(models), [0] * len(models)
  used: List[Set[int]] = [set() for _ in models]
  without_text = [{i for i in range(model.get_piece_size()) if model.is_byte(i) or model.is_unknown(i)}
                  for model in models]
  for text in texts:
    characters += len(text)
    utf8_bytes += len(text.encode())
    for i, model in enumerate(models):
      ids = model.encode(text)
      tokens[i] += len(ids)
      used[i].update(ids)
      odd[i] += sum(map(without_text[i].__contains__, ids))
  return [Counts(characters, utf8_bytes, tokens[i], len(used[i]), odd[i]) for i in range(len(models))]
