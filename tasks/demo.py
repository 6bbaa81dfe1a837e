"""The demo's tasks and mixtures: objectives over text that every Python installation has.

Tasks demo_code_* and demo_prose_*, mixtures demo_* of half code and half prose (the paper's share of code), each with
splits train and validation; `*` is one of `OBJECTIVES`.
"""

import functools
from typing import Any, Callable, Optional, Sequence

from openmoe_jax import denoising, fill_in_the_middle, objectives, vocabulary
from openmoe_jax.data import fingerprint
from openmoe_jax.feature_converters import WindowFeature
from openmoe_jax.tasks import standard_library
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow

tf = import_tensorflow()
seqio = import_seqio()

# Files are few and long (4,700 tokens on average): with the original's 128 a joined element would be a stream's whole
# share of the code, and the six denoisers of UL2, which take turns at elements, would wait for one another's epochs.
# With 4, every denoiser has data from the start in each of up to 16 streams, and in the validation split too.
DOCUMENTS = 4
# Examples; small, so that the first batch comes soon and a saved data position is small. Files are shuffled anyway.
SHUFFLE_BUFFER = 200


class DocumentSource(seqio.DataSource):
  """Documents as {'text': string}; shuffled by whole documents, sharded in any way.

  Args:
    documents: gives the `standard_library.Document`s of a split.
    splits: names.
  """

  def __init__(self, documents: Callable[[str], Sequence[standard_library.Document]], splits: Sequence[str]):
    super().__init__(splits=splits, caching_permitted=True)
    self._documents = documents

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str):
    return [split]

  def fingerprint(self, split: str) -> str:
    """Changes with the text, to which a saved data position belongs."""
    return fingerprint(f'{document.file}\n{document.text}' for document in self._documents(split))

  def get_dataset(self, split: str = 'train', shuffle: bool = True, seed: Optional[int] = None,
                  shard_info: Optional[Any] = None) -> Any:
    shard = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
    texts = _texts(self._documents, split, *shard)
    count = int(texts.shape[0])
    # Numbers are shuffled, not texts: a saved position then holds the order only.
    order = tf.data.Dataset.range(count)
    if shuffle and count:
      order = order.shuffle(count, seed=seed)
    return order.map(lambda i: {'text': texts[i]})


class StandardLibrarySource(DocumentSource):
  """The standard library's documents of one kind."""

  def __init__(self, kind: str):
    super().__init__(lambda split: standard_library.documents(kind, split), standard_library.SPLITS)


@functools.lru_cache(maxsize=None)
def _texts(documents: Callable[[str], Sequence[standard_library.Document]], split: str, index: int, num_shards: int
           ) -> Any:
  """A shard's texts as one string tensor, outside of any graph so that none holds a copy of them."""
  with tf.init_scope():
    own = documents(split)[index::num_shards]
    return tf.constant([document.text for document in own], tf.string, shape=[len(own)])


def _features(*names: str, feature: Any = seqio.Feature) -> dict:
  return {name: feature(vocabulary=vocabulary.shared(), add_eos=True) for name in names}


OBJECTIVES = {
    'full_lm': (functools.partial(objectives.full_lm, documents=DOCUMENTS), _features('targets')),
    'prefix_lm': (objectives.prefix_lm, _features('inputs', 'targets')),
    'ul2': (functools.partial(objectives.ul2, documents=DOCUMENTS), _features('inputs', 'targets')),
    'ul2_corrected': (denoising.ul2_corrected, _features('inputs', 'targets', feature=WindowFeature)),
    'span_corruption': (denoising.span_corruption, _features('inputs', 'targets', feature=WindowFeature)),
    'fim': (fill_in_the_middle.fill_in_the_middle, _features('targets')),
}


def register() -> None:
  """Adds tasks and mixtures to seqio's registries; those already there stay as they are."""
  for objective, (preprocessor, features) in OBJECTIVES.items():
    names = [f'demo_{kind}_{objective}' for kind in standard_library.KINDS]
    for kind, name in zip(standard_library.KINDS, names):
      if name not in seqio.TaskRegistry.names():
        seqio.TaskRegistry.add(name, source=StandardLibrarySource(kind), preprocessors=[preprocessor],
                               output_features=features, shuffle_buffer_size=SHUFFLE_BUFFER)
    mixture = f'demo_{objective}'
    if mixture not in seqio.MixtureRegistry.names():
      seqio.MixtureRegistry.add(mixture, names, default_rate=1.0)


register()
