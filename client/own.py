"""What a party of secure sums trains on: its own words, whatever the run config says.

Columns, files and models that a run config names would be a server's choice of what this
machine reads. A guarded node takes them from its node config; of the run config only names of
public data sets and models that install as packages count, which are no paths. What one party would
learn otherwise than the others is refused too: their sum would show it alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from client.config import DEFAULTS, ConfigValue, split_list
from client.data import BUILT_IN
from client.images import BUILT_IN_IMAGES
from client.instructions.sources import BUILT_IN_CONVERSATIONS
from client.models import MODELS
from dare_agg.errors import ConfigError

# Run config key → the node config's key for it, and the public names that a run may say.
PLACES = {
    "data": ("data-path", (*BUILT_IN, *BUILT_IN_IMAGES, *BUILT_IN_CONVERSATIONS)),
    "model": ("base-path", tuple(MODELS)),
}
# Columns are the node's, and so is its test file, else the app's own defaults.
COLUMNS = (
    "text-column", "label-column", "delimiter", "encoding", "partition-by", "prompt-column",
    "answer-column", "test-data",
)  # fmt: skip
# Words of run or node that a sum cannot keep, and why.
_UNSUMMED = {
    "keep-optimizer": "moments that a training without a sum left would have some parties stand "
    "still in the next one, which is the others' alone then; set it off",
    "lora-ranks": "components that some parties do not learn are the others' alone in the sum; "
    "leave it out, so that all learn the run's lora-rank",
}


def own_words(
    run: Mapping[str, ConfigValue], node: Mapping[str, ConfigValue]
) -> dict[str, ConfigValue]:
    """The run config with every path and column in this node's own words.

    Raises `ConfigError` where the node does not say and the run says no public name, and for
    words that would show a party's delta alone, the node's own ``lora-rank`` among them.
    """
    words = dict(run)
    for key, why in _UNSUMMED.items():
        if run.get(key) or node.get(key):
            raise ConfigError(f"{key} in secure sums: {why}")
    if "lora-rank" in node:
        raise ConfigError(f"lora-rank of a node in secure sums: {_UNSUMMED['lora-ranks']}")
    for key, (own, public) in PLACES.items():
        if own in node:
            words[key] = node[own]
        elif key in node:
            words[key] = node[key]
        elif not set(split_list(str(run.get(key, DEFAULTS[key])))) <= set(public):
            raise ConfigError(
                f"{key} = {str(run.get(key))[:60]!r} is the run's word, and this node takes part "
                f"in secure sums only: name its own in --node-config: {own}=…, or let the run "
                f"say one of {', '.join(public)}"
            )
    words.update({key: node.get(key, DEFAULTS[key]) for key in COLUMNS})
    return words
