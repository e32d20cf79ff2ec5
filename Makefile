# The two commands of the README. Everything is installed into .venv; PYTHON chooses the interpreter (>= 3.11).
PYTHON ?= python3
BIN := .venv/bin
NEWEST := .venv-newest/bin
PIP := -m pip install --quiet --disable-pip-version-check
PYTEST := -m pytest -n 2 --dist loadfile --durations 15
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install quickstart test test-newest lint docs constraints clean

install: .venv/installed

# the tested versions; `make constraints` renews them
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffpo needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) --constraint constraints.txt --editable '.[test]'
	@touch $@

quickstart: install
	$(BIN)/diffpo quickstart

# PYTHONDONTWRITEBYTECODE would have each of its processes compile all files again
test: install
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

# the same tests with the newest versions that pyproject.toml admits
test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	$(NEWEST)/python $(PIP) --editable '.[test]'
	$(NEWEST)/python -m pip freeze --exclude-editable
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(NEWEST)/python $(PYTEST)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site, in a venv of its own: mkdocs needs neither torch nor the package
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

.venv-docs/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python $(PIP) --constraint constraints.txt mkdocs mkdocs-material
	@touch $@

# resolves the newest versions for every Python and platform; run `make test` before you commit the file
constraints:
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python $(PIP) uv
	.venv-uv/bin/uv pip compile pyproject.toml --extra test --extra docs --universal --python-version 3.11 --upgrade --no-annotate \
		--custom-compile-command 'make constraints' --output-file constraints.txt --quiet
	rm -rf .venv-uv

clean:
	rm -rf .venv .venv-newest .venv-uv .venv-docs site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
