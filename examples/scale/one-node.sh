#!/usr/bin/env bash
# Eight GPUs of one machine, the student sharded over them. `stillhouse init --launch fsdp2` has written the
# configuration of accelerate; `torchrun --nproc-per-node 8 -m stillhouse run run.yaml` is DDP without one.
set -euo pipefail
cd "$(dirname "$0")"

stillhouse check run.yaml --devices 8 --parallel fsdp2 --gpu-memory 80GB
accelerate launch --config_file accelerate-fsdp2.yaml -m stillhouse run run.yaml "$@"
