# Everything below sets itself up: `make demo` and `make test` work in a fresh clone.
.PHONY: demo test lint cluster faults bench clean
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

# constraints.txt pins what the tests were run with; torch comes first, so that nothing drags in another build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install -qq --constraint constraints.txt torch
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(READY)  ## the main job on real images: a promoted model and pictures of what it draws
	$(BIN)/ddpm run jobs/presets/digits.yaml

test: $(READY)  ## the tests, in two processes, of which one has the only Ray
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

cluster: $(READY)  ## the tests that start a cluster of their own
	$(BIN)/python -m pytest -m cluster

faults: $(READY)  ## kills, outages and damage through the real product, at moments drawn from FAULTS_SEED (said at the start)
	$(BIN)/python -m pytest -m faults

lint: $(READY)  ## lint, format, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## speed of training and sampling against bare loops, two hours: writes docs/benchmarks-*.md
	$(BIN)/python -m benchmarks.training --resume --write
	$(BIN)/python -m benchmarks.sampling --resume --write

clean:  ## remove what make made
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
