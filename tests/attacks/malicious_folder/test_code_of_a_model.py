"""A model folder brings code of its own, and whoever sits at the terminal is asked to run it."""

import builtins
import json
from pathlib import Path

import pytest

from client.config import configure
from client.instructions.template import open_tokenizer
from client.tasks import causal_lm, image_classification, instructions, text_classification
from dare_agg.errors import ConfigError
from dare_agg.offline import statistics

pytest.importorskip("transformers")
CODE = "from pathlib import Path\nPath({!r}).touch()\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Its code says that it ran; the terminal's answer is always yes."""
    ran = tmp_path / "ran"
    where = tmp_path / "model"
    where.mkdir()
    (where / "code.py").write_text(CODE.format(str(ran)))
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    own = {"model_type": "own", "auto_map": dict.fromkeys(kinds, "code.Own")}
    (where / "config.json").write_text(json.dumps(own))
    words = {"auto_map": {"AutoTokenizer": ["code.Own", None]}}
    (where / "tokenizer_config.json").write_text(json.dumps(words))
    asked = []
    monkeypatch.setattr(builtins, "input", lambda said: asked.append(said) or "y")
    yield where
    assert not ran.exists() and not asked


@pytest.mark.parametrize(
    "load",
    [
        lambda config: open_tokenizer(config.model),
        lambda config: causal_lm.load_tokenizer(config.model),
        lambda config: causal_lm.language_model(config, 0),
        lambda config: text_classification.text_model(config, 2),
        lambda config: image_classification._hugging_face(config),
        lambda config: statistics._classifier(Path(config.model)),
    ],
)
def test_nobody_is_asked_and_nothing_runs(folder, load):
    with pytest.raises(ConfigError):
        load(configure(model=str(folder)))


def test_the_length_of_its_context_is_not_asked_of_its_code(folder):
    assert instructions._context(str(folder)) == 0
