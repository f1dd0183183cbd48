"""A model folder whose weights are a pickle: never opened, by a client as little as by a merge."""

import json
import pickle

import pytest

from client import check
from client.config import configure
from client.tasks import causal_lm, image_classification, text_classification
from dare_agg.errors import DareError
from tests.chat import make_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
LOADERS = {
    "causal": lambda config: causal_lm.language_model(config, 0),
    "text": lambda config: text_classification.text_model(config, 2),
    "images": lambda config: image_classification._hugging_face(config),
    "before Flower": lambda config: check._check_model(config.model),
}


class Touch:
    """Whoever opens this runs its code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_client_opens_no_pickle_and_says_what_helps(tmp_path, monkeypatch, load, name):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / name).write_bytes(pickle.dumps(Touch(str(ran))))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was opened"))
    with pytest.raises(DareError, match=rf"only pickled weights \({name}\).*save_pretrained"):
        load(configure(model=str(folder)))
    assert not ran.exists()


@pytest.mark.parametrize("load", list(LOADERS.values())[:3], ids=list(LOADERS)[:3])
def test_of_a_hub_safetensors_alone_are_asked_for(monkeypatch, load):
    import transformers

    asked = []

    def from_pretrained(name, **words):
        asked.append(words)
        raise OSError("no such file")

    for kind in (transformers.AutoModel, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DareError, match="cannot be loaded"):
        load(configure(model="somebody/old-model"))
    assert [words["use_safetensors"] for words in asked] == [True]


def test_what_is_saved_as_safetensors_is_loaded_whatever_lies_beside(tmp_path):
    folder = make_model(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(str(tmp_path / "ran"))))
    check._check_model(str(folder))
    assert causal_lm.language_model(configure(model=str(folder)), 0) is not None
    assert not (tmp_path / "ran").exists()
