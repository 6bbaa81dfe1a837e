"""Ablations: every edit against a model, or a router, that was changed by hand, and what is reported of them."""

import csv
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openmoe_jax import analyze, loading, routers
from openmoe_jax.analysis import surgery, surgery_report
from openmoe_jax.analysis.surgery import Ablation
from openmoe_jax.config import ConfigError, ModelConfig
from openmoe_jax.model import OpenMoE, variables
from openmoe_jax.names import from_t5x_names, stack_blocks
from openmoe_jax.recording import collect, policies
from openmoe_jax.routers import frozen, surgery as edits_lib
from openmoe_jax.routers.types import RouterContext
from tests import numpy_reference, tiny_checkpoint
from tests.routing_reference import softmax

CONFIG = ModelConfig(vocab_size=48, emb_dim=16, mlp_dim=16, num_heads=2, head_dim=4, num_layers=2, moe_interval=1,
                     num_experts=4, group_size=16, dtype='float32', scan_blocks=False, attention_query_blocks=1)
RUN = policies.configure(CONFIG, 'none')
TOKENS, E, S = 40, 5, 2
DOMAINS = ('demo_code_full_lm', 'demo_prose_full_lm')


@pytest.fixture(scope='module', autouse=True)
def quick():
  patch = pytest.MonkeyPatch()
  for name in ('_run', '_count'):
    patch.setattr(surgery, name, jax.jit(getattr(surgery, name).__wrapped__, static_argnums=(0,)))
  yield
  patch.undo()


# A router under edits.


@functools.partial(jax.jit, static_argnums=(0,))
def route(config, logits, is_token, context):
  out = routers.route(config, logits, is_token, logits.shape[1], context).assignment
  return out.expert_index, out.gate


def routed(router='top_k', logits=None, ids=None, more_logits=None, state={}, model={}, **edits):
  """Choices and gates [T, S] of a router under edits; the last three of the tokens are padding."""
  config = CONFIG.replace(**{**dict(router=router, num_experts=E, num_layers=1, ignore_padding_tokens=True), **model})
  layer = {**{name: x[0] for name, x in edits_lib.neutral(config).items()}, **edits}
  logits = LOGITS if logits is None else logits
  context = RouterContext(np.zeros((1, TOKENS), np.int32) if ids is None else ids[None], more_logits,
                          {**state, edits_lib.SURGERY: layer})
  index, gate = route(config, logits[None], np.arange(TOKENS)[None] < TOKENS - 3, context)
  return np.asarray(index[0, :-3]), np.asarray(gate[0, :-3])


LOGITS = np.random.RandomState(0).randn(TOKENS, E).astype(np.float32)
IDS = np.random.RandomState(1).randint(0, CONFIG.vocab_size, TOKENS).astype(np.int32)
ORDER = np.argsort(-LOGITS[:-3], axis=1)
PROBS = softmax(LOGITS[:-3].astype(np.float64))
OWN = np.take_along_axis(PROBS, ORDER[:, :S], axis=1)


def test_an_expert_whose_output_is_zero():
  index, gate = routed(scale=np.float32([1, 1, 0, 1, 1]))
  np.testing.assert_array_equal(index, ORDER[:, :S])
  np.testing.assert_allclose(gate, np.where(index == 2, 0, OWN), atol=1e-6)
  assert (index == 2).any()


def test_the_next_best_takes_the_place_of_an_expert():
  index, gate = routed(allowed=np.arange(E) != 2)
  without = np.delete(LOGITS[:-3].astype(np.float64), 2, axis=1)
  names = np.delete(np.arange(E), 2)
  order = np.argsort(-without, axis=1)[:, :S]
  np.testing.assert_array_equal(index, names[order])
  np.testing.assert_allclose(gate, np.take_along_axis(softmax(without), order, axis=1), atol=1e-6)


def test_no_router_chooses_an_expert_that_is_not_allowed():
  allowed = np.arange(E) != 2
  index, gate = routed('sigmoid', state={'bias': np.float32([0, 0, 9, 0, 0])}, allowed=allowed)
  assert not (index == 2).any() and (gate > 0).all()
  index, gate = routed('noisy_top_k', more_logits=np.zeros((1, TOKENS, E), np.float32), allowed=allowed)
  assert not (index == 2).any()
  np.testing.assert_allclose(gate.sum(axis=-1), 1, atol=1e-6)
  wanted = np.zeros((TOKENS, 6), np.float32)
  wanted[:, 2] = 7  # and its group of two with it
  index, _ = routed('hierarchical', wanted, more_logits=np.tile(np.float32([0, 5, 0]), (1, TOKENS, 1)),
                    model=dict(num_experts=6, num_expert_groups=3), allowed=np.arange(6) != 2)
  assert (index == 3).any(axis=-1).all() and not (index == 2).any()


