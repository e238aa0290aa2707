# make demo    export the bundled model, ask it about fresh scenes, draw what was kept
# make test    every check and every test
# make check   the checks alone (ruff, mypy, import contracts)
# Needs python3 (3.10 or later, with venv) and make; everything else is installed into .venv.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TREE := build/tree

.PHONY: demo test check tree clean

demo: .venv/.demo
	$(BIN)/python examples/demo/demo.py demo

# Not `python -m pytest`: that puts the root on sys.path, where edgeprune lacks its mapped folders.
test: check
	$(BIN)/pytest

check: .venv/.test tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(TREE) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache edgeprune tests examples
	cd $(TREE) && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-cache

# mypy and import-linter see mapped packages only as one real tree.
tree:
	rm -rf $(TREE)
	mkdir -p $(TREE)/edgeprune
	ln -s "$(CURDIR)"/edgeprune/* "$(CURDIR)/export" "$(CURDIR)/runtime" "$(CURDIR)/calibration" $(TREE)/edgeprune/
	ln -s "$(CURDIR)/tests" "$(CURDIR)/examples" $(TREE)/

# torch first and by its exact version, so that nothing else decides which build of it comes.
.venv/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e ".[export]"
	touch $@

.venv/.test: .venv/.demo
	$(INSTALL) -e ".[export,check,plot,ray,tensorrt,test]"
	touch $@

clean:
	rm -rf .venv build dist demo *.egg-info
