"""`dare-agg run` of instruction data, from its command to its tables, through Flower."""

import json
import subprocess
import sys

import pytest

from tests.chat import make_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(folder, *words):
    command = [sys.executable, "-m", "dare_agg.cli.main", "run", "--clients", "4"]
    return subprocess.run(
        [*command, "-o", str(folder), *words], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tiny chat model and two abilities, as words of a command line."""
    folder = tmp_path_factory.mktemp("abilities")
    model = make_model(folder / "model")
    for name, answer in (("sums", "{}"), ("left", "{} left")):
        rows = [{"prompt": f"apples {n}", "answer": answer.format(n % 5)} for n in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = f"{folder / 'sums.jsonl'},{folder / 'left.jsonl'}"
    return (
        "-c", f'model="{model}"', "-c", f'data="{data}"', "-c", "length=64", "-c", "steps=10",
        "-c", "learning-rate=1e-2", "-c", "num-rounds=2", "-c", 'drop-rate="0.5"',
        "-c", "generate-rows=4", "-c", "generate-tokens=6", "-c", 'partition="iid"',
    )  # fmt: skip


def test_a_run_tells_perplexity_exact_match_and_what_each_client_measured(words, tmp_path):
    done = run(tmp_path / "run", *words, "-c", "packing=true", "-c", "held-out=0.2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "perplexity" in done.stdout and "exact match" in done.stdout
    assert "by client and task" in done.stdout and "all clients" in done.stdout
    # Lengths are told before the first round.
    assert done.stderr.index("tokens median") < done.stderr.index("round 1 of 2")
    rows = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["loss"] < rows[0]["loss"]
    told = [(one["client"], one["task"], one["rows"]) for one in rows[1]["by_task"]]
    assert told == [("0", "sums", 6), ("1", "left", 6), ("2", "sums", 6), ("3", "left", 6)]


def test_what_no_client_can_read_is_refused_in_one_line(words, tmp_path):
    done = run(tmp_path / "run", *words, "-c", "length=4")
    assert done.returncode == 1
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
    assert "are masked entirely" in line and "the question alone fills length 4" in line
    assert "set length = " in line