def test_other_experts_get_the_gates_of_the_choices():
  table = np.random.default_rng(2).permuted(np.tile(np.arange(E), (48, 1)), axis=1)[:, :S].astype(np.int32)
  index, gate = routed(ids=IDS, chooser=np.int32(edits_lib.TABLE), experts=table)
  np.testing.assert_array_equal(index, table[IDS[:-3]])
  np.testing.assert_allclose(gate, OWN, atol=1e-6)
  index, gate = routed(ids=IDS, chooser=np.int32(edits_lib.TABLE), experts=table, gates=np.int32(edits_lib.OF_CHOICES))
  np.testing.assert_array_equal(index, table[IDS[:-3]])
  np.testing.assert_allclose(gate, np.take_along_axis(PROBS, index, axis=1), atol=1e-6)
  index, gate = routed(gates=np.int32(edits_lib.EVEN))
  np.testing.assert_array_equal(index, ORDER[:, :S])
  np.testing.assert_allclose(gate, OWN.mean(axis=1, keepdims=True).repeat(S, axis=1), atol=1e-6)


def test_random_experts():
  index, gate = routed(chooser=np.int32(edits_lib.RANDOM), seed=np.uint32(3))
  other, _ = routed(chooser=np.int32(edits_lib.RANDOM), seed=np.uint32(4))
  assert (index[:, 0] != index[:, 1]).all() and (index != other).any() and index.min() >= 0 and index.max() < E
  np.testing.assert_allclose(gate, OWN, atol=1e-6)


# A model under edits.


BATCH = {name: np.random.RandomState(3).randint(1, 48, (8, 12)).astype(np.int32)
         for name in ('decoder_input_tokens', 'decoder_target_tokens')}


@pytest.fixture(scope='module')
def params():
  return jax.tree.map(jnp.asarray, from_t5x_names(CONFIG, numpy_reference.random_params(CONFIG, 0)))


def log_probs(config, vars, edits=None):
  if edits is not None:
    return np.asarray(surgery._run(config, vars, BATCH, edits)[0])
  apply = jax.jit(lambda v: OpenMoE(config).apply(v, BATCH))
  return np.take_along_axis(np.asarray(jax.nn.log_softmax(apply(vars))), BATCH['decoder_target_tokens'][..., None],
                            axis=-1)[..., 0]


def without(params, layer, experts):
  """Parameters in which experts give zero."""
  kernel = params['decoder'][f'layers_{layer}']['mlp']['expert']['wo']['kernel']
  changed = jax.tree.map(lambda x: x, params)
  changed['decoder'][f'layers_{layer}']['mlp']['expert']['wo']['kernel'] = kernel.at[experts].set(0.)
  return changed


@pytest.fixture(scope='module')
def plain(params):
  return log_probs(RUN, variables(params))


def test_edits_that_change_nothing(params, plain):
  np.testing.assert_allclose(log_probs(RUN, variables(params), edits_lib.neutral(CONFIG)), plain, atol=2e-6)


@pytest.mark.parametrize('scan_blocks', (False, pytest.param(True, marks=pytest.mark.slow)))
@pytest.mark.parametrize('experts', ([2], [0, 1, 2, 3]), ids=('one', 'all'))
def test_zeroing_is_a_kernel_of_zeros(params, plain, experts, scan_blocks):
  edits = edits_lib.neutral(CONFIG)
  edits['scale'][1, experts] = 0
  config, own = RUN.replace(scan_blocks=scan_blocks), stack_blocks(CONFIG, params) if scan_blocks else params
  got = log_probs(config, variables(own), edits)
  np.testing.assert_allclose(got, log_probs(RUN, variables(without(params, 1, jnp.asarray(experts)))), atol=2e-6)
  assert np.abs(got - plain).max() > 1e-2


@pytest.mark.slow
def test_a_table_is_the_frozen_router(params):
  edits = edits_lib.neutral(CONFIG)
  edits['experts'] = np.asarray(frozen.hash_table(CONFIG))
  edits['chooser'][:], edits['gates'][:] = edits_lib.TABLE, edits_lib.OF_CHOICES
  want = log_probs(RUN.replace(router='frozen'), variables(params, {'experts': edits['experts']}))
  np.testing.assert_allclose(log_probs(RUN, variables(params), edits), want, atol=2e-6)


# What is planned.


