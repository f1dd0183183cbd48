#!/usr/bin/env bash
# NVFlare in an environment of its own: the tests of dare_agg/nvflare, and a small job in its simulator.
#   scripts/nvflare.sh         makes the environment where it is missing, runs both
#   scripts/nvflare.sh make    only makes it
# Few packages differ, so they are laid over the environment that is there: seconds and 60 MB. The
# variable DARE_AGG_NVFLARE names another place than .venv-nvflare.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
cd "$root"
overlay=${DARE_AGG_NVFLARE:-$root/.venv-nvflare}
stamp=$(cat "$venv/.dare-agg-stamp")
if [ "$(cat "$overlay/.complete" 2>/dev/null)" != "$stamp" ]; then
    rm -rf "$overlay"
    "$venv/bin/python" -m venv "$overlay"
    site='import sysconfig; print(sysconfig.get_path("purelib"))'
    # As a site directory, so that its own .pth files count: the checkout is one of them.
    printf 'import site; site.addsitedir("%s")\n' "$("$venv/bin/python" -c "$site")" \
        >"$("$overlay/bin/python" -c "$site")/dare-agg-base.pth"
    "$overlay/bin/python" -m pip install --quiet --disable-pip-version-check \
        -c constraints.txt "$(sed -n 's/^nvflare = \["\(.*\)"\]$/\1/p' pyproject.toml)" || {
        echo "error: NVFlare could not be installed from the package index; its tests did not run" >&2
        exit 1
    }
    echo "$stamp" >"$overlay/.complete"
fi
[ "${1:-}" != make ] || exit 0

export OMP_NUM_THREADS=1
"$overlay/bin/python" -c 'import nvflare; print("NVFlare", nvflare.__version__)'
"$overlay/bin/python" -m pytest -n 2 -q -W ignore -m "not federation" tests/nvflare
rows=$(mktemp)
trap 'rm -f "$rows"' EXIT
python -m simulations.bench.nvflare 0.9 --layers 1 --hidden 64 --clients 2 --rounds 2 \
    --environment "$overlay" --out "$rows"
