"""One merge of the parties' own models in a secure sum, over Flower's messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context
from flwr.clientapp import ClientApp
from safetensors.numpy import load_file, save_file
from toy import roster_of

from dare_agg.errors import ProtocolError
from dare_agg.flower.secure.merge import secure_merge
from dare_agg.flower.secure.mod import secure_mod, secure_queries
from dare_agg.secure.settings import SecureSettings


def models(tmp_path: Path, n: int) -> tuple[Path, list[dict], dict]:
    """A public base, and n tuned models with heads of their own under a prefix."""
    rng = np.random.default_rng(0)
    base = {
        "body.w": rng.normal(size=(30, 20)).astype(np.float32),
        "body.b": rng.normal(size=20).astype(np.float32),
        "steps": np.arange(3),
    }
    save_file(base, tmp_path / "base.safetensors")
    tuned = []
    for i in range(n):
        own = {
            f"model.{name}": array + rng.normal(0, 0.01, array.shape).astype(np.float32)
            if array.dtype == np.float32 else array
            for name, array in base.items()
        }  # fmt: skip
        own["classifier.w"] = np.full((i + 2, 3), i, np.float32)
        save_file(own, tmp_path / f"tuned{i}.safetensors")
        tuned.append(own)
    return tmp_path / "base.safetensors", tuned, base


@pytest.mark.parametrize(("method", "drop_rate"), [("ties", "0"), ("task-arithmetic", "0.5")])
def test_one_shot_merge_of_own_models(
    memory_grid: Any, keys: Any, tmp_path: Path, method: str, drop_rate: str
) -> None:
    folder = keys(4)
    base_path, tuned, base = models(tmp_path, 4)

    def node(partition: int) -> dict:
        return {
            "partition-id": partition,
            "model-path": str(tmp_path / f"tuned{partition}.safetensors"),
            "merged-path": str(tmp_path / f"merged{partition}.safetensors"),
        }

    app = ClientApp(mods=[secure_mod])
    secure_queries(app, find_base=lambda word: {"public": str(base_path)}[word])
    grid = memory_grid(app, 4, node_config=node)
    result = secure_merge(
        grid,
        base_path,
        roster_of(folder),
        SecureSettings(method, drop_rate=drop_rate, scaling=0.5, clip=0.1),
        run="merge",
        model="public",
        out=tmp_path / "merged.safetensors",
        stage_seconds=10,
    )
    merged = load_file(tmp_path / "merged.safetensors")
    deltas = np.array([t["model.body.w"] - base["body.w"] for t in tuned])
    step = merged["body.w"] - base["body.w"]
    if method == "ties":
        agree = np.sign(deltas) == np.sign(deltas.sum(0))
        plain = 0.5 * (deltas * agree).sum(0) / agree.sum(0)
        assert np.abs(step - plain).max() < 2e-4
    else:
        touched = step != 0
        assert 0.35 < touched.mean() < 0.65
        assert np.abs(step - deltas.sum(0))[touched].max() < 2e-4  # ×0.5 ×2
    for i, own in enumerate(tuned):
        mine = load_file(tmp_path / f"merged{i}.safetensors")
        assert np.array_equal(mine["classifier.w"], own["classifier.w"])
        assert np.array_equal(mine["model.body.w"], merged["body.w"])
    assert result.measurements["result_at"] == result.measurements["parties"]
    assert result.measurements["rejected"] == []
    # The same models in a second sum: every party refuses.
    for i in range(4):
        (tmp_path / f"merged{i}.safetensors").unlink()
    with pytest.raises(ProtocolError, match="stage 'vectors'"):
        secure_merge(
            grid,
            base_path,
            roster_of(folder),
            SecureSettings(method, drop_rate=drop_rate, clip=0.1),
            run="merge",
            model="public",
            stage_seconds=10,
        )


def test_bases_and_models_that_do_not_fit_are_named(
    memory_grid: Any, keys: Any, tmp_path: Path
) -> None:
    folder = keys(4)
    base_path, _, base = models(tmp_path, 4)
    save_file({**base, "body.b": base["body.b"] + 1}, tmp_path / "other.safetensors")
    save_file({"body.w": base["body.w"]}, tmp_path / "tuned1.safetensors")

    def node(partition: int) -> dict:
        config = {"partition-id": partition, "base-path": str(base_path)}
        if partition == 0:
            config["base-path"] = str(tmp_path / "other.safetensors")
        if partition < 3:
            config["model-path"] = str(tmp_path / f"tuned{partition}.safetensors")
        return config

    app = ClientApp(mods=[secure_mod])
    secure_queries(app)
    grid = memory_grid(app, 4, node_config=node)
    with pytest.raises(ProtocolError, match="1 of the 3 parties waited for can take part"):
        secure_merge(
            grid, base_path, roster_of(folder), SecureSettings("ties"), run="x", stage_seconds=5
        )
    said = " ".join(
        str(r.content["dare.secure"].get("detail", "")) for r in grid.received if not r.has_error()
    )
    for words in ("terms refused: base", "'body.b' is missing", "no model to merge"):
        assert words in said


def test_a_wrong_file_at_one_party_does_not_use_up_the_others_models(
    memory_grid: Any, keys: Any, tmp_path: Path
) -> None:
    """Four are waited for, one has another shape: the merge ends before any data is put in, and
    works once the file is mended."""
    folder = keys(4)
    base_path, tuned, _ = models(tmp_path, 4)
    good = tmp_path / "tuned2.safetensors"
    kept = good.read_bytes()
    save_file({**tuned[2], "model.body.w": tuned[2]["model.body.w"][:7].copy()}, good)
    app = ClientApp(mods=[secure_mod])
    secure_queries(app)
    grid = memory_grid(
        app,
        4,
        node_config=lambda p: {
            "partition-id": p,
            "base-path": str(base_path),
            "model-path": str(tmp_path / f"tuned{p}.safetensors"),
        },
    )

    def merge() -> Any:
        settings = SecureSettings("ties", drop_rate="0", clip=0.1)
        return secure_merge(
            grid, base_path, roster_of(folder), settings, run="x", parties=4, stage_seconds=10
        )

    with pytest.raises(ProtocolError, match=r"3 of the 4 parties .* site 2: .*\(7, 20\)") as error:
        merge()
    assert error.value.reason == "parties"
    assert not list(folder.glob("*.ledger"))
    good.write_bytes(kept)
    result = merge()
    assert len(result.measurements["parties"]) == 4
    # The result went down too: four bytes a survivor, on top of the protocol's requests.
    assert all(n > 4 * 620 + 1000 for n in result.measurements["download_bytes"])


def test_context_state_of_a_merge_stays_empty(memory_grid: Any, keys: Any, tmp_path: Path) -> None:
    folder = keys(3)
    base_path, _, _ = models(tmp_path, 3)
    app = ClientApp(mods=[secure_mod])
    secure_queries(app)
    grid = memory_grid(
        app,
        3,
        node_config=lambda p: {
            "partition-id": p,
            "base-path": str(base_path),
            "model-path": str(tmp_path / f"tuned{p}.safetensors"),
        },
    )
    secure_merge(grid, base_path, roster_of(folder), SecureSettings("mean"), run="x")
    assert all(not context.state for context in grid.contexts.values())
    assert not list((tmp_path / "dare-agg").rglob("*.state"))
    assert isinstance(next(iter(grid.contexts.values())), Context)
