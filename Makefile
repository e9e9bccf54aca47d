# Everything runs in a virtual environment that this file makes. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
# `make wheelhouse` alone reads a bare version, such as PYTHON=3.12, as the Python of the machine it packs for.
ifneq ($(filter wheelhouse,$(MAKECMDGOALS)),)
  TARGET_PYTHON := $(filter 3.%,$(PYTHON))
  override PYTHON := $(or $(filter-out 3.%,$(PYTHON)),python3)
endif
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
EXTENSION_SOURCES := setup.py $(wildcard dcnv3/csrc/*.h dcnv3/csrc/*/*)

.PHONY: demo demo-dense test test-slow test-long lint wheelhouse clean

## demo: install, build, and walk the whole way on the embedded set (about twenty minutes on two CPU cores)
demo: $(VENV)/.installed
	$(BIN)/internimage demo --output runs/demo

## demo-dense: after `make demo`, detection and segmentation on scenes of its drawings (about an hour on two CPU cores)
demo-dense: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[hf]'
	$(BIN)/internimage demo --dense --output runs/demo

## test: every test but the slow ones, the files of tests dealt out to WORKERS processes
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

## test-slow: the tests that take minutes each, a quarter of an hour in all; TESTS chooses among them
test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow $(TESTS)

## test-long: what CI has no time for; date, commit and result of each test's last run stand in tests/long_runs.json
test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m long --record-runs tests/long_runs.json $(TESTS)

## lint: style and types
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy

## wheelhouse: wheels for a machine without a network, PYTHON=3.12 TORCH=2.11 there (docs/offline.md)
wheelhouse: $(VENV)/.installed
	$(BIN)/python -m launch.wheelhouse $(if $(TARGET_PYTHON),--python $(TARGET_PYTHON)) \
	  $(if $(TORCH),--torch $(TORCH)) $(if $(ASSUMED),--assumed $(ASSUMED))

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; found $$($(PYTHON) --version). Set PYTHON=python3.x" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing: apt-get install python3-venv python3-dev" >&2; exit 1; }
	$(PIP) install --quiet --upgrade pip wheel ninja "setuptools>=77" -c constraints.txt

# torch first: the extension is built against the torch that will load it, so without build isolation.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt $(EXTENSION_SOURCES)
	@echo "Installing PyTorch and its CUDA libraries (several GB, a few minutes) ..."
	$(PIP) install --quiet -c constraints.txt torch torchvision
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[demo,dev,hf,onnx]'
	@touch $@

clean:
	rm -rf build dist *.egg-info dcnv3/*.so
