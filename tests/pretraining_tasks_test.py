"""The original's corpora, objectives and mixtures: names, rates, what comes out, and mistakes."""

import re

import numpy as np
import pytest

from openmoe_jax import data as data_lib
from openmoe_jax import gin_utils, mixtures, vocabulary
from openmoe_jax.config import ConfigError, DataConfig
from openmoe_jax.tensorflow_setup import import_seqio
from openmoe_jax.tasks import pretraining
from tests import prepared
from tests.prepared import forget_folder  # pylint: disable=unused-import

seqio = import_seqio()

# SPEC 10, in the order of its sentence, c4 to the stack.
SPEC_RATES = {
    'mix_ul2': dict(redpajama_c4=15, redpajama_wikipedia=4.5, redpajama_stackexchange=2, redpajama_arxiv=2.5,
                    redpajama_book=4.5, redpajama_github=4.5, redpajama_common_crawl=67, the_stack_dedup=100),
    'mix_ul2_stage2': dict(redpajama_c4=15, redpajama_wikipedia=6.5, wikipedia=6.5, redpajama_stackexchange=2.5,
                           redpajama_arxiv=4.5, redpajama_book=6.5, redpajama_github=5, redpajama_common_crawl=43.5,
                           the_stack_dedup=10),
    'mix_ul2_v2': dict(redpajama_c4=15, redpajama_wikipedia=4.5, wikipedia=2.5, redpajama_stackexchange=1,
                       redpajama_arxiv=4.5, redpajama_book=4.5, redpajama_github=5, redpajama_common_crawl=33,
                       the_stack_dedup=30)}
