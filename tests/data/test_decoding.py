"""From stored bytes to pixels: metadata that are damaged, grey of many bits, files that a row names."""

from __future__ import annotations

import io
import os
import re
import struct

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image, PngImagePlugin
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from erde_hub._image_files import decode
from erde_hub.errors import DataError
from erde_hub.export._inputs import read_picture
from tests.fakes.images import encode, picture, rows, write_parquet

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def exif(*entries):
    body = b"".join(
        struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0") for tag, kind, count, value in entries
    )
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + b"\0\0\0\0"


TURNED = (0x0112, 3, 1, struct.pack("<H", 6))
NEGATIVE = (0x0100, 9, 1, struct.pack("<i", -5))
TEXT = (0x0100, 2, 4, b"abc\0")
AWAY = (0x8769, 4, 1, struct.pack("<I", 0x7FFFFFFF))  # more entries beyond the end of the file


def no_profile():
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n 4\nzzzz\n")
    return text


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damage", [NEGATIVE, TEXT, AWAY, None], ids=["negative", "text", "away", "garbage"])
def test_damaged_metadata_never_refuse_pixels(kind, damage):
    content = exif(TURNED, damage) if damage else b"Exif\0\0garbage"
    stored = io.BytesIO()
    Image.fromarray(PIXELS).save(stored, kind, exif=content, quality=90)
    shown = decode(stored.getvalue(), "row 0")
    assert shown.size == ((16, 24) if damage else (24, 16))  # what can be read of the orientation counts


def test_a_profile_that_is_no_hexadecimal_says_nothing():
    stored = io.BytesIO()
    Image.fromarray(PIXELS).save(stored, "PNG", pnginfo=no_profile())
    assert np.array_equal(np.asarray(decode(stored.getvalue(), "row 0")), PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("grey", [False, True])
def test_every_orientation_is_pillows(orientation, grey):
    data = Image.Exif()
    data[0x0112] = orientation
    expected = PIXELS[..., 0] if grey else PIXELS
    buffer = io.BytesIO()
    Image.fromarray(expected.astype(np.uint16) if grey else expected).save(buffer, "PNG", exif=data)
    turned = {
        1: expected, 2: expected[:, ::-1], 3: expected[::-1, ::-1], 4: expected[::-1],
        5: expected.swapaxes(0, 1), 6: np.rot90(expected, -1), 7: np.rot90(expected, 2).swapaxes(0, 1),
        8: np.rot90(expected),
    }[orientation]  # fmt: skip
    shown = np.asarray(decode(buffer.getvalue(), "row 0"))
    assert np.array_equal(shown[..., 0] if grey else shown, turned)


GREY = [("PNG", "u2"), ("TIFF", "u2"), ("TIFF", ">u2"), ("PPM", "u2"), ("TIFF", "i4")]


@pytest.mark.parametrize(("kind", "dtype"), GREY)
def test_grey_of_many_bits_means_the_same_in_training_and_in_a_pipeline_or_is_refused(tmp_path, kind, dtype):
    def stored(values):
        if dtype == ">u2":
            return encode(Image.frombytes("I;16B", (16, 16), values.astype(dtype).tobytes()), kind)
        return encode(Image.fromarray(values.astype(dtype)), kind)

    levels = np.arange(256).reshape(16, 16)
    path = tmp_path / f"image.{kind}"
    path.write_bytes(stored(levels))
    shown = np.asarray(decode(path.read_bytes(), "row 0"))
    assert np.array_equal(shown, np.repeat(levels[..., None], 3, -1))
    assert np.array_equal(shown, np.asarray(load_image(str(path))))
    for values in (levels * 257, levels + 1, *([levels - 1] if dtype == "i4" else [])):
        with pytest.raises(DataError, match=r"row 0 cannot be read .*grey of mode I.* would clip at 255.*8 bits"):
            decode(stored(values), "row 0")


TRANSPARENT = [
    ("RGB", "PNG", (255, 0, 0)), ("L", "PNG", 76), ("P", "PNG", 0), ("P", "GIF", 0), ("P", "PNG", b"\0\x80"),
    ("1", "PNG", 0), ("I;16", "PNG", 76), ("I;16", "PNG", 0),
    ("RGBA", "PNG", None), ("LA", "PNG", None), ("RGBA", "WEBP", None),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "kind", "clear"), TRANSPARENT)
