import ast
from pathlib import Path

import numpy as np
import pytest

from client.config import configure
from client.tasks.table import TASKS, find_task
from dare_agg.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def test_auto_is_told_from_data_and_model(tmp_path):
    from PIL import Image

    (tmp_path / "cats").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "cats" / "a.png")

    def told(**words):
        return find_task(configure(**words)).name

    assert told(data=str(tmp_path)) == "image-classification"
    assert told(model="efficientnet-lite0") == "image-classification"
    assert told(data="reuters-r8") == told(data="nobody knows") == "text-classification"
    assert told(model="smollm2", data=str(tmp_path)) == "causal-lm"


def test_a_name_wins_and_a_typo_is_named():
    assert find_task(configure(task="causal-lm")).name == "causal-lm"
    with pytest.raises(ConfigError, match="did you mean 'image-classification'"):
        find_task(configure(task="image-clasification"))


def test_nothing_but_its_own_file_asks_for_a_task_by_name():
    """Else a new task would be more than a file and a row."""
    for room in ("client", "server", "simulations", "dare_agg"):
        for path in (ROOT / room).rglob("*.py"):
            words = {
                node.value
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
            named = words & set(TASKS)
            assert named <= {path.stem.replace("_", "-")}, f"{path}: {named}"
