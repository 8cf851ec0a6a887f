# `make` lists the targets. Each of them first brings .venv up to date, which takes no time when it is.
PYTHON ?= python3# makes .venv; 3.11 or newer
ARGS ?=
VENV := .venv/bin/python
# Tests are small: one thread each is faster than two that wait for each other.
TEST_ENV = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
BENCH ?= $(basename $(notdir $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))))
CHROMIUM := $(firstword $(foreach name,chromium chromium-browser google-chrome,$(shell command -v $(name))))

.DEFAULT_GOAL := help
.PHONY: help setup grpo test lint nightly rewards bench docs pins clean

help: ## list the targets
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: ## make or update .venv with what fits this machine (PYTHON=python3.12 to choose one)
	@$(PYTHON) -m runtime.install

grpo: setup ## train a small model with GRPO (ARGS="--config ... --key value")
	@$(VENV) -m recipes.grpo $(ARGS)

lint: setup ## ruff, formatting, types
	@$(VENV) -m ruff check --quiet
	@$(VENV) -m ruff format --check --quiet || { echo "formatting: run .venv/bin/ruff format"; exit 1; }
	@$(VENV) -m mypy

test: lint ## lint, then the tests that take minutes on a CPU (ARGS="-k name")
	@$(TEST_ENV) $(VENV) -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

nightly: lint rewards ## the rewards, then all tests but those for a GPU (browser ones where Chromium is installed)
	@$(TEST_ENV) $(VENV) -m pytest -m "not gpu$(if $(CHROMIUM),, and not browser)" --durations=20 $(ARGS)

rewards: setup ## the rewards' suites, and a page with the change since last time (NIGHT="--quick")
	@$(VENV) -m benchmarks.nightly --out runs/nightly --previous runs/nightly/figures.json $(NIGHT)

bench: setup ## the benchmarks (BENCH=name for one of benchmarks/)
	@set -e; for name in $(BENCH); do $(VENV) -m benchmarks.$$name $(ARGS); done

docs: setup ## the site of docs/ in site/; a broken link fails it
	@NO_MKDOCS_2_WARNING=1 $(VENV) -m mkdocs build --strict
	@echo "open site/index.html; its search wants a server: $(VENV) -m http.server --directory site"

pins: ## a new .venv at the newest versions pyproject.toml allows, pinned in constraints.txt
	@$(PYTHON) -m runtime.install --upgrade

clean: ## remove .venv and caches; runs/ stays
	@rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache dist site
	@find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
