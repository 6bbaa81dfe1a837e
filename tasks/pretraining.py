"""Pre-training tasks and mixtures of the original OpenMoE, by its names and rates (SPEC section 10).

A task is CORPUS_OBJECTIVE (`redpajama_c4_ul2`), a mixture mix_OBJECTIVE, mix_OBJECTIVE_stage2 or mix_OBJECTIVE_v2, for
every objective below; `mix_lesscode_OBJECTIVE` is the first one without The Stack. The original registered only some of
these combinations; those it had do what they did, but for `mix_ul2_noprefix`: there its tasks were the prefixed ones,
so that it was a second `mix_ul2`. Here it is what its name says. `ul2_corrected`, `span_corruption` and `fim` are not the
original's: see `openmoe_jax.denoising` and `openmoe_jax.fill_in_the_middle`.

Any other data set with the feature `text` that lies in the TFDS folder becomes tasks NAME_OBJECTIVE when it is asked for by such a name.
"""

import dataclasses
import functools
import re
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Tuple

from openmoe_jax import denoising, fill_in_the_middle, objectives, paths, vocabulary
from openmoe_jax.feature_converters import WindowFeature
from openmoe_jax.tensorflow_setup import import_seqio

seqio = import_seqio()

_TRAIN = {'train': 'train'}
# Only C4 has a validation split: the last examples of its only one.
_C4_SPLITS = {'train': 'train[:-2000]', 'validation': 'train[-2000:]'}


class Corpus(NamedTuple):
  """Attributes:
    tfds_name: with version.
    splits: {split of the tasks: split of the data set}; None takes those of the data set.
  """
  tfds_name: str
  splits: Optional[Mapping[str, str]]


CORPORA = {
    'redpajama_c4': Corpus('redpajama_c4:1.0.0', _C4_SPLITS),
    'redpajama_wikipedia': Corpus('redpajama_wikipedia:1.0.0', _TRAIN),
    'wikipedia': Corpus('wikipedia/20190301.en:1.0.0', _TRAIN),
    'redpajama_stackexchange': Corpus('redpajama_stackexchange:1.0.0', _TRAIN),
    'redpajama_arxiv': Corpus('redpajama_arxiv:1.0.0', _TRAIN),
    'redpajama_book': Corpus('redpajama_book:1.0.0', _TRAIN),
    'redpajama_github': Corpus('redpajama_github:1.0.0', _TRAIN),
    'redpajama_common_crawl': Corpus('redpajama_common_crawl:1.0.0', _TRAIN),
    'the_stack_dedup': Corpus('the_stack_dedup:1.0.0', _TRAIN),
    # C4 by itself, with the validation split that TFDS gives it.
    'c4_v220': Corpus('c4/en:3.0.1', {'train': 'train', 'validation': 'validation'}),
}

# The suffix of a mixture's name, and the rates of its corpora.
RATES = {
    '': {'redpajama_c4': 15, 'redpajama_wikipedia': 4.5, 'redpajama_stackexchange': 2, 'redpajama_arxiv': 2.5,
         'redpajama_book': 4.5, 'redpajama_github': 4.5, 'redpajama_common_crawl': 67, 'the_stack_dedup': 100},
    '_stage2': {'redpajama_c4': 15, 'redpajama_wikipedia': 6.5, 'wikipedia': 6.5, 'redpajama_stackexchange': 2.5,
                'redpajama_arxiv': 4.5, 'redpajama_book': 6.5, 'redpajama_github': 5, 'redpajama_common_crawl': 43.5,
                'the_stack_dedup': 10},
    '_v2': {'redpajama_c4': 15, 'redpajama_wikipedia': 4.5, 'wikipedia': 2.5, 'redpajama_stackexchange': 1,
            'redpajama_arxiv': 4.5, 'redpajama_book': 4.5, 'redpajama_github': 5, 'redpajama_common_crawl': 33,
            'the_stack_dedup': 30},
}

