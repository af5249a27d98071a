# Each target works in a fresh clone: it creates the environment and builds the extension first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EDITABLE := $(VENV)/.editable
PYTEST_ARGS ?=
AN4 ?=

.PHONY: demo test browser-test bench lint gpu-check build wheel

demo: build
	@echo "== demo: speech corpus, training, decoding, report (runs/demo)"
	@$(BIN)/python -m las_fast.demo --out runs/demo

test: build
	@echo "== tests"
	@$(BIN)/python -m pytest --cov --cov-report=term $(PYTEST_ARGS)

# The web page of las_fast.serve; needs Debian's packages chromium and chromium-driver.
browser-test: build
	@echo "== browser"
	@$(BIN)/pip install -qq --disable-pip-version-check selenium==4.51.0
	@$(BIN)/python -m pytest tests/serve/browser.py

bench: build
	@echo "== benchmarks"
	@$(BIN)/python -m pytest benchmarks --record

lint: $(STAMP)
	@echo "== lint"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .
	@$(BIN)/mypy

gpu-check: build
	@$(BIN)/python -m benchmarks.device --out runs/gpu-$$(date +%Y%m%d-%H%M%S) $(if $(AN4),--data $(AN4))

wheel: build
	@echo "== wheel in dist"
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w dist .
	@ls dist/*.whl

# Without a compiler, setup.py prints one line and succeeds; slower PyTorch paths are used.
build: $(STAMP)
	@echo "== C++ extension"
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py -q build_ext > $(VENV)/build.log 2>&1 || \
	    { cat $(VENV)/build.log; exit 1; }
	@grep "^las_fast:" $(VENV)/build.log || true
	@$(MAKE) -s $(EDITABLE)

# The editable installation makes las_fast work outside this folder, too.
$(EDITABLE): build_backend.py pyproject.toml
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -C extension=skip -e .
	@touch $@

$(STAMP): requirements.txt
	@echo "== environment in $(VENV)"
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'las_fast needs Python 3.11 or newer; try make PYTHON=python3.11')"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== torch"
	@$(BIN)/pip install -qq --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	@echo "== other packages"
	@$(BIN)/pip install -qq --disable-pip-version-check -r requirements.txt
	@touch $@
