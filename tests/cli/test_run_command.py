"""`dare-agg run`: what the user's folder and words become before Flower starts."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dare_agg.cli.execute import execute
from dare_agg.cli.run_config import absolute_paths, parse_overrides, run_settings
from dare_agg.errors import ConfigError, DareError, StateError
from dare_agg.files.app_config import Scalar
from server.reading import read_config


def test_paths_named_from_here_become_absolute_and_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("text,label\n")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = parse_overrides(['data="a.csv,reuters-r8"', 'model="model"', "num-rounds=2"])
    absolute_paths(settings)
    assert settings == {
        "data": f"{tmp_path}/a.csv,reuters-r8",
        "model": f"{tmp_path}/model",
        "num-rounds": 2,
    }
    # What is absolute already, or a name, is left alone; nothing is added.
    again = dict(settings)
    absolute_paths(again)
    assert again == settings


def test_a_resumed_run_keeps_its_downlink_and_a_new_deployment_takes_auto(tmp_path: Path) -> None:
    stored = {
        "status": "running",
        "config": {"downlink": "union-b1", "num-rounds": 4, "output": "x"},
    }
    (tmp_path / "run.json").write_text(json.dumps(stored))
    resumed = run_settings([], deployed=True, resume=tmp_path)
    assert resumed == {"downlink": "union-b1", "num-rounds": 4, "resume": True}
    assert run_settings([], deployed=True, resume=None) == {"downlink": "auto"}
    assert run_settings(["downlink=full"], deployed=True, resume=None) == {"downlink": "full"}
    merge = ["secure=ties", "secure-merge=true"]
    assert run_settings(merge, deployed=True, resume=None)["downlink"] == "full"
    assert run_settings([], deployed=False, resume=None) == {}


@pytest.mark.parametrize("missing", ["flwr", "none"])
def test_doctor_goes_on_without_flower(missing: str) -> None:
    hide = f"import sys; sys.modules[{missing!r}] = None; " if missing != "none" else ""
    code = hide + "from dare_agg.cli.main import main; main(['doctor', '--json'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert '"checks"' in done.stdout, done.stderr
    assert ("not looked at" in done.stdout) == (missing == "flwr")


def prints(folder: Path) -> dict[str, str]:
    """Every entry of a folder, and what its files hold."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a finished run of this app."""
    folder = tmp_path / "finished"
    folder.mkdir()
    config = read_config({"num-rounds": 1, "output": str(folder), "min-clients": 4})
    state = {"status": "completed", "config": config.model_dump(mode="json", by_alias=True)}
    (folder / "run.json").write_text(json.dumps(state))
    (folder / "metrics.jsonl").write_text('{"method": "dare-task-arithmetic", "round": 1}\n')
    return folder


REFUSED = [
    (["num-round=3"], "run config key 'num-round' is unknown; did you mean 'num-rounds'?"),
    (["device=meta"], "device 'meta' is unknown; known: auto, cpu"),
    (["device=cuda:1"], "device 'cuda:1' in a simulation, where Ray chooses"),
    (["device=gpu"], "did you mean 'cuda'?"),
    (["gpus=1"], "run config key 'gpus': it is no word of the run config"),
    (["threads=0"], "threads = 0: Input should be greater"),
    (["precision=bf16"], "precision 'bf16' is unknown; did you mean 'bfloat16'?"),
    (["trim=0.2"], "run config key 'trim': there is no magnitude trim"),
    (["num-rounds=0"], "num-rounds = 0"),
    (["num-rounds=three"], "num-rounds = 'three': Input should be a valid integer"),
    (['steps="10"'], "steps = '10': Input should be a valid integer"),
    (["evaluate=1"], "evaluate = 1"),
    (['methods=["fedavg"]'], "write a list as one text"),
    (["values=b3"], "value format 'b3'"),
    (["steps=2000000"], "steps = 2000000; 0 to 1048576 are possible"),
    (["task=txt"], "task 'txt' is unknown"),
    (["data=missing.csv"], "data 'missing.csv' does not exist; check the path"),
    (["data=/nowhere/images"], "data '/nowhere/images' does not exist"),
    (["data=reuters-r9"], "did you mean 'reuters-r8'?"),
    (["model=./nothing"], "model './nothing' does not exist"),
    (["model=minilmm"], "did you mean 'minilm'?"),
    (["initial=none.safetensors"], "initial: the file 'none.safetensors' does not exist"),
    (["secure=ties"], "2 clients; a secure sum needs at least 3"),
    (["words.toml"], "words.toml: No such file"),
    (["broken.toml"], "broken.toml is no TOML: Expected '=' after a key"),
]


