.DEFAULT_GOAL := help
.PHONY: help setup demo check test cluster-test lock clean

BIN := .venv/bin
# Two at a time, files whole (their fixtures are runs), one thread each: small networks gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile
# Two files at a time, too: while Ray starts its processes, one after the other, half of the cores are idle.
CLUSTER := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile -m cluster

help:   ## what can be made
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 24

setup:  ## make this machine ready (system packages for FFCV, .venv)
	@cluster/setup_node.sh

demo: setup  ## a student alone, its twin with BD-KD, and the two compared
	@printf '\n[demo] 1 of 3: a teacher and a student that learn from 40 digits, each alone\n'
	@$(BIN)/bdkd train digits_few objective.name=ce run.name=digits_alone
	@printf '\n[demo] 2 of 3: the same networks, images and steps with BD-KD\n'
	@$(BIN)/bdkd train digits_few run.name=digits_bdkd
	@printf '\n[demo] 3 of 3: both on the same 359 test images\n'
	@$(BIN)/bdkd compare runs/digits_alone runs/digits_bdkd --out runs/digits_comparison

check: setup  ## lint, types and the fast tests, for the daily loop
	@$(BIN)/ruff format --check --quiet . && $(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(PYTEST) -m "not slow"

test: check  ## everything
	@$(PYTEST) -m "slow and not cluster"
	@$(CLUSTER)

cluster-test: setup  ## on Ray nodes: faults, growth, jobs (part of `make test`)
	@$(CLUSTER)

# The lock names no index, so it works with any mirror; torch and torchvision are a pair that was built together.
lock:   ## resolve requirements.txt again from pyproject.toml
	@printf 'torch==2.14.1\ntorchvision==0.29.1\n' | uv pip compile --quiet --universal --generate-hashes \
		--no-emit-index-url --no-header --extra ffcv --extra dev --constraint - pyproject.toml -o requirements.txt
	@echo uv | uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header - \
		-o cluster/uv-requirements.txt

clean:  ## remove .venv and caches; runs stay
	@rm -rf .venv .bootstrap .mypy_cache .pytest_cache .ruff_cache .hypothesis build ./*.egg-info
