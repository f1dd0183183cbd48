"""The API reference of dare_agg, written into a folder: ``scripts/docs.py FOLDER``.

Whatever pdoc warns of (a module it cannot import, an annotation it cannot read) is an error.
"""

import importlib
import importlib.util
import pkgutil
import sys
import typing
import warnings
from pathlib import Path

import pdoc

import dare_agg

warnings.filterwarnings("error", module=r"pdoc\b")
pdoc.render.configure(docformat="numpy", footer_text=f"dare-agg {dare_agg.__version__}")
# The room that needs NVFlare is shown where NVFlare is installed.
left_out = () if importlib.util.find_spec("nvflare") else ("dare_agg.nvflare",)
for room in left_out:
    warnings.filterwarnings("ignore", message=f"Error loading {room}", module=r"pdoc\b")
    warnings.filterwarnings("ignore", message=f"Couldn't import {room}", module=r"pdoc\b")
    importlib.import_module(room).__all__ = []  # pdoc asks for each before it leaves the room out
for found in pkgutil.walk_packages(dare_agg.__path__, "dare_agg."):
    if found.name.startswith(left_out):
        continue
    module = importlib.import_module(found.name)
    # A room's __all__ names what it lends to others; the reference shows its files too.
    room, _, name = found.name.rpartition(".")
    names = getattr(sys.modules[room], "__all__", None)
    if names is not None:
        names.append(name)
    # A NamedTuple's constructor does not know the module of its annotations.
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields"):
            value.__new__.__annotations__ = typing.get_type_hints(value)
pdoc.pdoc("dare_agg", *(f"!{room}" for room in left_out), output_directory=Path(sys.argv[1]))
