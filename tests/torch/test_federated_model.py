"""An app that holds a model: the same bits as one of arrays, with any loop around it."""

from __future__ import annotations

import logging

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flwr.app import ArrayRecord, MetricRecord, RecordDict  # noqa: E402
from flwr.app import Message as FlowerMessage  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402

from dare_agg.downlink.ways import make_downlink  # noqa: E402
from dare_agg.errors import RunError  # noqa: E402
from dare_agg.flower import DareStrategy, dare_mod  # noqa: E402
from dare_agg.torch import federated_model  # noqa: E402
from dare_agg.torch.named import named_tensors  # noqa: E402

CLIENTS = 2


def a_model(**config):
    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **config}))


def tokens_of(context):
    generator = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    return torch.randint(64, (8, 12), generator=generator)


def plain_loop(model, tokens, output_dir=None):
    """A few steps of AdamW."""
    del output_dir
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for rows in tokens.split(4):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def hf_trainer(model, tokens, output_dir):
    """The same by transformers' Trainer."""
    words = transformers.TrainingArguments(
        output_dir=str(output_dir), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3,
        lr_scheduler_type="constant", report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, seed=1, max_grad_norm=0.0,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    transformers.Trainer(model, words, train_dataset=rows).train()


def by_accelerate(model, tokens, output_dir=None):
    """A loop over a model that accelerate and torch.compile wrapped, as TRL's trainers do."""
    del output_dir
    from accelerate import Accelerator

    prepared, optimizer = Accelerator(cpu=True).prepare(
        torch.nn.DataParallel(model), torch.optim.AdamW(model.parameters(), lr=1e-3)
    )
    for rows in tokens.split(4):
        prepared(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def app_of_models(make, loop, tmp_path, after=None, mods=(dare_mod,)):
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(msg, context):
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(7)  # what a client has of its own beforehand does not count
        with federated_model(model, msg, context) as turn:
            loop(model, tokens_of(context), tmp_path)
        if after is not None:
            after(model, context)
        return turn.reply(num_examples=8, metrics={"loss": 0.5})

    @app.evaluate()
    def evaluate(msg, context):
        model = make()
        with federated_model(model, msg, context) as turn, torch.inference_mode():
            total = sum(float(p.double().sum()) for p in model.parameters())
        return turn.reply(num_examples=8, metrics={"total": total})

    return app


def app_of_arrays(make, loop, tmp_path):
    app = ClientApp(mods=[dare_mod])

    @app.train()
    def train(msg, context):
        model = make()
        tensors = named_tensors(model)
        with torch.no_grad():
            for name, array in msg.content["arrays"].items():
                tensors[name].copy_(torch.from_numpy(array.numpy()))
        loop(model, tokens_of(context), tmp_path)
        tensors, names = named_tensors(model), list(msg.content["arrays"])
        trained = {name: tensors[name].detach().numpy().copy() for name in names}
        metrics = MetricRecord({"num-examples": 8, "loss": 0.5})
        content = {"arrays": ArrayRecord(numpy_record(trained)), "metrics": metrics}
        return FlowerMessage(RecordDict(content), reply_to=msg)

    return app


def numpy_record(arrays):
    from flwr.app import Array

    return {name: Array(array) for name, array in arrays.items()}


def record_of(model):
    return ArrayRecord(
        numpy_record({n: t.detach().numpy().copy() for n, t in named_tensors(model).items()})
    )


def play(memory_grid, app, make, rounds=2, strategy=None, **words):
    strategy = strategy or DareStrategy(seed=3, drop_rate=0.5, fraction_evaluate=0.0, **words)
    result = strategy.start(memory_grid(app, CLIENTS), record_of(make()), num_rounds=rounds)
    return {name: array.numpy() for name, array in result.arrays.items()}, result


def adapter():
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(a_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def partly_frozen():
    model = a_model()
    model.model.embed_tokens.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "loop", "downlink"),
    [
        (a_model, plain_loop, "auto"),
        (a_model, hf_trainer, "full"),
        (a_model, by_accelerate, "full"),
        (adapter, plain_loop, "auto"),
        (partly_frozen, plain_loop, "full"),
    ],
)
def test_a_run_of_models_ends_at_the_bits_of_one_of_arrays(
    memory_grid, tmp_path, make, loop, downlink
):
    ours, result = play(
        memory_grid, app_of_models(make, loop, tmp_path), make, downlink=make_downlink(downlink)
    )
    theirs, _ = play(
        memory_grid, app_of_arrays(make, loop, tmp_path), make, downlink=make_downlink(downlink)
    )
    begun = record_of(make())
    assert ours.keys() == theirs.keys()
    assert any(not np.array_equal(ours[name], begun[name].numpy()) for name in ours)
    for name in ours:
        assert np.array_equal(ours[name], theirs[name]), name
    assert result.train_metrics_clientapp[2]["loss"] == 0.5


def test_a_bfloat16_model_is_federated_by_what_training_changed(memory_grid, tmp_path):
    def make():
        return a_model().bfloat16()

    idle, _ = play(memory_grid, app_of_models(make, lambda *_: None, tmp_path), a_model)
    begun = record_of(a_model())
    for name, array in idle.items():  # rounding to bfloat16 is no change
        assert np.array_equal(array, begun[name].numpy())
    moved, _ = play(memory_grid, app_of_models(make, plain_loop, tmp_path), a_model)
    assert any(not np.array_equal(moved[name], begun[name].numpy()) for name in moved)


def test_an_evaluation_sees_the_version_and_sends_metrics_alone(memory_grid, tmp_path):
    strategy = DareStrategy(seed=3, drop_rate=0.5)
    app = app_of_models(a_model, plain_loop, tmp_path)
    arrays, result = play(memory_grid, app, a_model, 1, strategy)
    total = sum(
        float(array.astype(np.float64).sum())
        for name, array in arrays.items()
        if name != "lm_head.weight"
    )
    assert result.evaluate_metrics_clientapp[1]["total"] == pytest.approx(total)


def test_a_head_of_its_own_stays_with_each_client(memory_grid, tmp_path):
    kept = {}

    def after(model, context):
        kept[context.node_config["partition-id"]] = model.lm_head.weight.detach().clone()

    def make():
        return a_model(tie_word_embeddings=False)

    seen = []

    def loop(model, tokens, output_dir):
        seen.append(model.lm_head.weight.detach().clone())
        plain_loop(model, tokens)

    app = app_of_models(make, loop, tmp_path, after)
    arrays, _ = play(memory_grid, app, make, 2, exclude=["lm_head"])
    begun = make().lm_head.weight.detach()
    assert np.array_equal(arrays["lm_head.weight"], begun.numpy())
    assert all(torch.equal(head, begun) for head in seen[:CLIENTS])
    assert not any(torch.equal(head, begun) for head in seen[CLIENTS:])


def test_the_same_app_works_under_fedavg(memory_grid, tmp_path):
    app = app_of_models(a_model, plain_loop, tmp_path)
    ours, _ = play(memory_grid, app, a_model, strategy=FedAvg())
    theirs, _ = play(
        memory_grid, app_of_arrays(a_model, plain_loop, tmp_path), a_model,
        strategy=FedAvg(fraction_evaluate=0.0),
    )  # fmt: skip
    for name in ours:
        assert np.array_equal(ours[name], theirs[name])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m: m.model.norm.weight.data.fill_(float("nan")), "nan in tensor"),
        (
            lambda m: setattr(m.model.layers[0], "more", torch.nn.Linear(2, 2)),
            "the global model does not have",
        ),
    ],
)
def test_what_cannot_be_sent_is_refused_in_words(memory_grid, tmp_path, caplog, spoil, said):
    app = app_of_models(a_model, plain_loop, tmp_path, lambda model, _: spoil(model))
    with caplog.at_level(logging.INFO), pytest.raises(RunError, match=said):
        play(memory_grid, app, a_model)


