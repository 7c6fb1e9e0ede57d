# make demo, make test: each makes the environment it needs.
#
# PYTHON=python3.12       another interpreter (3.10 or newer)
# VENV=/path              another place for the environment
# TORCH_INDEX=URL         where torch comes from: the index of CPU builds by default, so that no CUDA libraries are
#                         fetched; empty for PyPI's own build, or an index from https://pytorch.org/get-started
# LOCK=                   the newest version of everything that setup.py allows, and not those of requirements/lock.txt
# ARGS="--facts 20"       arguments for the demo or for pytest
# WORKERS=2               processes that share the tests, one thread each

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
LOCK ?= requirements/lock.txt
DONOR ?= runs/donor
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet $(if $(LOCK),--constraint $(LOCK))

.PHONY: bench bench-long demo docs sweep test test-all test-foreign test-latest test-slow test-unit test-versions test-vllm donor lock quality style wheel clean

# glibc gives large blocks back to the system after every use by default; keeping them is worth about a third of the
# training speed on a CPU (measured: 245 to 321 tokens/s). Other systems ignore the variables.
KEEP_BLOCKS := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456

# Teaches SmolLM2 100 facts, and shows what else changes: under 10 minutes on 2 cores.
demo: $(VENV)/.demo
	$(KEEP_BLOCKS) $(BIN)/python -m examples.demo $(ARGS)

docs: $(VENV)/.dev
	$(BIN)/python -m examples.demo.publish
	$(BIN)/python -m tests.integration.matrix docs/generation.md
	$(BIN)/python -m benchmarks.publish
	$(BIN)/python -m examples.domain.publish

# Each worker begins with one half of the tests, so that what a file prepares once is mostly prepared once, and the one
# that is done first takes over from the other.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: $(VENV)/.dev donor
	ENGRAM_LOCK=$(LOCK) ENGRAM_DONOR=$(DONOR) $(PYTEST) -m "not slow" $(ARGS)

# Every other backbone in every way of generating, the compilers' C++, the README's blocks, the benchmarks.
test-slow: $(VENV)/.dev donor
	ENGRAM_DONOR=$(DONOR) $(PYTEST) -m slow $(ARGS)

# 40 times as many examples of every property, other ones each time.
test-all: $(VENV)/.dev donor
	ENGRAM_DONOR=$(DONOR) $(PYTEST) --hypothesis-profile=wide $(ARGS)

# The core tests on other versions than the locked ones, and checkpoints between them: VERSIONS="5.20.2 oldest" for some,
# with names of tests/versions/__main__.py. Needs Python 3.10, 3.12 and 3.13 too, which
# uv must be able to start: with pyenv, PYENV_VERSION=3.11.7:3.10.13:3.12.1:3.13.0. Table: runs/versions.json.
test-versions: $(VENV)/.dev
	WORKERS=$(WORKERS) $(BIN)/python -m tests.versions $(VERSIONS)

# The same on whatever the index has today, also above the range: the early warning.
test-latest: $(VENV)/.dev
	rm -rf runs/versions/latest
	WORKERS=$(WORKERS) $(BIN)/python -m tests.versions latest

# What Transformers and accelerate test their own models with, on ours and theirs: docs/foreign-tests.md.
test-foreign: $(VENV)/.dev
	$(INSTALL) --editable ".[foreign]"
	$(BIN)/python -m tests.foreign

# Every causal type of Transformers with a memory, at a tiny size, and docs/backbones.md. Types that
# tests/sweep/results.jsonl has of this version are not run again, unless ARGS names them.
sweep: $(VENV)/.dev
	WORKERS=$(WORKERS) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.sweep $(ARGS)

# The plugin in vLLM itself, in an environment of its own under runs/vllm (3.5 GB).
test-vllm: $(VENV)/.dev donor
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.vllm_engine $(DONOR) $(ARGS)

test-unit: $(VENV)/.dev
	$(PYTEST) tests/unit tests/parity tests/house $(ARGS)

# Figures of docs/performance.md: `bench` takes half an hour and 18 GB of disk. `bench-long` needs 42 GB of disk, root for
# a memory control group, and two hours for what a memory learns of a domain (finished runs are kept).
bench: $(VENV)/.dev donor
	ENGRAM_DONOR=$(DONOR) $(BIN)/python -m benchmarks $(ARGS)

bench-long: $(VENV)/.dev donor
	ENGRAM_DONOR=$(DONOR) $(KEEP_BLOCKS) $(BIN)/python -m examples.domain
	ENGRAM_DONOR=$(DONOR) $(KEEP_BLOCKS) $(BIN)/python -m benchmarks.facts
	ENGRAM_DONOR=$(DONOR) $(BIN)/python -m benchmarks.big $(ARGS)
	$(BIN)/python -m benchmarks.publish
	$(BIN)/python -m examples.domain.publish

donor: $(VENV)/.dev
	$(BIN)/python -m examples.demo.donor $(DONOR)

quality: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes the lock anew: the newest version of everything that goes with requirements/pins.txt, for every Python and
# system that setup.py allows. After it, run `make test`.
lock: $(VENV)/.python
	$(PIP) install --quiet $$(grep -o 'uv==[0-9.]*' setup.py)
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --extra dev --extra demo --extra foreign \
		--constraints requirements/pins.txt --no-annotate --output-file requirements/lock.txt setup.py

# dist/engram_transformers-*.whl, installed into an empty environment and imported there with what it asks for.
wheel: $(VENV)/.dev
	rm -rf build dist
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv --clear build/wheel
	build/wheel/bin/python -m pip install --quiet --no-deps dist/engram_transformers-*.whl
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> "$$(echo build/wheel/lib/python*/site-packages)/zz_base.pth"
	cd build && wheel/bin/python -c 'import engram_transformers as e; print(e.EngramForCausalLM, e.EngramTrainer, e.__file__)'

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

# Without its dependencies, because an index of CPU builds holds only some versions of them.
$(VENV)/.torch: $(VENV)/.python $(LOCK)
	$(if $(TORCH_INDEX),$(INSTALL) --retries 0 --timeout 20 --no-deps --index-url $(TORCH_INDEX) torch ||) $(INSTALL) torch
	touch $@

$(VENV)/.demo: $(VENV)/.torch setup.py
	$(INSTALL) --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch setup.py
	$(INSTALL) --editable ".[dev,demo]"
	touch $@
