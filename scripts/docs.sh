#!/usr/bin/env bash
# The documentation as a site, API reference included, into site/ (not in git): open site/index.html.
# Any broken link, page without a place, or resource from elsewhere is an error.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
cd "$root"
rm -rf site
python scripts/site.py build/docs
NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet
python scripts/docs.py site/reference
python scripts/site.py --check site
echo "site/index.html (its search wants a server: python -m http.server -d site)"
