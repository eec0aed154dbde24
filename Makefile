# make demo: input to 4D asset on this machine.  make test: what CI runs.  Both make .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv demo test lint clean
venv: .venv/done

.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("d2 needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch .venv/done

demo: venv
	$(BIN)/d2 run tests/data/toy.png --preset tiny --reconstruct-preset fast --out runs/toy --overwrite

test: lint
	$(BIN)/python -m pytest

# pyright cannot see the package-dir mapping of pyproject.toml, so it checks a tree of links laid out as installed.
lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build/lint && mkdir -p build/lint/d2
	for f in d2/* recon cli configs; do ln -s ../../../$$f build/lint/d2/; done
	ln -s ../../benchmarks build/lint/benchmarks
	$(BIN)/pyright --project pyproject.toml

clean:
	rm -rf .venv runs build dist *.egg-info
