#!/bin/sh
# What docs/ship.md claims and tests are too short for; `make examples` runs it, in at most 30 minutes on 2 cores.
# A line each, in the order of the page: `example "what it shows" command ...`. The first that fails stops it.
#
#   examples/ship/run.sh [FOLDER]     FOLDER takes what the commands write (default: runs/examples)
set -eu
cd "$(dirname "$0")/../.."
out=${1:-runs/examples}
mkdir -p "$out"

example() {
    what=$1
    shift
    echo "== $what: $*"
    "$@"
}

# Pruning
example "SmolLM2-135M pruned by importance and evenly, and trained a step" \
    python benchmarks/pruning.py --small

# Quantised students

for weights in int8 int4 nf4; do
    rm -rf "$out/$weights"
    example "the demonstration's teacher in $weights" \
        stillhouse quantise package:stillhouse/demo/teacher -o "$out/$weights" --weights "$weights"
    example "what that has cost" stillhouse eval "$out/$weights" --data package:stillhouse/demo/data/eval.jsonl \
        --template plain --max-tokens 64 --limit 40
done
example "recovery over adapters and by QAT" python benchmarks/quantised.py --small

# Drafts

example "a draft before and after distillspec, timed" python benchmarks/drafts.py --small

# Export

for dtype in float32 q8_0; do
    rm -rf "$out/gguf-$dtype"
    example "the demonstration's teacher in llama.cpp, word for word, in $dtype" \
        stillhouse export package:stillhouse/demo/teacher --to gguf --dtype "$dtype" --output "$out/gguf-$dtype" \
        --prompt "name[Cocum], eatType[coffee shop], food[Chinese], priceRange[moderate]"
    grep "Beside transformers" "$out/gguf-$dtype/README.md"
    example "its own smoke test" python "$out/gguf-$dtype/smoke_test.py"
done

# Chains

# Sweeps

echo "all examples ran; what they wrote is in $out"
