# make help lists the verbs. What is done is not done again: stamps lie in .make/.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(shell command -v /usr/bin/python3 || command -v python3)
TRIPLE := $(shell uname -m)-unknown-linux-gnu
AGENT := guest-agent/target/$(TRIPLE)/release/vmruntime-agent
AGENT_SOURCES := $(shell find guest-agent/src proto -type f) guest-agent/Cargo.toml guest-agent/Cargo.lock guest-agent/build.rs
SCRIPTS := .ci/run $(wildcard images/*.sh images/*/*.sh images/*/*/*.sh tools/*.sh)
GUEST := /var/lib/vmruntime/guest
LIBEXEC := /usr/local/libexec/vmruntime
PYTEST_ARGS ?=
ONLY ?=
# Tests start hundreds of daemons, each of which would be compiled again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup system run bench bench-setup bench-docs conformance test test-unit lint types protos agent kernel guest clean

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: system .make/venv guest ## install everything that is missing and build the guest

system: ## system packages, the vmruntime account, vhost-device-vsock
	@tools/setup-system.sh

.make/venv: pyproject.toml $(wildcard proto/*.proto) tools/gen_protos.py tools/hatch_build.py | system
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@mkdir -p .make && touch $@

protos: .make/venv ## generate the Python stubs again
	$(VENV)/bin/python tools/gen_protos.py .

agent: $(AGENT) ## build the guest agent

$(AGENT): $(AGENT_SOURCES) | system
	cd guest-agent && cargo build --quiet --locked --release --target $(TRIPLE)
	@touch $@

build/crun: images/crun/build.sh | system
	@images/crun/build.sh || [ $$? -eq 3 ] # 3: no source; the guest then carries the distribution's crun
	@if [ -e $@ ]; then touch $@; fi

kernel: system ## build the minimal guest kernel (about 10 minutes)
	images/kernel/build.sh

guest: .make/guest ## put kernel, agent and crun together and install them in $(GUEST)

.make/guest: $(AGENT) build/crun $(wildcard build/kernel/vmlinuz) $(wildcard images/initramfs/*)
	images/initramfs/build.sh
	images/initramfs/install.sh
	install -D -m 755 $(AGENT) $(LIBEXEC)/vmruntime-agent # host pods run the same agent on the host
	@if [ -e build/crun ]; then install -m 755 build/crun $(LIBEXEC)/crun; fi
	@mkdir -p .make && touch $@

run: setup ## run a real image in a VM through the CRI socket
	$(VENV)/bin/python tools/demo.py

test: setup ## every test: unit, contract, vm, e2e
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-unit: .make/venv ## the tests that need neither root nor a VM
	$(VENV)/bin/python -m pytest tests/unit $(PYTEST_ARGS)

conformance: setup ## cri-tools' conformance suite against the daemon (CRITEST_FOCUS=regexp for some specs)
	$(VENV)/bin/python -m pytest tests/conformance $(PYTEST_ARGS)

bench: setup bench-setup ## measure beside named peers (ONLY=measure for one); writes bench/results/latest.json
	$(VENV)/bin/python -m bench $(ONLY)

bench-setup: | system ## install containerd and runc, which only benchmarks need
	@tools/setup-bench.sh

bench-docs: .make/venv ## put the figures of the last run into docs/performance.*
	$(VENV)/bin/python -m bench --write-docs

lint: .make/venv ## ruff, import contracts, clippy, rustfmt, shellcheck
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	shellcheck --external-sources $(SCRIPTS)
	cd guest-agent && cargo fmt --check && cargo clippy --quiet --locked --release --target $(TRIPLE) --all-targets -- -D warnings

types: .make/venv ## mypy --strict
	$(VENV)/bin/mypy

clean: ## remove what was built here (not what was installed)
	rm -rf build .make $(VENV) guest-agent/target