def test_plans():
  found = surgery.plan(CONFIG)
  assert len(found) == 2 * 4 * 2 + 2 * 6 and len(set(found)) == len(found)
  assert surgery.plan(CONFIG, ['zero'], layers=[1]) == [Ablation('zero', 1, expert) for expert in range(4)]
  assert surgery.plan(CONFIG, experts=[(0, 3)]) == [Ablation('zero', 0, 3), Ablation('next', 0, 3)]
  assert surgery.plan(CONFIG, ['zero', 'random'], [(0, 3)], [1]) == [Ablation('zero', 0, 3), Ablation('random', 1)]
  assert {a.kind for a in surgery.plan(CONFIG.replace(router='hash'))} == {'zero', 'no_experts', 'random', 'same'}
  assert {a.kind for a in surgery.plan(CONFIG.replace(router='switch', num_selected_experts=1))} == {
      *surgery.KINDS} - {'uniform'}
  assert 'next' not in {a.kind for a in surgery.plan(CONFIG.replace(router='hierarchical', num_expert_groups=4))}


@pytest.mark.parametrize('changes, call, message', (
    ({}, dict(kinds=['kill']), "'kill' is not known; valid: zero, next"),
    ({}, dict(layers=[5]), 'layer 5 holds no experts; the sparse layers are 0, 1'),
    ({}, dict(experts=[(1, 4)]), 'expert 4 of layer 1 does not exist; a layer has experts 0 to 3'),
    ({}, dict(kinds=['hash'], experts=[(1, 1)]), '--experts without --layers leaves nothing to do'),
    (dict(router='hash'), dict(kinds=['next']), "'next' makes no sense: the router 'hash' has no next best expert"),
    (dict(router='sigmoid'), dict(kinds=['table']), "'table' makes no sense: the router 'sigmoid' has other gates"),
    (dict(num_experts=0), {}, 'this model has no sparse layers')), ids=str)
def test_plans_that_cannot_be(changes, call, message):
  with pytest.raises(ConfigError) as error:
    surgery.plan(CONFIG.replace(**changes), **call)
  assert message in str(error.value)


# Whole ablations.


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  return tiny_checkpoint.write(tmp_path_factory.mktemp('tiny') / 'run', row_length=32)


@pytest.fixture(scope='module')
def reported(checkpoint, tmp_path_factory):
  stem = tmp_path_factory.mktemp('out') / 'ablation'
  analyze.main(['ablate', checkpoint, '--mixture=demo_full_lm', f'--output={stem}', '--tokens=512', '--batch_size=8'])
  return stem


@pytest.mark.slow
def test_changes_are_paired_means_of_a_changed_model(checkpoint, reported):
  """The reference: parameters without the expert, over the batches of the validation."""
  from openmoe_jax import data as data_lib
  model = loading.load(checkpoint)
  own = collect.Settings(['demo_full_lm'], tokens=512, batch_size=8)
  about = json.loads((reported.parent / 'ablation.json').read_text())
  lines = {(line['domain'], line['kind'], line['expert']): line for line in about['ablations']}
  config = policies.configure(model.config, 'none')
  loss = jax.jit(lambda p, batch: jnp.take_along_axis(jax.nn.log_softmax(OpenMoE(config).apply({'params': p}, batch)),
                                                  batch['decoder_target_tokens'][..., None], axis=-1)[..., 0])
  kernel = model.params['decoder']['layers_1']['mlp']['expert']['wo']
  for domain in DOMAINS:
    batches = list(data_lib.eval_batches(collect.data_settings(model.run, own), domain))
    sums = lambda: [np.sum(np.asarray(loss(model.params, b), np.float64) * (b['decoder_target_tokens'] > 0)) for b in batches]
    count = sum((b['decoder_target_tokens'] > 0).sum() for b in batches)
    before, whole = sum(sums()), kernel['kernel']
    kernel['kernel'] = whole.at[2].set(0.)
    after = sum(sums())
    kernel['kernel'] = whole
    line = lines[domain, 'zero', 2]
    assert about['target_tokens'][domain] == count
    assert line['loss'] == pytest.approx(-before / count, abs=1e-5)
    assert line['change'] == pytest.approx((before - after) / count, abs=2e-5) and abs(line['change']) > 1e-3
    assert line['low'] <= line['change'] <= line['high']