def test_copies_that_came_apart_become_two_tensors(memory_grid, tmp_path):
    def untied():
        model = a_model(tie_word_embeddings=False)
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
        return model

    app = app_of_models(untied, plain_loop, tmp_path)
    arrays, _ = play(memory_grid, app, untied, 3)
    assert not np.array_equal(arrays["lm_head.weight"], arrays["model.embed_tokens.weight"])


def test_another_model_is_refused_before_it_trains(memory_grid, tmp_path):
    app = app_of_models(lambda: a_model(hidden_size=64), plain_loop, tmp_path)
    with pytest.raises(RunError, match="the global model's has"):
        play(memory_grid, app, a_model)


def test_without_the_mod_the_error_says_what_to_write(memory_grid, tmp_path):
    app = app_of_models(a_model, plain_loop, tmp_path, mods=())
    with pytest.raises(Exception, match=r"ClientApp\(mods=\[dare_mod\]\)"):
        play(memory_grid, app, a_model)


# --- a base on disk -------------------------------------------------------------------------


def on_disk(memory_grid, app, folder, state, rounds=2):
    """Play a run whose base is a folder; returns the arrays of the newest version."""
    strategy = DareStrategy(
        seed=3, drop_rate=0.5, fraction_evaluate=0.0, base=folder, state=state, verify_every=1
    )
    node_config = lambda number: {"partition-id": number, "base": str(folder)}  # noqa: E731
    grid = memory_grid(app, CLIENTS, node_config=node_config)
    result = strategy.start(grid, num_rounds=rounds)
    strategy.save_model(state / "saved")
    return {name: array.numpy() for name, array in result.arrays.items()}


