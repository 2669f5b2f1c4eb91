# Everything sets itself up in $(VENV); outside it only the model's cache and pip's are touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-dev
INSTALLED_USER := $(VENV)/.installed
PROCESSES ?= 2
CASES ?= 3000
SEED ?= $(shell date +%Y%m%d)
TRACES ?= ../shared/traces
SYSTEM_TOOLS := tmux:tmux ip:iproute2 tcpdump:tcpdump nft:nftables redis-server:redis-server curl:curl

.PHONY: chat test check soak format paper bench-netem bench-transport bench-engine bench-swiftqueue soak-server clean help

help: ## Say what there is.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

chat: $(INSTALLED_USER) ## Install, fetch the model, and chat with it.
	@$(BIN)/eloquent models fetch >/dev/null
	@$(BIN)/eloquent chat

test: $(INSTALLED) system-tools ## Install, then run all that CI runs.
	$(MAKE) --no-print-directory check

check: ## Run all checks in an environment that is installed, tests in PROCESSES=2 processes.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses $(PROCESSES) --dist loadfile

soak: $(INSTALLED) ## Make up thousands of networks for whole sessions, CASES=3000 (ten minutes), SEED=that of the day.
	@echo "make soak CASES=$(CASES) SEED=$(SEED)"
	ELOQUENT_CASES=$(CASES) $(BIN)/pytest tests/eloquent/test_session_interleavings.py --hypothesis-seed=$(SEED)

format: $(INSTALLED) ## Put the code into its standard form.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

paper: $(INSTALLED) ## Make docs/results.md and its figures anew (minutes in virtual time, then half an hour over TUN, which needs root or user namespaces; goes on where it was stopped).
	$(BIN)/eloquent lab paper

bench-netem: $(INSTALLED) ## Hold netem to the kernel and its speed to its bounds (five minutes; needs root or user namespaces).
	$(BIN)/eloquent netem fidelity
	$(BIN)/eloquent lab speed

bench-transport: $(INSTALLED) ## Hold the transport to its bounds, make docs/results-transport.md anew (40 minutes on two cores; goes on where it was stopped).
	@mkdir -p build
	$(BIN)/eloquent lab transport --part grid --part wire --part outages --part cancel --seeds 20 \
		--cache build/transport.jsonl --json build/transport.json \
		--markdown docs/results-transport.md || test $$? = 1
	$(BIN)/eloquent lab transport --part fairness --part liveness --seeds 3 \
		--cache build/transport.jsonl --json build/transport-more.json

bench-engine: $(INSTALLED_USER) ## Measure the engine beside transformers and llama.cpp (15 minutes on two idle cores).
	@mkdir -p build
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	$(BIN)/eloquent bench engine --json build/engine.json

bench-swiftqueue: $(INSTALLED) ## Judge SwiftQueue's predictions, policies and cost, make docs/results-swiftqueue.md anew (two hours on two cores; goes on where it was stopped).
	@mkdir -p build
	$(BIN)/eloquent swiftqueue collect --flows 24 --out build/swiftqueue \
		$(if $(wildcard $(TRACES)),--traces $(TRACES))
	$(BIN)/eloquent lab swiftqueue --seeds 5 --traces $(TRACES) --data build/swiftqueue \
		--cache build/swiftqueue.jsonl --json build/swiftqueue.json --report build/swiftqueue-report \
		--markdown docs/results-swiftqueue.md

soak-server: $(INSTALLED) ## Hold 500 turns in flight for ten minutes: memory, tasks, files (24 minutes on two idle cores).
	@mkdir -p build
	$(BIN)/eloquent bench soak --json build/soak-server.json

clean: ## Remove the environment and all caches in this folder.
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -prune -exec rm -rf {} +

# Tools that some tests need, and the packages that have them. CI has them installed; elsewhere those tests skip by name.
.PHONY: system-tools
system-tools:
ifeq ($(CI),true)
	@for tool in $(SYSTEM_TOOLS); do \
		command -v $${tool%:*} >/dev/null || missing="$$missing $${tool#*:}"; done; \
	if [ -n "$$missing" ]; then apt-get update -q && apt-get install -q -y $$missing; fi
endif

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Eloquent needs Python 3.11 or newer as '$(PYTHON)'; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone: asked for by its exact version it comes as the wheel that the
# index or the local configuration offers, and what follows finds it satisfied.
$(INSTALLED_USER): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all]'
	@touch $@

$(INSTALLED): $(INSTALLED_USER)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
