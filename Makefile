# Two commands do everything: `make run ARGS="system=vllm workload=burst"` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?= --help
INSTALL = test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e
# Real tensors need torch (half a gigabyte and more); the simulator does not.
NEEDS := $(if $(or $(findstring runtime=local,$(ARGS)),$(findstring runtime=dist,$(ARGS))),setup-engine,setup)

.PHONY: setup setup-engine setup-nightly run test lint nightly clean

setup: $(VENV)/.stamp
setup-engine: $(VENV)/.stamp-engine
setup-nightly: $(VENV)/.stamp-nightly

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(INSTALL) .
	touch $@

$(VENV)/.stamp-engine: pyproject.toml constraints.txt
	$(INSTALL) '.[dev,engine,exact]'
	touch $@ $(VENV)/.stamp

# And Ray, without which its tests are skipped.
$(VENV)/.stamp-nightly: pyproject.toml constraints.txt
	$(INSTALL) '.[dev,engine,exact,dist]'
	touch $@ $(VENV)/.stamp $(VENV)/.stamp-engine

run: $(NEEDS)
	$(BIN)/python run.py $(ARGS)

test: setup-engine lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup-engine
	$(BIN)/ruff check .
	$(BIN)/mypy

nightly: setup-nightly
	KVPLANE_NIGHTLY=1 $(BIN)/python -m pytest -n 2 --dist loadfile

clean:
	rm -rf $(VENV) results/runs
