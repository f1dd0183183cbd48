"""A tiny random BERT and small files, so that real tasks train in a second."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.chat import as_messages, make_model, talk

sys.path.insert(0, str(Path(__file__).parent))

WORDS = ["good", "fine", "great", "happy", "bad", "poor", "awful", "sad", "film", "book", "the"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A Hugging Face folder with a random two-layer BERT and a word tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    words = Tokenizer(
        WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}, "[UNK]")
    )
    words.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_language_model(tmp_path_factory):
    """A Hugging Face folder with a random two-layer Llama and a word tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    special = ["[UNK]", "[END]"]
    words = Tokenizer(WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="[END]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder


def review_rows(count=240):
    """Texts whose words tell the label, by six authors."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        positive = i % 2 == 0
        tone = WORDS[:4] if positive else WORDS[4:8]
        words = [*rng.choice(tone, 3), *rng.choice(WORDS[8:], 3)]
        label = "positive" if positive else "negative"
        rows.append({"review": " ".join(words), "tone": label, "author": f"author {i % 6}"})
    return rows


@pytest.fixture(scope="session")
def review_files(tmp_path_factory):
    """The same rows as CSV, JSON Lines, Parquet and a `datasets` folder."""
    import csv

    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("reviews")
    rows = review_rows()
    with (folder / "r.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "r.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "r.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "r.dataset"))
    return {name: folder / f"r.{name}" for name in ("csv", "jsonl", "parquet", "dataset")}


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """A Hugging Face folder with a random two-layer Llama, a tokenizer and a chat template."""
    return make_model(tmp_path_factory.mktemp("chat-llama"))


@pytest.fixture(scope="session")
def talk_file(tmp_path_factory):
    """Forty conversations as JSON Lines, of two kinds by four authors."""
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    rows = [
        {"messages": as_messages(talk(n)), "kind": ("short", "long")[n % 3 == 0], "by": f"a{n % 4}"}
        for n in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