@pytest.mark.slow
def test_reports_hold_all_experts_and_their_load(reported):
  about = json.loads((reported.parent / 'ablation.json').read_text())
  lines = about['ablations']
  assert len(lines) == 2 * (2 * 4 + 6)
  for domain in DOMAINS:
    own = [line for line in lines if line['domain'] == domain and line['kind'] == 'zero']
    assert [line['expert'] for line in own] == [0, 1, 2, 3]
    assert sum(line['load'] for line in own) == pytest.approx(4, abs=1e-6)
    most = next(m for m in about['matters_most'] if m['domain'] == domain and m['kind'] == 'zero')
    assert most['change'] == max(line['change'] for line in own)
    assert most['load_rank'] == 1 + sum(line['load'] > most['load'] for line in own)
    follows = next(m for m in about['follows_load'] if m['domain'] == domain and m['kind'] == 'zero')
    ranks = [np.argsort(np.argsort([line[name] for line in own])) for name in ('change', 'load')]
    assert follows['correlation'] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)
  with open(f'{reported}.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  assert [float(row['change']) for row in rows] == [line['change'] for line in lines]
  assert 0 < about['not_in_table'] < 1
  import matplotlib.image
  for name in ('experts', 'layers'):
    assert matplotlib.image.imread(f'{reported}_{name}.png')[..., :3].std() > .05
    assert (reported.parent / f'ablation_{name}.svg').read_text().rstrip().endswith('</svg>')


@pytest.mark.slow
def test_what_is_known_is_not_computed_again(checkpoint, reported, tmp_path, monkeypatch, capsys):
  (tmp_path / 'again.npz').write_bytes((reported.parent / 'ablation.npz').read_bytes())
  calls, run = [], surgery._run
  monkeypatch.setattr(surgery, '_run', lambda *args: (calls.append(args), run(*args))[1])
  flags = ['ablate', checkpoint, '--mixture=demo_full_lm', f'--output={tmp_path}/again.json', '--batch_size=8']
  analyze.main([*flags, '--tokens=512'])
  assert len(calls) == 4  # two batches of two domains, of the model as it is
  assert (tmp_path / 'again.csv').read_text() == (reported.parent / 'ablation.csv').read_text()
  capsys.readouterr()
  with pytest.raises(SystemExit):
    analyze.main([*flags, '--tokens=256'])
  error = capsys.readouterr().err
  assert 'again.npz holds losses of another model or of other rows; give another --output' in error
  assert error.count('\n') == 1


@pytest.mark.slow
def test_an_interruption_keeps_what_is_done(checkpoint, tmp_path, monkeypatch):
  calls, run = [], surgery._run
  def stopped(*args):
    calls.append(args)
    if len(calls) > 6:
      raise KeyboardInterrupt
    return run(*args)
  model, data = loading.load(checkpoint), collect.Settings(['demo_code_full_lm'], tokens=512, batch_size=8)
  monkeypatch.setattr(surgery, '_run', stopped)
  with pytest.raises(KeyboardInterrupt):
    surgery.ablate(model, data, ['zero'], rows_file=tmp_path / 'rows.npz')
  calls.clear()
  monkeypatch.setattr(surgery, '_run', lambda *args: (calls.append(args), run(*args))[1])
  surgery.ablate(model, data, ['zero'], rows_file=tmp_path / 'rows.npz')
  assert len(calls) == 2 + 2 * 4 - 4  # the model as it is, and two of four experts


@pytest.mark.slow
def test_one_line_of_python(checkpoint):
  frame = loading.load(checkpoint).ablate('demo_code_full_lm', tokens=512, kinds=['zero', 'same'])
  columns = {name: np.asarray(frame[name]) for name in ('kind', 'expert', 'change', 'load')}
  assert columns['kind'].tolist() == ['zero'] * 4 + ['same'] and columns['expert'].tolist() == [0, 1, 2, 3, -1]
  assert np.isfinite(columns['change']).all() and np.isnan(columns['load'][-1])


@pytest.mark.parametrize('flags, message', (
    (['--experts=1-3'], "--experts: '1-3' must be 2 numbers with ':' between them"),
    (['--layers=a'], "--layers: 'a' must be numbers with ',' between them"),
    pytest.param(['--tokens=64'], 'demo_code_full_lm has 2 rows with targets, at least 8 are needed for an interval',
                 marks=pytest.mark.slow),
    pytest.param(['--mixture=demo_ful'], "'demo_ful' is not a registered mixture or task", marks=pytest.mark.slow)))
def test_mistakes_take_one_line(checkpoint, tmp_path, capsys, flags, message):
  with pytest.raises(SystemExit) as stopped:
    analyze.main(['ablate', checkpoint, '--mixture=demo_full_lm', f'--output={tmp_path}/x', '--batch_size=2', *flags])
  error = capsys.readouterr().err
  assert stopped.value.code == 2 and message in error and error.count('\n') == 1
