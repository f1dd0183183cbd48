#!/usr/bin/env bash
# The fast tests of the wire to Flower on the oldest supported Flower; the suite runs the newest.
#   scripts/flower_matrix.sh            the lower bound of pyproject.toml's range
#   scripts/flower_matrix.sh 1.41.0     this one
# One package differs, so it is laid over the environment that is there: seconds and 12 MB, where
# an environment of its own would load torch and everything else a second time. What that Flower
# asks of others is not installed: of the versions in the range only uv and certifi differ, and
# the tests need neither.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
folder=${DARE_AGG_FLOWER:-$root/.venv-flower}
python=${DARE_AGG_VENV:-$root/.venv}/bin/python
tests=$("$python" -c 'from tests.conftest import FLOWER_TESTS; print(*FLOWER_TESTS)')
[ "$#" -gt 0 ] || set -- "$(sed -n 's/^flower = \["flwr>=\([0-9.]*\),.*/\1/p' pyproject.toml).*"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 HF_HUB_OFFLINE=1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1

for version in "$@"; do
    overlay=$folder/${version%.\*}
    if [ ! -e "$overlay/.complete" ]; then
        rm -rf "$overlay"
        "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
            --target "$overlay" "flwr==$version"
        touch "$overlay/.complete"
    fi
    # Before the site packages on the path; the processes that tests start inherit it.
    export PYTHONPATH=$overlay
    "$python" -c 'import flwr, sys; assert flwr.__file__.startswith(sys.argv[1])' "$overlay"
    # shellcheck disable=SC2086
    "$python" -m pytest -n 2 -q -W ignore -m "not slow and not federation" $tests
done
