"""What every test runs under: 8 fake CPU devices, a quiet TensorFlow, examples that are the same on every run, no cache
of the user's, and the package's vocabulary."""

import os
import sys
import tempfile

import hypothesis
import pytest

# They are read once, when jax first asks for its devices. JAX_PLATFORMS from outside wins, so that a test can be tried
# on an accelerator: JAX_PLATFORMS=cuda python -m pytest tests/model_test.py
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Most of the time of the tests is XLA's compiler, which takes half of it without LLVM's optimizations; XLA's own are done
# as ever. golden_optimized_test.py repeats the comparison with the original with all of them.
for flag in ('--xla_force_host_platform_device_count=8', '--xla_backend_optimization_level=0'):
  if flag.split('=')[0] not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# transformers copies the code of a model's folder to here: a place for every process, that is not the user's.
_MODULES = tempfile.TemporaryDirectory(prefix='openmoe_jax_modules_')
os.environ['HF_MODULES_CACHE'] = _MODULES.name
# datasets, which reads the tasks of lm-eval, keeps a copy of every file there.
os.environ['HF_DATASETS_CACHE'] = os.path.join(_MODULES.name, 'datasets')

# No deadline: the first example of a property compiles. A failing example is printed and stays the same.
hypothesis.settings.register_profile('openmoe_jax', deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile('openmoe_jax')


# Files are given to workers in this order; what takes longest must not come last, when there is nothing left beside it.
_LONGEST = ('processes_test', 'fault_test', 'train_test', 'mesh_test', 'compile_report_test', 'conversion_test',
            'torch_model_test', 'decoding_test', 'infer_test', 'pipeline_test', 'model_test', 'eval_test')


def pytest_collection_modifyitems(items):
  place = {name: number for number, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope='module', autouse=True)
def packages_vocabulary():
  """A file of tests does not begin with the vocabulary that one before it has chosen."""
  if 'openmoe_jax.vocabulary' in sys.modules:
    sys.modules['openmoe_jax.vocabulary'].configure()
