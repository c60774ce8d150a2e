# Slipway's verbs. `make run` and `make test` need nothing but Rust on a Debian or Ubuntu machine: they install the rest.
# Everything that can be cached lives in $(SLIPWAY_CACHE), outside the checkout.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export SLIPWAY_CACHE ?= $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/slipway
export CARGO_TARGET_DIR ?= $(SLIPWAY_CACHE)/target
# The programs, side by side, as they would be installed.
export SLIPWAY_BIN := $(CARGO_TARGET_DIR)/dist

ARCH := $(shell uname -m)
PREFIX ?= /usr/local
SETUP := tests/setup

.PHONY: help
help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/; s#\$$\(SLIPWAY_BIN\)#$(SLIPWAY_BIN)#; s#\$$\(SLIPWAY_CACHE\)#$(SLIPWAY_CACHE)#; s#\$$\(PREFIX\)#$(PREFIX)#' | expand -t 18

.PHONY: run
run: build ## Build a training image from a Dockerfile and run it as a pod, leaving nothing behind
	@$(SETUP)/run-deps.sh
	@tests/demo/run.sh

# slipwayd's text is most of its memory: it is optimised as one, and its addresses are kept packed where the C library unpacks
# them (2.36): a seventh and a megabyte less.
LEAN := -C lto=fat $(shell printf '2.36\n%s\n' "$$(getconf GNU_LIBC_VERSION | cut -d' ' -f2)" | sort -VC \
  && echo -C link-arg=-Wl,-z,pack-relative-relocs)

.PHONY: build
build: ## Release builds of slipwayd, slipway, slipway-agent, the shim and its worker, into $(SLIPWAY_BIN)
	@$(SETUP)/build-deps.sh
	cargo build --release -p slipwayd -p slipway-cli -p slipway-agent --bin slipway --bin slipway-agent
	cargo rustc --release -p slipwayd --bin slipwayd -- $(LEAN)
	cargo build --profile shim --target $(ARCH)-unknown-linux-musl -p containerd-shim-slipway-v1
	RUSTFLAGS="-C target-feature=+crt-static" LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=/usr/lib/$(ARCH)-linux-gnu \
	  cargo rustc --release --target $(ARCH)-unknown-linux-gnu -p slipway-runc --bin slipway-runc -- -C relocation-model=static
	@mkdir -p $(SLIPWAY_BIN)
	@cd $(CARGO_TARGET_DIR) && for f in release/slipwayd release/slipway release/slipway-agent \
	  $(ARCH)-unknown-linux-musl/shim/containerd-shim-slipway-v1 $(ARCH)-unknown-linux-gnu/release/slipway-runc; do \
	    cmp -s $$f $(SLIPWAY_BIN)/$${f##*/} || install -m 755 $$f $(SLIPWAY_BIN)/; done
	@echo 'The programs are in $(SLIPWAY_BIN)'

.PHONY: where
where: ## Where `make build` puts the programs
	@echo '$(SLIPWAY_BIN)'

.PHONY: path
path: ## The same for PATH, with the tools that `make test` and `make cluster` bring along: export PATH=$(make path):$PATH
	@echo '$(SLIPWAY_BIN):$(SLIPWAY_CACHE)/tools/bin'

.PHONY: check
check: ## Formatting, lints, unit tests, licences and advisories, and the arrows of ARCHITECTURE.md
	@$(SETUP)/build-deps.sh
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy -p slipway-stream --features fuzzing -- -D warnings
	cargo test -q -p slipway-tests --test arrows
	$(SETUP)/cargo-deny.sh
	cargo test --workspace --lib --bins

.PHONY: test
test: build ## Every test, with real registries, CNI plugins, crictl and containerd
	@$(SETUP)/test-deps.sh
	tests/run.sh

ROUNDS ?= 300000
SEED ?= $(shell date +%s)

.PHONY: fuzz
fuzz: ## Damaged and made-up SPDY, WebSocket and headers for the streaming server (ROUNDS=…, SEED=…), longer than the tests do it, then libFuzzer on each framing (FUZZ_SECONDS=60)
	NOISE_ROUNDS=$(ROUNDS) NOISE_SEED=$(SEED) cargo test --release -p slipway-stream --lib -- no_bytes --nocapture
	cri/stream/fuzz/run.sh $(FUZZ_SECONDS)

# Where the cluster of `make cluster` lies.
CLUSTER := /var/tmp/slipway-cluster
NODES ?= 1
# GPUs that each of its nodes has, by a driver made for tests.
GPUS ?= 0

.PHONY: cluster
cluster: build ## A Kubernetes cluster on this machine with slipwayd under it, left for play (NODES=2: two nodes; GPUS=4: with GPUs, not real ones)
	@$(SETUP)/test-deps.sh
	cargo build -q -p slipway-tests --bin cluster
	@$(CARGO_TARGET_DIR)/debug/cluster up $(CLUSTER) $(NODES) $(GPUS)

.PHONY: cluster-examples
cluster-examples: ## Make ready in that cluster what manifests/examples needs, and say how to run them
	@$(SETUP)/base-image.sh
	@cargo build -q -p slipway-tests --bin cluster
	@$(CARGO_TARGET_DIR)/debug/cluster examples $(CLUSTER)

.PHONY: cluster-down
cluster-down: ## Take that cluster down, leaving no trace
	@cargo build -q -p slipway-tests --bin cluster
	@$(CARGO_TARGET_DIR)/debug/cluster down $(CLUSTER)

.PHONY: bench
bench: build ## Slipway beside containerd, runc and BuildKit: a table of medians and ratios
	@$(SETUP)/test-deps.sh
	@$(SETUP)/go-tools.sh buildkit
	@$(SETUP)/base-image.sh
	cargo run --release -q -p slipway-tests --bin bench

SYSCONFDIR ?= /etc
UNITDIR ?= $(PREFIX)/lib/systemd/system

.PHONY: install
install: build ## Install programs below $(PREFIX), the systemd unit, CNI and kubelet snippets (DESTDIR is honoured)
	manifests/node/install.sh "$(SLIPWAY_BIN)" "$(DESTDIR)" "$(PREFIX)" "$(SYSCONFDIR)" "$(UNITDIR)"

.PHONY: clean
clean: ## Remove what builds made (downloads and tools stay; `rm -r $(SLIPWAY_CACHE)` removes those too)
	rm -rf $(CARGO_TARGET_DIR)
