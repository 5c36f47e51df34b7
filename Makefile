# make train   set up and train on Tiny Shakespeare, for three minutes
# make test    set up and run the tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
ARGS   ?=
# Short tests of the promises in docs/reliability.md; `make test` runs them, too.
PROMISES := tests/runs tests/reliability

.PHONY: train test test-slow test-reliability test-kernels test-transformers4 check clean

train: $(VENV)/installed
	$(BIN)/chargpt train $(ARGS)

# One thread per process: the models are tiny, and two processes share two cores.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not reliability" $(ARGS)

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow $(ARGS)

test-reliability: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not reliability" $(ARGS) $(PROMISES)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m reliability -rP $(ARGS)

test-kernels: $(VENV)/installed
	tests/kernels/sanitize.sh $(BIN)/python

# Python looks into PYTHONPATH first, so that the older packages hide those of the environment.
test-transformers4: $(VENV)/transformers4/installed
	PYTHONPATH=$(<D) $(BIN)/python -c 'import transformers; assert transformers.__version__[:2] == "4."'
	PYTHONPATH=$(<D) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/export/test_huggingface.py $(ARGS)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("chargpt needs Python 3.11 or newer, and $(PYTHON) is %s.%s: give make PYTHON=…" % sys.version_info[:2])'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned requirements into $(VENV) (once)"
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps -e .
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(PIP) install -r requirements-dev.txt
	touch $@

$(VENV)/transformers4/installed: tests/export/requirements-transformers4.txt $(VENV)/installed-dev
	rm -rf $(@D)
	$(PIP) install --no-deps --target $(@D) -r $<
	touch $@

clean:
	rm -rf $(VENV) build dist chargpt/compute/lib .pytest_cache .mypy_cache .ruff_cache .hypothesis
