"""Which adapters have a delta that is known here, and where the others are sent."""

from __future__ import annotations

from shlex import quote
from typing import Any

from dare_agg.checkpoint import Checkpoint
from dare_agg.errors import CheckpointError
from dare_agg.offline.adapters.folder import AdapterFolder
from dare_agg.offline.adapters.memory import task_class

# Adapters that change no weight: there is nothing to merge.
_PROMPTS = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT",
    "CPT", "CARTRIDGE",
}  # fmt: skip
# Adapters whose change depends on the input or the task: PEFT has no merge of them.
_UNMERGEABLE = {"XLORA", "POLY", "LILY", "SHADOW"}
# Settings of LoRA under which what is added depends on the input or the layer.
_ON_INPUT = {
    "alora_invocation_tokens": "acts behind its invocation tokens alone",
    "arrow_config": "is chosen among others token by token",
    "layer_replication": "is another one in each layer that repeats the same weights",
}
_KNOWN_FORMS = {"use_rslora", "use_dora", "use_bdlora", "use_qalora"}


def check_kind(folder: AdapterFolder, base: Checkpoint) -> None:
    """Raise `CheckpointError` for an adapter that is no LoRA, or one whose delta is not known."""
    if folder.kind == "MLX":
        raise CheckpointError(
            f"{folder.path} is an adapter of MLX; fuse it there (mlx_lm.fuse) and give the fused "
            "model"
        )
    if folder.kind in _PROMPTS:
        raise CheckpointError(
            f"{folder.path} is a {folder.kind} adapter, which changes no weight: there is nothing "
            "to merge; use it beside the model"
        )
    if folder.kind in _UNMERGEABLE:
        raise CheckpointError(
            f"{folder.path} is a {folder.kind} adapter: what it adds depends on the input, so no "
            "merged model is equal to it; use it beside the model"
        )
    if folder.kind != "LORA":
        raise sent_to_peft(folder, base, f"is a {folder.kind} adapter")
    for key, what in _ON_INPUT.items():
        if folder.config.get(key):
            raise CheckpointError(
                f"{folder.path} has {key}: it {what}, so no merged model is equal to it; use it "
                "beside the model"
            )
    for key, value in folder.config.items():
        if value and key.startswith("use_") and key not in _KNOWN_FORMS:
            raise sent_to_peft(folder, base, f"has {key} (a form not known here)")


def sent_to_peft(folder: AdapterFolder, base: Checkpoint, why: str) -> CheckpointError:
    """The error of an adapter that PEFT can merge, with the command that does."""
    model = task_class(base, folder.config)
    place = base.folder or base.path.parent
    if not (place / "config.json").is_file():
        return CheckpointError(
            f"{folder.path} {why}: merge it with peft (merge_and_unload), onto BASE in a folder "
            "with its config.json, and give the merged model"
        )
    code = (
        "import sys; from peft import PeftModel; "
        f"from transformers import {model} as M; "
        "m = PeftModel.from_pretrained(M.from_pretrained(sys.argv[1]), sys.argv[2]); "
        "m.merge_and_unload().save_pretrained(sys.argv[3])"
    )
    words = " ".join(quote(str(part)) for part in (place, folder.path, f"{folder.path}-merged"))
    return CheckpointError(
        f'{folder.path} {why}: merge it with peft and give the merged model: python -c "{code}" '
        f"{words}"
    )


def spelled(config: Any) -> tuple[str, ...]:
    """The parameters that ``target_parameters`` names; () for none or no list."""
    given = config.get("target_parameters") or ()
    return tuple(t for t in given if isinstance(t, str)) if isinstance(given, list) else ()
