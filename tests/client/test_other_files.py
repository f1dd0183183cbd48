"""Data files as people have them: read as they were meant, or refused in one true line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.data import load_text
from client.images import load_images
from client.pixels import read_image
from dare_agg.errors import ConfigError

ROWS = [("café crème", "good"), ("naïve façade", "bad"), ("plain", "good"), ("mer bleue", "bad")]


def csv_text(delimiter: str = ",", rows: Any = ROWS) -> str:
    lines = [delimiter.join(("text", "label")), *(delimiter.join(row) for row in rows)]
    return "\n".join(lines) + "\n"


def loaded(path: Path, **words: Any) -> tuple[set[tuple[str, str]], tuple[str, ...]]:
    """The (text, label) pairs of a file, and what was said of it."""
    data = load_text(str(path), test_share=0.25, **words)
    assert not any("b'" in str(text) for text in data.train.inputs)
    pairs = {
        (str(text), data.label_names[label])
        for rows in (data.train, data.test)
        for text, label in zip(rows.inputs, rows.labels, strict=True)
    }
    return pairs, data.notes


def refused(path: Path, **words: Any) -> str:
    with pytest.raises(ConfigError) as error:
        loaded(path, **words)
    said = str(error.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"],
)
def test_encodings_that_can_be_told_are_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(csv_text().encode(encoding))
    assert loaded(path)[0] == set(ROWS)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "shift_jis", "gb18030"])
def test_others_are_refused_with_what_they_read_as_and_can_be_told(
    tmp_path: Path, encoding: str
) -> None:
    rows = ROWS if encoding in ("cp1252", "latin-1") else [("日本語の文", "一"), ("中文", "二")] * 2
    path = tmp_path / "a.csv"
    path.write_bytes(csv_text(rows=rows).encode(encoding))
    said = refused(path)
    assert "not UTF-8 (line 2" in said and "encoding=" in said
    assert loaded(path, encoding=encoding)[0] == set(rows)


def test_a_wrong_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(csv_text().encode("cp1252"))
    assert "line 2" in refused(path, encoding="utf-8")
    assert "unknown" in refused(path, encoding="utf8x")


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_another_delimiter_is_seen_and_said_or_told(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(csv_text(delimiter))
    pairs, notes = loaded(path)
    assert pairs == set(ROWS) and repr(delimiter) in notes[0]
    assert loaded(path, delimiter=delimiter) == (set(ROWS), ())
    said = refused(path, text_column="words")
    assert f"did you mean delimiter {delimiter!r}" in said


def test_blank_texts_and_labels_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(csv_text(rows=[*ROWS, ("  ", "good"), ("word", ""), ("word", "NaN")]))
    pairs, notes = loaded(path)
    assert pairs == set(ROWS)
    assert "3 of 7 rows are left out: 1 without a text, 2 without a label" in notes[0]
    path.write_text(csv_text(rows=[("", "good"), ("word", "")]))
    assert "no row with a text and a label" in refused(path)


def test_numbers_as_labels_are_one_whatever_wrote_them(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(csv_text(rows=[("a", "1"), ("b", "0"), ("c", "1.0"), ("d", "0")]))
    assert loaded(path)[0] == {("a", "1"), ("b", "0"), ("c", "1"), ("d", "0")}
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in
                             (("a", 1), ("b", 0), ("c", 1.0), ("d", "0"))))  # fmt: skip
    assert loaded(lines)[0] == loaded(path)[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"text,label\n", "no rows"),
        (b"text,label\nword,good\n", "one row; at least 2"),
        (b"text,text,label\na,b,good\nc,d,bad\n", "2 columns 'text'"),
        (b"text,label\na,good\nb,c,bad\n", "line 3: 3 fields"),
        (b'text,label\n"a,good\nb,c,bad\n', "ends inside a quote"),
        (b"text,label\na\0b,good\nc,bad\n", "NUL bytes, the first in line 2"),
        (b"PK\x03\x04rest", "Excel workbook"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"great film,good\nbad film,bad\n", "no column 'text'"),
        (b"great film,good\nbad film,bad\nfine,good\n", "looks like data: add one of column names"),
        (b"# films\ntext,label\na,good\nb,bad\n", "a comment: take it out"),
    ],
)
def test_what_cannot_be_meant_is_one_true_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    assert said in refused(path)


def test_fields_larger_than_pythons_limit_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "word " * 40_000
    path.write_text(csv_text(rows=[(long.strip(), "good"), *ROWS]))
    assert (long.strip(), "good") in loaded(path)[0]


def test_quoted_line_ends_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,label\r\n"two\r\nlines",good\r\n"a ""quote""",bad\r\n\r\n')
    assert loaded(path)[0] == {("two\r\nlines", "good"), ('a "quote"', "bad")}


