#!/usr/bin/env bash
# Builds what a GPU machine runs into one folder that can be copied anywhere: `gpu-bundle/run.sh` needs a GPU with its
# driver, Python 3 and, for the checks of memory, compute-sanitizer. The routing traces are inside the command.
#
#   scripts/gpu_bundle.sh [FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bundle=${1:-gpu-bundle}

export MOEFY_REQUIRE_NVCC=1
cargo build --release --locked --features cli
gpu_tests=$(cargo test --release --locked --features cli --test gpu --no-run --message-format json |
  python3 -c 'import json, sys
lines = map(json.loads, sys.stdin)
print([line["executable"] for line in lines if line.get("target", {}).get("name") == "gpu" and line.get("executable")][-1])')

rm -rf "$bundle"
mkdir -p "$bundle"
strip -o "$bundle/gpu-tests" "$gpu_tests"
strip -o "$bundle/moefy" target/release/moefy
cp scripts/gpu_record.py "$bundle/record.py"
cat >"$bundle/run.sh" <<'RUN'
#!/bin/sh
# Tests, sanitizers and benchmarks on the GPU of this machine; record.py says what can be asked for.
here=$(cd "$(dirname "$0")" && pwd) && exec python3 "$here/record.py" "$@"
RUN
chmod +x "$bundle/run.sh"
du -sh "$bundle"
