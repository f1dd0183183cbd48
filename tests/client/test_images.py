"""Image folders, IDX files and `datasets` folders; a real vision model learns from them."""

import gzip
import struct

import numpy as np
import pytest

from client.config import configure
from client.images import is_image_source, load_images
from client.pixels import read_image
from client.training import build_task
from dare_agg.errors import ConfigError


def _picture(kind, number):
    """Stripes across for one class, along for the other, of differing colours."""
    pixels = np.zeros((40, 48, 3), np.uint8)
    pixels[:] = (number * 37 % 200, number * 11 % 200, 60)
    if kind == "across":
        pixels[::8] = 255
    else:
        pixels[:, ::8] = 255
    return pixels


@pytest.fixture(scope="module")
def picture_folder(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 12), ("test", 6)):
        lines = ["file_name,camera"]
        for kind in ("across", "along"):
            (folder / split / kind).mkdir(parents=True)
            for number in range(count):
                name = f"{kind}/{number}.png"
                Image.fromarray(_picture(kind, number)).save(folder / split / name)
                lines.append(f"{name},camera {number % 3}")
        (folder / split / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_class_folders_with_splits_and_a_partition_column(picture_folder):
    data = load_images(str(picture_folder), partition_by="camera")
    assert data.label_names == ("across", "along")
    assert (len(data.train), len(data.test)) == (24, 12)
    assert set(data.train.groups) == {"camera 0", "camera 1", "camera 2"}
    pixels = read_image(data.train.inputs[0], 32)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8


def test_without_splits_test_images_are_set_apart(picture_folder):
    data = load_images(str(picture_folder / "train"))
    assert (len(data.train), len(data.test)) == (19, 5)


def test_idx_files(tmp_path):
    images = np.arange(5 * 6 * 6, dtype=np.uint8).reshape(5, 6, 6)
    blob = struct.pack(">BBBBIII", 0, 0, 8, 3, 5, 6, 6) + images.tobytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(blob))
    labels = struct.pack(">BBBBI", 0, 0, 8, 1, 5) + bytes([3, 1, 3, 1, 0])
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    data = load_images(str(tmp_path))
    assert data.label_names == ("0", "1", "3") and len(data.train) + len(data.test) == 5
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels[:-1])
    with pytest.raises(ConfigError, match="header says 5"):
        load_images(str(tmp_path))


def test_a_datasets_folder_of_images(tmp_path):
    import datasets
    from PIL import Image

    rows = {
        "image": [Image.fromarray(_picture("across", n)) for n in range(8)],
        "label": [n % 2 for n in range(8)],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])}
    )
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "set"))
    assert is_image_source(str(tmp_path / "set"))
    data = load_images(str(tmp_path / "set"))
    assert data.label_names == ("even", "odd")
    assert read_image(data.train.inputs[0], 16).shape == (16, 16, 3)


def test_what_is_wrong_with_a_folder_is_said(picture_folder, tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_image(tmp_path / "cats" / "a.png", 16)
    with pytest.raises(ConfigError, match="no column 'lens'"):
        load_images(str(picture_folder), partition_by="lens")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="subfolder of its name"):
        load_images(str(tmp_path / "empty"))


def test_a_text_model_sees_no_images(picture_folder):
    with pytest.raises(ConfigError, match="set model to 'efficientnet-lite0'"):
        build_task(configure(data=str(picture_folder))).initial_state()


def _config(folder, **more):
    return configure(
        **{
            "data": str(folder),
            "model": "efficientnet-lite0",
            "image_size": 48,
            "steps": 8,
            "batch": 8,
            "learning_rate": 1e-3,
            "head_learning_rate": 1e-2,
            **more,
        }
    )


@pytest.mark.slow
def test_a_real_vision_model_learns_and_repeats(picture_folder):
    task = build_task(_config(picture_folder))
    start = task.initial_state()
    assert sum(array.size for array in start.values()) > 3_000_000
    rows = np.arange(len(task.train_rows))
    trained, examples, _ = task.train(start, rows, seed=[0, 1])
    again, _, _ = build_task(_config(picture_folder)).train(start, rows, seed=[0, 1])
    assert examples == 24
    assert all(np.array_equal(trained[name], again[name]) for name in trained)
    assert task.evaluate(trained)["accuracy"] >= 0.9


@pytest.mark.slow
def test_adapters_on_a_hugging_face_image_model(picture_folder, tmp_path):
    import torch
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**sizes, intermediate_size=64, image_size=32, patch_size=8)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    words = {"model": str(tmp_path), "image_size": 0, "train": "lora", "lora_rank": 2}
    task = build_task(_config(picture_folder, **words, steps=2, lora_targets=("q_proj", "v_proj")))
    start = task.initial_state()
    assert all("lora_" in name or name.startswith("head.") for name in start)
    trained, _, _ = task.train(start, np.arange(16), seed=[0])
    assert any(not np.array_equal(trained[name], start[name]) for name in start if "lora_B" in name)
    words_said = r"lora-targets 'nowhere' fits no module of model .*it has projection, q_proj"
    with pytest.raises(ConfigError, match=words_said):
        build_task(_config(picture_folder, **words, lora_targets=("nowhere",))).initial_state()