LETTERS = dict(zip(sorted(pretraining.CORPORA), 'ABCDEFGHIJ'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Every corpus, with documents of one letter that tells which corpus they are of."""
  path = tmp_path_factory.mktemp('tfds')
  for name, corpus in pretraining.CORPORA.items():
    texts = [' '.join([LETTERS[name]] * 31)] * 24  # With EOS, two rows of 16 tokens each.
    if name == 'redpajama_c4':
      texts = texts * 100  # 2,000 of them are validation.
    tfds_name, version = corpus.tfds_name.split(':')
    prepared.corpora(path, {tfds_name: texts}, version=version, records_per_file=300)
  return path


def settings(folder, **changes):
  values = dict(mixture_or_task='mix_full_lm', task_feature_lengths={'targets': 16}, batch_size=8, num_streams=2,
                tfds_data_dir=str(folder))
  return DataConfig(**{**values, **changes})


def corpus_of(row):
  """Which corpus a row of tokens is of, by its letter."""
  letters = set(re.sub('<[^>]*>|\\[[A-Z0-9]*\\]|[^A-Z]', '', vocabulary.decode(row)))
  name, = [name for name, letter in LETTERS.items() if {letter} == letters]
  return name


@pytest.mark.parametrize('name', ['mix_ul2', 'mix_ul2_stage2', 'mix_ul2_v2'])
def test_rates_are_those_of_the_specification(name):
  for mixture in (name, name.replace('ul2', 'full_lm'), name.replace('ul2', 'prefix_lm'),
                  *(name.replace('ul2', own) for own in ('ul2_noprefix', 'ul2_corrected', 'span_corruption', 'fim'))):
    found = seqio.MixtureRegistry.get(mixture)
    objective = re.fullmatch(r'mix_(.*?)(_stage2|_v2)?', mixture)[1]
    rates = {task.name: found.get_rate(task) for task in found.tasks}
    assert rates == {f'{corpus}_{objective}': rate for corpus, rate in SPEC_RATES[name].items()}
  assert sum(SPEC_RATES['mix_ul2'].values()) == 200


def test_less_code_is_without_the_stack():
  rates = {task.name: seqio.MixtureRegistry.get('mix_lesscode_ul2').get_rate(task)
           for task in seqio.MixtureRegistry.get('mix_lesscode_ul2').tasks}
  assert rates == {f'{name}_ul2': rate for name, rate in SPEC_RATES['mix_ul2'].items() if name != 'the_stack_dedup'}


def test_tasks_read_the_data_sets_of_the_original():
  names = {task: mixtures._tfds_name(seqio.TaskRegistry.get(task)) for task in seqio.TaskRegistry.names()}
  for subset in ('common_crawl', 'c4', 'github', 'arxiv', 'book', 'wikipedia', 'stackexchange'):
    assert names[f'redpajama_{subset}_ul2'] == names[f'redpajama_{subset}_full_lm'] == f'redpajama_{subset}:1.0.0'
  assert names['the_stack_dedup_ul2'] == 'the_stack_dedup:1.0.0'
  assert names['wikipedia_ul2'] == 'wikipedia/20190301.en:1.0.0'
  assert names['c4_v220_ul2_pack'] == 'c4/en:3.0.1'
  assert (names['orca_sft'], names['wildchat_gpt4_sft']) == ('orca:1.0.0', 'wildchat_gpt4_sft:1.0.0')
  validation = seqio.TaskRegistry.get('redpajama_c4_ul2').source.tfds_dataset._map_split('validation')
  assert validation == 'train[-2000:]'
  assert set(seqio.MixtureRegistry.get('mix_ul2').splits) == {'train', 'validation'}


@pytest.mark.parametrize('name', [pytest.param('mix_full_lm', marks=pytest.mark.exhaustive), pytest.param('mix_full_lm_stage2', marks=pytest.mark.exhaustive),
                                  pytest.param('mix_full_lm_v2', marks=pytest.mark.slow)])
def test_ten_thousand_examples_have_the_rates_within_one_percent(folder, name):
  # Random choices with a fixed seed: three standard deviations of a half of 10,000 would be 1.5 %.
  batch = next(data_lib.TrainStreams(settings(folder, mixture_or_task=name, pack=False, batch_size=10_000,
                                              num_streams=1)))
  rows = batch['decoder_target_tokens'][0]
  found, counts = np.unique([corpus_of(row[:3]) for row in rows], return_counts=True)
  rates = SPEC_RATES[name.replace('full_lm', 'ul2')]
  assert set(found) == set(rates)
  for corpus, count in zip(found, counts):
    assert abs(count / 10_000 - rates[corpus] / sum(rates.values())) < .01, corpus


@pytest.mark.slow
def test_mixtures_without_prompts_have_none(folder):
  beginnings = {}
  for name in ('redpajama_book_ul2', 'redpajama_book_ul2_noprefix'):
    data = settings(folder, mixture_or_task=name, task_feature_lengths={'inputs': 64, 'targets': 64}, pack=False,
                    batch_size=64, num_streams=1)
    rows = next(data_lib.TrainStreams(data))['decoder_target_tokens'][0]
    beginnings[name] = {re.sub('<[^>]*>', '', vocabulary.decode(row)).strip()[:5] for row in rows}
  assert {'[NLU]', '[NLG]', '[S2S]'} <= beginnings['redpajama_book_ul2']
  assert not any('[' in beginning for beginning in beginnings['redpajama_book_ul2_noprefix'])
  tasks = [task.name for task in seqio.MixtureRegistry.get('mix_ul2_noprefix').tasks]
  assert tasks and all(name.endswith('_ul2_noprefix') for name in tasks)


def test_a_folder_of_texts_becomes_tasks_by_its_name(folder, tmp_path):
  for version, word in (('1.0.0', 'old'), ('1.2.0', 'new')):
    prepared.write(tmp_path, 'my_texts', {'train': [{'text': f'{word} text {i}'} for i in range(8)],
                                          'validation': [{'text': 'held out'}]}, version=version)
  data = settings(tmp_path, mixture_or_task='my_texts_full_lm', pack=False)
  assert 'new text' in vocabulary.decode(next(data_lib.TrainStreams(data))['decoder_target_tokens'][0, 0])
  assert data_lib.eval_sources(data) == ['my_texts_full_lm']
  text = vocabulary.decode(next(data_lib.eval_batches(data, 'my_texts_full_lm'))['decoder_target_tokens'][0])
  assert text.removesuffix('</s>') == 'held out</s>'  # The original puts a second one behind short ends.
  with pytest.raises(ConfigError, match="'my_text_full_lm' is not a registered"):
    data_lib.TrainStreams(settings(tmp_path, mixture_or_task='my_text_full_lm'))


@pytest.mark.slow
def test_what_lies_in_one_folder_is_not_looked_for_in_another(folder, tmp_path):
  next(data_lib.TrainStreams(settings(folder, mixture_or_task='redpajama_book_full_lm')))
  prepared.corpora(tmp_path, {'redpajama_book': ['Other text of a book.'] * 9})
  data = settings(tmp_path, mixture_or_task='redpajama_book_full_lm', task_feature_lengths={'targets': 64})
  assert 'Other text' in vocabulary.decode(next(data_lib.TrainStreams(data))['decoder_target_tokens'][0, 0])


@pytest.mark.parametrize('changes, message', [
    (dict(tfds_data_dir='/no/such/folder'), 'tfds_data_dir = ./no/such/folder. is not a folder; it should hold '
     'redpajama_arxiv:1.0.0, redpajama_book:1.0.0, .*docs/data.md'),
    (dict(mixture_or_task='mix_full_lm_stage2'), 'the data of mix_full_lm_stage2 cannot be read: .* lacks '
     r'redpajama_arxiv:1.0.0, redpajama_book:1.0.0 \(there is version 0.9.0\), redpajama_c4:1.0.0, .*'
     'wikipedia/20190301.en:1.0.0; prepare them'),
    (dict(mixture_or_task='redpajama_c4_full_lm'), r'lacks redpajama_c4:1.0.0; prepare'),
    (dict(mixture_or_task='redpajama_github_full_lm'), r'redpajama_github:1.0.0 \(there, but damaged or not finished\)'),
    (dict(mixture_or_task='the_stack_dedup_full_lm'), 'no text for stream 0 of 2'),
    (dict(mixture_or_task='c4_v220_full_lm'), r'c4/en:3.0.1 \(there is version 3.0.0\)'),
    (dict(mixture_or_task='mix_full_lmm'), 'did you mean mix_full_lm'),
    (dict(mixture_or_task='mix_ul2'), "has the features 'inputs', 'targets', but"),
])
def test_mistakes_are_one_clear_line(tmp_path, changes, message):
  prepared.corpora(tmp_path, {'redpajama_book': ['text']}, version='0.9.0')
  (tmp_path / 'redpajama_github' / '1.0.0').mkdir(parents=True)
  prepared.corpora(tmp_path, {'the_stack_dedup': [' ', '']})
  prepared.corpora(tmp_path, {'c4/en': ['text']}, version='3.0.0')
  with pytest.raises(ConfigError, match=message) as error:
    data_lib.TrainStreams(settings(tmp_path, **changes))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', [name for name in gin_utils.package_gin_files()
                                  if name.startswith('recipes/') and not name.startswith('recipes/eval_')])
def test_recipes_name_what_they_lack(name, tmp_path):
  """Every mixture is known; without its data there is one line that names all of it."""
  run = gin_utils.load_run_config([name], ['VOCABULARY='], check_required=False)
  data = run.data
  provider = seqio.get_mixture_or_task(data.mixture_or_task)
  assert set(provider.output_features) == set(data.task_feature_lengths)
  if name not in ('recipes/demo.gin', 'recipes/demo_ul2.gin'):
    with pytest.raises(ConfigError, match='cannot be read: .* lacks .*1; prepare|lacks .*0; prepare') as error:
      mixtures.provider_for(settings(tmp_path, task_feature_lengths=data.task_feature_lengths),
                            data.mixture_or_task, 'train')
    wanted = {mixtures._tfds_name(task) for task, _ in mixtures.tasks_with_rates(provider)}
    assert all(dataset in str(error.value) for dataset in wanted)
