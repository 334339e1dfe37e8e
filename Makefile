# make demo    a real model reads a long document and answers a question about it
# make demo-long  the same in 24,576 tokens, read densely and sparsely, side by side
# make demo-mesh  12,288 tokens on eight virtual devices and on one: the same answers
# make demo-pod   two processes read a document, one is killed, the job goes on and is asked
# make test    the test suite
# make test-long  what takes longer: documents of up to 24,000 tokens, more meshes, kills and shapes
# make test-tpu-aot  all kernels and steps compiled for five TPU generations, without a TPU, and
#              a million tokens and more on whole topologies of them
# make test-gpu-aot  all kernels and steps compiled for five NVIDIA GPUs, without a GPU
# make lint    formatting, lint, types, import directions
# make docs    the site of docs/, strict, into build/site
# make bench   prefill, decode and memory against PyTorch (Python 3.11), then dense against sparse
#
# Everything is installed into $(VENV). Another Python: make test PYTHON=python3.12 VENV=.venv312
# jax-triton takes no jax of these versions yet, so test-gpu-aot has others of Python 3.12:
#   make test-gpu-aot PYTHON=python3.12 VENV=.venv312-gpu CONSTRAINTS=constraints/py312-gpu.txt

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TAG := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])')
CONSTRAINTS := constraints/$(TAG).txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
# PyTorch is the oracle of the parity tests; its CPU wheel exists for Python 3.11 here.
# With accelerate, transformers reads GGUF files.
TORCH := $(if $(filter py311,$(TAG)),torch==2.13.0 accelerate)

# Without a TPU, libtpu, which the tests compile with, is told not to look for one.
ifeq ($(wildcard /dev/accel* /dev/vfio),)
export TPU_SKIP_MDS_QUERY := 1
export TPU_WORKER_HOSTNAMES := localhost
export TPU_ACCELERATOR_TYPE := v5litepod-4
endif

.PHONY: demo demo-long demo-mesh demo-pod test test-long test-tpu-aot test-gpu-aot lint docs bench clean

demo: $(VENV)/.demo
	$(BIN)/python scripts/demo.py

demo-long: $(VENV)/.demo
	$(BIN)/python scripts/demo_long.py

demo-mesh: $(VENV)/.demo
	$(BIN)/python scripts/demo_mesh.py

demo-pod: $(VENV)/.demo
	$(BIN)/python scripts/demo_pod.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-long: $(VENV)/.test
	$(BIN)/python -m pytest -m long

test-tpu-aot: $(VENV)/.test
	$(BIN)/python -m pytest -m tpu_aot

test-gpu-aot: $(VENV)/.gpu
	$(BIN)/python -m pytest -m 'gpu_aot or not gpu_aot' -rP tests/kernels/test_gpu_aot.py

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python scripts/draw_imports.py --check
	$(BIN)/python scripts/draw_attention.py --check

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.test
	$(BIN)/python scripts/bench.py
	$(BIN)/python scripts/bench_sparse.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/.python: $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml
	$(PIP) -e '.[demo]'
	touch $@

# PyPI's PyTorch asks for another Triton than jax-triton, and runs on CPUs with either.
$(VENV)/.test: $(VENV)/.demo
	grep -v '^triton==' $(CONSTRAINTS) > $(VENV)/torch.txt
	$(if $(TORCH),$(PIP:$(CONSTRAINTS)=$(VENV)/torch.txt) $(TORCH))
	$(PIP) -e '.[demo,test,dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.python pyproject.toml
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/.gpu: $(VENV)/.test
	$(PIP) -e '.[triton]' jax-cuda13-plugin jax-cuda13-pjrt
	touch $@

$(CONSTRAINTS):
	@echo "no tested versions for $(TAG): set PYTHON to python3.11 or python3.12" >&2; exit 2
