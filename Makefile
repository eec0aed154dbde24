# make demo: input to 4D asset on this machine.  make test: what CI runs.  make test-browser: the viewer in chromium.
# make rows: the tests of tests/faults/README.md, and that page.  make campaign: them, crashes, damaged files, long runs: an hour.
# make test-ray: d2 batch on a local Ray cluster.  make test-nerfstudio: the method d2-4dgs in nerfstudio.  make test-dcc:
# exports drawn by other people's renderers and read by Blender, which comes as the Python package bpy (5.0.1: Python 3.11,
# NumPy 1, 1 GB) into .venv-dcc.  All make .venv first.
PYTHON ?= python3
unexport PYTHONDONTWRITEBYTECODE  # a suite that starts d2 a hundred times would compile it a hundred times
BIN := .venv/bin

.PHONY: venv demo test rows campaign test-browser test-ray test-nerfstudio test-dcc lint clean
venv: .venv/done

.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("d2 needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch .venv/done

demo: venv
	$(BIN)/d2 run tests/data/toy.png --preset tiny --reconstruct-preset fast --out runs/toy --overwrite

test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal

rows: venv
	$(BIN)/python -m pytest --rows

campaign: rows
	$(BIN)/python benchmarks/campaign.py

# Needs chromium (Debian: apt-get install --no-install-recommends chromium).  Where npm is there, accessibility and the
# types of the modules are checked too.
test-browser: venv
	-! command -v npm >/dev/null || npm install --silent --no-audit --no-fund --prefix build/node axe-core@4.14.1 typescript@7.0.2
	D2_AXE="$$(ls $(CURDIR)/build/node/node_modules/axe-core/axe.min.js 2>/dev/null)" \
	D2_TSC="$$(ls $(CURDIR)/build/node/node_modules/.bin/tsc 2>/dev/null)" \
	$(BIN)/python -m pytest tests/viewer -m 'browser or not browser'

test-ray: venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest tests/test_batch.py -m ray

# Lays nerfstudio and diffusers over what .venv holds, trains, evaluates and renders in the one and compares SVD with the
# other's: minutes.
test-nerfstudio: .venv-nerfstudio/done
	.venv-nerfstudio/bin/python -m pytest tests/nerf tests/models/test_diffusers.py tests/test_adapters.py -o filterwarnings=

.venv-nerfstudio/done: .venv/done tests/nerf/requirements.txt
	test -x .venv-nerfstudio/bin/python || $(PYTHON) -m venv .venv-nerfstudio
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		>"$$(.venv-nerfstudio/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/d2_packages.pth"
	.venv-nerfstudio/bin/python -m pip install -q --disable-pip-version-check --no-deps -r tests/nerf/requirements.txt
	touch .venv-nerfstudio/done

# Exports drawn by renderers of other people (npm and chromium) and read by Blender.  Not part of CI.
DCC_PYTHON ?= python3.11
.venv-dcc/done:
	test -x .venv-dcc/bin/python || $(DCC_PYTHON) -m venv .venv-dcc
	.venv-dcc/bin/python -m pip install -q --disable-pip-version-check 'bpy==5.0.1' 'numpy<2'
	touch .venv-dcc/done

test-dcc: venv .venv-dcc/done
	npm install --silent --no-audit --no-fund --prefix build/node three@0.187.0 @sparkjsdev/spark@2.2.0 playcanvas@2.23.3
	D2_NODE_MODULES="$(CURDIR)/build/node/node_modules" $(BIN)/python benchmarks/dcc.py

# pyright cannot see the package-dir mapping of pyproject.toml, so it checks a tree of links laid out as installed.
lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build/lint && mkdir -p build/lint/d2
	for f in d2/* recon cli configs; do ln -s ../../../$$f build/lint/d2/; done
	ln -s ../../benchmarks build/lint/benchmarks
	$(BIN)/pyright --project pyproject.toml

clean:
	rm -rf .venv .venv-nerfstudio .venv-dcc runs build dist *.egg-info
