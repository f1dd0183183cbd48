"""They put something into the cache folders, or have the cache clear away files of ours."""

import os
from pathlib import Path

import numpy as np
import pytest

from client.unpack import unpack, unpacked_folder
from dare_agg.checkpoint import open_checkpoint, write_checkpoint
from dare_agg.checkpoint.fingerprints import recall, remember
from dare_agg.downlink.base import write_base
from dare_agg.downlink.client import VersionReceiver
from dare_agg.errors import StateError
from dare_agg.vectors.model import global_model

ARRAYS = {"body": np.arange(8, dtype=np.float32), "head.w": np.ones(2, np.float32)}
VERSION = global_model(ARRAYS, dense=("^head",), exclude=()).ref.version


def receiver(folder: Path, keep_bytes: int = 1 << 30) -> VersionReceiver:
    return VersionReceiver(folder, "one", VERSION, dense=("^head",), keep_bytes=keep_bytes)


def test_a_version_cache_they_made_or_can_write(place: Path, nobody: int) -> None:
    (place / "versions").mkdir(mode=0o700)
    os.chown(place / "versions", nobody, nobody)
    with pytest.raises(StateError, match=r"belongs to user nobody.*cache in the node config"):
        receiver(place / "versions")
    (place / "open").mkdir()
    (place / "open").chmod(0o777)
    with pytest.raises(StateError, match="has mode 777"):
        receiver(place / "open")
    own = receiver(place / "own")
    assert own.adopt(ARRAYS) and own.have() == VERSION


def test_links_in_the_cache_do_not_lead_its_clearing_to_our_files(place, tmp_path, nobody) -> None:
    (tmp_path / "precious").write_text("x" * 1000)
    (place / "versions").mkdir()
    (place / "versions" / "bases").symlink_to(tmp_path)
    os.chown(place / "versions" / "bases", nobody, nobody, follow_symlinks=False)
    with pytest.raises(StateError, match="belongs to user nobody"):
        receiver(place / "versions", keep_bytes=1).receive(
            VERSION, {"base": write_base(ARRAYS)}, None
        )
    assert os.listdir(tmp_path) == ["precious"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.safetensors"
    write_checkpoint(path, {"w": np.ones(5, np.float32)})
    return path


def test_a_fingerprint_they_planted_is_not_believed(model, place, nobody, monkeypatch) -> None:
    monkeypatch.setenv("DARE_AGG_CACHE", str(place / "cache"))
    monkeypatch.setattr("dare_agg.checkpoint.fingerprints._SETTLED_SECONDS", 0.0)
    true = open_checkpoint(model).fingerprint()
    layout = open_checkpoint(model).layout().fingerprint
    remember([model], layout, "ab" * 32)
    assert recall([model], layout) == "ab" * 32  # the cache works, for us
    folder = place / "cache" / "fingerprints"
    for path in (*folder.iterdir(), folder, place / "cache"):
        os.chown(path, nobody, nobody)
        assert recall([model], layout) is None
        assert open_checkpoint(model).fingerprint() == true
        os.chown(path, 0, 0)
        remember([model], layout, "ab" * 32)
    os.chown(folder, nobody, nobody)
    remember([model], layout, true)  # refuses in silence: it is but a cache
    assert next(folder.iterdir()).read_text().strip() == "ab" * 32


def test_a_model_they_unpacked_for_us(place: Path, nobody: int, monkeypatch) -> None:
    monkeypatch.setenv("DARE_AGG_CACHE", str(place / "cache"))
    folder = unpacked_folder("toy", "ab" * 4)
    folder.mkdir(parents=True)
    os.chown(folder.parent, nobody, nobody)
    with pytest.raises(StateError, match=r"belongs to user nobody.*DARE_AGG_CACHE"):
        unpack("toy", [place / "toy.zip"], "ab" * 4, ".zip", "get another")
    os.chown(folder.parent, 0, 0)
    assert unpack("toy", [place / "toy.zip"], "ab" * 4, ".zip", "get another") == folder
