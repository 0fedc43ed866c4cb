#!/usr/bin/env bash
# Builds what a GPU machine runs into one folder that can be copied anywhere: `gpu-bundle/run.sh` needs a GPU with its
# driver, Python 3 and, for the checks of memory, compute-sanitizer; PyTorch, for the comparison with it. The routing
# traces are inside the command. What is large is in files.tar.xz, which run.sh unpacks beside itself when it first runs.
#
#   scripts/gpu_bundle.sh [FOLDER]
#
#   MOEFY_STS=CSV        sentence pairs with scores (sentence, sentence, score) that the bundle's model then ranks
#   MOEFY_MODEL=FOLDER   a converted model for the bundle, instead of MiniLM converted now, which takes minutes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bundle=${1:-gpu-bundle}
target=${CARGO_TARGET_DIR:-target}
if [ -e "$bundle" ] && [ ! -e "$bundle/run.sh" ] && [ -n "$(ls -A "$bundle")" ]; then
  echo "error: $bundle is no bundle and would be replaced: name another folder" >&2
  exit 1
fi
max_bytes=$((60 << 20))

export MOEFY_REQUIRE_NVCC=1
flags=(--release --locked --features cli)
cargo build "${flags[@]}" --bin moefy --example engine
gpu_tests=$(cargo test "${flags[@]}" --test gpu --no-run --message-format json |
  python3 -c 'import json, sys
lines = map(json.loads, sys.stdin)
print([line["executable"] for line in lines if line.get("target", {}).get("name") == "gpu" and line.get("executable")][-1])')
moefy=$target/release/moefy

files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
strip -o "$files/gpu-tests" "$gpu_tests"
strip -o "$files/moefy" "$moefy"
strip -o "$files/engine" "$target/release/examples/engine"
model=${MOEFY_MODEL:-}
if [ -z "$model" ]; then
  model=$files/converted
  "$moefy" convert inputs/all-MiniLM-L6-v2 "$model" --experts 48 --partition kmeans --router d2dmoe --density 0.27 \
    --calibration inputs/wikipedia/calibration.txt --seed 0 --quiet
fi
"$moefy" retune "$model" "$files/model" --dtype f16 >/dev/null
rm -rf "$files/converted"
if [ -n "${MOEFY_STS:-}" ]; then
  cp "$MOEFY_STS" "$files/sts.csv"
else
  echo "MOEFY_STS is not set: the record will not say how the model ranks pairs on the GPU" >&2
fi

rm -rf "$bundle"
mkdir -p "$bundle"
# The names are those that record.py looks for.
(cd "$files" && tar -c --owner=0 --group=0 -- gpu-tests engine model $([ -e sts.csv ] && echo sts.csv) moefy) |
  xz -T0 -6 >"$bundle/files.tar.xz"
cp scripts/gpu_record.py "$bundle/record.py"
cp benches/peers/bert.py "$bundle/bert.py"
cat >"$bundle/run.sh" <<'RUN'
#!/bin/sh
# Tests, sanitizers and benchmarks on the GPU of this machine; record.py says what can be asked for.
set -e
here=$(cd "$(dirname "$0")" && pwd)
if [ ! -e "$here/.unpacked" ]; then
  python3 -W ignore -m tarfile -e "$here/files.tar.xz" "$here"
  touch "$here/.unpacked"
fi
exec python3 "$here/record.py" "$@"
RUN
chmod +x "$bundle/run.sh"
bytes=$(cat "$bundle"/* | wc -c)
echo "$bundle: $bytes bytes, $((bytes / (1 << 20))) MiB"
if [ "$bytes" -ge "$max_bytes" ]; then
  echo "error: $bundle must be smaller than $max_bytes bytes, got $bytes: leave something out" >&2
  exit 1
fi
