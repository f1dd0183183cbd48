"""Merges from updates that carry directions: what a row counts, and its table."""

from __future__ import annotations

import numpy as np
import pytest

from dare_agg.errors import ConfigError
from dare_agg.merge.directions import directions_of
from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.linears import model_linears
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.sources import array_source
from simulations.pages.gram import gram_table
from simulations.runs import gram, merging
from simulations.runs import gram_pictures as pictures
from simulations.runs.small_classifier import Rows

LAYOUT = layout_of({"a.weight": (60, 50), "b.bias": (60,), "emb.weight": (200, 50)})


def deltas(count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    found = []
    for _ in range(count):
        delta = 1e-4 * rng.standard_normal(LAYOUT.size)
        entry = LAYOUT["a.weight"]
        low = rng.standard_normal((60, 3)) @ rng.standard_normal((3, 50)) * 1e-3
        delta[entry.offset : entry.stop] += low.reshape(-1)
        found.append(delta.astype(np.float32))
    return found


def test_survivors_and_directions_are_counted_as_they_are_coded() -> None:
    whole = array_source(deltas()[0])
    linears = model_linears(LAYOUT)
    found = {name: (rows, axis) for name, rows, axis in directions_of(whole, linears, 8)}
    update = gram._update(whole, LAYOUT, "0.9", "b1", 3, "R8")
    assert update.nbytes == 120 + update.payload.size
    sizes = {}
    for rank, bits in ((2, 2), (4, 2), (4, 4)):
        read, nbytes = gram._carried(found, LAYOUT, rank, bits, update)
        assert read["a.weight"].shape == (rank, 50)
        sizes[rank, bits] = nbytes
        # Two bytes a direction, its elements, a few scales and the checksum.
        assert nbytes >= 2 * rank + rank * 50 * bits / 8 + 16
    assert sizes[2, 2] < sizes[4, 2] < sizes[4, 4] < sizes[4, 2] + 60


def test_rates_by_tensor_take_no_more_bytes_and_keep_what_changed() -> None:
    whole = array_source(deltas()[0])
    updates = [
        gram._update(whole, LAYOUT, rate, "b1", 3, "R8") for rate in ("0.8", "0.8" + gram.BY_TENSOR)
    ]
    assert updates[1].nbytes <= updates[0].nbytes
    entry = LAYOUT["a.weight"]
    kept = [int(u.present(entry.offset, entry.stop).sum()) for u in updates]
    assert kept[1] > 2 * kept[0]


def test_methods_by_own_gram_matrices_take_those_of_the_deltas_before_the_drop() -> None:
    whole = deltas()
    dropped = [merging.dropped(d, "0.5", 1, str(i)) for i, d in enumerate(whole)]
    start = np.zeros(LAYOUT.size, np.float32)

    def merged(options: dict, wholes: list) -> np.ndarray:
        spec = {"method": "wudi", "options": options}
        return merging.merged(spec, LAYOUT, start, dropped, [{}] * 3, 0, wholes)

    sources = [array_source(d) for d in dropped]
    own, _ = merge_deltas(LAYOUT, sources, "wudi")
    by_whole, _ = merge_deltas(LAYOUT, sources, "wudi", statistics=[array_source(d) for d in whole])
    np.testing.assert_array_equal(merged({}, whole), by_whole)
    np.testing.assert_array_equal(merged({"gram": "dropped"}, whole), own)
    assert not np.array_equal(own, by_whole)


def test_the_table_pairs_each_way_with_the_average_of_the_same_updates() -> None:
    def point(rank: object, bits: int, size: float | None, accuracy: float) -> dict:
        return {
            "drop_rate": "0.99", "rank": rank, "bits": bits, "bits_per_parameter": size,
            "accuracy": accuracy, "accuracies": {"R8": accuracy},
        }  # fmt: skip

    rows = [
        {
            "seed": seed,
            "points": [
                point(0, 0, 0.01, 0.7 + seed / 100),
                point(8, 2, 0.04, 0.8 + seed / 100),
                point("whole", 0, None, 0.82),
                # Of one seed alone: left out.
                *([point(4, 4, 0.03, 0.5)] if seed else []),
            ],
        }
        for seed in (0, 1)
    ]
    lines = gram_table(rows).splitlines()[2:]
    assert len(lines) == 3
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:4] == [".99", "average", "0.0100", "3,200×"]
    assert cells[1][1:4] == ["wudi, 8 directions of 2 bits", "0.0400", "800×"]
    assert cells[1][5].startswith("+10.0 ± 0.0")
    assert cells[2][1].endswith("whole deltas") and cells[2][2] == "–"
    for row in rows:
        for one in row["points"]:
            one["drop_rate"] += gram.BY_TENSOR
    assert gram_table(rows).splitlines()[2].startswith("| .99, rates by tensor | average |")


@pytest.mark.parametrize("rate", ["0.9", "0.99"])
def test_the_average_of_the_updates_is_that_of_the_library(rate: str) -> None:
    updates = [
        gram._update(array_source(d), LAYOUT, rate, "b1", 0, str(i)) for i, d in enumerate(deltas())
    ]
    found, _ = merge_deltas(LAYOUT, updates, "average", measure=False)
    dense = np.zeros(LAYOUT.size, np.float32)
    for update in updates:
        row = np.empty(LAYOUT.size, np.float32)
        update.read(0, row.size, row)
        dense += row / np.float32(3)
    np.testing.assert_allclose(found, dense, rtol=1e-5, atol=1e-9)


def test_networks_of_pictures_learn_merge_and_count_their_bytes() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 400)
    inputs = rng.normal(size=(400, 784)).astype(np.float32) * 0.3
    inputs[np.arange(400), 70 * labels] += 6
    rows = Rows(inputs, labels)
    base = pictures.new_network(16, 1)
    tuned = pictures.train(base, rows, 200, [1])
    assert pictures.accuracy(base, rows) < 0.4 and pictures.accuracy(tuned, rows) > 0.9
    assert pictures.accuracy(tuned, pictures.seen(rows, "upside down")) < 0.5
    twice = pictures.seen(pictures.seen(rows, "mirrored"), "mirrored")
    assert np.array_equal(twice.inputs, rows.inputs)
    with pytest.raises(ConfigError, match="did you mean 'mirrored'"):
        pictures.seen(rows, "mirored")


def test_a_network_trains_by_the_gradient_of_its_loss() -> None:
    rng = np.random.default_rng(1)
    inputs = np.repeat(rng.normal(size=(1, 784)).astype(np.float32), pictures.BATCH, 0)
    rows = Rows(inputs, np.full(pictures.BATCH, 3))
    base = pictures.new_network(12, 2)
    tuned = pictures.train(base, rows, 1, [0])

    def loss(arrays: dict[str, np.ndarray]) -> float:
        fed = inputs[:1].astype(np.float64)
        for name in ("first", "second"):
            fed = np.maximum(fed @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"], 0)
        scores = fed @ arrays["head.weight"].T + arrays["head.bias"]
        return float(np.log(np.exp(scores).sum()) - scores[0, 3])

    exact = {name: array.astype(np.float64) for name, array in base.items()}
    for name, array in exact.items():
        step = (tuned[name] - base[name]).astype(np.float64)
        place = np.unravel_index(np.abs(step).argmax(), step.shape)
        moved = {**exact, name: array.copy()}
        moved[name][place] += 1e-5
        slope = (loss(moved) - loss(exact)) / 1e-5
        assert step[place] == pytest.approx(-pictures.RATE * slope, rel=2e-3)
