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

# Quantised students

# Drafts

# Export

# Chains

# Sweeps

echo "all examples ran; what they wrote is in $out"
