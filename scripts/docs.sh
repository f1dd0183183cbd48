#!/usr/bin/env bash
# The API reference from the docstrings, into site/ (not in git); open site/index.html.
# Whatever pdoc warns of (a module it cannot import, an annotation it cannot read) is an error.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" dev
cd "$root"
rm -rf site
exec python - <<'PYTHON'
import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import dare_agg

warnings.filterwarnings("error", module=r"pdoc\b")
pdoc.render.configure(
    docformat="numpy",
    footer_text=f"dare-agg {dare_agg.__version__}",
)
# A room's __all__ names what it lends to others; the reference shows its files too.
for module in pkgutil.walk_packages(dare_agg.__path__, "dare_agg."):
    room, _, name = module.name.rpartition(".")
    names = getattr(sys.modules.get(room) or importlib.import_module(room), "__all__", None)
    if names is not None:
        names.append(name)
pdoc.pdoc("dare_agg", output_directory=Path("site"))
print("site/index.html")
PYTHON
