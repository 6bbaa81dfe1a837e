"""Recorded routing: a forward pass's own decisions under every policy, tables of a text, and files that an interruption
does not hurt."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import analyze, data as data_lib, loading
from openmoe_jax.config import ConfigError, ModelConfig
from openmoe_jax.loading import Model
from openmoe_jax.model import OpenMoE
from openmoe_jax.names import from_t5x_names
from openmoe_jax.recording import collect, files, forward as forward_lib, policies, tables
from openmoe_jax.recording.forward import forward
from openmoe_jax.routers.slots import in_token_order
from tests import numpy_reference, routing_reference, tiny_checkpoint

CONFIG = ModelConfig(vocab_size=8576, emb_dim=16, mlp_dim=16, num_heads=4, head_dim=4, num_layers=2, moe_interval=1,
                     num_experts=4, group_size=16, min_expert_capacity=1, dtype='float32', scan_blocks=False)
BATCH = {'decoder_input_tokens': np.asarray([[0, 7, 8, 9, 3, 7, 4, 5, 6], [0, 5, 5, 5, 0, 0, 0, 0, 0]], np.int32),
         'decoder_target_tokens': np.asarray([[7, 8, 9, 3, 7, 4, 5, 6, 1], [5, 5, 5, 1, 0, 0, 0, 0, 0]], np.int32)}


@pytest.fixture(scope='module', autouse=True)
def quick():
  """Compiling takes most of the time of these tests."""
  patch = pytest.MonkeyPatch()
  patch.setattr(forward_lib, '_run', jax.jit(forward_lib._run.__wrapped__, static_argnums=(0,)))
  yield
  patch.undo()


@pytest.fixture(scope='module')
def params():
  return jax.tree.map(jnp.asarray, from_t5x_names(CONFIG, numpy_reference.random_params(CONFIG, 0)))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  return tiny_checkpoint.write(tmp_path_factory.mktemp('tiny') / 'run', steps=(3, 6), row_length=32)


def logits_of(config, params):
  """Router logits [N, G, T, E] of a plain pass."""
  apply = jax.jit(lambda p: OpenMoE(config, record_routing=True).apply({'params': p}, BATCH, False, method='features'))
  return np.asarray(apply(params)[2].router_logits)


@pytest.mark.parametrize('policy, groups, group_size, capacity', [
    ('t5x_train', 4, 5, 2), ('colossalai', 1, 18, 18), ('colossalai_train', 1, 18, 12)])
def test_a_record_is_what_the_specification_says(params, policy, groups, group_size, capacity):
  """Two rows of nine become, by the original's rules, two rows of ten in four groups; the port has one group."""
  config = policies.configure(CONFIG, policy)
  got = forward(config, params, BATCH)
  assert (got.grouping.num_groups, got.grouping.group_size, got.grouping.capacity) == (groups, group_size, capacity)
  want = [routing_reference.route(logits, 2, capacity) for logits in logits_of(config, params)]
  place = np.arange(got.grouping.batch * got.grouping.length).reshape(got.grouping.batch, -1)[:2, :9]
  np.testing.assert_array_equal(got.group, place // group_size)
  np.testing.assert_array_equal(got.group_position, place % group_size)
  for layer, routed in enumerate(want):
    at = lambda x: x[got.group, got.group_position]
    np.testing.assert_array_equal(got.expert[layer], at(routed.expert))
    np.testing.assert_array_equal(got.slot[layer], at(routed.slot))
    np.testing.assert_array_equal(got.kept[layer], at(routed.kept))
    np.testing.assert_allclose(got.gate[layer], at(routed.gate), rtol=0, atol=1e-6)
  assert not got.kept.all() or policy == 'colossalai'
  assert got.is_token.sum() == 9 + 4


def test_log_probs_are_those_of_a_forward_pass(params):
  config = policies.configure(CONFIG, 'none')
  got = forward(config, params, BATCH)
  logits = jax.jit(lambda p: OpenMoE(config).apply({'params': p}, BATCH))(params)
  want = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), BATCH['decoder_target_tokens'][..., None], -1)[..., 0]
  np.testing.assert_allclose(got.log_prob, np.where(BATCH['decoder_target_tokens'] > 0, want, np.nan), rtol=0, atol=1e-5)
  assert got.kept[:, got.is_token].all() and not got.kept[:, ~got.is_token].any()  # padding asks for nobody