_WITHOUT_PROMPTS = tuple(dataclasses.replace(denoiser, prompt='') for denoiser in objectives.UL2_DENOISERS)


class Objective(NamedTuple):
  """Attributes:
    preprocessor: a function of `objectives`.
    features: that it gives.
    feature: their kind.
  """
  preprocessor: Callable[..., Any]
  features: Tuple[str, ...] = ('inputs', 'targets')
  feature: Callable[..., seqio.Feature] = seqio.Feature

  def output_features(self) -> Dict[str, seqio.Feature]:
    """The features of a task, over the vocabulary of the run."""
    return {name: self.feature(vocabulary.shared(), add_eos=True) for name in self.features}


OBJECTIVES = {
    'ul2': Objective(objectives.ul2),
    'ul2_noprefix': Objective(functools.partial(objectives.ul2, denoisers=_WITHOUT_PROMPTS)),
    'ul2_corrected': Objective(denoising.ul2_corrected, feature=WindowFeature),
    'span_corruption': Objective(denoising.span_corruption, feature=WindowFeature),
    'fim': Objective(fill_in_the_middle.fill_in_the_middle, ('targets',)),
    'prefix_lm': Objective(objectives.prefix_lm),
    'full_lm': Objective(objectives.full_lm, ('targets',)),
}

# What `register_prepared` has registered.
_prepared: Dict[str, str] = {}


def add_task(name: str, corpus: Corpus, objective: Objective) -> None:
  """Registers an objective on a data set with the feature `text`."""
  seqio.TaskRegistry.add(
      # read_only: seqio would otherwise set out to download what is not there.
      name, source=seqio.TfdsDataSource(corpus.tfds_name, splits=corpus.splits, read_only=True),
      preprocessors=[objective.preprocessor], output_features=objective.output_features())


def register() -> None:
  """Adds tasks and mixtures to seqio's registries; those already there stay as they are."""
  for kind, objective in OBJECTIVES.items():
    for name, corpus in CORPORA.items():
      if f'{name}_{kind}' not in seqio.TaskRegistry.names():
        add_task(f'{name}_{kind}', corpus, objective)
    mixtures = {f'mix_{kind}{suffix}': rates for suffix, rates in RATES.items()}
    mixtures[f'mix_lesscode_{kind}'] = {name: rate for name, rate in RATES[''].items() if name != 'the_stack_dedup'}
    for mixture, rates in mixtures.items():
      if mixture not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add(mixture, [(f'{name}_{kind}', float(rate)) for name, rate in rates.items()])
  # The original packed this task's text in a preprocessor of its own. Here DataConfig.pack does, for every task.
  if 'c4_v220_ul2_pack' not in seqio.TaskRegistry.names():
    add_task('c4_v220_ul2_pack', CORPORA['c4_v220'], OBJECTIVES['ul2'])


def newest_version(dataset: str, folder: str) -> str:
  """The newest version of a data set in a TFDS folder, '' if there is none."""
  versions = [entry for entry in paths.entries(paths.path(folder) / dataset) if re.fullmatch(r'\d+\.\d+\.\d+', entry)]
  return max(versions, key=lambda version: tuple(map(int, version.split('.'))), default='')


def register_prepared(name: str, folder: str) -> None:
  """Registers the task `name` if it is NAME_OBJECTIVE for a data set NAME in `folder`, in its newest version there.

  Everything else is left to who looks the name up.
  """
  for kind, objective in OBJECTIVES.items():
    dataset = name.removesuffix(f'_{kind}')
    taken = name in seqio.TaskRegistry.names() and name not in _prepared
    if dataset == name or taken or not re.fullmatch(r'[a-z]\w*', dataset):
      continue
    version = newest_version(dataset, folder)
    if version and _prepared.get(name) != version:
      if name in _prepared:
        seqio.TaskRegistry.remove(name)
      _prepared[name] = version
      add_task(name, Corpus(f'{dataset}:{version}', None), objective)


register()
