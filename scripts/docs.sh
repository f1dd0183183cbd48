#!/usr/bin/env bash
# The API reference from the docstrings, into site/ (not in git); open site/index.html.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
cd "$root"
rm -rf site
python scripts/docs.py site
echo "site/index.html"
