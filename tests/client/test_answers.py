import json
import subprocess
import sys

import pytest

from client.answers import answer
from client.config import configure
from client.training import build_task
from dare_agg.errors import ConfigError
from dare_agg.runs.answers import read_answers


def config(model, data, **more):
    return configure(
        model=str(model), data=str(data), length=96, generate_rows=4, generate_tokens=5, **more
    )


def test_loss_and_exact_match_are_the_tasks_own(chat_model, talk_file):
    settings = config(chat_model, talk_file)
    found = answer(settings, {"before": str(chat_model), "again": str(chat_model)}, 3)
    task = build_task(settings)
    metrics = task.evaluate(task.initial)
    first, second = found["models"]
    assert first["loss"] == metrics["loss"] and first["answers"] == second["answers"]
    assert len(found["questions"]) == len(found["wanted"]) == len(first["answers"]) == 3
    assert found["rows"] == len(task.test_rows) and found["answered"] == 4
    several = [q for q in found["questions"] if "\n" in q]
    assert all(q.startswith("user: ") and "assistant: " in q for q in several)


def test_data_without_conversations_are_refused(tiny_language_model, review_files):
    settings = config(tiny_language_model, review_files["csv"], task="causal-lm",
                      text_column="review")  # fmt: skip
    with pytest.raises(ConfigError, match="holds no conversations"):
        answer(settings, {"x": str(tiny_language_model)}, 2)


def test_the_command_writes_what_reports_read(chat_model, talk_file, tmp_path):
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "client.answers", *words, "-o", str(tmp_path / "answers.json"),
             "-c", f'data="{talk_file},{talk_file}"', "-c", f'model="{chat_model}"',
             "-c", "length=96", "-c", "generate-tokens=4", "--shown", "2"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = run(f"before={chat_model}")
    assert done.returncode == 0, done.stderr[-500:]
    assert "before: perplexity" in done.stdout
    sections = read_answers(tmp_path)
    assert len(sections) == 2 and len(sections[0].lines) == 2
    assert json.loads((tmp_path / "answers.json").read_text())["sections"][0]["rows"] == 8
    failed = run("nothing")
    assert failed.returncode == 1
    assert "error: 'nothing' names no model; write NAME=MODEL" in failed.stderr
