"""Masks that an app sends along stay what they are, and what is frozen is warned of."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from dare_agg.downlink.ways import make_downlink
from dare_agg.flower import DareStrategy, dare, dare_mod
from dare_agg.flower.turns import warn_of_unmoved
from simulations.runs.memory_grid import MemoryGrid

PLACES = 16


class Attention(nn.Module):
    """One head with its mask as a buffer, as nanoGPT has it, or added to the scores."""

    def __init__(self, added: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv = nn.Embedding(30, 24), nn.Linear(24, 72)
        self.out, self.added = nn.Linear(24, 30), added
        mask = torch.ones(PLACES, PLACES).tril()[None, None]
        self.register_buffer("bias", mask.log()[0, 0] if added else mask)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.embed(words)).split(24, -1)
        scores, mask = q @ k.mT / 24**0.5, self.bias.reshape(PLACES, PLACES)
        scores = scores + mask if self.added else scores.masked_fill(mask == 0, float("-inf"))
        return self.out(scores.softmax(-1) @ v)


def app_of(added: bool, frozen: bool = False) -> ClientApp:
    app = ClientApp(mods=[dare_mod])

    @app.train()
    def train(msg, context):
        model = Attention(added)
        model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
        model.embed.requires_grad_(not frozen)
        words = torch.randint(30, (8, PLACES), generator=torch.Generator().manual_seed(1))
        used = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(used, lr=0.1)
        for _ in range(3):
            loss = nn.functional.cross_entropy(model(words).flatten(0, 1), words.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": 8})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=msg)

    return app


WAYS = {
    "auto": lambda: DareStrategy(seed=1, fraction_evaluate=0.0),
    "dropped": lambda: DareStrategy(seed=1, drop_rate=0.5, fraction_evaluate=0.0),
    "versions": lambda: DareStrategy(
        seed=1, drop_rate=0.5, downlink=make_downlink("auto"), fraction_evaluate=0.0
    ),
    "around FedAvg": lambda: dare(FedAvg(fraction_evaluate=0.0)),
}


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_causal_model_stays_causal(way: str, added: bool) -> None:
    first = Attention(added).state_dict()
    grid = MemoryGrid(app_of(added), 3)
    result = WAYS[way]().start(grid, ArrayRecord(first), num_rounds=2, timeout=60)
    found = result.arrays.to_torch_state_dict()
    assert torch.equal(found["bias"], first["bias"])
    assert not torch.equal(found["qkv.weight"], first["qkv.weight"])
    # What comes later changes nothing before it.
    model = Attention(added)
    model.load_state_dict(found)
    words = torch.arange(PLACES)[None]
    other = torch.cat([words[:, :-1], words[:, -1:] + 5], 1)
    assert torch.equal(model(words)[:, :-1], model(other)[:, :-1])


def test_what_is_frozen_is_warned_of_and_the_remedy_keeps_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = ArrayRecord({n: Array(v.numpy()) for n, v in Attention(False).state_dict().items()})
    before = first["embed.weight"].numpy()

    def after(**words) -> np.ndarray:
        warn_of_unmoved.cache_clear()
        caplog.clear()
        strategy = DareStrategy(seed=1, fraction_evaluate=0.0, **words)
        grid = MemoryGrid(app_of(False, frozen=True), 3)
        return strategy.start(grid, first, num_rounds=1, timeout=60).arrays["embed.weight"].numpy()

    with caplog.at_level(logging.WARNING, logger="flwr"):
        assert not np.array_equal(after(), before)
        said = [r.getMessage() for r in caplog.records if "training left" in r.getMessage()]
        assert len(said) == 1 and said[0].startswith("training left 1 of 5 tensors as they were ('")
        assert "'embed.weight'" in said[0] and "'exclude'" in said[0]
        assert np.array_equal(after(exclude=["^embed"]), before)
        assert not any("training left" in r.getMessage() for r in caplog.records)
        # Formats that are not rotated leave it alone.
        assert np.array_equal(after(drop_rate=0.5, values="f16"), before)
        assert not any("training left" in r.getMessage() for r in caplog.records)
