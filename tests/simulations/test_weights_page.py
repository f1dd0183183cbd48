from simulations.pages.weights import weights_table


def row(cell: str, seed: int, loss: float) -> dict:
    return {"cell": cell, "seed": seed, "accuracy": 0.5, "curve": [{"loss": 9.0}, {"loss": loss}]}


def test_what_is_kept_is_a_share_of_float32s_gain_on_the_same_seed() -> None:
    found = [("untouched base", 2.0), ("float32", 1.0), ("bfloat16 to the nearest", 1.75)]
    rows = [row(cell, 0, loss) for cell, loss in found]
    rows += [row(f"SmolLM2, {cell}", 0, 2 * loss) for cell, loss in found]
    lines = weights_table(rows).splitlines()
    assert lines[3] == "| float32 | 50.0 | 1.000 | – | 1 |"
    assert lines[4] == "| bfloat16 to the nearest | 50.0 | 1.750 | 25.0 | 1 |"
    assert lines[7] == "| SmolLM2, bfloat16 to the nearest | 50.0 | 3.500 | 25.0 | 1 |"
