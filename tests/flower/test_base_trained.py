"""A transformers model fine-tuned from a base on disk, by an app of arrays."""

from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from dare_agg.flower import DareStrategy, dare_mod, offer_base, reception
from tests.tiny import llama

torch = pytest.importorskip("torch")


def app(base: Path) -> ClientApp:
    """An ordinary app: loads what it is sent, trains with AdamW, returns its state_dict."""
    from transformers import AutoModelForCausalLM

    made = ClientApp(mods=[dare_mod])

    def loaded(msg: Message) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(base)
        left = model.load_state_dict(msg.content["arrays"].to_torch_state_dict(), strict=False)
        assert left.missing_keys in ([], ["lm_head.weight"]) and not left.unexpected_keys
        model.tie_weights()
        return model

    def batch(context, number: int) -> torch.Tensor:
        torch.manual_seed(100 * number + int(context.node_config["partition-id"]))
        return torch.randint(8, (4, 16)).repeat(1, 2)

    @made.train()
    def train(msg: Message, context) -> Message:
        model = loaded(msg)
        tokens = batch(context, int(msg.content["config"]["server-round"]))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(4):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": 4, "loss": float(loss.detach())}),
        }
        return Message(RecordDict(content), reply_to=msg)

    @made.evaluate()
    def evaluate(msg: Message, context) -> Message:
        model, tokens = loaded(msg), batch(context, 0)
        with torch.no_grad():
            loss = float(model(input_ids=tokens, labels=tokens).loss)
            total = sum(float(p.double().sum()) for p in model.parameters())
        metrics = MetricRecord({"num-examples": 4, "loss": loss, "total": total})
        return Message(RecordDict({"metrics": metrics}), reply_to=msg)

    return made


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_what_clients_hold_and_has_learnt(
    memory_grid, tmp_path, monkeypatch, tied
):
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reception, "_OFFERS", [])
    base = llama(tmp_path / "base", tie_word_embeddings=tied)
    offer_base(lambda message, context: base)
    seen = []
    strategy = DareStrategy(
        base=base,
        state=tmp_path / "state",
        drop_rate="0.5",
        seed=1,
        verify_every=1,
        round_hook=lambda outcome: seen.append(outcome) and None,
    )
    strategy.start(memory_grid(app(base), 2), num_rounds=3)
    assert [outcome.measurements["rejected"] for outcome in seen] == [[], [], []]
    losses = [outcome.client_metrics["loss"] for outcome in seen]
    assert losses[-1] < losses[0] < np.log(64) + 0.1
    saved = AutoModelForCausalLM.from_pretrained(strategy.save_model(tmp_path / "out"))
    total = sum(float(p.double().sum()) for p in saved.parameters())
    assert total == pytest.approx(seen[-1].client_metrics["total"], rel=1e-12)
    held = strategy.broadcasting.arrays
    for name, tensor in saved.state_dict().items():
        if name in held:
            assert np.array_equal(tensor.numpy(), held[name].numpy())
