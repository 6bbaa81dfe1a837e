# make demo      train the demo model on this machine's CPU and show where its results are
# make test      the quick tests              make test-all   the slow ones, and those that need PyTorch, lm-eval or the
#                                                            TPU compiler; make test-exhaustive   still more cases
# make routing-study-small   what the demo's routers do: records its checkpoints, draws figures, writes a report
# make bench     speed of one training step   make clean      remove .venv
# make bench-all   what layer, training step and decoding cost, over their sizes
# make layer-report   what a layer costs on a TPU chip over numbers of experts, by the TPU compiler
# make bench-decode   speed of generation beside transformers' Qwen2-MoE
# make bench-data     tokens per second of the data path, and how many cores a chip needs
# make router-study   remedies for the router, compared over seeds (an hour or two, can be stopped; more seeds:
#                     FLAGS=--seeds=0,1,2,3,4)
# make conversion-study   memory and speed of conversions at the base model's size
# make data-demo   from raw files to a trained model: the base recipe's mixture at the demo's size (make it longer with
#                  FLAGS=--steps=1000)      make data-study   memory and speed of preparing a file of 2 GB
#
# The first of these also creates the virtual environment .venv from requirements.lock; nothing outside this folder is
# changed.  Another Python: make demo PYTHON=python3.12     Another environment: make test VENV=/path/to/venv
# Settings of the demo: make demo DEMO_DIR=runs/longer FLAGS=--gin.TRAIN_STEPS=2000

VENV ?= .venv
# The first of these that runs, is a supported version and can make virtual environments.
SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
NAMES := python3.13 python3.12 python3.11 python3
PYTHON ?= $(shell for python in $(NAMES); do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)

# Where it is set, as in many container images, every process would compile TensorFlow's sources anew: 10 to 20 seconds.
unexport PYTHONDONTWRITEBYTECODE

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.openmoe_jax_installed
TORCH_INSTALLED := $(VENV)/.openmoe_jax_torch_installed
EVAL_INSTALLED := $(VENV)/.openmoe_jax_eval_installed
TPU_INSTALLED := $(VENV)/.openmoe_jax_tpu_installed
DEMO_DIR := runs/demo
DATA_DEMO_DIR := runs/data_demo
BENCH_DIR := runs/benchmark
# Two processes, a file of tests at a time, in conftest's order; make test PYTEST_FLAGS= runs one test after the other.
PYTEST_FLAGS := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-exhaustive bench bench-all bench-decode bench-data layer-report conversion-study \
	routing-study-small router-study install install-torch install-eval install-tpu data-demo data-study clean