def test_over_a_base_on_disk_models_and_arrays_end_at_the_same_bits(memory_grid, tmp_path):
    folder, make = tmp_path / "base", a_model
    begun = make()
    begun.save_pretrained(folder)
    ours = on_disk(
        memory_grid, app_of_models(make, plain_loop, tmp_path), folder, tmp_path / "ours"
    )
    theirs = on_disk(
        memory_grid, app_of_arrays(make, plain_loop, tmp_path), folder, tmp_path / "theirs"
    )
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    tensors = named_tensors(begun)
    assert any(not np.array_equal(ours[n], tensors[n].detach().numpy()) for n in ours)


def test_a_bfloat16_base_is_trained_in_bfloat16(memory_grid, tmp_path):
    folder = tmp_path / "base"
    a_model().bfloat16().save_pretrained(folder)
    app = app_of_models(lambda: a_model().bfloat16(), plain_loop, tmp_path)
    begun = named_tensors(a_model().bfloat16())
    moved = on_disk(memory_grid, app, folder, tmp_path / "state")
    assert any(not np.array_equal(moved[n], begun[n].detach().float().numpy()) for n in moved)
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "state" / "saved")
    assert saved.lm_head.weight is saved.model.embed_tokens.weight


# --- Flower's own simulation ----------------------------------------------------------------


@pytest.mark.slow
def test_flowers_simulation_runs_the_same_round(memory_grid, tmp_path):
    pytest.importorskip("ray")
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    found = tmp_path / "found.npz"
    server = ServerApp()

    @server.main()
    def main(grid, context):
        strategy = DareStrategy(seed=3, drop_rate=0.5, fraction_evaluate=0.0)
        result = strategy.start(grid, record_of(a_model()), num_rounds=2)
        np.savez(found, **{name: array.numpy() for name, array in result.arrays.items()})

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    app = app_of_models(a_model, hf_trainer, tmp_path)
    run_simulation(server, app, num_supernodes=CLIENTS, backend_config=resources)
    here, _ = play(memory_grid, app_of_models(a_model, hf_trainer, tmp_path), a_model)
    there = np.load(found)
    for name, array in here.items():
        assert np.array_equal(array, there[name]), name
