# One environment (.venv) for everything; every target sets up what it needs.
#   make pretrain   prepare real text, pretrain a small mixture of experts, show what it learned
#   make test       the quick tests        make test-all   with the slow ones
#   make lint       ruff and mypy          make bench      benchmarks, results in docs/results
#   make native     compile the C++ kernels again

PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
PROCESSES ?= 2
BIN := .venv/bin
READY := .venv/.ready

# Images often forbid compiled modules; without them every process takes twice as long to start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup native pretrain test test-all lint bench clean

setup: $(READY)

$(READY): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else "LightBulb needs Python 3.11 or 3.12, found %d.%d; run make PYTHON=/path/to/python3.12" % v)'
	@echo "[setup] installing into .venv (torch and its CUDA libraries are large; this is done once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[dev]"
	@$(BIN)/python -c 'import lightbulb.launcher.pretrain, lightbulb.launcher.preprocess'  # compiled once, for all that follows
	@touch $@

native: $(READY)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt --no-deps --reinstall-package lightbulb -e .

pretrain: $(READY)
	@echo "[1/2] preparing text"
	@$(BIN)/lightbulb preprocess configs/debug/corpus.yaml
	@echo "[2/2] pretraining with $(PROCESSES) processes"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --num_gpus $(PROCESSES) launcher/pretrain.py configs/debug/quickstart.yaml

test: $(READY)
	@$(BIN)/python -m pytest -m "not slow"

test-all: $(READY)
	@$(BIN)/python -m pytest

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY)
	@mkdir -p docs/results
	@$(BIN)/python benchmarks/kernels.py --output docs/results
	@$(BIN)/python benchmarks/train_moe.py --seconds 120 --json docs/results/train_moe.json
	@$(BIN)/python benchmarks/parallel_overhead.py --json docs/results/parallel_overhead.json
	@$(BIN)/python benchmarks/checkpoint.py --json docs/results/checkpoint.json
	@$(BIN)/python benchmarks/data_prep.py --output docs/results/data_prep.json
	@$(BIN)/python benchmarks/upcycling.py --quick
	@$(BIN)/python benchmarks/width_scaling.py --output docs/results
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[bench]"
	@$(BIN)/python benchmarks/mixers.py --json docs/results/mixers.json --plot docs/results/mixers-growth.png

clean:
	rm -rf .venv build dist *.egg-info runs data
