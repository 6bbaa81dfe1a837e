"""Reading gin files and --gin.NAME=VALUE: what is understood, and the one line that every mistake ends in."""

import builtins
import os
import subprocess
import sys

import hypothesis
from hypothesis import strategies as st
from openmoe_jax import command_line, config, gin_utils
from openmoe_jax.config import ConfigError
import pytest

DEMO = 'recipes/demo.gin'


def load(*bindings, file=DEMO, **kwargs):
  return gin_utils.load_run_config([file], bindings, check_required=False, **kwargs)


def message(function, *args, **kwargs):
  """The text of the ConfigError that a call raises; it must be one line."""
  with pytest.raises(ConfigError) as caught:
    function(*args, **kwargs)
  text = str(caught.value)
  assert '\n' not in text and len(text) < 600, text
  return text


@pytest.fixture
def write(tmp_path, monkeypatch):
  """Writes a gin file into the current folder, and gives its name."""
  monkeypatch.chdir(tmp_path)

  def write_file(text, name='x.gin'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    return name

  return write_file


@pytest.mark.parametrize('binding, section, field, value', [
    ('BATCH_SIZE=16', 'data', 'batch_size', 16),
    ('TRAIN_STEPS=1e6', 'train', 'train_steps', 1000000),
    ('TRAIN_STEPS=%BATCH_SIZE', 'train', 'train_steps', 4),
    ('DROPOUT_RATE=0', 'model', 'dropout_rate', 0.0),
    ('ModelConfig.dispatch=einsum', 'model', 'dispatch', 'einsum'),
    ('openmoe_jax.config.ModelConfig.dispatch=einsum', 'model', 'dispatch', 'einsum'),
    ("ModelConfig.dispatch='einsum'", 'model', 'dispatch', 'einsum'),
    ('ModelConfig.scan_blocks=true', 'model', 'scan_blocks', True),
    ('ModelConfig.scan_blocks=True', 'model', 'scan_blocks', True),
    ('ModelConfig.mlp_activations=silu,linear', 'model', 'mlp_activations', ('silu', 'linear')),
    ("ModelConfig.mlp_activations=('silu', 'linear')", 'model', 'mlp_activations', ('silu', 'linear')),
    ('DataConfig.module_imports=my_tasks', 'data', 'module_imports', ('my_tasks',)),
    ('DataConfig.module_imports=()', 'data', 'module_imports', ()),
    ('TASK_FEATURE_LENGTHS=inputs:64,targets:32', 'data', 'task_feature_lengths', {'inputs': 64, 'targets': 32}),
    ('TASK_FEATURE_LENGTHS={inputs: 64, targets: 32}', 'data', 'task_feature_lengths', {'inputs': 64, 'targets': 32}),
    ('TASK_FEATURE_LENGTHS={"inputs": 64, "targets": 32}', 'data', 'task_feature_lengths',
     {'inputs': 64, 'targets': 32}),
    ('TASK_FEATURE_LENGTHS={"targets": %BATCH_SIZE}', 'data', 'task_feature_lengths', {'targets': 4}),
    ('MIXTURE_OR_TASK_NAME=mix_ul2', 'data', 'mixture_or_task', 'mix_ul2'),
    ('VOCABULARY=gs://bucket/a b.model', 'data', 'vocabulary', 'gs://bucket/a b.model'),
    ('VOCABULARY=2024', 'data', 'vocabulary', '2024'),
    ('VOCABULARY=1e6', 'data', 'vocabulary', '1e6'),
    ('VOCABULARY=2024-01-02', 'data', 'vocabulary', '2024-01-02'),
    ('VOCABULARY=a=b', 'data', 'vocabulary', 'a=b'),
    ('VOCABULARY=', 'data', 'vocabulary', ''),
    ('VOCABULARY=None', 'data', 'vocabulary', 'None'),
    ('VOCABULARY=@f()', 'data', 'vocabulary', '@f()'),
    ('VOCABULARY=__import__("os").system("false")', 'data', 'vocabulary', '__import__("os").system("false")'),
    ('RunConfig.model_dir=/tmp/x', None, 'model_dir', '/tmp/x'),
])
def test_command_line_values(binding, section, field, value):
  run = load(binding)
  got = getattr(getattr(run, section) if section else run, field)
  assert got == value and type(got) is type(value)


@hypothesis.given(st.text(st.characters(exclude_categories=['Cs', 'Cc']), max_size=30))
def test_any_text_reaches_a_string_setting(text):
  text = text.strip()
  hypothesis.assume(text[:1] not in ('%', '"', "'") and not text.lower().startswith(('b"', "b'", 'r"', "r'", 'u', 'f')))
  assert load(f'VOCABULARY={text}').data.vocabulary == text


@pytest.mark.parametrize('binding, parts', [
    ('BATCHSIZE=3', ('BATCHSIZE', 'did you mean BATCH_SIZE?')),
    ('NUM_EXPERT=3', ('NUM_EXPERT', 'NUM_EXPERT_PARTITIONS')),
    ('XYZZY=3', ('XYZZY', 'known: ', 'BATCH_SIZE')),
    ('ModelConfi.emb_dim=3', ('ModelConfi', 'did you mean ModelConfig')),
    ('train/utils.DatasetConfig.batch_size=3', ('scopes are not supported',)),
    ('ModelConfig.embdim=3', ('ModelConfig', "'embdim'", 'emb_dim')),
    ('RunConfig.model=3', ('RunConfig', "'model'", 'model_dir')),
    ('ModelConfig=3', ('ModelConfig', 'not a macro')),
    ('BATCH_SIZE=abc', ('DataConfig.batch_size', "'abc'", 'an integer')),
    ('BATCH_SIZE=1.5', ('DataConfig.batch_size', '1.5', 'an integer')),
    ('BATCH_SIZE=True', ('DataConfig.batch_size', 'True', 'an integer')),
    ('BATCH_SIZE=', ('DataConfig.batch_size', "''", 'an integer')),
    ('BATCH_SIZE=%TRAIN_STEP', ('TRAIN_STEP', 'did you mean TRAIN_STEPS?')),
    ('BATCH_SIZE=%BATCH_SIZE', ('BATCH_SIZE -> BATCH_SIZE',)),
    ('DROPOUT_RATE=much', ('ModelConfig.dropout_rate', "'much'", 'a number')),
    ('ModelConfig.scan_blocks=1', ('ModelConfig.scan_blocks', '1', 'True or False')),
    ('TASK_FEATURE_LENGTHS=64', ('DataConfig.task_feature_lengths', '64', 'a dictionary')),
    ('TASK_FEATURE_LENGTHS=inputs:x', ("DataConfig.task_feature_lengths['inputs']", "'x'", 'an integer')),
    ('TASK_FEATURE_LENGTHS=input:64', ('DataConfig.task_feature_lengths', 'input')),
    ('ModelConfig.mlp_activations=3', ('ModelConfig.mlp_activations', '3', 'strings')),
    ('ModelConfig.dtype=float31', ('ModelConfig.dtype', 'float31', 'float32')),
    ('BATCH_SIZE', ('--gin.BATCH_SIZE', 'NAME=VALUE')),
])
def test_mistakes_on_the_command_line(binding, parts):
  text = message(load, binding)
  assert all(part in text for part in parts), text


@pytest.mark.parametrize('text, parts', [
    ("include 'models/demo.gin'\nX = 1", ('x.gin:2', 'nothing refers to the macro X')),
    ('ModelConfig:\n  emb_dims = 3', ('x.gin:2', "'emb_dims'", 'did you mean emb_dim')),
    ('\nModelConfi:\n  emb_dim = 3', ('x.gin:2', 'ModelConfi', 'did you mean ModelConfig')),
    ('ModelConfig.dtype = float32', ('x.gin:1', 'float32 is not a value; strings need quotes')),
    ('ModelConfig.emb_dim = __import__("os")', ('x.gin:1', '__import__ is not a value')),
    ('ModelConfig.emb_dim = ', ('x.gin:1', 'cannot be read as gin')),
    ('ModelConfig.emb_dim = (1,', ('cannot be read as gin', 'not closed')),
    ("ModelConfig.dtype = 'float32", ('x.gin', 'cannot be read as gin')),
    ('ModelConfig.emb_dim = 1 2', ('x.gin:1', 'cannot be read as gin')),
    ('ModelConfig:\nemb_dim = 3', ('x.gin:2', 'cannot be read as gin')),
    ('?', ('x.gin:1', 'cannot be read as gin')),
    ('import os', ('x.gin:1', 'import is not supported')),
    ('from __gin__ import dynamic_registration', ('x.gin:1', 'import is not supported')),
    ('ModelConfig.emb_dim = @f()', ('x.gin:1', '@f() is not supported')),
    ('ModelConfig.mlp_activations = [@f]', ('x.gin:1', '@f is not supported')),
    ('train/BATCH_SIZE = 3', ('x.gin:1', 'scopes are not supported')),
    ("include 'nope.gin'", ('x.gin:1', "'nope.gin' not found")),
    ("include 'x.gin'", ('x.gin:1', 'includes itself')),
    ("ModelConfig.vocab_size = '5'", ('x.gin:1', 'ModelConfig.vocab_size', 'an integer')),
    ('ModelConfig.vocab_size = 5', ('name no model', 'emb_dim', 'models/')),
    ("include 'models/demo.gin'\nModelConfig.head_dim = 31", ('ModelConfig.head_dim', '31', 'even')),
])
def test_mistakes_in_a_file(write, text, parts):
  got = message(load, file=write(text))
  assert all(part in got for part in parts), got


def test_unknown_files_are_named_with_suggestions(write):
  assert 'recipes/demo.gin' in message(load, file='recipes/dem.gin')
  assert 'recipes/demo.gin' in message(load, file='demo.gin')
  assert '/nowhere/x.gin' in message(load, file='/nowhere/x.gin')
  assert 'search/folder' in message(load, file='x.gin', search_paths=['search/folder'])
  assert '--gin_file' in message(gin_utils.load_run_config, [])


def test_required_settings(write):
  text = message(gin_utils.load_run_config, [DEMO])
  assert 'MODEL_DIR' in text and '--model_dir=...' in text and 'BATCH_SIZE' not in text
  assert gin_utils.load_run_config([DEMO], ['MODEL_DIR=/tmp/x']).model_dir == '/tmp/x'
  assert gin_utils.load_run_config([DEMO], ['RunConfig.model_dir=/tmp/x']).model_dir == '/tmp/x'
  text = message(gin_utils.load_run_config, [write("include 'models/demo.gin'\nDataConfig.batch_size = %gin.REQUIRED")])
  assert '--gin.DataConfig.batch_size=' in text


def test_a_macro_that_is_set_but_overridden_is_refused(write):
  file = write(f"include '{DEMO}'\nDataConfig.batch_size = 16")
  assert load(file=file).data.batch_size == 16
  assert 'no effect' in message(load, 'BATCH_SIZE=32', file=file)
  assert load('DataConfig.batch_size=32', file=file).data.batch_size == 32


def test_last_value_of_a_macro_counts_everywhere(write):
  file = write(f"include '{DEMO}'\nSTEPS = 30\nTRAIN_STEPS = %STEPS\nSTEPS = 40")
  assert load(file=file).train.train_steps == 40
  assert load('STEPS=50', file=file).train.train_steps == 50
  assert gin_utils.load_run_config([file, write('STEPS = 60', 'y.gin')], check_required=False).train.train_steps == 60


def test_a_file_is_looked_for_here_then_in_search_paths_then_in_the_package(write, tmp_path):
  steps = lambda **kwargs: load(file='recipes/demo.gin', **kwargs).train.train_steps
  package = steps()
  write("include 'models/demo.gin'\nTrainConfig.train_steps = 11", 'first/recipes/demo.gin')
  write("include 'models/demo.gin'\nTrainConfig.train_steps = 12", 'second/recipes/demo.gin')
  assert steps(search_paths=['second', str(tmp_path / 'first')]) == 12
  write("include 'models/demo.gin'\nTrainConfig.train_steps = 13", 'recipes/demo.gin')
  assert steps(search_paths=['second']) == 13
  assert package not in (11, 12, 13)
  write('NUM_EMBEDDINGS = 640', 'second/extra.gin')  # includes follow the same rules
  assert load(file=write("include 'models/demo.gin'\ninclude 'extra.gin'"), search_paths=['second']
              ).model.vocab_size == 640


def test_the_folder_of_gin_files_holds_no_python():
  for _, _, files in os.walk(gin_utils.gin_folder()):
    assert all(name.endswith('.gin') for name in files if not name.startswith('.')), files


def test_another_folder_named_gin_is_not_taken_for_ours(tmp_path, monkeypatch):
  package = tmp_path / 'site-packages' / 'openmoe_jax'
  (tmp_path / 'site-packages' / 'gin').mkdir(parents=True)  # gin-config's own, beside an installed package
  package.mkdir()
  monkeypatch.setattr(gin_utils, '__file__', str(package / 'gin_utils.py'))
  assert 'gin files of openmoe_jax are missing' in message(gin_utils.gin_folder)
  (package / 'gin').mkdir()
  (package / 'gin' / gin_utils.MARKER).write_text('')
  assert gin_utils.gin_folder() == str(package / 'gin')


def test_without_gin_config(monkeypatch):
  """With gin-config missing, `import gin` finds the folder gin of the checkout and gives an empty namespace."""
  real_import = builtins.__import__

  def without_gin(name, globals_=None, locals_=None, fromlist=(), level=0):
    if name == 'gin' and 'config_parser' in (fromlist or ()):
      raise ImportError("cannot import name 'config_parser' from 'gin' (unknown location)")
    return real_import(name, globals_, locals_, fromlist, level)

  monkeypatch.setattr(builtins, '__import__', without_gin)
  assert 'pip install gin-config' in message(load)


def test_reading_leaves_no_trace_in_gin_and_prints_nothing(tmp_path):
  code = ('from openmoe_jax import gin_utils\n'
          'gin_utils.load_run_config(["recipes/demo.gin"], check_required=False)\n'
          'import sys, gin; assert gin.config_str() == "" and not gin.config_is_locked()\n'
          'assert "jax" not in sys.modules and "tensorflow" not in sys.modules')
  done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_every_type_of_setting_is_understood():
  """A setting of a new type would otherwise be refused at its first use."""
  run = load()
  for cls, section in gin_utils.SECTIONS.items():
    for name in gin_utils.setting_names(cls):
      value = command_line.literal(config.to_dict(getattr(getattr(run, section), name)))
      assert load(f'{cls.__name__}.{name}={value}') == run
