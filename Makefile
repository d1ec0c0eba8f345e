# Everything happens in $(VENV), which the first `make demo` or `make test` creates (about 4 minutes; nothing but pip
# uses the network). Later calls install again only when the requirements have changed.

PYTHON ?= python3
VENV ?= .venv

# What pip is asked for as torch: the tested version unless you say otherwise. For the CUDA build that suits a driver:
#   make install TORCH="torch==2.9.1 torchaudio==2.9.1 torchvision==0.24.1 --index-url URL"   (as pytorch.org's selector shows)
# The request is remembered in $(VENV), so that a later `make demo` keeps it. To install beside the torch of an
# environment that exists already:
#   make install VENV=path/to/environment TORCH="torch torchaudio"
TORCH ?= $(shell cat $(VENV)/torch-request 2>/dev/null || echo torch torchaudio torchvision -c constraints.txt)

# Bytecode is made at the end, on all cores.
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check --no-input --no-compile
# Commands that the demo and the tests start (fairseq-train, codistill-launch) are found through PATH.
IN_VENV := PATH="$(abspath $(VENV))/bin:$$PATH"

# Where `make benchmark` and `make soak` put data and runs; their tables and figures go to benchmarks/results.
BENCHMARKS ?= benchmark-runs

# Files of tests at a time, the longest first (tests/conftest.py).
TEST_WORKERS ?= 2
PYTEST := python -m pytest -q -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test lint benchmark stress soak gpu test-legacy clean FORCE
.DELETE_ON_ERROR:

help:
	@echo 'make install      create $(VENV) and install everything that the targets below need'
	@echo 'make demo         codistillation against its baselines on a corpus of our own: six minutes on two cores'
	@echo 'make test         the tests; TESTS=tests/core/test_losses.py runs some of them'
	@echo 'make lint         ruff, and mypy on the package'
	@echo 'make docs         the documentation as a site, in site/; strictly: a broken link is an error'
	@echo 'make dist         source distribution and wheel, in dist/'
	@echo 'make benchmark    what an exchange costs and saves, what a step costs: more than an hour on two idle cores'
	@echo 'make stress       2,200 damaged and forged files, 200 kills while publishing'
	@echo 'make soak         peers that are killed and started again for half an hour'
	@echo 'make gpu          everything that needs a GPU, within 25 minutes; DRY_RUN=1 shows the commands'
	@echo 'make test-legacy  the tests with stock fairseq 0.12.2, where a Python 3.9 or 3.10 is found'
	@echo 'make clean        remove .venv, .venv-legacy, demo and benchmark-runs'

install: $(VENV)/.installed

demo: install
	@$(IN_VENV) bash recipes/demo/run.sh

test: install
	$(IN_VENV) $(PYTEST) $(TESTS)

lint: install
	$(IN_VENV) ruff check .
	$(IN_VENV) mypy

benchmark: install
	$(IN_VENV) python -m benchmarks.communication.bytes_per_update
	$(IN_VENV) python -m benchmarks.simulation.simulate --sweep benchmarks/results/simulation
	$(IN_VENV) python -m benchmarks.step.measure --out benchmarks/results/step/latest.json
	for setting in transformer_base transformer_big; do $(IN_VENV) python -m benchmarks.step.measure --setting $$setting || exit; done
	$(IN_VENV) python -m benchmarks.step.measure --setting resnet50 --methods cross_entropy codistill_ce:2:mse codistill_ce:2:ce codistill_ce:4:ce
	$(IN_VENV) python -m benchmarks.step.measure --setting lstm_lm --no-memory --out benchmarks/results/step/lstm_lm_latest.json
	rm -rf $(BENCHMARKS)/exchange_speed*
	$(IN_VENV) python -m benchmarks.exchange.speed --out $(BENCHMARKS)/exchange_speed --results benchmarks/results/exchange_speed
	for n in 4 16; do $(IN_VENV) python -m benchmarks.exchange.speed --interval $$n --pairs $$((96 / n + 2)) --words 8000 --width 256 --layers 2 \
	    --tokens 2000 --out $(BENCHMARKS)/exchange_speed$$n --results benchmarks/results/exchange_speed/interval_$$n || exit; done
	$(IN_VENV) python -m benchmarks.step.scaling --out benchmarks/results/step --exchanges benchmarks/results/exchange_speed/interval_*/results.json
	$(IN_VENV) python -m benchmarks.data.prep_speed

stress: install
	$(IN_VENV) python tests/stress/fuzz_snapshots.py --examples 2200 --seed 1
	$(IN_VENV) python tests/stress/kill_while_publishing.py --kills 200 --seed 1

soak: install
	rm -rf $(BENCHMARKS)/soak
	$(IN_VENV) python tests/stress/soak.py --out $(BENCHMARKS)/soak --results benchmarks/results/soak

