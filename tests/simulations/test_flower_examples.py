"""Flower's examples: the two changed lines, which runs are made, and the table of them."""

from __future__ import annotations

import json
import sys

import pytest

from simulations.flower_examples import __main__ as runner
from simulations.flower_examples.apps import APPS
from simulations.flower_examples.changes import change_two_lines
from simulations.flower_examples.one import flat
from simulations.flower_examples.table import table

SERVER = """
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import {names}

def main(grid, context):
    # FedAvg
    strategy = {made}
    strategy.start(grid)
"""
CLIENT = """
from flwr.clientapp import ClientApp
from mine import clip

app = ClientApp({mods})
"""


def changed(folder, words="", names="FedAvg", made="FedAvg(fraction_train=0.5)", mods=""):
    (folder / "server_app.py").write_text(SERVER.format(names=names, made=made))
    (folder / "client_app.py").write_text(CLIENT.format(mods=mods))
    lines = change_two_lines(folder, words)
    return sorted(line for line in lines if "import" not in line)


def test_two_lines_are_changed_and_their_imports(tmp_path):
    assert changed(tmp_path) == [
        "app = ClientApp(mods=[dare_mod])",
        "strategy = DareStrategy(fraction_train=0.5)",
    ]
    for name in ("server_app.py", "client_app.py"):
        compile((tmp_path / name).read_text(), name, "exec")
    assert "strategy import" not in (tmp_path / "server_app.py").read_text()
    assert "from dare_agg.flower import dare_mod" in (tmp_path / "client_app.py").read_text()


def test_words_mods_and_other_imports_stay_together(tmp_path):
    lines = changed(
        tmp_path, 'drop_rate=0, values="b2"', names="FedAvg, Result", mods="mods=[clip]"
    )
    assert lines == [
        "app = ClientApp(mods=[dare_mod, clip])",
        'strategy = DareStrategy(drop_rate=0, values="b2", fraction_train=0.5)',
    ]
    assert "strategy import Result" in (tmp_path / "server_app.py").read_text()


def test_a_strategy_of_the_examples_own_changes_its_base(tmp_path):
    (tmp_path / "strategy.py").write_text(
        "from flwr.serverapp.strategy import FedAvg\n\n\nclass Mine(FedAvg):\n    pass\n"
    )
    lines = changed(tmp_path, "drop_rate=0", names="Result", made="Mine(fraction_train=1)")
    assert lines == [
        "app = ClientApp(mods=[dare_mod])",
        "class Mine(DareStrategy):",
        "strategy = Mine(drop_rate=0, fraction_train=1)",
    ]


def test_nested_run_configs_are_dotted():
    config = {"train": {"seq-length": 8, "arguments": {"steps": 2}}, "num-server-rounds": 3}
    assert flat(config) == {
        "train.seq-length": 8, "train.arguments.steps": 2, "num-server-rounds": 3,
    }  # fmt: skip


SAID = 'round 2: the drop\'s noise is 91 % …; give DareStrategy drop_rate=0, values="b2"'


def row(form, seed, accuracy, name="fl-tabular", **other):
    app = APPS[name]
    return {
        "example": name, "form": form, "seed": seed, "rounds": app.rounds, "words": "",
        "clients": app.clients, "rows": list(app.rows), "accuracy": accuracy, "warnings": [],
        "parameters": 10_241, "seconds": 1, **other,
    }  # fmt: skip


def test_the_table_has_mean_and_spread_and_leaves_other_settings_out():
    rows = [row("fedavg", 0, 0.8), row("fedavg", 1, 0.9), row("fedavg", 2, 0.1, clients=3)]
    sent = {"sent": ["0 b4", "0 b2"], "update_bytes": [5_284, 2_724]}
    rows += [row("dare", 0, 0.7, warnings=[SAID], **sent), row("dare", 1, 0.85, **sent)]
    rows += [row("words", 0, 0.8, words="drop_rate=0", **sent)]
    rows += [row("fixed", 0, 0.5, words="drop_rate=0.9", warnings=[SAID])]
    [line] = table(rows).splitlines()[2:]
    # 8,008 bytes of twice 40,964.
    assert line.endswith(
        "| 12,000 | 5, 8, 2 | 10,241 | 85.0 (80.0 to 90.0) | 77.5 (70.0 to 85.0) | 0 b2 | 9.77 % "
        "| 1 of 2; `drop_rate=0`: 80.0 | 50.0, warned 1 of 1 |"
    )


def test_what_is_done_is_not_repeated_and_words_are_those_of_the_warning(tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    done = [row("fedavg", 0, 0.8), row("dare", 0, 0.7, warnings=[SAID]), row("dare", 1, 0.8)]
    out.write_text("".join(json.dumps(one) + "\n" for one in done))
    ran = []
    monkeypatch.setattr(runner, "one", lambda options, key, words: ran.append((*key[1:3], words)))
    words = ["here", "--data", "there", "--only", "fl-tabular", "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", ["examples", *words, "--out", str(out)])
    runner.main()
    assert ran == [("fedavg", 1, ""), ("words", 0, 'drop_rate=0, values="b2"')]
    ran.clear()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--forms", "fixed"])
    runner.main()
    assert ran == [("fixed", seed, "drop_rate=0.9") for seed in (0, 1)]


@pytest.mark.parametrize("name", APPS)
def test_every_example_says_what_stands_in_for_it(name):
    app = APPS[name]
    assert app.instead
    assert app.rounds > 1
    assert app.clients > 1
