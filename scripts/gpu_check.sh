#!/usr/bin/env bash
# On a machine with a GPU: the tests that need one, and a federated fine-tuning round of SmolLM2
# whose updates are compared with the host's, bit for bit; prints what encoding takes as a share of
# a training step. Sets itself up first. Options go to `python -m simulations.bench.gpu`.
set -euo pipefail
arguments=("$@")
set --
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
cd "$root"
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    python -c 'import torch; print(f"torch {torch.__version__}")' >&2
    echo "error: torch sees no GPU here; install a CUDA build of torch (pip install torch) on a" \
        "machine with one, or run python -m simulations.bench.gpu --device cpu" >&2
    exit 1
fi
export DARE_AGG_CACHE=${DARE_AGG_CACHE:-$(mktemp -d)}
python -m pytest -q -m gpu tests/torch tests/client
exec python -m simulations.bench.gpu "${arguments[@]+"${arguments[@]}"}"
