#!/bin/sh
# What docs/ship.md claims and tests are too short for; `make examples` runs it, in at most 30 minutes on 2 cores.
# A line each, in the order of the page: `example "what it shows" command ...`. The first that fails stops it.
#
#   examples/ship/run.sh [FOLDER]     FOLDER takes what the commands write (default: runs/examples)
set -eu
cd "$(dirname "$0")/../.."
out=${1:-runs/examples}
page=$out/page
demo=src/stillhouse/demo
mkdir -p "$out"

example() {
    what=$1
    shift
    echo "== $what: $*"
    "$@"
}

# A command of the page, in a folder that has what the page speaks of.
on_page() (
    cd "$page"
    example "as the page has it" "$@"
)

rm -rf "$page"
mkdir -p "$page"
head -n 8 "$demo/data/eval.jsonl" >"$page/test.jsonl"
cat >"$page/run.yaml" <<END
name: kd
recipe: kd
student: {from_teacher: {layers: [0, 3]}}
teacher: {kind: live, path: "package:stillhouse/demo/teacher", dtype: float32}
data: {train: "package:stillhouse/demo/data/train.jsonl", template: plain, max_prompt: 96, max_response: 48}
train: {max_steps: 20, batch_size: 16, micro_batch_size: 16, lr: 1.0e-3}
evaluate: {data: test.jsonl, before: false}
END
sed -n '/^# sweep.yaml$/,/^```$/p' docs/ship.md | sed '$d' >"$page/sweep.yaml"
on_page stillhouse check run.yaml
on_page stillhouse run run.yaml

# Pruning
example "SmolLM2-135M pruned by importance, and trained a step" \
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
on_page stillhouse quantise runs/kd -o kd-int8 --weights int8
on_page stillhouse quantise runs/kd -o kd-int4 --weights int4 --group-size 32
on_page stillhouse quantise runs/kd -o kd-nf4 --weights nf4
on_page stillhouse eval kd-int8 --data test.jsonl

# Drafts

example "a draft before and after distillspec, timed" python benchmarks/drafts.py --small

# Export

for dtype in float32 q8_0; do
    rm -rf "$out/gguf-$dtype"
    example "the demonstration's teacher in llama.cpp, word for word, in $dtype" \
        stillhouse export package:stillhouse/demo/teacher --to gguf --dtype "$dtype" --output "$out/gguf-$dtype" \
        --prompt "name[Cocum], eatType[coffee shop], food[Chinese], priceRange[moderate]"
    grep "Beside transformers" "$out/gguf-$dtype/README.md"
    (cd "$out/gguf-$dtype" && example "its own smoke test" python smoke_test.py)
done

on_page stillhouse export runs/kd
on_page stillhouse export runs/kd --dtype bfloat16 --output kd-bfloat16
on_page stillhouse export runs/kd --to gguf
on_page stillhouse export runs/kd --to gguf --dtype q8_0 --output kd-q8
on_page stillhouse export runs/kd --to onnx
on_page stillhouse export runs/kd --to hub --repo me/kd --dry-run
printf 'name[Cocum], eatType[coffee shop]\n/history\n' >"$page/questions.txt"
on_page stillhouse chat runs/kd <"$page/questions.txt"
on_page stillhouse chat runs/kd --teacher --temperature 0 <"$page/questions.txt"

# Chains

rm -rf "$out/quickstart"
example "the quickstart's chain in a few steps" stillhouse run "$demo/quickstart.yaml" output.folder="$out/quickstart" \
    evaluate.limit=8 stages.warm-start.train.epochs=4.0 stages.kd.train.max_steps=8 \
    stages.distillm2.data.train.limit=128
example "its student in llama.cpp, word for word" stillhouse export "$out/quickstart/distillm2" --to gguf
grep "Beside transformers" "$out"/quickstart/distillm2/export/gguf/README.md

# Sweeps

example "a sweep interrupted and resumed, against one that was not" python benchmarks/sweeps.py --small
on_page stillhouse sweep sweep.yaml --dry-run
on_page stillhouse sweep sweep.yaml --workers 2
on_page stillhouse compare runs/methods

echo "all examples ran; what they wrote is in $out"
