import json
from dataclasses import replace

import numpy as np
import pytest

from client.config import configure
from client.instructions.template import open_tokenizer
from client.training import build_task
from dare_agg.errors import ConfigError
from tests.chat import as_messages, make_model


def config(model, data, **more):
    settings = {
        "model": str(model),
        "data": str(data),
        "label_column": "kind",
        "length": 96,
        "steps": 20,
        "batch": 4,
        "learning_rate": 3e-3,
    }
    return configure(**{**settings, **more})


def everything(task):
    return np.arange(len(task.train_rows))


def test_training_learns_and_repeats_bit_for_bit(chat_model, talk_file):
    task = build_task(config(chat_model, talk_file))
    assert task.kind.name == "instructions"
    start = task.initial_state()
    trained, examples, metrics = task.train(start, everything(task), seed=[0, 1])
    again, _, _ = build_task(task.config).train(start, everything(task), seed=[0, 1])
    assert examples == len(task.train_rows) == 32 and metrics["train-loss"] > 0
    assert all(np.array_equal(trained[name], again[name]) for name in trained)
    before, after = task.evaluate(start), task.evaluate(trained)
    assert after["loss"] < before["loss"] - 1
    assert after["perplexity"] == pytest.approx(np.exp(after["loss"]))


def test_loss_is_the_models_own_on_answers_alone(chat_model, talk_file):
    """Against transformers' loss with every other label at -100, a row at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = build_task(config(chat_model, talk_file))
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    loss, count = 0.0, 0
    for row in task.test_rows.inputs:
        text = tokenizer.apply_chat_template(as_messages(row.conversation), tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        labels = [-100] * len(ids)
        said, at = False, 0
        for place, one in enumerate(ids):  # by hand: between "assistant\n" and the end token
            so_far = tokenizer.decode(ids[:place])
            said = said or so_far.endswith("<|im_start|>assistant\n")
            if said:
                labels[place], at = one, at + 1
            said = said and one != tokenizer.eos_token_id
        found = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        loss, count = loss + float(found.detach()) * at, count + at
    assert task.evaluate(task.initial_state())["loss"] == pytest.approx(loss / count, rel=1e-5)


def test_packing_changes_neither_loss_nor_step(chat_model, talk_file):
    plain = build_task(config(chat_model, talk_file, steps=3))
    packed = build_task(replace(plain.config, packing=True))
    start = plain.initial_state()
    one, other = plain.evaluate(start), packed.evaluate(start)
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
    # Fewer places are computed: else packing would be no packing.
    readers = [task.network(start, "train")[1] for task in (plain, packed)]
    sizes = [read(np.arange(8))["input_ids"].numel() for read in readers]
    assert sizes[1] < sizes[0]
    a, _, trained = plain.train(start, everything(plain), seed=[0])
    b, _, in_rows = packed.train(start, everything(plain), seed=[0])
    assert in_rows["train-loss"] == pytest.approx(trained["train-loss"], rel=1e-6)
    moved = max(np.abs(a[name] - start[name]).max() for name in a)
    assert max(np.abs(a[name] - b[name]).max() for name in a) < 1e-3 * moved


def test_metrics_are_told_by_label_and_add_up(chat_model, talk_file):
    task = build_task(config(chat_model, talk_file, generate_rows=2, generate_tokens=4))
    found = task.evaluate(task.initial_state())
    assert found["rows:short"] + found["rows:long"] == len(task.test_rows)
    tokens = {"short": 0, "long": 0}
    for row, label in zip(task.test_rows.inputs, task.test_rows.labels, strict=True):
        tokens[task.data.label_names[label]] += int(row.answer_mask.sum())
    mean = sum(found[f"loss:{k}"] * n for k, n in tokens.items()) / sum(tokens.values())
    assert found["loss"] == pytest.approx(mean, rel=1e-6)
    assert found["exact-match"] == found["exact-match:short"] == 0.0
    assert "exact-match" not in build_task(config(chat_model, talk_file)).evaluate(
        task.initial_state()
    )


def test_exact_match_rises_to_one_where_the_answers_are_learned(chat_model, tmp_path):
    rows = [{"prompt": f"say {word}", "answer": word} for word in ("apples", "left")] * 8
    path = tmp_path / "say.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = build_task(
        config(chat_model, path, steps=60, learning_rate=1e-2, generate_rows=8, generate_tokens=6)
    )
    start = task.initial_state()
    trained, _, _ = task.train(start, everything(task), seed=[0])
    assert task.evaluate(start)["exact-match"] == 0.0
    assert task.evaluate(trained)["exact-match"] == 1.0


def test_evaluation_may_be_on_training_rows(chat_model, talk_file):
    task = build_task(config(chat_model, talk_file, held_out=0.2))
    assert len(task.train_rows) == 40 and not len(task.test_rows)
    start = task.initial_state()
    some = task.evaluate(start, np.arange(5), split="train")
    assert some != task.evaluate(start, np.arange(5, 10), split="train")


def test_lora_trains_adapters_and_gram_matrices_are_of_every_token(chat_model, talk_file):
    task = build_task(config(chat_model, talk_file, train="lora", lora_rank=2))
    start = task.initial_state()
    assert all("lora_" in name for name in start)
    trained, _, _ = task.train(start, everything(task), seed=[0])
    assert task.evaluate(trained)["loss"] < task.evaluate(start)["loss"]
    whole = build_task(config(chat_model, talk_file))
    rows = whole.train_rows.inputs[:4]
    found = whole.statistics("gram", whole.initial_state(), np.arange(4), examples=4)
    table = whole.initial_state()["model.embed_tokens.weight"]
    x = table[np.concatenate([row.ids for row in rows])]
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)
    gram = found["model.layers.0.self_attn.q_proj.weight"]
    assert np.allclose(gram, x.T @ x / len(x), atol=1e-4)


def test_lengths_are_told_before_training(chat_model, talk_file):
    task = build_task(config(chat_model, talk_file, length=60))
    told = [note for note in task.data.notes if "training" in note]
    assert len(told) == 1 and "rows are longer than length 60 and lose their end" in told[0]
    assert all(row.ids.size <= 60 for row in task.train_rows.inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "minilm"}, "no causal language model; built in: smollm2"),
        (
            {"length": 8},
            r"entirely \(the first begins 'how many .*: the question alone fills length 8",
        ),
        ({"length": 300}, "length = 300, and the context of model .* ends after 256 tokens"),
        ({"train": "head"}, "no head of its own"),
        ({"generate_rows": 1, "generate_tokens": 255}, "leaves no room for a question"),
        ({"generate_rows": 1, "generate_tokens": 300}, "leaves no room for a question"),
        ({"generate_rows": 1, "answer_form": "number", "data": "words"}, "has no number; set answ"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    chat_model, talk_file, tmp_path, changes, message
):
    words = tmp_path / "words.jsonl"
    words.write_text("\n".join('{"prompt": "a", "answer": "b"}' for _ in range(5)))
    settings = {"model": chat_model, "data": talk_file, **changes}
    settings["data"] = words if settings["data"] == "words" else settings["data"]
    with pytest.raises(ConfigError, match=message):
        build_task(config(settings.pop("model"), settings.pop("data"), **settings))


def test_a_tokenizer_without_padding_trains_as_one_with_it(chat_model, talk_file, tmp_path):
    open_tokenizer.cache_clear()
    bare = make_model(tmp_path / "bare", padding=False)
    task, other = (build_task(config(m, talk_file, generate_rows=2)) for m in (bare, chat_model))
    start = task.initial_state()
    one, right = (t.train(start, everything(t), seed=[0])[0] for t in (task, other))
    assert all(np.array_equal(one[name], right[name]) for name in one)
    assert task.evaluate(one) == other.evaluate(one)


def test_questions_without_room_are_counted_and_not_answered(chat_model, talk_file):
    sizes = sorted(row.asked for row in build_task(config(chat_model, talk_file)).test_rows.inputs)
    most = 256 - sizes[3]
    task = build_task(config(chat_model, talk_file, generate_rows=8, generate_tokens=most))
    left = sum(size > sizes[3] for size in sizes)
    assert left and f"leaves no room for {left} of {len(sizes)} questions" in task.data.notes[-1]


def test_packing_is_refused_where_conversations_would_see_each_other(talk_file, tmp_path):
    from transformers import MambaConfig

    folder = make_model(
        tmp_path / "mamba",
        config=lambda **words: MambaConfig(
            hidden_size=16, state_size=4, num_hidden_layers=1, **words
        ),
    )
    task = build_task(config(folder, talk_file, packing=True))
    with pytest.raises(ConfigError, match="cannot be packed: leave packing out"):
        task.initial_state()
    assert build_task(config(folder, talk_file)).initial_state()


def test_the_system_prompt_is_what_the_model_reads(chat_model, talk_file):
    plain, own, none = (
        build_task(config(chat_model, talk_file, system_prompt=text)).train_rows.inputs[0]
        for text in ("", "Count the apples.", " ")
    )
    text = open_tokenizer(str(chat_model)).decode
    assert "system\nHelp.<" in text(plain.ids) and "system\nCount the apples.<" in text(own.ids)
    assert "system\n<|im_end|>" in text(none.ids)
    assert own.answer_mask.sum() == plain.answer_mask.sum() == none.answer_mask.sum()
