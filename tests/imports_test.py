"""The shape of the code: who may import whom, how long a file may be, and what an import costs."""

import ast
import functools
import json
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / 'openmoe_jax'
FOLDERS = {'openmoe_jax': PACKAGE, 'openmoe_jax.tasks': REPOSITORY / 'tasks', 'openmoe_jax.tools': REPOSITORY / 'tools'}
LONGEST = 500

# docs/architecture.md has this table with a sentence about each. A module imports from lower layers, and from its own
# layer as long as that makes no circle.
LAYERS = (
    ('checks', 'model_config', 'config', 'partitioning', 'losses', 'paths', 'gin_utils', 'routers', 'history', 'schedules',
     'tensorflow_setup', 'cluster_environment', 'environment', 'ending', 'hang_detector', 'heartbeat', 'launch', 'tpu_slices',
     'compiler_options'),
    ('layers', 'attention', 'splash', 'dispatch', 'moe'),
    ('model', 'names', 'pipeline'),
    ('optimizers', 'checkpoint_files', 'checkpoint_layout', 'checkpoints', 'vocabulary', 'feature_converters',
     'objectives', 'mixtures', 'iterator_state', 'data', 'writers', 'metric_window', 'alarms', 'batch_hash', 'progress',
     'profiling', 'sampling',
     'decoding', 'scoring', 'text_decoding', 'vocabulary_files', 'quantization', 'chat', 'bar', 'generation_files',
     'sandbox', 'code_execution', 'denoising', 'fill_in_the_middle', 'packing', 'recording'),
    ('train_state', 'train_step', 'metrics', 'evaluation', 'resume', 'analysis', 'convert', 'bigbench', 'task_eval',
     'mt_bench', 'preparation', 'tpu'),
    ('command_line', 'checkpoint_flags', 'conversion', 'infer', 'eval', 'inspection', 'loading', 'replay',
     'training_loop', 'train', 'tasks', 'tools', 'lm_harness', 'lm_harness_model', 'lm_harness_tasks', 'analyze',
     'analyze_figures', 'compile_report'),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
# Everybody else gets TensorFlow and seqio from tensorflow_setup, which tells them to leave accelerators alone.
WITH_TENSORFLOW = ('tensorflow_setup', 'tasks')


@functools.cache
def modules():
  """{dotted name: file} of the library, its tasks and tools."""
  found = {}
  for package, folder in FOLDERS.items():
    for path in sorted(folder.rglob('*.py')):
      parts = path.relative_to(folder).with_suffix('').parts
      name = '.'.join((package, *(p for p in parts if p != '__init__')))
      found[name] = path
  return found


@functools.cache
def imports(path, package):
  """Dotted names that a file imports, inside functions too; `from a import b` gives a.b if that is a module."""
  known = set(modules())
  found = set()
  for node in ast.walk(ast.parse(path.read_text(), str(path))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        base = '.'.join(filter(None, [*package.split('.')[:len(package.split('.')) - node.level + 1], base]))
      names = {f'{base}.{alias.name}' for alias in node.names}
      found |= {name if name in known else base for name in names}
  return found


def unit(name):
  """'openmoe_jax.routers.top_k' -> 'routers'; '' for the package itself."""
  return name.split('.')[1] if '.' in name else ''


def edges():
  """{(unit, imported unit)} within the library."""
  return {(unit(name), unit(other)) for name, path in modules().items()
          for other in imports(path, name if path.stem == '__init__' else name.rpartition('.')[0])
          if other.split('.')[0] == 'openmoe_jax' and unit(other) != unit(name)}


def test_every_module_has_a_layer():
  units = {unit(name) for name in modules()} - {''}
  assert not units - set(LAYER_OF), 'give new modules a layer, here and in docs/architecture.md'
  assert not set(LAYER_OF) - units, 'these modules are gone'


def test_modules_import_from_below():
  wrong = sorted(f'{a} (layer {LAYER_OF[a]}) imports {b} (layer {LAYER_OF[b]})' for a, b in edges()
                 if a and b and LAYER_OF.get(b, 0) > LAYER_OF.get(a, 9))
  assert not wrong, '\n'.join(wrong)


def test_package_itself_imports_nothing():
  """`import openmoe_jax` is free: names are loaded on first use."""
  assert not {b for a, b in edges() if not a}


def test_no_circles():
  below = {}
  for a, b in edges():
    below.setdefault(a, set()).add(b)
  done, path = set(), []

  def visit(name):
    assert name not in path, ' -> '.join(path[path.index(name):] + [name])
    if name not in done:
      path.append(name)
      for other in sorted(below.get(name, ())):
        visit(other)
      path.pop()
      done.add(name)

  for name in sorted(below):
    visit(name)


def test_tensorflow_is_imported_where_it_belongs():
  for name, path in modules().items():
    loaded = {other.split('.')[0] for other in imports(path, name)}
    heavy = loaded & {'tensorflow', 'seqio', 'tensorflow_datasets', 't5'}
    assert not heavy or unit(name) in WITH_TENSORFLOW, f'{name} imports {heavy}'


@pytest.mark.parametrize('name', sorted(modules()))
def test_files_are_short(name):
  lines = len(modules()[name].read_text().splitlines())
  assert lines <= LONGEST, f'{lines} lines: past {LONGEST} a file has two ideas in it'


def test_there_is_no_utils():
  assert not [name for name in modules() if name.split('.')[-1] in ('utils', 'helpers', 'common', 'misc')]


IMPORT = '''
import json, sys, time
import jax, jax.numpy, flax, flax.linen, optax
start = time.process_time()
import openmoe_jax.model, openmoe_jax.train_step
cost = time.process_time() - start
print(json.dumps({'cost': cost, 'loaded': sorted({name.split('.')[0] for name in sys.modules})}))
'''


def test_import_of_the_model_is_cheap():
  """CPU seconds on top of jax, flax and optax, which everybody has loaded; no TensorFlow."""
  done = subprocess.run([sys.executable, '-c', IMPORT], cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
                        check=False)
  assert done.returncode == 0, done.stderr
  got = json.loads(done.stdout.splitlines()[-1])
  assert got['cost'] < 1.0
  assert not set(got['loaded']) & {'tensorflow', 'seqio', 't5', 'tensorflow_datasets', 'torch', 'matplotlib'}