def test_queue_in_token_order():
  """By hand: experts of the choices of four tokens, and how many choices of the same expert came before."""
  expert = jnp.asarray([[[0, 1], [1, 0], [9, 0], [0, 1]]])
  assert in_token_order(expert, 2).tolist() == [[[0, 0], [1, 1], [-1, 2], [3, 2]]]


def test_policies():
  assert policies.configure(CONFIG, 'none').dispatch == 'dropless'
  dropless = policies.configure(CONFIG, 'none')
  assert policies.configure(dropless, 't5x_train').dispatch == 'auto'
  assert policies.configure(CONFIG, 't5x_train').eval_capacity_factor == 1.25
  with pytest.raises(ConfigError, match="policy = 'all' is not known; valid: 'none', 't5x_train'"):
    policies.configure(CONFIG, 'all')
  with pytest.raises(ConfigError, match='no sparse layers'):
    policies.configure(CONFIG.replace(num_experts=0), 'none')


def test_a_text_as_a_table(params):
  model = Model(CONFIG, params, 0, {'data': {'vocabulary': '', 'extra_ids': 300}})
  frame = model.record_routing('def main(self):')
  ids = model.vocabulary.encode('def main(self):')
  assert frame['layer'].tolist() == [0] * (len(ids) + 1) + [1] * (len(ids) + 1)
  first = frame[frame['layer'] == 0]
  assert first['token_id'].tolist() == [0, *ids] and first['target_id'].tolist() == [*ids, 1]
  assert ''.join(first['token'].tolist()[1:]).replace('▁', ' ').strip() == 'def main(self):'
  assert frame[['kept_0', 'kept_1']].all(axis=None) and frame.attrs['policy'] == 'none'
  assert (frame['gate_0'] >= frame['gate_1']).all() and (frame['expert_0'] != frame['expert_1']).all()
  # The sum of the log-probabilities is the score of the text and its end.
  score = model.score([''], ['def main(self):']).log_probs[0]
  assert first['log_prob'].iloc[:-1].sum() == pytest.approx(score, abs=1e-4)
  with pytest.raises(ConfigError, match='the text has no tokens'):
    model.record_routing('')


def test_a_table_without_pandas(monkeypatch):
  import sys
  monkeypatch.setitem(sys.modules, 'pandas', None)
  table = tables.to_frame({'row': np.arange(2)}, {'capacity': 4})
  assert table.to_pydict() == {'row': [0, 1]} and table.schema.metadata == {b'capacity': b'4'}


def run(checkpoint, output, *flags):
  analyze.main(['record', checkpoint, '--mixture=demo_full_lm', f'--output={output}', '--tokens=200', '--batch_size=3',
                *flags])
  return files.Recording(output)


COLUMNS = ['row', 'position', 'group', 'token_id', 'expert_0', 'kept_1', 'gate_0', 'log_prob']


def test_a_recording_is_the_forward_passes_one_after_another(checkpoint, tmp_path, capsys):
  recording = run(checkpoint, tmp_path / 'out', '--policy=t5x_train,colossalai', '--part_tokens=100')
  domains = ('demo_code_full_lm', 'demo_prose_full_lm')
  assert recording.keys() == [files.Key(6, policy, domain) for policy in ('colossalai', 't5x_train') for domain in domains]
  assert recording.layers == [1] and 'step 6 demo_prose_full_lm: 576 tokens in' in capsys.readouterr().out
  model = loading.load(checkpoint)
  data = collect.data_settings(model.run, collect.Settings(['demo_full_lm'], tokens=200, batch_size=3))
  batches = list(data_lib.eval_batches(data, domains[0]))
  assert len(batches) == 3
  for policy in ('t5x_train', 'colossalai'):
    key = files.Key(6, policy, domains[0])
    got = recording.read(key, 1, COLUMNS)
    assert recording.finished(key)['tokens'] == len(got['row']) == 9 * 32
    assert len(files.part_files(tmp_path / 'out' / key.folder())) == 2  # of two batches and of one
    np.testing.assert_array_equal(got['row'], np.repeat(np.arange(9), 32))
    np.testing.assert_array_equal(got['token_id'], np.concatenate([b['decoder_input_tokens'].ravel() for b in batches]))
    together = policies.POLICIES[policy].rows_together or 3
    last = {name: value[3 - together:] for name, value in batches[-1].items()}
    routing = forward(policies.configure(model.config, policy), model.params, last)
    np.testing.assert_array_equal(got['expert_0'][-32:], routing.expert[0, -1, :, 0])
    np.testing.assert_array_equal(got['kept_1'][-32:], routing.kept[0, -1, :, 1])
    np.testing.assert_array_equal(got['log_prob'][-32:], routing.log_prob[-1])
    sizes = np.bincount(got['group'])
    assert (sizes == recording.finished(key)['group_size']).all()


