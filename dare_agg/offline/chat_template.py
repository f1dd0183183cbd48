"""OUT's chat template: a text, one by name, or what most of the models have.

mergekit's key ``chat_template``. Names stand for the forms that models of these families were
trained on, written here in Jinja as transformers renders it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dare_agg.checkpoint.tokenizer import has_tokenizer, read_tokenizer
from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.files.json_text import read_json

# The template of most models; where as many have another, the first one's.
AUTO = "auto"
_FILE = "chat_template.jinja"
_TAIL = "{%- if add_generation_prompt %}{{ start }}{% endif %}"
_SHORTEST = 20

NAMED = {
    "chatml": (
        "{%- for m in messages %}"
        "{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}"
        "{%- endfor %}" + _TAIL.replace("start", "'<|im_start|>assistant\\n'")
    ),
    "llama3": (
        "{{- bos_token }}{%- for m in messages %}"
        "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' }}"
        "{{ m.content | trim ~ '<|eot_id|>' }}{%- endfor %}"
        + _TAIL.replace("start", "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'")
    ),
    "mistral": (
        "{%- set lead = messages[0].content ~ '\\n\\n' if messages[0].role == 'system' else '' %}"
        "{%- set turns = messages[1:] if lead else messages %}{{- bos_token }}"
        "{%- for m in turns %}"
        "{%- if m.role not in ('user', 'assistant') or (m.role == 'user') != loop.index0 is even %}"
        "{{ raise_exception('After a system message users and assistants take turns') }}"
        "{%- endif %}"
        "{%- if m.role == 'user' %}"
        "{{ ' [INST] ' ~ (lead if loop.first else '') ~ m.content ~ ' [/INST]' }}"
        "{%- else %}{{ ' ' ~ m.content ~ eos_token }}{%- endif %}{%- endfor %}"
    ),
    "alpaca": (
        "{%- set heads = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'}"
        " %}{%- for m in messages %}{%- if m.role == 'system' %}{{ m.content | trim ~ '\\n\\n' }}"
        "{%- elif m.role in heads %}"
        "{{ '### ' ~ heads[m.role] ~ ':\\n' ~ m.content | trim ~ '\\n\\n' }}{%- endif %}"
        "{%- endfor %}" + _TAIL.replace("start", "'### Response:\\n'")
    ),
    "exaone": (
        "{%- for m in messages %}"
        "{%- if loop.first and m.role != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{%- endif %}"
        "{{ '[|' ~ m.role ~ '|]' ~ m.content }}"
        "{{ '\\n' if m.role == 'user' else '[|endofturn|]\\n' }}{%- endfor %}"
        + _TAIL.replace("start", "'[|assistant|]'")
    ),
}


def check_template(word: str) -> str:
    """Return a recipe's ``chat-template`` where it is one; raises `ValueError`."""
    is_text = "{" in word and len(word) >= _SHORTEST
    if word != AUTO and word not in NAMED and not is_text:
        raise ValueError(
            f"chat template {word[:40]!r} is no Jinja text{did_you_mean(word, [AUTO, *NAMED])}"
        )
    return word


def write_template(word: str, folder: Path, models: Sequence[Path]) -> list[str]:
    """Give the tokenizer of a folder a chat template; ``models`` are asked for theirs by "auto".

    Returns what should be said of it.
    """
    text = NAMED.get(word, word)
    if word == AUTO:
        found = Counter(
            template
            for model in dict.fromkeys(models)
            if model.is_dir() and (template := read_tokenizer(model).templates.get("default"))
        )
        if not found:
            return ["chat template auto: no model has one, and OUT has none"]
        text = found.most_common(1)[0][0]
    if not has_tokenizer(folder):
        return [f"OUT has no tokenizer, and so the chat template {word[:20]!r} is not written"]
    settings = folder / "tokenizer_config.json"
    try:
        values = read_json(settings)
    except (OSError, ValueError):
        values = None
    if isinstance(values, dict) and values.pop("chat_template", None) is not None:
        written = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        settings.write_text(written, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / _FILE).write_text(text, encoding="utf-8")
    return []


def check_out(word: str, out: Path) -> None:
    """Raise `ConfigError` where ``out`` is a file, which has no chat template."""
    if out.suffix == ".safetensors":
        raise ConfigError(
            f"chat template {word[:20]!r}: {out} is a file, which has none; name a folder"
        )
