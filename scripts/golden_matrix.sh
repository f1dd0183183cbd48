#!/usr/bin/env bash
# The codec's golden tests on several Pythons and numpys: the same bits everywhere.
#   scripts/golden_matrix.sh            every combination whose Python is installed
#   scripts/golden_matrix.sh 3.11:1.26.4 3.13:2.4.6
#   scripts/golden_matrix.sh --quick    one with numpy 1.26; skipped, and said so, if not to be had
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
folder=${DARE_AGG_GOLDEN:-$root/.venv-golden}
pinned=$(sed -n 's/^numpy==//p' constraints.txt)
# With pyenv, offer every interpreter it has.
if command -v pyenv >/dev/null; then
    PYENV_VERSION=$(pyenv versions --bare | paste -sd:)
    export PYENV_VERSION
fi
quick=""
case "${1:-}" in
--quick)
    quick=yes
    version=$("${PYTHON:-.venv/bin/python}" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    set -- "$version:1.26.4"
    [ "$version" = 3.13 ] && set -- "$version:2.1.3"
    ;;
"") set -- 3.11:1.26.4 "3.11:$pinned" 3.12:1.26.4 "3.12:$pinned" 3.13:2.1.3 "3.13:$pinned" ;;
esac

# What the codec's rooms import, and what runs their tests.
packages="cryptography google-re2 pytest hypothesis"

mkdir -p "$folder"
grep -v '^numpy==' constraints.txt >"$folder/constraints.txt"
ran=0
for combination in "$@"; do
    version=${combination%%:*} numpy=${combination##*:}
    python=""
    for candidate in "python$version" "$root/.venv/bin/python"; do
        if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" \
            2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "Python $version, numpy $numpy: skipped, python$version is not installed" >&2
        continue
    fi
    venv=$folder/$version-numpy$numpy
    if [ "$(cat "$venv/.complete" 2>/dev/null)" != "$packages" ]; then
        rm -rf "$venv"
        # shellcheck disable=SC2086
        if ! { "$python" -m venv "$venv" &&
            "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
                -c "$folder/constraints.txt" "numpy==$numpy" $packages; } >&2; then
            [ -n "$quick" ] || exit 1
            echo "Python $version, numpy $numpy: skipped, its packages could not be installed" >&2
            continue
        fi
        echo "$packages" >"$venv/.complete"
    fi
    echo "Python $version, numpy $numpy:"
    "$venv/bin/python" -m pytest -q -W ignore -m "not slow" -k "golden or plain_rule or hadamard" \
        tests/codec/test_plain_decoder.py tests/codec/test_mask.py tests/codec/test_formats.py
    ran=$((ran + 1))
done
[ "$ran" -gt 0 ] || [ -n "$quick" ] || { echo "error: no combination could be run" >&2; exit 1; }
