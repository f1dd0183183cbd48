"""The run config has parties remember, or leave out, what makes one of them alone in the sum."""

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

import client.app
from client.config import DEFAULTS
from client.kept_optimizer import KeptOptimizer
from client.own import own_words
from dare_agg.errors import ConfigError
from server.reading import read_config

torch = pytest.importorskip("torch")
NODE = {"secure-identity": "north.key", "data-path": "/own/notes.csv", "base-path": "/own/base"}
SECURE = {"secure": "mean", "secure-roster": "roster.json"}


def moved(folder, number, gradient):
    """How far a round of AdamW with kept moments moves parameters."""
    weights = torch.nn.Parameter(torch.zeros(64))
    optimizer = torch.optim.AdamW([weights], lr=1e-3, weight_decay=0.0)
    kept, named = KeptOptimizer(folder, "north", ("run", "0", "secure"), number), {"w": weights}
    kept.load(optimizer, named)
    for _ in range(20):
        weights.grad = torch.full((64,), float(gradient))
        optimizer.step()
    kept.save(optimizer, named)
    return float(weights.detach().norm())


def test_moments_that_no_sum_left_have_a_party_stand_still(tmp_path):
    """Why it is refused: a wild base and six calm ones, trained for no sum, then the sum."""
    others, victim = tmp_path / "others", tmp_path / "victim"
    for number, gradient in enumerate((1e6, *[1] * 6), 1):
        moved(others, number, gradient)
    assert moved(others, 8, 1) < 1e-4 * moved(victim, 8, 1)


@pytest.mark.parametrize(
    ("run", "node"),
    [
        ({"keep-optimizer": True}, {}), ({}, {"keep-optimizer": True}),
        ({"lora-ranks": "1,8"}, {"partition-id": 0}), ({}, {"lora-rank": 2}),
    ],
)  # fmt: skip
def test_a_guarded_node_neither_remembers_nor_learns_less(monkeypatch, run, node):
    monkeypatch.setattr(client.app, "_task", lambda config: pytest.fail("it trains"))
    words = {**DEFAULTS, "train": "lora", **run}
    context = Context(
        run_id=1, node_id=7, node_config={**NODE, **node}, state=RecordDict(), run_config=words
    )
    message = Message(RecordDict({"config": ConfigRecord({})}), 7, "train")
    with pytest.raises(ConfigError, match="in secure sums"):
        client.app._own_task(message, context)
    assert own_words({**DEFAULTS, "keep-optimizer": False, "lora-ranks": ""}, NODE)


@pytest.mark.parametrize(("key", "word"), [("keep-optimizer", True), ("lora-ranks", "1,8")])
def test_an_honest_server_does_not_ask_for_it(key, word):
    with pytest.raises(ConfigError, match=f"{key} with secure"):
        read_config({**SECURE, key: word})