@pytest.mark.parametrize(("words", "why"), REFUSED, ids=[words[0] for words, _ in REFUSED])
def test_what_is_refused_changes_no_folder_and_starts_nothing(
    words: list[str], why: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.toml").write_text("num-rounds = 3\nsteps 4\n")
    monkeypatch.chdir(tmp_path)
    before = prints(tmp_path)
    for folder in (tmp_path / "new" / "run", finished):
        with pytest.raises(DareError) as raised:
            execute(folder, parse_overrides(words), clients=2)
        assert why in str(raised.value) or folder == finished
    assert prints(tmp_path) == before


def test_a_run_is_not_written_over_and_not_resumed_as_another(
    finished: Path, tmp_path: Path
) -> None:
    def resumed(*words: str) -> dict[str, Scalar]:
        return run_settings(list(words), deployed=False, resume=finished)

    (tmp_path / "other.csv").write_text("text,label\na,b\n")
    before = prints(tmp_path)
    with pytest.raises(StateError, match="holds a finished run"):
        execute(finished, {"num-rounds": 1}, clients=4)
    with pytest.raises(StateError, match="nothing is left to resume"):
        execute(finished, resumed(), clients=4)
    with pytest.raises(ConfigError) as raised:
        other = f"data={tmp_path}/other.csv"
        execute(finished, resumed("seed=7", other, "num-rounds=2", "deadline=9"), clients=4)
    assert "seed 0 → 7" in str(raised.value) and "data 'reuters-r8' → " in str(raised.value)
    # What may change is not among them.
    assert "num-rounds" not in str(raised.value) and "deadline" not in str(raised.value)
    with pytest.raises(ConfigError, match=r"--clients 3: the run in .* has 4"):
        execute(finished, resumed("num-rounds=2"), clients=3)
    assert prints(tmp_path) == before


def test_a_wrong_word_is_said_before_flower_is_even_imported(tmp_path: Path) -> None:
    """What takes a second is the import of Flower; 0.2 s of CPU time here without it."""
    code = (
        "import resource, sys\n"
        "from dare_agg.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n"
        "    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF,"
        " resource.RUSAGE_CHILDREN)]\n"
        "    assert not {'flwr', 'torch', 'ray', 'transformers'} & set(sys.modules)\n"
        "    print(sum(one.ru_utime + one.ru_stime for one in used))\n"
    )
    for word, most in (("num-round=3", 1.0), ("num-rounds=0", 3.0)):
        done = subprocess.run(
            [sys.executable, "-c", code, "run", "-c", word, "-o", str(tmp_path / "run")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1 and "num-rounds" in done.stderr
        assert float(done.stdout) < most
    assert not (tmp_path / "run").exists()


def test_words_are_taken_in_flowers_form_and_from_files(tmp_path: Path) -> None:
    (tmp_path / "words.toml").write_text('num-rounds = 3\n[a]\nb = "c"\n')
    assert parse_overrides([str(tmp_path / "words.toml"), "num-rounds=4"]) == {
        "num-rounds": 4, "a.b": "c",
    }  # fmt: skip
    assert parse_overrides(["num-rounds=3 lr=0.1 name='a b'"]) == {
        "num-rounds": 3, "lr": 0.1, "name": "a b",
    }  # fmt: skip
    # One value with blanks or an equals sign in it stays one.
    assert parse_overrides(["server-step=adam(tau=0.1)", "text=a b", 'x="a b=1 c=2"']) == {
        "server-step": "adam(tau=0.1)", "text": "a b", "x": "a b=1 c=2",
    }  # fmt: skip


def test_another_apps_words_are_checked_by_its_defaults(tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(
        "[tool.flwr.app]\n[tool.flwr.app.config]\nlocal-epochs = 1\nverbose = false\n"
        '[tool.flwr.app.config.optimizer]\nname = "sgd"\n'
    )
    for words, why in (
        ({"local-epoch": 2}, "did you mean 'local-epochs'"),
        ({"optimizer.nam": "adam"}, "did you mean 'optimizer.name'"),
        ({"local-epochs": "two"}, "local-epochs = 'two': a number is needed, as 1 is"),
        ({"verbose": 1}, "verbose = 1: true or false is needed"),
    ):
        with pytest.raises(ConfigError, match=why):
            execute(tmp_path / "run", words, app=app)
    (app / "pyproject.toml").write_text("[tool.flwr.app]\n[tool.flwr.app.config\n")
    with pytest.raises(ConfigError, match=r"pyproject.toml is no TOML: .*line 2"):
        execute(tmp_path / "run", {}, app=app)
    assert not (tmp_path / "run").exists()