# Everything that needs a GPU, within 25 minutes; results in $(GPU_RESULTS). DATA: a folder made by
# `data_prep/prepare.py tatoeba_de_en`, without which nothing is trained. DRY_RUN=1 shows every command.
# WHEELS: on a machine that has torch but reaches no registry, a folder of wheels of what is missing, this package's too
# (`make dist`); then $(PYTHON) is used and nothing is installed into it.
GPU_RESULTS ?= gpu-results
GPU_SUITE = -m benchmarks.gpu.suite --results $(GPU_RESULTS) $(if $(DATA),--data $(DATA)) $(if $(DRY_RUN),--dry-run)

gpu: $(if $(WHEELS),,install)
ifdef WHEELS
	$(PYTHON) -m pip install -q --no-index --no-deps --no-compile --upgrade --target gpu-site $(WHEELS)/*.whl
	PYTHONPATH="$(CURDIR)/gpu-site:$(CURDIR)" PATH="$(CURDIR)/gpu-site/bin:$$PATH" $(PYTHON) $(GPU_SUITE)
else
	$(IN_VENV) python $(GPU_SUITE)
endif

clean:
	rm -rf .venv .venv-legacy demo site $(BENCHMARKS) gpu-runs gpu-site

# --- documentation and distributions ------------------------------------------------------------------------------------

.PHONY: docs dist

# Without --quiet, which would silence the warnings that --strict counts.
docs: install
	$(IN_VENV) NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --site-dir site

# Source distribution and wheel, in $(DIST). No network: the setuptools of $(VENV) builds them.
DIST ?= dist
dist: install
	$(IN_VENV) .ci/dist $(DIST)

# --- installation -----------------------------------------------------------------------------------------------------

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo >&2 \
	    "PYTHON must be Python 3.11 or newer, but '$(PYTHON)' is '$$($(PYTHON) --version 2>&1 | head -n 1)' instead. Another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo >&2 \
	    "A C++ compiler is needed to build fairseq, but PATH has no c++, g++ or clang++. Did you forget to install one (on Debian: apt install g++)?"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Written only when the request changes, so that it makes the installation stale only then.
$(VENV)/torch-request: FORCE | $(VENV)/bin/python
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

# The order matters. fairseq-fixed compiles against the torch and numpy that are there; pip's isolated build would
# download a second torch for it. The chosen torch becomes a constraint, so that no later step replaces it. Python's own
# flags ask for debug information (-g), and with torch's headers the compiler spends much of its time on that; -g0 takes it back.
$(VENV)/.installed: setup.py constraints.txt $(VENV)/torch-request
	$(PIP) $(TORCH)
	@grep -v '^torch' constraints.txt > $(VENV)/constraints.txt
	@$(VENV)/bin/python -c 'from importlib.metadata import version; [print(f"{p}=={version(p)}") for p in ("torch", "torchaudio")]' >> $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt numpy cython setuptools wheel
	CPPFLAGS="$$CPPFLAGS -g0" $(PIP) -c $(VENV)/constraints.txt --no-build-isolation fairseq-fixed
	$(PIP) -c $(VENV)/constraints.txt --no-build-isolation -e '.[dev]'
	@$(VENV)/bin/python -m compileall -q -q -j 0 -x '/tests?/' $(VENV)/lib/python3*/site-packages || true # templates are no Python
	@touch $@

# --- stock fairseq on an old Python ------------------------------------------------------------------------------------
# For users who live in such environments; not part of CI. pip and setuptools must be older than the releases that
# refuse the metadata of fairseq 0.12.2 and its omegaconf; its code needs numpy's old type names. About 7 GB.

LEGACY_TORCH ?= torch==2.8.0
# pyenv's shims exist on PATH without working, so each candidate is tried.
LEGACY_PYTHON ?= $(shell for p in python3.9 python3.10 $(wildcard $(HOME)/.pyenv/versions/3.9.*/bin/python $(HOME)/.pyenv/versions/3.10.*/bin/python); \
    do $$p -c 'import venv' 2>/dev/null && echo $$p && break; done)
LEGACY_PIP := .venv-legacy/bin/python -m pip install --disable-pip-version-check --no-input

test-legacy: .venv-legacy/.installed
	PATH="$(CURDIR)/.venv-legacy/bin:$$PATH" $(PYTEST) $(TESTS)

.venv-legacy/.installed: setup.py
	@test -n '$(LEGACY_PYTHON)' || { echo >&2 \
	    "make test-legacy needs Python 3.9 or 3.10, but neither is on PATH nor in ~/.pyenv/versions. Name one: make test-legacy LEGACY_PYTHON=path"; exit 2; }
	$(LEGACY_PYTHON) -m venv .venv-legacy
	$(LEGACY_PIP) 'pip<24.1' 'setuptools<70' wheel
	$(LEGACY_PIP) 'numpy<1.24' $(LEGACY_TORCH)
	$(LEGACY_PIP) 'numpy<1.24' fairseq==0.12.2
	$(LEGACY_PIP) --no-build-isolation 'numpy<1.24' -e '.[dev]'
	@touch $@