demo: $(INSTALLED)
	@$(VENV)/bin/python -m openmoe_jax.train --gin_file=recipes/demo.gin --model_dir=$(DEMO_DIR) $(FLAGS)
	@echo
	@echo "Results are in $(DEMO_DIR):"
	@ls -1 $(DEMO_DIR)/*.png | sed 's/^/  /'
	@echo "  TensorBoard: $(VENV)/bin/tensorboard --logdir=$(DEMO_DIR)"

# Trains nothing; goes on where it was stopped.
routing-study-small: $(INSTALLED)
	@$(VENV)/bin/python -m openmoe_jax.tools.routing_study_small --model_dir=$(DEMO_DIR) $(FLAGS)

test: $(INSTALLED)
	@$(VENV)/bin/python -m pytest -q $(PYTEST_FLAGS) -m "not slow and not exhaustive and not torch and not lm_eval and not tpu"

test-all: $(TORCH_INSTALLED) $(EVAL_INSTALLED) $(TPU_INSTALLED)
	@$(VENV)/bin/python -m pytest -q $(PYTEST_FLAGS) -m "(slow or torch or lm_eval or tpu) and not exhaustive"

# An hour or two: after changes of meshes, of data, of remat.
test-exhaustive: $(TORCH_INSTALLED) $(EVAL_INSTALLED) $(TPU_INSTALLED)
	@$(VENV)/bin/python -m pytest -q $(PYTEST_FLAGS) -m exhaustive

bench: $(INSTALLED)
	@$(VENV)/bin/python -m openmoe_jax.tools.bench_train_step

# Half an hour: layer, training step and decoding over their sizes; goes on where it was stopped.
bench-all: $(INSTALLED)
	@$(VENV)/bin/python -m openmoe_jax.tools.benchmark --output=$(BENCH_DIR) $(FLAGS)

# Compiles for a TPU that need not be there, some minutes a case; goes on where it was stopped.
layer-report: $(TPU_INSTALLED)
	@$(VENV)/bin/python -m openmoe_jax.tools.layer_report --output=$(BENCH_DIR) $(FLAGS)

bench-decode: $(TORCH_INSTALLED)
	@$(VENV)/bin/python -m openmoe_jax.tools.bench_decode

bench-data: $(INSTALLED)
	@$(VENV)/bin/python -m openmoe_jax.tools.bench_data

# 13 GB of disk, five minutes.
conversion-study: $(INSTALLED)
	@$(VENV)/bin/python -m openmoe_jax.tools.conversion_study --gin_file=models/openmoe_base.gin

router-study: $(INSTALLED)
	@$(VENV)/bin/python -m openmoe_jax.tools.router_study $(FLAGS)

data-demo: $(INSTALLED)
	@$(VENV)/bin/python -m openmoe_jax.tools.data_demo --work_dir=$(DATA_DEMO_DIR) $(FLAGS)

# 5 GB of disk, 5 GB of memory (to write the raw files), five minutes.
data-study: $(INSTALLED)
	@$(VENV)/bin/python -m openmoe_jax.tools.preparation_study $(FLAGS)

install: $(INSTALLED)

install-torch: $(TORCH_INSTALLED)

install-eval: $(EVAL_INSTALLED)

install-tpu: $(TPU_INSTALLED)

# --no-deps: t5 declares seqio-nightly and tfds-nightly, which overwrite the folders of seqio and tensorflow-datasets.
# --no-compile: half of the files are never imported; Python compiles the others when they are.
$(INSTALLED): requirements.lock setup.py pyproject.toml
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' 2>/dev/null || { echo \
	  "openmoe_jax needs Python 3.11, 3.12 or 3.13 with venv; $(if $(PYTHON),$(PYTHON) is not one,none of $(NAMES) is one). Name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -c '$(SUPPORTED)' 2>/dev/null || { echo \
	  "$(VENV) holds no working Python 3.11, 3.12 or 3.13; 'make clean' removes it." >&2; exit 1; }
	@echo "Installing $$(grep -c == requirements.lock) packages into $(VENV) ($$($(VENV)/bin/python --version), 4 GB, one to three minutes, this once)"
	@$(PIP) install --quiet --no-deps --no-compile -r requirements.lock
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(TORCH_INSTALLED): $(INSTALLED) requirements-torch.lock
	@echo "Installing PyTorch and transformers into $(VENV)"
	@$(PIP) install --quiet --no-compile -r requirements-torch.lock 2>&1 | grep -v "^WARNING\|dependency conflicts\|^t5 " || true
	@$(VENV)/bin/python -c "import torch, transformers"
	@touch $@

$(EVAL_INSTALLED): $(INSTALLED) requirements-eval.lock
	@echo "Installing lm-eval into $(VENV)"
	@$(PIP) install --quiet --no-deps --no-compile -r requirements-eval.lock
	@$(VENV)/bin/python -c "import lm_eval.evaluator"
	@touch $@

$(TPU_INSTALLED): $(INSTALLED) requirements-tpu.lock
	@echo "Installing the TPU compiler into $(VENV)"
	@$(PIP) install --quiet --no-deps --no-compile -r requirements-tpu.lock
	@touch $@

clean:
	rm -rf $(VENV)
