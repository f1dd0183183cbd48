"""The model card of a merged model: its recipe verbatim, no network needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dare_agg import __version__
from dare_agg.checkpoint.hub_names import shown_name
from dare_agg.offline.yaml_text import write_yaml
from dare_agg.vectors.layout import Layout

if TYPE_CHECKING:
    from dare_agg.merge.row import Method


def model_card(
    recipe: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    layout: Layout,
    method: Method,
) -> str:
    """Return the card as Markdown with a YAML head that hubs read."""
    head = {
        "tags": ["merge", "dare-agg", method.name],
        "base_model": [shown_name(str(recipe["base"]))]
        + [shown_name(str(m[key])) for m in models for key in ("path", "adapter") if key in m],
        "base_model_relation": "merge",
    }
    rows = "\n".join(
        f"| {_shown(m)} | {m['kind']} | {m.get('weight', 'default')} | `{m['content']}` |"
        for m in models
    )
    dropped = ""
    rates = [m.get("drop-rate", recipe.get("drop-rate")) for m in recipe["models"]]
    if any(rates):
        said = ", ".join(str(rate) for rate in rates) if len({*map(str, rates)}) > 1 else rates[0]
        dropped = (
            f"\nThe deltas were sparsified first ({recipe.get('sparsifier', 'dare')}, drop rate "
            f"{said}, seed {recipe.get('seed', 0)}).\n"
        )
    return f"""---
{write_yaml(head)}
---
# {shown_name(str(recipe["base"]))}, merged by {method.name}

Made with dare-agg {__version__}: {method.formula} ([reference]({method.reference})).
{dropped}
| model | kind | weight | content of its delta |
|---|---|---|---|
{rows}

{layout.size:,} parameters in {len(layout.entries)} tensors were merged; \
{len(layout.excluded)} excluded tensors and {len(layout.buffers)} buffers are the base's.
Layout fingerprint: `{layout.fingerprint}`.

## Recipe

```yaml
{write_yaml(recipe)}
```
"""


def _shown(model: Mapping[str, Any]) -> str:
    return " + ".join(shown_name(str(model[key])) for key in ("path", "adapter") if key in model)
