"""Every gin file of the package can be read, and says what the original's said (SPEC 6, 10, 12, 13)."""

import dataclasses
import pathlib
import re

from openmoe_jax import gin_utils, partitioning
from openmoe_jax.analysis import memory, parameters
from openmoe_jax.config import ConfigError, EvalConfig
from openmoe_jax.routers.groups import group_tokens
from openmoe_jax.tools import document_configuration
import pytest

FILES = gin_utils.package_gin_files()
EVALUATIONS = [name for name in FILES if name.startswith(document_configuration.EVALUATIONS)]
RECIPES = [name for name in FILES if name.startswith('recipes/') and name not in EVALUATIONS]
# Parts that others include: they name no model of their own.
PARTS = {'openmoe.gin', 'models/openmoe.gin', 'models/openllama.gin', 'runs/pretrain.gin', 'runs/continue.gin',
         'runs/finetune.gin'}
OVERLAYS = {'runs/eval.gin', 'runs/one_pass.gin'}  # put behind something complete
UMT5 = 'gs://t5-data/vocabs/umt5.256000/sentencepiece.model'
UL2, LM = {'inputs': 1024, 'targets': 1024}, {'targets': 2048}


def load(name, *bindings):
  return gin_utils.load_run_config([name], bindings, check_required=False)


@pytest.mark.parametrize('name', FILES)
def test_every_file_can_be_read(name):
  if name in PARTS or name in EVALUATIONS or name in OVERLAYS:
    with pytest.raises(ConfigError, match='name no model'):
      load(name)
  else:
    assert load(name).model.vocab_size % 128 == 0


@pytest.mark.parametrize('name', sorted(PARTS - {'openmoe.gin', 'models/openmoe.gin', 'models/openllama.gin'}))
def test_a_run_can_be_put_behind_any_model(name):
  bindings = ['MIXTURE_OR_TASK_NAME=my_task', 'TASK_FEATURE_LENGTHS=targets:64', 'TRAIN_STEPS=10', 'MODEL_DIR=/tmp/x']
  bindings += [] if name == 'runs/pretrain.gin' else ['INITIAL_CHECKPOINT_PATH=/tmp/y']
  for model in ('models/demo.gin', 'models/openllama_base.gin'):
    run = gin_utils.load_run_config([model, name], bindings)
    assert (run.data.mixture_or_task, run.data.row_length, run.model_dir) == ('my_task', 64, '/tmp/x')
    assert run.model.dropout_rate == (.05 if name == 'runs/finetune.gin' else 0)


@pytest.mark.parametrize('recipe, bindings', (('openmoe_base', ()), ('openmoe_8b', ()), ('openllama_large', ()),
                                              ('openmoe_34b', ('GROUP_SIZE=4096',))))
