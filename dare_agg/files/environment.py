"""The environment variables that the library reads, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# variable -> (what is so without it, meaning)
VARIABLES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "DARE_AGG_CACHE": ("~/.cache/dare-agg", "folder for unpacked models and model versions"),
        "DARE_AGG_PASSPHRASE": ("asked, or a file", "passphrase of a private key"),
        "DARE_AGG_KERNEL": ("auto", "loops of the codec: auto, numpy or numba; the same bits"),
        "DARE_AGG_SECURE_KEYS": ("none", "folder of keys for simulated parties; a simulation sets "
                                 "it itself"),
        "DARE_AGG_WARM_TRAINER": ("none", "set inside a warm trainer, by the node that starts it"),
        "NO_COLOR": ("none", "with any value: no colour and no bold"),
        "HF_HUB_OFFLINE": ("none", "1: no hub is asked"),
        "HF_DATASETS_OFFLINE": ("none", "1: no hub is asked for data sets"),
        "HF_TOKEN": ("what hf auth login keeps", "token of the hub, for dare-agg push"),
        "HF_ENDPOINT": ("https://huggingface.co", "the hub"),
        "HF_HUB_CACHE": ("HF_HOME/hub", "the hub's cache, also as HUGGINGFACE_HUB_CACHE"),
        "HUGGINGFACE_HUB_CACHE": ("HF_HOME/hub", "older name of HF_HUB_CACHE"),
        "HF_HOME": ("XDG_CACHE_HOME/huggingface", "folder of Hugging Face's libraries"),
        "XDG_CACHE_HOME": ("~/.cache", "where caches lie"),
        "XDG_RUNTIME_DIR": ("the cache, or a temporary folder", "folder in memory, for sealed "
                            "session state and the sockets of warm trainers"),
        "OMP_NUM_THREADS": ("1 in simulations", "threads of the CPU of a process's libraries"),
        "PYTHONPATH": ("none", "kept, behind the app's folder"),
        "PATH": ("the system's", "kept, behind the folder of this Python"),
        "FLWR_TELEMETRY_ENABLED": ("0 in dare-agg run", "whether Flower sends telemetry"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": ("1 in dare-agg run", "whether a SuperLink "
                                                         "installs packages"),
        "FLWR_HOME": ("a folder of the run", "Flower's own files"),
    }
)  # fmt: skip
