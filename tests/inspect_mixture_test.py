"""The report on a mixture: shares, objectives, fill, cut tokens, examples, and the program around it."""

import dataclasses
import json

import numpy as np
import pytest

from openmoe_jax import objectives, vocabulary
from openmoe_jax.analysis import mixture_report
from openmoe_jax.config import DataConfig
from openmoe_jax.tensorflow_setup import import_seqio, import_tensorflow
from openmoe_jax.tools import inspect_mixture
from tests import prepared
from tests.prepared import forget_folder  # pylint: disable=unused-import

tf = import_tensorflow()
seqio = import_seqio()


class LengthSource(seqio.DataSource):
  """Examples whose targets are the given numbers of 5s, over and over."""

  def __init__(self, lengths):
    super().__init__(splits=('train',))
    self._lengths = lengths

  @property
  def supports_arbitrary_sharding(self):
    return True

  def list_shards(self, split):
    return [split]

  def get_dataset(self, split='train', shuffle=True, seed=None, shard_info=None):
    return tf.data.Dataset.from_tensor_slices(self._lengths).map(lambda n: {'targets': tf.fill([n], 5)})


def _register():
  feature = {'targets': seqio.Feature(seqio.PassThroughVocabulary(100, eos_id=1), add_eos=True)}
  # Of 10 places: 9 tokens and EOS fit, so the second example loses three tokens, and the first one fills half of a row.
  for name, lengths in (('report_short', [4]), ('report_long', [12])):
    seqio.TaskRegistry.add(name, LengthSource(lengths), feature, [seqio.preprocessors.append_eos_after_trim])
  seqio.MixtureRegistry.add('report_mix', [('report_short', 3), ('report_long', 1)])


_register()


@pytest.mark.slow
def test_shares_fill_and_cut_tokens_are_counted():
  data = DataConfig(mixture_or_task='report_mix', task_feature_lengths={'targets': 10}, num_streams=1)
  report = mixture_report.measure(data, 4000)
  short, long = report.sources['report_short'], report.sources['report_long']
  assert (short.configured, long.configured) == (.75, .25)
  assert short.count + long.count == report.examples == 4000 and abs(short.examples - .75) < .02
  assert report.tokens == 5 * short.count + 10 * long.count
  assert short.tokens == pytest.approx(5 * short.count / report.tokens)
  assert report.tokens_cut == 3 * long.count and report.examples_cut == long.count
  assert list(report.objectives) == [mixture_report.LANGUAGE_MODEL]
  # In order, a short example begins a row, which another one may fill.
  assert .75 < report.fill < 1 and report.scored == report.fill and 1 < report.segments < 2
  # Out of order, every short one finds another.
  best = mixture_report.measure(dataclasses.replace(data, open_rows=4), 4000)
  assert best.fill > .99 and best.tokens == report.tokens
  whole = mixture_report.measure(DataConfig(mixture_or_task='report_long', task_feature_lengths={'targets': 10}), 50)
  assert (whole.fill, whole.segments, whole.rows) == (1., 1., 49)


def test_counting_leaves_seqio_and_the_examples_as_they_were():
  before = seqio.preprocessors.append_eos_after_trim
  data = DataConfig(mixture_or_task='demo_prose_full_lm', task_feature_lengths={'targets': 64}, num_streams=1)
  report = mixture_report.measure(data, 100, pages=1)
  assert seqio.preprocessors.append_eos_after_trim is before
  # A full segment's last token is overwritten by EOS.
  assert 90 <= report.examples_cut <= 100 and report.tokens_cut == report.examples_cut
  assert report.pages[0].targets.endswith('</s>')


def test_objectives_are_told_from_their_examples():
  chosen = vocabulary.get()
  known = [mixture_report.span_name(d.density, d.mean_span) for d in objectives.UL2_DENOISERS if d.density]
  assert known == ['spans of 3, 15%', 'spans of 8, 15%', 'spans of 3, 50%', 'spans of 8, 50%', 'spans of 64, 50%']
  rng = np.random.default_rng(0)
  for denoiser, name in zip(objectives.UL2_DENOISERS, known):
    for seed in range(5):
      tokens = tf.constant(rng.integers(3, 8000, 900), tf.int32)
      mask = objectives.noise_mask(900, denoiser.density, denoiser.mean_span, ((seed, 1), (seed, 2)))
      inputs, targets = (objectives.replace_spans(tokens, part, chosen.vocab_size).numpy() for part in (mask, ~mask))
      assert mixture_report.objective_of(inputs, targets, known) == name
  assert mixture_report.objective_of(np.arange(3, 9), np.arange(3, 9), known) == mixture_report.PREFIX_LM
  assert mixture_report.objective_of(None, np.arange(3, 9), known) == mixture_report.LANGUAGE_MODEL


@pytest.mark.slow
def test_program_on_ul2(capsys, tmp_path):
  numbers = tmp_path / 'report.json'
  inspect_mixture.main(['demo_prose_ul2', '--lengths=inputs:128,targets:128', '--examples=300', '--pages=6',
                        f'--json={numbers}'])
  text = capsys.readouterr().out
  assert text.startswith('demo_prose_ul2: 300 examples, ') and 'prefix LM' in text and '<extra_id_0>' in text
  assert text.count('--- ') == 6 and '[S2S] ' in text and '</s>' in text
  report = json.loads(numbers.read_text())
  assert report['objectives']['prefix LM']['configured'] == .5
  assert sum(share['examples'] for share in report['objectives'].values()) == pytest.approx(1)
  assert sum(share['tokens'] for share in report['objectives'].values()) == pytest.approx(1)
  assert set(report['objectives']) == {'prefix LM', *(mixture_report.span_name(d.density, d.mean_span)
                                                      for d in objectives.UL2_DENOISERS if d.density)}


@pytest.mark.slow
def test_program_on_the_originals_mixture_and_a_recipe(capsys, tmp_path):
  from openmoe_jax.tasks import pretraining
  texts = ['Some words of this document, and more of them. ' * 3] * 4
  prepared.corpora(tmp_path, {name: texts * (510 if name == 'redpajama_c4' else 1) for name in pretraining.RATES['']})
  inspect_mixture.main(['--gin_file=recipes/ablation_wo_ul2.gin', '--gin.VOCABULARY=', '--gin.NUM_STREAMS=1',
                        f'--tfds_data_dir={tmp_path}', '--examples=50', '--pages=1', '--lengths=targets:64'])
  text = capsys.readouterr().out
  assert text.startswith('mix_full_lm: 50 examples') and 'the_stack_dedup_full_lm' in text and '50.00%' in text


@pytest.mark.parametrize('arguments, message', [
    (['mix_ul4'], 'did you mean mix_ul2'), ([], 'name a task or mixture'), (['demo_ul2', '--lengths=7'], '--lengths='),
    (['mix_ul2', '--tfds_data_dir=/no/such/folder'], 'is not a folder'), (['demo_ul2', '--examples=0'], 'positive'),
    (['demo_ul2', '--vocabulary=/no/such.model'], 'no such file'), (['demo_ul2', '--gin.X=1'], 'goes with a --gin_file')])
def test_mistakes_are_one_line(capsys, arguments, message):
  with pytest.raises(SystemExit) as stopped:
    inspect_mixture.main(arguments)
  error = capsys.readouterr().err
  assert stopped.value.code == 2 and message in error and error.count('\n') == 1
