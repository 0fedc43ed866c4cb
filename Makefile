# Every target sets up what it needs: Rust, a C compiler, and Python 3 with pip are enough to begin with.

PYTHON ?= python3
# The features that build on any machine.
FEATURES := cli
# One profile and one set of features everywhere, so that the dependencies are compiled once.
CARGO_FLAGS := --release --locked --features $(FEATURES)
# How long the parsers are fuzzed, all together.
export MOEFY_FUZZ_SECONDS ?= 60
export PYTHONDONTWRITEBYTECODE := 1
# Compiles the kernels; `make toolchain` installs it.
ifndef WITHOUT_NVCC
INSTALLED_NVCC := $(wildcard $(CURDIR)/.toolchain/nvidia/cu13/bin/nvcc)
endif
ifdef INSTALLED_NVCC
export MOEFY_NVCC ?= $(INSTALLED_NVCC)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-all inputs annalog toolchain fmt fmt-check clippy docs licences kernels-check abi abi-check test-scripts \
  test-rust gpu-bundle gpu-bundle-all tools clean-inputs
# The steps of `test` share one build folder: they would only wait for each other.
.NOTPARALLEL:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: inputs ## convert a real model and show what was skipped and what it cost
	cargo build $(CARGO_FLAGS)
	$(PYTHON) scripts/demo.py

# A second make, because this one began before there was a compiler for the kernels.
test: toolchain ## everything that is checked before a change is accepted; WITHOUT_NVCC=1 leaves the kernels out
	@$(MAKE) --no-print-directory test-all

test-all: fmt-check licences test-scripts kernels-check abi-check clippy docs test-rust

inputs: ## fetch the model and the text that demo and test use (110 MB, once)
	$(PYTHON) scripts/fetch_inputs.py

toolchain: ## install nvcc 13.0 and libclang into .toolchain/ (270 MB, once)
	$(if $(WITHOUT_NVCC),@echo no kernels: WITHOUT_NVCC is set,$(PYTHON) scripts/install_nvcc.py)

annalog: ## convert the FFNs of a real ReLU model and see how close they stay (40 MB, ten minutes)
	$(PYTHON) -m pip install --quiet --no-deps --only-binary=:all: --upgrade --target inputs/python numpy==2.2.6
	$(PYTHON) scripts/annalog.py
	cargo run $(CARGO_FLAGS) --example relu_layers -- inputs/annalog/ffns.safetensors

gpu-bundle: toolchain inputs ## build gpu-bundle/, whose run.sh tests and measures on a machine with a GPU
	@$(MAKE) --no-print-directory gpu-bundle-all

gpu-bundle-all:
	scripts/gpu_bundle.sh

fmt: tools ## format the code
	cargo fmt

fmt-check: tools
	cargo fmt --check

clippy: tools
	cargo clippy $(CARGO_FLAGS) --all-targets -- -D warnings

docs:
	RUSTDOCFLAGS='-D warnings' cargo doc $(CARGO_FLAGS) --no-deps

kernels-check:
	$(if $(INSTALLED_NVCC),$(PYTHON) scripts/check_kernels.py $(INSTALLED_NVCC),@echo SKIPPED no nvcc: kernels)

# The crate without GPUs and without the command. Where libclang is installed, the build script has src/abi.rs to
# generate on the way.
abi: tools ## generate src/abi.rs from the header of the kernels again
	LIBCLANG_PATH=$(CURDIR)/.toolchain/clang/native cargo clippy --release --locked --no-default-features \
	  $(if $(INSTALLED_NVCC),--features bindgen) --lib -- -D warnings

abi-check: abi
	$(if $(INSTALLED_NVCC),git diff --exit-code src/abi.rs,@echo SKIPPED no libclang: src/abi.rs is not compared)

licences:
	$(PYTHON) scripts/check_licences.py

test-scripts:
	$(PYTHON) -m unittest discover -s scripts

test-rust: inputs
	cargo test $(CARGO_FLAGS)
	cargo run $(CARGO_FLAGS) --example quickstart

# A minimal installation of Rust lacks these two.
tools:
	@cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 || rustup component add rustfmt clippy

clean-inputs: ## remove what `make inputs` fetched
	rm -rf inputs