@pytest.mark.slow
def test_an_interrupted_recording_goes_on(checkpoint, tmp_path, monkeypatch):
  whole = run(checkpoint, tmp_path / 'whole', '--part_tokens=100')
  original, calls = collect.forward, []

  def interrupt(*args):
    calls.append(1)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return original(*args)

  monkeypatch.setattr(collect, 'forward', interrupt)
  with pytest.raises(SystemExit):
    run(checkpoint, tmp_path / 'cut', '--part_tokens=60')
  assert files.Recording(tmp_path / 'cut').keys() == []
  resumed = run(checkpoint, tmp_path / 'cut', '--part_tokens=100')
  assert len(calls) == 3 + 4  # the third batch of the first task again, and the second task
  for key in whole.keys():
    for name, values in whole.read(key, 1, COLUMNS).items():
      np.testing.assert_array_equal(resumed.read(key, 1, [name])[name], values)
  run(checkpoint, tmp_path / 'cut')
  assert len(calls) == 7  # nothing is left to do
  run(checkpoint, tmp_path / 'cut', '--tokens=300')
  assert len(calls) == 9 and resumed.finished(whole.keys()[0])['batches'] == 4


@pytest.mark.slow
def test_steps_and_the_parameters_before_training(checkpoint, tmp_path):
  recording = run(checkpoint, tmp_path / 'out', '--all_checkpoints', '--initialization', '--tokens=32')
  assert sorted({key.step for key in recording.keys()}) == [0, 3, 6]
  keys = [files.Key(step, 'none', 'demo_code_full_lm') for step in (0, 3, 6)]
  zero, three, six = (recording.read(key, 1, ['token_id', 'expert_0']) for key in keys)
  np.testing.assert_array_equal(zero['token_id'], six['token_id'])
  assert (zero['expert_0'] != six['expert_0']).any() and (three['expert_0'] != six['expert_0']).any()


@pytest.mark.parametrize('flags, message', [
    (['--policy=all'], "--policy: 'all' is not known; valid: none, t5x_train, t5x_eval, colossalai"),
    (['--tokens=0'], '--tokens=0 must be at least 1'),
    (['--split=test'], "demo_full_lm has no split 'test'"),
    (['--mixture=demo_ful'], "--mixture = 'demo_ful' is not a registered mixture or task; did you mean"),
    (['--gin.X=1'], '--gin.X=1: this program takes its configuration from the checkpoint'),
])
def test_mistakes_take_one_line(checkpoint, tmp_path, capsys, flags, message):
  with pytest.raises(SystemExit) as stopped:
    run(checkpoint, tmp_path / 'out', *flags)
  error = capsys.readouterr().err
  assert stopped.value.code == 2 and message in error and error.count('\n') == 1


def test_a_folder_of_another_model(checkpoint, tmp_path):
  output = tmp_path / 'out'
  files.begin(output, {'model': {'emb_dim': 8}})
  about = json.loads((output / 'recording.json').read_text())
  with pytest.raises(ConfigError, match='recording.json is damaged'):
    files.Recording(output)
  model = loading.load(checkpoint)
  (output / 'recording.json').write_text(json.dumps({**about, 'model': {**model.run['model'], 'emb_dim': 8}}))
  with pytest.raises(ConfigError, match='was recorded with model.emb_dim = 8, now it is 16; give another --output'):
    files.begin(output, {'model': model.run['model']})
  with pytest.raises(ConfigError, match='holds no recorded routing'):
    files.Recording(tmp_path)
  with pytest.raises(ConfigError, match='layer 0 holds no experts; the sparse layers of .* are 1'):
    files.Recording(output).read(files.Key(1, 'none', 'x'), 0, ['row'])
