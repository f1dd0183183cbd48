"""The words of a node's own config (``--node-config``) that the library reads, and what they mean.

What an app reads besides (data, columns, device) the app says itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# key -> (what stands where it is left out, meaning)
NODE_WORDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "client-name": ("the partition's number", "what the node is called in rows and logs; must "
                        "be the same after a restart"),
        "identity": ("none", "file of the private key that signs this node's updates"),
        "cache": ("below DARE_AGG_CACHE", "folder for the versions of the model it holds"),
        "base": ("the hub's cache", "a run's base on this machine: folder, file, hub's name"),
        "uplink-kbit-s": ("0: unknown", "its uplink; with the run's upload-seconds it gets its own "
                          "drop rate and value format"),
        "warm": ("true under a SuperNode, but in secure sums", "keep a trainer process between "
                 "messages of a run"),
        "warm-idle": ("600", "seconds after which an unused trainer ends"),
        "secure-identity": ("none", "file of this party's private key; with it the node takes part "
                            "in secure sums only"),
        "secure-roster": ("none", "file of the signed roster"),
        "secure-trust": ("none", "public keys, by commas, who may vouch for a roster"),
        "secure-passphrase-file": ("DARE_AGG_PASSPHRASE", "file with the passphrase of the key"),
        "secure-only": ("true", "train in secure sums and never in the clear"),
        "secure-evaluate": ("false", "may report metrics of a model it is sent, of all its rows"),
        "secure-state": ("in memory", "folder of sealed session state"),
        "secure-ledger": ("beside the key", "file of what this party has put into sums"),
        "secure-methods": ("mean,ties,wudi,private-mean", "sums it takes part in"),
        "secure-epsilon": ("the run's, at most 8", "the most that all noised sums may tell of it; "
                           "with it the party takes part in no others"),
        "secure-delta": ("the run's", "its δ"),
        "secure-budget": ("beside the key", "file of what noised sums have told"),
        "secure-groups": ("1: of all together", "it takes part in sums over one of so many groups "
                          "of the roster"),
        "secure-min-parties": ("3", "fewest honest parties in a sum"),
        "secure-min-cohort": ("0.5", "the cohort must be more than this share of the roster, "
                              "or of the own group"),
        "secure-min-threshold": ("2/3", "least share of the cohort that must stay to the end"),
        "secure-min-norm": ("0", "its own change must be larger than this"),
        "secure-max-clip": ("1", "largest secure-clip it accepts"),
        "secure-colluding": ("0.2", "share of the parties who may collude with the server"),
        "base-path": ("the run's model, if public", "this party's copy of the base"),
        "model-path": ("none", "the model it puts into a merge"),
        "merged-path": ("nowhere", "where its merged model is written"),
        "partition-id": ("set by a simulation", "its number among the simulated clients"),
        "num-partitions": ("set by a simulation", "how many simulated clients there are"),
    }
)  # fmt: skip
