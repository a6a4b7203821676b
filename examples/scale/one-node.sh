#!/usr/bin/env bash
# Eight GPUs of one machine: an 8B teacher and a 1B student fit on each, so plain DDP. What does not fit:
# `stillhouse init --launch fsdp2`, and `accelerate launch --config_file accelerate-fsdp2.yaml -m` in the place of torchrun.
set -euo pipefail
cd "$(dirname "$0")"

stillhouse check one-node.yaml --devices 8 --gpu-memory 80GB --no-values
torchrun --nproc-per-node 8 -m stillhouse run one-node.yaml "$@"
