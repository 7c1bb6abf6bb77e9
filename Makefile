# Two commands do everything: `make course` and `make test`. Both make `.venv` where needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# One worker a core, each with one thread; a file stays with its worker.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
CORE := $(wildcard notebooks/0[0-6]_*.ipynb)
ELECTIVES := $(filter-out $(CORE),$(wildcard notebooks/[0-9][0-9]_*.ipynb))
NBVAL := GEMMATE_PROFILE=tiny $(BIN)/python tests/offline.py $(PYTEST) --nbval --nbval-sanitize-with tests/notebooks/sanitize.cfg --nbval-cell-timeout=1200 -W ignore

.DEFAULT_GOAL := help
.PHONY: help course test test-slow release lint types notebooks settings performance stamp machines faults lab bench lock outputs readme clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[notebook,dev]"
	@touch $@

course: $(VENV)/.made ## Run notebooks 00 to 06 headless on the embedded model
	$(BIN)/gemmate course --profile tiny

test: lint types unit course-notebooks ## Everything that must hold before a commit, in minutes

.PHONY: unit
unit: $(VENV)/.made
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(VENV)/.made ## What takes longer: electives, solutions, another machine, no network, wheel
	$(NBVAL) $(ELECTIVES) notebooks/solutions
	sh tests/notebooks/machines.sh "avx2 2"
	$(PYTEST) --no-loadscope-reorder -m "slow and not gpu and not release" --durations=12

release: $(VENV)/.made ## What only a release needs: the embedded models rebuilt, fifty kills, the true shape, all resamples
	$(PYTEST) -m "release and not gpu"

lint: $(VENV)/.made ## Style, floors, notebooks fit to be read, spelling, secrets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tests/notebooks/gate.py
	git ls-files -z | xargs -0 -r $(BIN)/codespell
	git ls-files -z | xargs -0 -r $(BIN)/detect-secrets-hook --disable-plugin Base64HighEntropyString --disable-plugin HexHighEntropyString

types: $(VENV)/.made ## Static types
	$(BIN)/mypy

notebooks: $(VENV)/.made ## Re-run every notebook and compare with its stored outputs, without a network if possible
	$(NBVAL) notebooks

.PHONY: course-notebooks
course-notebooks: $(VENV)/.made
	$(NBVAL) $(CORE)

outputs: $(VENV)/.made ## Run every notebook in place and store its outputs
	GEMMATE_PROFILE=tiny $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb notebooks/solutions/*.ipynb

readme: $(VENV)/.made ## Measure the results again and write the README's generated tables
	$(BIN)/python tests/integration/test_results.py

settings: $(VENV)/.made ## Write the table of all settings
	$(BIN)/gemmate config settings > gemmate_lib/experiments/README.md

stamp: ## Write badges and install cells from the repository's URL in pyproject.toml
	$(PYTHON) tests/notebooks/stamp.py

TIMES ?= 1
machines: $(VENV)/.made ## Compare the notebooks as other machines compute: capability and threads, TIMES=10 for flakes
	for i in $$(seq $(TIMES)); do sh tests/notebooks/machines.sh "own 1" "own 2" "avx2 1" "avx2 2" || exit 1; done

faults: $(VENV)/.made ## Inject every fault, fifty kills among them, and print the table
	mkdir -p build
	$(PYTEST) tests/faults -m "not gpu" --junitxml=build/faults.xml
	$(BIN)/python tests/faults/table.py build/faults.xml README.md

lab: $(VENV)/.made ## Open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

bench: $(VENV)/.made ## Measure what fits this machine: four hours
	for name in training memory generation loading startup scaling peers limit survival temporal serving; do $(BIN)/gemmate bench $$name --out benchmarks/$$name.json || exit 1; done
	$(BIN)/gemmate bench true_shape
	$(MAKE) performance

performance: $(VENV)/.made ## Write the README's table of performance from what was measured
	$(BIN)/python benchmarks/performance.py README.md

lock: ## Resolve the lock again, for Python 3.11 to 3.13
	$(BIN)/uv pip compile --universal --python-version 3.11 --all-extras --no-annotate --no-header --no-emit-index-url pyproject.toml -o constraints.txt

clean: ## Remove what was made here, the environment too
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
