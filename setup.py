"""Packaging of openmoe_jax. `pip install .` works; for a reproducible set of versions use `make` (requirements.lock).

The wheel is one package: the folders gin/, tasks/ and tools/ of the checkout become openmoe_jax.gin, openmoe_jax.tasks
and openmoe_jax.tools, so that an installed program finds its recipes without the checkout.
This file must be readable by any Python 3, because refusing an unsupported one in a clear line is its job.
"""

import os
import re
import sys

from setuptools import setup

PYTHONS = ((3, 11), (3, 12), (3, 13))
FOLDERS = {'openmoe_jax': 'openmoe_jax', 'openmoe_jax.gin': 'gin', 'openmoe_jax.tasks': 'tasks',
           'openmoe_jax.tools': 'tools'}
REQUIREMENTS = [
    'absl-py>=2.1',
    'clu>=0.0.12',
    'etils[epath]>=1.10',
    'flax>=0.12,<0.13',
    'gin-config>=0.5,<0.6',
    # tensorflow-datasets 4.9.10 needs it once a builder class is used, and does not declare it.
    'importlib_resources>=6',
    'jax>=0.10,<0.13',
    'matplotlib>=3.8',
    'ml_dtypes>=0.5',
    'numpy>=2.0',
    'optax>=0.2.6,<0.3',
    'orbax-checkpoint>=0.12,<0.13',
    'packaging>=23',
    'pyarrow>=16',
    'rich>=13',
    'rouge-score>=0.1.2',
    'sacrebleu>=2.4',
    'scikit-learn>=1.4',
    'sentencepiece>=0.2,<0.3',
    'seqio>=0.0.20,<0.1',
    't5>=0.9.4,<0.10',
    'tensorboard>=2.20',
    'tensorstore>=0.1.70',
    'tensorflow>=2.20,<3',
    'tensorflow-datasets>=4.9.9,<5',
    'tensorflow-text>=2.20,<3',
]
HERE = os.path.dirname(os.path.abspath(__file__))

# pip asks any Python for the metadata, reads python_requires there and refuses in one line of its own: so only the
# commands that would really build or install are refused here, and the metadata then names no dependencies, which
# older versions of pip would download before they look at python_requires.
SUPPORTED = sys.version_info[:2] in PYTHONS
if not SUPPORTED and not {'egg_info', 'dist_info', 'sdist'}.intersection(sys.argv):
  sys.exit('openmoe_jax needs Python 3.11, 3.12 or 3.13; this is Python %s.' % sys.version.split()[0])


def read(*path):
  with open(os.path.join(HERE, *path), encoding='utf-8') as file:
    return file.read()


def packages():
  """Every folder that holds modules or gin files, by its name in the wheel. gin/ never holds a .py file: a module
  there would shadow gin-config for every program started in the checkout."""
  for package, folder in FOLDERS.items():
    for root, _, files in os.walk(os.path.join(HERE, folder)):
      if any(name.endswith(('.gin', '.py')) for name in files):
        below = os.path.relpath(root, os.path.join(HERE, folder))
        yield package if below == os.curdir else '.'.join([package] + below.split(os.sep))


setup(
    name='openmoe_jax',
    version=re.search(r"__version__ = '([^']+)'", read('openmoe_jax', '__init__.py')).group(1),
    description='OpenMoE in JAX: train, study and use Mixture-of-Experts language models',
    long_description=read('README.md'),
    long_description_content_type='text/markdown',
    author='The openmoe_jax authors',
    license='Apache-2.0',
    python_requires='>=3.11,<3.14',
    package_dir=FOLDERS,
    packages=sorted(packages()),
    package_data={'': ['*.gin'], 'openmoe_jax.tasks': ['vocabulary/*']},
    zip_safe=False,
    install_requires=REQUIREMENTS if SUPPORTED else [],
    extras_require={
        'tpu': ['jax[tpu]>=0.10,<0.13'],
        'gpu': ['jax[cuda12]>=0.10,<0.13'],
        'torch': ['torch>=2.6', 'transformers>=4.50,<6', 'tokenizers>=0.21', 'safetensors>=0.5', 'accelerate>=1'],
        'eval': ['lm-eval>=0.4.13,<0.5'],
        'beam': ['apache-beam>=2.60'],
        'test': ['hypothesis>=6.100', 'pytest>=8', 'pytest-xdist>=3.5'],
    },
    entry_points={
        'console_scripts': [
            'openmoe-train = openmoe_jax.train:main',
            'openmoe-inspect = openmoe_jax.inspection:main',
            'openmoe-convert = openmoe_jax.conversion:main',
            'openmoe-infer = openmoe_jax.infer:main',
            'openmoe-eval = openmoe_jax.eval:main',
            'openmoe-lm-eval = openmoe_jax.lm_harness:main',
            'openmoe-analyze = openmoe_jax.analyze:main',
            'openmoe-compile-report = openmoe_jax.compile_report:main',
        ],
    },
    classifiers=[
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
