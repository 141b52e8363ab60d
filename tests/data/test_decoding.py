"""From stored bytes to pixels: metadata that are damaged, grey of many bits, files that a row names."""

from __future__ import annotations

import io
import logging
import os
import struct

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image, PngImagePlugin

from erde_hub.data import load_image_data
from erde_hub.data.decoding import decode
from erde_hub.errors import DataError
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
    image = Image.fromarray((PIXELS[..., 0].astype(np.uint16) * 257) if grey else PIXELS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=data)
    expected = np.asarray(Image.fromarray(PIXELS[..., 0] if grey else PIXELS))
    turned = {
        1: expected, 2: expected[:, ::-1], 3: expected[::-1, ::-1], 4: expected[::-1],
        5: expected.swapaxes(0, 1), 6: np.rot90(expected, -1), 7: np.rot90(expected, 2).swapaxes(0, 1),
        8: np.rot90(expected),
    }[orientation]  # fmt: skip
    shown = np.asarray(decode(buffer.getvalue(), "row 0"))
    assert np.array_equal(shown[..., 0] if grey else shown, turned)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", ">u2"), ("PPM", np.uint16)]
)
def test_grey_of_16_bits_is_scaled_and_told(tmp_path, caplog, kind, dtype):
    values = (np.arange(256).reshape(16, 16) * 257).astype(np.uint16)
    if dtype == ">u2":
        image = Image.frombytes("I;16B", (16, 16), values.astype(">u2").tobytes())
    else:
        image = Image.fromarray(values)
    assert np.array_equal(np.asarray(decode(encode(image, kind), "row 0"))[..., 0], np.arange(256).reshape(16, 16))
    for label in ("cat", "dog"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for i in range(12):
            (tmp_path / "set" / label / f"{i}.{kind}").write_bytes(
                encode(Image.fromarray(np.roll(values, i + 20 * (label == "dog"), 0)), kind)
            )
    with caplog.at_level(logging.WARNING):
        load_image_data(tmp_path / "set", progress=False, cache_dir=tmp_path / "cache")
    assert "is grey of 16 bits" in caplog.text


def test_grey_of_32_bits_is_taken_as_it_is_or_refused():
    def stored(value):
        return encode(Image.fromarray(np.full((16, 16), value, np.int32)), "TIFF")

    assert (np.asarray(decode(stored(200), "row 0")) == 200).all()
    for value in (256, 70_000, -1):
        with pytest.raises(DataError, match=r"32-bit pixels up to .* have no stated range"):
            decode(stored(value), "row 0")


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
             "file://{}/private.png", "zip://x::{}/private.png", "hf://datasets/other/name@main/x.png", "fifo"],
)  # fmt: skip
def test_a_row_names_no_file_outside_its_folder(tmp_path, path, streaming):
    (tmp_path / "private.png").write_bytes(picture(0, 1))
    folder = write_cells(tmp_path / "set", path.format(tmp_path))
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    os.mkfifo(folder / "fifo")
    with pytest.raises(DataError, match=r"is not in the data set's folder|there is no such file"):
        load_image_data(folder, progress=False, cache_dir=tmp_path / "cache", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_may_name_a_file_of_its_folder(tmp_path, streaming):
    folder = write_cells(tmp_path / "set", "more/3.jpg")
    (folder / "more").mkdir()
    (folder / "more" / "3.jpg").write_bytes(picture(1, 3))
    data = load_image_data(folder, progress=False, cache_dir=tmp_path / "cache", streaming=streaming)
    assert data.num_classes == 2


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    folder = write_parquet(tmp_path / "set", {"train": rows(30)})
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the cache of data sets, '.*file/cache', cannot be written .*cache_dir="):
        load_image_data(folder, progress=False, cache_dir=tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    "address", ["https://huggingface.co/datasets/uoft-cs/cifar10", "hf://datasets/uoft-cs/cifar10"]
)
def test_an_address_of_the_hub_is_no_name(address):
    with pytest.raises(DataError, match="is an address: give the data set's name, 'uoft-cs/cifar10'"):
        load_image_data(address)
