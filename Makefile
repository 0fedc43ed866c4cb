# Every target sets up what it needs: Rust, a C compiler, and Python 3 with pip are enough to begin with.

PYTHON ?= python3
# The features that build on any machine.
FEATURES := cli
# One profile and one set of features everywhere, so that the dependencies are compiled once.
CARGO_FLAGS := --release --locked --features $(FEATURES)
# How long the parsers are fuzzed, all together.
export MOEFY_FUZZ_SECONDS ?= 60
export PYTHONDONTWRITEBYTECODE := 1

.DEFAULT_GOAL := help
.PHONY: help demo test inputs fmt fmt-check clippy docs licences test-scripts test-rust tools clean-inputs
# The steps of `test` share one build folder: they would only wait for each other.
.NOTPARALLEL:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: inputs ## convert a real model and show what was skipped and what it cost
	cargo build $(CARGO_FLAGS)
	$(PYTHON) scripts/demo.py

test: fmt-check licences test-scripts clippy docs test-rust ## everything that is checked before a change is accepted

inputs: ## fetch the model and the text that demo and test use (110 MB, once)
	$(PYTHON) scripts/fetch_inputs.py

fmt: tools ## format the code
	cargo fmt

fmt-check: tools
	cargo fmt --check

clippy: tools
	cargo clippy $(CARGO_FLAGS) --all-targets -- -D warnings

docs:
	RUSTDOCFLAGS='-D warnings' cargo doc $(CARGO_FLAGS) --no-deps

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