def test_json_in_its_forms(tmp_path: Path) -> None:
    rows = [{"text": t, "label": y} for t, y in ROWS]
    forms = {
        "a.jsonl": "\n".join(map(json.dumps, rows)),
        "b.json": json.dumps(rows),
        "c.json": json.dumps({"data": rows}),
        "d.json": json.dumps({"text": [t for t, _ in ROWS], "label": [y for _, y in ROWS]}),
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        assert loaded(tmp_path / name)[0] == set(ROWS), name
    (tmp_path / "e.jsonl").write_text(forms["a.jsonl"] + "\n{broken\n")
    assert "line 5" in refused(tmp_path / "e.jsonl")
    (tmp_path / "f.jsonl").write_text(forms["a.jsonl"] + "\n[1]\n")
    assert "line 5: a list" in refused(tmp_path / "f.jsonl")


def test_packed_files_are_unpacked(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.csv.gz", "wt", encoding="utf-8") as file:
        file.write(csv_text())
    assert loaded(tmp_path / "a.csv.gz")[0] == set(ROWS)


def test_bytes_in_parquet_are_text_or_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    for encoding in ("utf-8", "cp1252"):
        texts = [text.encode(encoding) for text, _ in ROWS]
        parquet.write_table(pa.table({"text": texts, "label": [y for _, y in ROWS]}), path)
        if encoding == "utf-8":
            assert loaded(path)[0] == set(ROWS)
    assert "bytes that are no UTF-8 text" in refused(path)
    assert loaded(path, encoding="cp1252")[0] == set(ROWS)


def test_a_column_of_identifiers_is_no_label(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(csv_text(rows=[(f"text {i}", f"id-{i}") for i in range(60)]))
    assert "no two rows share one" in refused(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    from PIL import Image

    rng = np.random.default_rng(0)
    for kind in ("cats", "dogs"):
        (tmp_path / kind).mkdir()
        for number in range(4):
            pixels = rng.integers(0, 255, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"{number}.png")
    return tmp_path


def test_corrupt_images_and_stray_files_are_left_out_and_counted(pictures: Path) -> None:
    (pictures / "cats" / "empty.jpg").write_bytes(b"")
    (pictures / "dogs" / "text.png").write_text("no image")
    (pictures / "dogs" / ".DS_Store").write_bytes(b"\0")
    (pictures / "dogs" / "Thumbs.db").write_bytes(b"\0")
    (pictures / "dogs" / "notes.txt").write_text("words")
    data = load_images(str(pictures))
    assert len(data.train) + len(data.test) == 8 and data.label_names == ("cats", "dogs")
    said = "; ".join(data.notes)
    assert "2 images are left out" in said and "1 .txt" in said and "DS_Store" not in said


def test_an_image_cut_off_costs_itself_not_the_client(pictures: Path, tiny_task: Any) -> None:
    whole = (pictures / "cats" / "0.png").read_bytes()
    (pictures / "cats" / "0.png").write_bytes(whole[: len(whole) // 2])
    reader = tiny_task(pictures)
    rows = np.arange(len(reader.inputs))
    good, why = reader.readable(rows)
    assert len(good) == len(rows) - 1 and "0.png" in why
    assert reader(good)["pixel_values"].shape == (len(good), 3, 16, 16)


@pytest.fixture
def tiny_task(monkeypatch: pytest.MonkeyPatch) -> Any:
    from types import SimpleNamespace

    from client.tasks import image_classification

    def make(folder: Path) -> Any:
        monkeypatch.setattr(
            image_classification, "_normalisation", lambda model: (np.float32(0), np.float32(1))
        )
        rows = load_images(str(folder), test_share=0).train
        config: Any = SimpleNamespace(image_size=16, model="")
        return image_classification.ImageReader(config, rows)

    return make


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_pictures_of_any_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    from PIL import Image

    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
    else:
        image = Image.new("RGB", (8, 8), (120, 130, 140)).convert(mode)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr", "I;16") else "a.png")
    image.save(path)
    pixels = read_image(path, 8)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    if mode == "I;16":
        assert pixels.mean() == 40_000 // 257
    if mode in ("RGBA", "CMYK", "YCbCr"):
        assert abs(pixels.astype(int) - (120, 130, 140)).max() < 4
