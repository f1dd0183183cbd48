"""What a model's files say of its quantisation: its configuration, or a quantiser's own file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dare_agg.files.json_text import read_settings

# Files that a quantiser leaves beside the weights, and what it is where they do not say.
_BESIDE = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "quanto_qmap.json": "quanto",
    "quantization_map.json": "quanto",
}
# How users write what `quant_method` says in one word.
_SPELLING = {
    "gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "bitsandbytes_4bit":
    "bitsandbytes 4 bit", "bitsandbytes_8bit": "bitsandbytes 8 bit", "fp8": "FP8", "fbgemm_fp8":
    "FP8 (fbgemm)", "hqq": "HQQ", "eetq": "EETQ", "mxfp4": "MXFP4", "nvfp4": "NVFP4", "gguf":
    "GGUF", "aqlm": "AQLM", "vptq": "VPTQ", "bitnet": "BitNet", "exl2": "EXL2", "exl3": "EXL3",
    "modelopt": "ModelOpt", "mlx": "MLX", "marlin": "Marlin",
}  # fmt: skip
_NESTED_DEEP = 4
_CONFIG_KEYS = ("quantization_config", "compression_config")


class Declared(NamedTuple):
    """What a model's files say of its quantisation: the kind, the file, its settings."""

    kind: str
    file: str
    settings: Mapping[str, Any]


def declared_by(folder: Path) -> Declared | None:
    """What ``config.json`` or a quantiser's own file says of a folder's weights; None: nothing.

    Files that cannot be read say nothing.
    """
    found = declared_in(read_settings(folder / "config.json"))
    if found is not None:
        return found
    params = read_settings(folder / "params.json").get("quantization")
    if isinstance(params, dict) and params:
        return Declared(_kind_of(params, "FP8"), "params.json", params)
    for name, kind in _BESIDE.items():
        settings = read_settings(folder / name)
        if settings:
            inner = settings.get("quantization")
            settings = inner if isinstance(inner, dict) else settings
            return Declared(_kind_of(settings, kind), name, settings)
    return None


def declared_in(config: Mapping[str, Any]) -> Declared | None:
    """What a model's configuration says of its quantisation, in nested configurations too."""
    for settings in _settings(config, 0):
        return Declared(_kind_of(settings, "unnamed"), "config.json", settings)
    bits = config.get("quantization_bit")
    if isinstance(bits, int) and bits > 0:
        return Declared(f"ChatGLM, {int(bits)} bit", "config.json", {"bits": bits})
    own = config.get("quantization")
    if isinstance(own, dict) and {"bits", "group_size"} & own.keys():
        return Declared(_kind_of(own, "MLX"), "config.json", own)
    return None


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration, nested ones too, without what says that it is quantised."""
    return {
        key: without_quantisation(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _CONFIG_KEYS
    }


def _settings(config: Mapping[str, Any], depth: int) -> Iterator[Mapping[str, Any]]:
    """The quantisation settings of a configuration, its own before those of its parts."""
    for key in _CONFIG_KEYS:
        settings = config.get(key)
        if isinstance(settings, dict) and settings and not _switched_off(settings):
            yield settings
    if depth < _NESTED_DEEP:
        for part in config.values():
            if isinstance(part, dict):
                yield from _settings(part, depth + 1)


def _switched_off(settings: Mapping[str, Any]) -> bool:
    """Whether it is a bitsandbytes configuration of a model that was loaded in full precision."""
    loads = [settings[key] for key in ("load_in_4bit", "load_in_8bit") if key in settings]
    return bool(loads) and not any(loads) and "bits" not in settings


def _kind_of(settings: Mapping[str, Any], otherwise: str) -> str:
    method = settings.get("quant_method") or settings.get("quant_algo") or settings.get("format")
    if not isinstance(method, str):
        if "desc_act" in settings:
            method = "gptq"
        elif "w_bit" in settings or "zero_point" in settings:
            method = "awq"
        elif settings.get("load_in_4bit") or settings.get("load_in_8bit"):
            method = "bitsandbytes"
        elif otherwise == "unnamed" and {"bits", "group_size"} <= settings.keys():
            method = "mlx"
        else:
            method = otherwise
    words = [_SPELLING.get(method.lower(), method[:40])]
    bits = settings.get("bits", settings.get("w_bit"))
    if settings.get("load_in_4bit"):
        bits = 4
    elif settings.get("load_in_8bit"):
        bits = 8
    if isinstance(bits, int):
        words.append(f"{bits} bit")
    return ", ".join(words)
