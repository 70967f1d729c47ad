# Everything runs in .venv, which the targets make themselves; nothing is installed outside it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
LEGACY := .venv-legacy
PEERS  := .venv-trl
ARGS   ?=
K      ?=
WORKERS ?= 3
# pages that show what is stored in bench/results
FIGURES := measured/ about/03_a_thousand_subnets network/09_consensus
PICKED  = $(if $(K),-k "$(K)") $(ARGS)
PYTEST  = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest

export TOKENIZERS_PARALLELISM ?= false
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-long check test-legacy mutants bench-reward bench-gating bench-miner lab docs preview refresh screenshots prepare readme clean

help:            ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

demo: $(VENV)/.library  ## install the library and run the whole loop (ARGS="--steps 100" adds flags)
	$(BIN)/prompting-nb loop $(ARGS)

test: $(VENV)/.dev  ## install everything, run everything but the long forms (K=miner picks some)
	$(PYTEST) -n $(WORKERS) --dist worksteal $(PICKED)

test-fast: $(VENV)/.dev  ## the quick tests alone (K=miner picks those with a word in their name)
	@echo "leaves out the notebooks, the documentation in a browser, and tests that are marked slow: make test runs them"
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not notebook and not slow and not site and not long" $(PICKED)

test-long: $(VENV)/.dev  ## the long forms: many fuzz inputs, killed processes, subnets for minutes (K=chain picks some)
	$(PYTEST) -n $(WORKERS) --dist worksteal -m long $(PICKED)

check: $(VENV)/.dev  ## style, formatting, types, notebooks in sync, who imports whom, stored benchmark figures (about two minutes)
	$(BIN)/ruff check
	$(BIN)/ruff format --check nbs
	$(BIN)/python -m basedpyright --pythonpath $(BIN)/python
	$(PYTEST) -q tests/test_sync.py tests/test_floors.py
	$(BIN)/python -m tools.refresh --check $(FIGURES)

test-legacy: $(VENV)/.library $(LEGACY)/.stock  ## let a stock Dendrite of bittensor 10.5.0 ask our miner (it has an environment of its own)
	MINER_PYTHON=$(abspath $(BIN)/python) $(LEGACY)/bin/python -m pytest tests/legacy/stock_dendrite.py $(ARGS)

mutants: $(VENV)/.dev  ## change one module in many small ways and list the changes that no test notices (MODULE=network.auth)
	$(BIN)/python -m tools.mutants $(MODULE) $(ARGS)

bench-miner: $(VENV)/.dev $(LEGACY)/.stock  ## measure the miner beside Starlette and bittensor 10.5.0 (JSON=FILE keeps the figures)
	$(BIN)/python bench/miner.py $(if $(JSON),--json $(JSON)) $(ARGS)

bench-reward: $(VENV)/.dev $(PEERS)/.trl  ## measure the reward model beside TRL, the reference and a pipeline (JSON=FILE keeps the figures)
	HF_HUB_OFFLINE=1 $(BIN)/python bench/reward.py --trl-python $(PEERS)/bin/python $(if $(JSON),--json $(JSON)) $(ARGS)

bench-gating: $(VENV)/.dev  ## measure how well and how fast gates learn (JSON=FILE keeps the figures; half an hour)
	HF_HUB_OFFLINE=1 $(BIN)/python bench/gating.py $(if $(JSON),--json $(JSON)) $(ARGS)

lab: $(VENV)/.dev  ## open the notebooks in JupyterLab (as root: ARGS=--allow-root)
	@if [ "$$(id -u)" = 0 ] && [ -z "$(findstring --allow-root,$(ARGS))" ]; then \
		echo 'JupyterLab refuses to run as root: make lab ARGS=--allow-root'; fi
	$(BIN)/jupyter lab --notebook-dir nbs $(ARGS)

docs: $(VENV)/.dev  ## build the documentation into _docs/, with Quarto where it is installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m tools.site build $(ARGS)

preview: $(VENV)/.dev  ## serve the documentation on loopback, build again on change (ARGS="--port 8001")
	HF_HUB_OFFLINE=1 $(BIN)/python -m tools.site preview $(ARGS)

refresh: $(VENV)/.dev  ## run the notebooks and store what they show (ARGS="gating" picks some, ARGS=--check only compares)
	$(BIN)/python -m tools.refresh $(ARGS)

screenshots: $(VENV)/.dev  ## take the pictures anew that tests/test_site.py compares with
	REFRESH_SCREENSHOTS=1 $(BIN)/python -m pytest tests/test_site.py -k look $(ARGS)

prepare: $(VENV)/.dev  ## export the notebooks to the package, clean them, make README.md from the index
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/readme.py

clean:           ## remove the environment and what was built
	rm -rf $(VENV) $(LEGACY) $(PEERS) .mutants _docs _proc build *.egg-info .pytest_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.library: settings.ini setup.py constraints.txt | $(BIN)/python
	@echo "installing the library into $(VENV) (a few minutes the first time)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.library
	@echo "installing the development tools into $(VENV)"
	$(PIP) --editable ".[dev]"
	@touch $@

$(LEGACY)/.stock: tests/legacy/constraints.txt
	@echo "installing bittensor 10.5.0 into $(LEGACY)"
	$(PYTHON) -m venv $(LEGACY)
	$(LEGACY)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $< bittensor==10.5.0 \
	  uvloop httptools pytest
	@touch $@

$(PEERS)/.trl: bench/requirements-reward.txt
	@echo "installing TRL into $(PEERS)"
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	@touch $@
