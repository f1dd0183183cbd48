"""Update files, statistics, merges and remembered fingerprints of the first layout."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from exact_app import Unmoved

from dare_agg.checkpoint import fingerprints

DATA = Path(__file__).resolve().parents[1] / "data" / "made-by-0.1"
UPDATES = json.loads((DATA / "updates" / "expected.json").read_text())
MERGES = json.loads((DATA / "merges" / "expected.json").read_text())
Old, Call = Callable[[str], Path], Callable[..., str]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_format_and_mask_is_here() -> None:
    formats = {"f32", "f16", "bf16", "i8", "b4", "b2", "b1"}
    assert set(UPDATES) == {f"{f}-{m}.dare" for f in formats for m in ("stratified", "bernoulli")}


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_restores_the_same_model(
    name: str, old: Old, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(old("updates"))
    call("apply", "base.safetensors", name, "-o", "restored.safetensors")
    assert sha256(Path("restored.safetensors")) == UPDATES[name]["restored"]
    found, known = json.loads(call("inspect", name, "--json")), UPDATES[name]["inspected"]
    assert found.pop("delta_quantiles") == pytest.approx(known["delta_quantiles"])
    for key, value in found.items():
        assert value == (pytest.approx(known[key]) if isinstance(value, float) else known[key]), key


@pytest.mark.parametrize("name", UPDATES)
def test_the_same_models_give_the_same_update(
    name: str, old: Old, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(old("updates"))
    call("diff", "base.safetensors", "tuned.safetensors", "-o", "again.dare",
         *UPDATES[name]["words"])  # fmt: skip
    assert Path("again.dare").read_bytes() == Path(name).read_bytes()


@pytest.mark.parametrize("name", MERGES)
def test_a_card_s_recipe_gives_the_same_model(
    name: str, old: Old, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (old("merges") / f"{name}.md").read_text(encoding="utf-8")
    monkeypatch.chdir(old("updates"))
    recipe = re.search(r"```yaml\n(.*)```", card, re.DOTALL)
    assert recipe is not None
    Path("recipe.yaml").write_text(recipe[1], encoding="utf-8")
    call("merge", "--recipe", "recipe.yaml", "-o", "merged")
    assert sha256(Path("merged/model.safetensors")) == MERGES[name]

    def told(text: str) -> list[str]:
        """What a card tells of layout and models: contents, weights, fingerprint."""
        return [line for line in text.splitlines() if line.startswith(("| ", "Layout "))]

    assert told(Path("merged/README.md").read_text(encoding="utf-8")) == told(card)


def test_a_remembered_fingerprint_is_found(old: Old, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARE_AGG_CACHE", str(old("cache")))
    assert fingerprints.recall([Unmoved()], "cd" * 32) == "ef" * 32  # type: ignore[list-item]
    assert fingerprints.recall([Unmoved()], "ab" * 32) is None  # type: ignore[list-item]
