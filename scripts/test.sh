#!/usr/bin/env bash
# Sets itself up, lints, type-checks and runs the tests. Arguments go to pytest:
#   scripts/test.sh                  everything
#   scripts/test.sh -m "not slow"    the fast path
set -euo pipefail
arguments=("$@")
set --
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
cd "$root"
# The tests start hundreds of Pythons: what one of them compiles, the others need not.
unset PYTHONDONTWRITEBYTECODE
ruff check .
ruff format --check .
mypy
if [ -n "${CI:-}" ]; then
    bash scripts/golden_matrix.sh --quick
    bash scripts/flower_matrix.sh
    bash scripts/nvflare.sh
fi
exec python -m pytest -n 2 --dist worksteal -q "${arguments[@]+"${arguments[@]}"}"