def test_a_recipe_in_one_pass(recipe, bindings):
  """Nothing else changes: the same batch, and routing groups of the same size."""
  before = load(f'recipes/{recipe}.gin')
  run = gin_utils.load_run_config([f'recipes/{recipe}.gin', 'runs/one_pass.gin'], bindings, check_required=False)
  assert (run.train.num_microbatches, run.mesh.model, run.mesh.fsdp) == (1, 1, ('data', 'expert'))
  assert (run.data, run.optimizer) == (before.data, before.optimizer)
  assert run.model.attention == 'splash'
  assert run.model.replace(group_size=1, attention='blocked') == before.model.replace(group_size=1)
  sizes = [group_tokens(run.model, r.data.batch_size // r.train.num_microbatches, r.data.row_length, True).group_size
           for r in (before, run) if run.model.num_experts]
  assert len(set(sizes)) <= 1


# recipe: model, mixture, feature lengths, batch, microbatches, steps, expert and model partitions
ORIGINAL = {
    'openmoe_base': ('openmoe_base', 'mix_ul2', UL2, 128, 1, 500000, 16, 1),
    'openmoe_base_stage2': ('openmoe_base', 'mix_ul2_stage2', UL2, 128, 1, 600000, 16, 1),
    'openmoe_base_paper': ('openmoe_base_paper', 'mix_ul2', UL2, 128, 1, 500000, 16, 1),
    'openmoe_8b': ('openmoe_8b', 'mix_ul2', UL2, 1024, 8, 500000, 32, 8),
    'openmoe_8b_paper': ('openmoe_8b_paper', 'mix_ul2', UL2, 1024, 8, 500000, 32, 8),
    'openmoe_8b_stage2': ('openmoe_8b', 'mix_ul2_stage2', UL2, 1024, 8, 500000, 32, 8),
    'openmoe_8b_full_lm': ('openmoe_8b', 'mix_full_lm_stage2', LM, 1024, 8, 700000, 32, 8),
    'openmoe_34b_ul2': ('openmoe_34b', 'mix_ul2_v2', UL2, 1024, 16, 25000, 32, 16),
    'openmoe_34b': ('openmoe_34b', 'mix_full_lm_v2', LM, 1024, 16, 500000, 32, 16),
    'openmoe_8b_wildchat_sft': ('openmoe_8b', 'wildchat_gpt4_sft', UL2, 128, 4, 553000, 32, 8),
    'openmoe_8b_orca_sft': ('openmoe_8b', 'orca_sft', {'inputs': 1536, 'targets': 512}, 64, 2, 700000, 32, 8),
    'openllama_base': ('openllama_base', 'mix_full_lm', LM, 128, 1, 500000, 1, 1),
    'openllama_large': ('openllama_large', 'mix_ul2', UL2, 1024, 16, 500000, 1, 8),
    'ablation_wo_moe': ('openllama_base', 'mix_ul2', UL2, 128, 1, 500000, 1, 1),
    'ablation_wo_ul2': ('openmoe_base', 'mix_full_lm', LM, 128, 1, 500000, 16, 1),
    'ablation_wo_code': ('openmoe_base', 'mix_lesscode_ul2', UL2, 128, 1, 500000, 16, 1),
    'ablation_llama_tokenizer': ('openmoe_base', 'mix_ul2', {'inputs': 512, 'targets': 512}, 128, 1, 500000, 16, 1),
    'ablation_pack': ('openmoe_base', 'c4_v220_ul2_pack', UL2, 128, 1, 500000, 16, 1),
}


def test_every_recipe_is_pinned_here():
  assert {f'recipes/{name}.gin' for name in ORIGINAL} | {'recipes/demo.gin', 'recipes/demo_ul2.gin'} == set(RECIPES)


@pytest.mark.parametrize('name', ORIGINAL)
def test_recipe_is_the_originals(name):
  model, mixture, lengths, batch, microbatches, steps, expert, model_axis = ORIGINAL[name]
  run = load(f'recipes/{name}.gin')
  assert (run.data.mixture_or_task, run.data.task_feature_lengths) == (mixture, lengths)
  assert (run.data.batch_size, run.train.num_microbatches, run.train.train_steps) == (batch, microbatches, steps)
  assert (run.mesh.data, run.mesh.expert, run.mesh.model) == (-1, expert, model_axis)

  changed = {}
  if name == 'openmoe_34b':
    changed = {'router_z_loss_factor': 1e-3, 'group_size': 8192}
  elif name == 'ablation_llama_tokenizer':
    changed = {'vocab_size': 32128}
  elif name.endswith('_sft'):
    changed = {'dropout_rate': .05}
  assert run.model == load(f'models/{model}.gin').model.replace(**changed)
  assert run.model.num_expert_replicas == 1

  llama = name == 'ablation_llama_tokenizer'
  assert (run.data.vocabulary, run.data.extra_ids) == (('', 128) if llama else (UMT5, 300))
  assert run.data.pack and run.data.shuffle and run.data.loss_on_targets_only
  optimizer = run.optimizer
  assert optimizer.name == 'adafactor' and optimizer.weight_decay == 0 and optimizer.max_grad_norm == 0
  if name.endswith('_sft'):
    assert (optimizer.schedule, optimizer.learning_rate) == ('constant', 1e-3)
    period = 100 if 'wildchat' in name else 1000
    assert run.train.eval_period == run.checkpoint.period == period
  else:
    assert optimizer.schedule == 'constant * rsqrt_decay'
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (1., 10000)


def test_mathematics_of_the_models():
  for name, emb, mlp, heads, head_dim, layers, interval, experts in (
      ('openmoe_base', 768, 2048, 12, 64, 12, 4, 16), ('openmoe_8b', 2048, 8192, 24, 128, 24, 6, 32),
      ('openmoe_34b', 3072, 12288, 24, 128, 32, 4, 32)):
    model = load(f'models/{name}.gin').model
    assert (model.emb_dim, model.mlp_dim, model.num_heads, model.head_dim) == (emb, mlp, heads, head_dim)
    assert (model.num_layers, model.moe_interval, model.num_experts) == (layers, interval, experts)
    assert (model.num_selected_experts, model.group_size, model.capacity_mode) == (2, 4096, 't5x')
    assert (model.train_capacity_factor, model.eval_capacity_factor, model.min_expert_capacity) == (1.25, 2., 4)
    assert (model.aux_loss_factor, model.router_z_loss_factor, model.z_loss) == (.01, 1e-4, 1e-4)
    assert model.mlp_activations == ('swiglu', 'linear') and model.extra_mlp and not model.parallel_moe
    assert (model.init_scale, model.loss_normalization, model.dtype) == (.1, 'target_tokens', 'bfloat16')
    assert not model.inputs_bidirectional_attention and not model.batch_prioritized and not model.ignore_padding_tokens
  for name in ('openllama_base', 'openllama_large'):
    dense = load(f'models/{name}.gin').model
    assert (dense.num_sparse_layers, dense.num_blocks) == (0, dense.num_layers)
    assert (dense.init_scale, dense.loss_normalization) == (1., 'sum')


@pytest.mark.parametrize('name', ORIGINAL)
def test_recipe_fits_its_mesh(name):
  """Every parameter divides, and so do the rows of a microbatch."""
  run = load(f'recipes/{name}.gin')
  mesh = memory.mesh_shape(run.mesh)
  for parameter, shape in parameters.parameter_shapes(run.model).items():
    spec = partitioning.mesh_axes(partitioning.param_axes(parameter.split('/'), len(shape)))
    assert all(dim % partitioning._axes_size(mesh, axes) == 0 for dim, axes in zip(shape, spec)), (parameter, shape, spec)
  assert run.data.batch_size // run.train.num_microbatches % (mesh['data'] * mesh['expert']) == 0


@pytest.mark.parametrize('name, replicas, same', [('openmoe_8b', 2, True), ('openmoe_8b_full_lm', 2, True),
                                                  ('openmoe_base', 4, True), ('openmoe_base', 8, False),
                                                  ('openmoe_34b', 2, False),
                                                  ('ablation_llama_tokenizer', 2, True),
                                                  ('ablation_llama_tokenizer', 4, False)])
def test_what_the_comments_say_about_replicas(name, replicas, same):
  """SPEC 15.1: the original's R was devices / (expert x model partitions)."""
  run = load(f'recipes/{name}.gin')
  rows = run.data.batch_size // run.train.num_microbatches
  ours, theirs = (group_tokens(run.model.replace(num_expert_replicas=r), rows, run.data.row_length, True)
                  for r in (1, replicas))
  assert (ours == theirs) == same
  text = pathlib.Path(gin_utils.gin_folder(), f'recipes/{name}.gin').read_text()
  assert re.search(r'# R of the original\b', text)


def test_later_stages_ask_for_their_start():
  for name in ('openmoe_base_stage2', 'openmoe_8b_stage2', 'openmoe_8b_full_lm', 'openmoe_34b',
               'openmoe_8b_wildchat_sft', 'openmoe_8b_orca_sft'):
    with pytest.raises(ConfigError, match='INITIAL_CHECKPOINT_PATH'):
      gin_utils.load_run_config([f'recipes/{name}.gin'], ['MODEL_DIR=/tmp/x'])
    assert load(f'recipes/{name}.gin').checkpoint.restore == 'full'


def test_demo_trains_a_million_tokens_in_pieces_that_divide():
  for name in ('recipes/demo.gin', 'recipes/demo_ul2.gin'):
    run = load(name)
    assert run.train.train_steps * run.data.batch_size * run.data.row_length >= 1e6
    assert run.data.vocabulary == '' and run.model.vocab_size >= 8192 + run.data.extra_ids
    assert parameters.count_parameters(run.model).parts['experts'] > 0
  assert load('recipes/demo.gin').data.row_length == load('recipes/demo_ul2.gin').data.row_length


@pytest.mark.parametrize('name', EVALUATIONS)
def test_an_evaluation_names_tasks_that_exist(name):
  from openmoe_jax.tasks import evaluation
  given = gin_utils.load_settings([name], ['CHECKPOINT_PATH=x', 'EVAL_OUTPUT_DIR=y', 'BATCH_SIZE=3'])
  settings = EvalConfig(**given['eval'])
  assert settings.tasks and set(settings.tasks) <= {*evaluation.NAMES, 'bigbench_lite'}
  assert (settings.checkpoint, settings.output_dir, settings.batch_size) == ('x', 'y', 3)
  assert not any(given[section] for section in given if section != 'eval')


def test_every_task_has_a_recipe():
  from openmoe_jax.tasks import evaluation
  named = {task for name in EVALUATIONS for task in gin_utils.load_settings([name])['eval']['tasks']}
  assert named == {*evaluation.NAMES, 'bigbench_lite'}


def test_documentation_is_up_to_date():
  """If this fails: python -m openmoe_jax.tools.document_configuration docs/configuration.md"""
  text = (pathlib.Path(__file__).resolve().parents[1] / 'docs' / 'configuration.md').read_text()
  assert document_configuration.fill(text) == text
  for cls in gin_utils.SECTIONS:
    undocumented = {f.name for f in dataclasses.fields(cls)} ^ set(document_configuration.setting_docs(cls))
    assert not undocumented, f'docstring and fields of {cls.__name__} differ: {undocumented}'


@pytest.mark.parametrize('name', [name for name in RECIPES if 'ul2' in str(load(name).data.mixture_or_task)])
def test_ul2_has_sentinels_and_room_for_its_lengths(name):
  """What the objective would refuse once the corpora are there."""
  from openmoe_jax import objectives
  data = load(name).data
  for denoiser in objectives.UL2_DENOISERS:
    if denoiser.density:
      lengths = objectives.span_lengths(data.task_feature_lengths['inputs'], denoiser.density, denoiser.mean_span)
      spans = round(round(lengths.segment * denoiser.density) / denoiser.mean_span)
      assert spans <= data.extra_ids and lengths.targets <= data.task_feature_lengths['targets'], denoiser
