# vmruntime: every verb is listed by `make help`. Stages leave a stamp under .make/ and run again only when something
# they depend on has changed.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules
# Stages share apt, pip and two cores: they run one after the other; compilers parallelise by themselves.
.NOTPARALLEL:
.DELETE_ON_ERROR:

STAMPS := .make
BIN := .venv/bin
ARCH := $(shell uname -m)
AGENT := guest-agent/target/$(ARCH)-unknown-linux-gnu/release/vmruntime-agent
AGENT_SOURCES := $(shell find guest-agent -path guest-agent/target -prune -o -type f -print) proto/agent.proto
RECIPES := $(shell find images tools .ci -type f \( -name '*.sh' -o -name setup -o -name run \))
GUEST_DIRECTORY ?= /var/lib/vmruntime/guest
PYTEST_ARGS ?=
PYTEST := $(BIN)/pytest
CARGO := cd guest-agent && cargo

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

##### Setting up

.PHONY: setup
setup: $(STAMPS)/system $(STAMPS)/venv guest ## install all it takes: packages, toolchains, .venv, agent, guest (root)

$(STAMPS):
	@mkdir -p $@

$(STAMPS)/system: tools/packages.txt tools/setup | $(STAMPS)
	@tools/setup packages run build test
	@tools/setup rust
	@tools/setup user
	@tools/setup vsock
	@touch $@

$(STAMPS)/venv: pyproject.toml tools/gen_protos.py tools/hatch_build.py tools/setup $(wildcard proto/*.proto) | $(STAMPS)/system
	@tools/setup venv
	@touch $@

.PHONY: protos
protos: $(STAMPS)/venv ## generate the Python stubs from proto/ again
	$(BIN)/python tools/gen_protos.py

.PHONY: agent
agent: $(AGENT) ## build the guest agent (Rust, static)

$(AGENT): $(AGENT_SOURCES) | $(STAMPS)/system
	$(CARGO) build --release --locked
	@touch $@

.PHONY: crun
crun: build/crun ## build crun as one static binary

# Status 3 says that there is no source; the guest is then made with the distribution's crun.
build/crun: images/crun/build.sh images/lib.sh | $(STAMPS)/system
	@images/crun/build.sh || [ $$? -eq 3 ]
	@if [ -e $@ ]; then touch $@; fi

.PHONY: kernel
kernel: ## build the minimal guest kernel (about 9 minutes on 2 cores) and put it into the guest
	@tools/setup packages kernel
	@images/kernel/build.sh
	@$(MAKE) --no-print-directory guest

.PHONY: guest
guest: build/guest/guest.json ## put kernel, agent and crun together and install them in GUEST_DIRECTORY
	@images/initramfs/install.sh $(GUEST_DIRECTORY)

build/guest/guest.json: $(AGENT) build/crun $(wildcard build/kernel/vmlinuz images/initramfs/*) images/lib.sh
	@images/initramfs/build.sh

.PHONY: demo-images
demo-images: $(STAMPS)/system ## make the demo OCI images under build/demo-images
	@images/demo/build.sh

##### Running

.PHONY: run
run: setup ## set up, start the daemon and run a real image in a VM
	@tools/run-demo

##### Checking

.PHONY: test test-unit lint types
test: setup ## run every test: unit, contract, vm, e2e (PYTEST_ARGS are passed on)
	@$(PYTEST) $(PYTEST_ARGS)

test-unit: $(STAMPS)/venv ## run the tests that need neither root nor QEMU
	@$(PYTEST) tests/unit $(PYTEST_ARGS)

lint: $(STAMPS)/venv ## ruff, import-linter, clippy, rustfmt, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) fmt --check
	shellcheck -x -P . $(RECIPES)

types: $(STAMPS)/venv ## mypy --strict over sources, tests and benchmarks
	$(BIN)/mypy

.PHONY: bench
bench: setup ## measure, and write bench/results/latest.json (ONLY=name runs one measure)
	@$(BIN)/python -m bench $(if $(ONLY),--only $(ONLY))

.PHONY: clean
clean: ## remove what was built here (the installed guest and system packages stay)
	rm -rf .make .venv build guest-agent/target dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find vmruntime/generated -mindepth 1 ! -name __init__.py -delete
