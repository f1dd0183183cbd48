"""OUT's chat template: given, by name, or that of most models, as transformers renders it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import command, llama
from tests.tokenizers import tokenizer

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "More?"},
]
HEAD, START = "<|start_header_id|>", "<|end_header_id|>\n\n"
RIGHT = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>user\nMore?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama3": f"<s>{HEAD}system{START}Be kind.<|eot_id|>{HEAD}user{START}Hi<|eot_id|>"
    f"{HEAD}assistant{START}Yes<|eot_id|>{HEAD}user{START}More?<|eot_id|>{HEAD}assistant{START}",
    "mistral": "<s> [INST] Be kind.\n\nHi [/INST] Yes</s> [INST] More? [/INST]",
    "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nYes\n\n"
    "### Instruction:\nMore?\n\n### Response:\n",
    "exaone": "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]Yes[|endofturn|]\n"
    "[|user|]More?\n[|assistant|]",
    "{{ messages[-1].content }} and no more": "More? and no more",
    "auto": "Hi, says b",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    tokenizer(llama(place / "base"), template="{{ 'says base' }}")
    for number, name in enumerate("abc", 1):
        text = "{{ 'says a' }}" if name == "a" else "{{ messages[1].content }}, says b"
        tokenizer(llama(place / name, number), template=text)
    return place


@pytest.mark.parametrize("word", RIGHT)
def test_a_conversation_is_written_in_its_form(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    from transformers import AutoTokenizer

    file = folder / "r.yml"
    file.write_text(
        "models:\n" + "".join(f"  - model: {n}\n    parameters: {{weight: 0.2}}\n" for n in "abc")
        + f"merge_method: task_arithmetic\nbase_model: base\nchat_template: {json.dumps(word)}\n"
    )  # fmt: skip
    out = tmp_path / "out"
    status, said = command(capsys, "merge", file, "-o", out)
    assert status == 0 and "chat template" not in said, said
    read = AutoTokenizer.from_pretrained(out)
    read.bos_token, read.eos_token = "<s>", "</s>"
    found = read.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert found == RIGHT[word]


def test_a_word_that_is_no_template_a_file_and_no_tokenizer_are_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "wrong.yml"
    text = "models:\n  - model: a\nmerge_method: karcher\nchat_template: {}\n"
    file.write_text(text.format("chatmI"))
    status, said = command(capsys, "merge", file, "-o", tmp_path / "out")
    assert status == 1 and "line 4: chat template 'chatmI' is no Jinja text; did you mean" in said
    file.write_text(text.format("chatml"))
    status, said = command(capsys, "merge", file, "-o", tmp_path / "out.safetensors")
    assert status == 1 and "is a file, which has none; name a folder" in said
    llama(tmp_path / "a")
    (tmp_path / "r.yml").write_text(text.format("chatml"))
    status, said = command(capsys, "merge", tmp_path / "r.yml", "-o", tmp_path / "out")
    assert status == 0 and "OUT has no tokenizer" in said, said