def test_transparency_means_the_same_in_training_in_a_pipeline_and_in_a_session(tmp_path, mode, kind, clear):
    """Half of the image is clear; transformers' own functions say what it looks like."""
    image = Image.new("RGBA", (16, 16), "blue")
    image.paste((0, 0, 0, 0) if clear == 0 else (255, 0, 0, 0), (0, 0, 8, 16))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16))
    else:
        image = image.convert("RGB").quantize(2) if mode == "P" else image.convert(mode)
    path = tmp_path / f"image.{kind.lower()}"
    if mode == "P":
        clear = image.getpixel((0, 0)) if clear == 0 else clear
    image.save(path, kind, lossless=True, **({} if clear is None else {"transparency": clear}))
    expected = convert_to_rgb(load_image(str(path)), return_numpy=True)
    assert np.array_equal(np.asarray(decode(path.read_bytes(), "row 0")), expected)
    assert np.array_equal(read_picture(path, 3, 0), expected)
    with Image.open(path) as opened:
        assert np.array_equal(read_picture(opened, 3, 0), expected)


@pytest.mark.parametrize("shape", [(1, 65_000), (65_000, 1), (2, 2001)])
def test_a_strip_that_would_be_resized_to_gigabytes_is_refused(shape):
    strip = encode(Image.fromarray(np.zeros(shape, np.uint8)), "PNG")
    with pytest.raises(DataError, match=f"row 3 .*{shape[1]} x {shape[0]} pixels.*1000 times the other"):
        decode(strip, "row 3")
    assert decode(encode(Image.fromarray(np.zeros((2, 2000), np.uint8)), "PNG"), "row 3").size == (2000, 2)


@pytest.mark.parametrize("kind", ["EPS", "PDF"])
def test_pages_are_no_images(kind):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind)
    with pytest.raises(DataError, match="cannot be read"):
        decode(buffer.getvalue(), "row 0")


def write_cells(folder, path, count=60):
    """A table whose fourth row names a file."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": picture(i % 2, i), "path": None} for i in range(count)]
    cells[3] = {"bytes": None, "path": path}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(cells, kind), "label": [i % 2 for i in range(count)]})
    pa.parquet.write_table(table.replace_schema_metadata(features.arrow_schema.metadata), folder / "train.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "path", ["{}/private.png", "../private.png", "/dev/zero", "link.png", "ftp://127.0.0.1:9/x.png", "foo://x",
             "file://{}/private.png", "zip://x::{}/private.png", "hf://datasets/other/name@main/x.png", "fifo", "a\0b"],
)  # fmt: skip
def test_a_row_names_no_file_outside_its_folder(tmp_path, path, streaming, load):
    (tmp_path / "private.png").write_bytes(picture(0, 1))
    folder = write_cells(tmp_path / "set", path.format(tmp_path))
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    os.mkfifo(folder / "fifo")
    with pytest.raises(DataError, match=r"is not in the data set's folder|there is no such file|null byte"):
        load(folder, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("entry", ["data_files: {}", "data_files: ../set/data/*.parquet", "data_dir: {}"])
def test_a_card_names_no_file_outside_its_folder(tmp_path, entry, streaming, load):
    private = write_parquet(tmp_path / "set", {"train": rows(30)})
    write_parquet(tmp_path / "card", {"train": rows(30)})
    file = f"{private}/data/train-00000-of-00001.parquet" if "files" in entry else private
    text = f"---\nconfigs:\n- config_name: default\n  {entry.format(file)}\n---\n"
    (tmp_path / "card" / "README.md").write_text(text)
    with pytest.raises(DataError, match=r"the card of 'card' names the file '.*parquet', which is not in the data set"):
        load(tmp_path / "card", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_may_name_a_file_of_its_folder(tmp_path, streaming, load):
    folder = write_cells(tmp_path / "set", "more/3.jpg")
    (folder / "more").mkdir()
    (folder / "more" / "3.jpg").write_bytes(picture(1, 3))
    data = load(folder, streaming=streaming)
    assert data.num_classes == 2


def test_a_cache_that_cannot_be_written_is_told(tmp_path, load):
    folder = write_parquet(tmp_path / "set", {"train": rows(30)})
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the cache of data sets, '.*file/cache', cannot be written .*cache_dir="):
        load(folder, cache_dir=tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    "address",
    ["https://huggingface.co/datasets/{}", "https://hf.co/datasets/{}/tree/main", "hf.co/datasets/{}", "datasets/{}/",
     "hf://datasets/{}", "hf://{}", "{}/"],
)  # fmt: skip
def test_an_address_of_the_hub_is_no_name(address, load):
    with pytest.raises(DataError, match="is an address: give the data set's name, 'uoft-cs/cifar10'"):
        load(address.format("uoft-cs/cifar10"))


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "cifar 10", "org/", "org/name@main", "org/name:plain", "s3://a/b", "C:\\a", "~x"]
)
def test_what_is_no_name_of_the_hub_is_not_asked_for(tmp_path, monkeypatch, name, load):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"there is no folder {re.escape(repr(name))}, and names on the Hub look like"):
        load(name)
