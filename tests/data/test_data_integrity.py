"""Images that stay encoded are looked at before training, once."""

from __future__ import annotations

import datasets
import numpy as np
import pytest

from erde_hub._image_files import decode, header_size
from erde_hub.data import integrity as data_integrity
from erde_hub.data.decoding import EncodedImages, evenly_spaced
from erde_hub.errors import DataError, UnknownNameError
from tests.fakes.images import rows, write_parquet

LARGE = {"size": (120, 100)}
FEATURES = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}


def write(folder, damaged: int | None = None):
    """Forty large images, of which one may be cut off in the middle of its pixels: its header is fine."""
    columns = rows(40, **LARGE)
    if damaged is not None:
        columns["img"][damaged] = columns["img"][damaged][:-40]
    return write_parquet(folder, {"train": columns, "test": rows(9, first_seed=90, **LARGE)}, FEATURES)


@pytest.fixture
def decoded(monkeypatch):
    """The places that are decoded, as messages name them."""
    seen = []
    image = EncodedImages.image
    monkeypatch.setattr(EncodedImages, "image", lambda self, row: seen.append(str(self.where(row))) or image(self, row))
    return seen


def test_an_image_that_is_cut_off_is_named_before_training(tmp_path, load):
    folder = write(tmp_path / "set", damaged=17)
    with pytest.raises(DataError, match=r"the image in row 17 of split 'train' of 'set' cannot be read"):
        load(folder)
    for how in ("headers", "none"):
        load(folder, check_images=how)


def test_what_is_wrong_with_an_image_is_said_without_addresses_in_memory():
    for read in (decode, header_size):
        with pytest.raises(DataError) as error:
            read(b"no image", "row 3")
        assert str(error.value) == (
            "the image in row 3 cannot be read (UnidentifiedImageError: cannot identify image file): repair or"
            " remove it"
        )


def test_a_broken_header_is_found_by_the_quick_check_too(tmp_path, load):
    columns = rows(40, **LARGE)
    unseen = min(set(range(40)) - set(evenly_spaced(40, 32).tolist()))  # by the first look, which asks for sizes
    columns["img"][unseen] = b"no image"
    folder = write_parquet(tmp_path / "set", {"train": columns, "test": rows(9, **LARGE)}, FEATURES)
    with pytest.raises(DataError, match=f"row {unseen} of split 'train'"):
        load(folder, check_images="headers")
    load(folder, check_images="none")


def test_it_is_paid_once_and_goes_on_where_it_was_cut_off(tmp_path, decoded, monkeypatch, load):
    monkeypatch.setattr(data_integrity, "_PIECE", 16)
    folder = write(tmp_path / "set", damaged=39)
    with pytest.raises(DataError, match="row 39"):
        load(folder)
    assert {f"row {row} of split 'train' of 'set'" for row in range(32)} < set(decoded)
    decoded.clear()
    with pytest.raises(DataError, match="row 39"):
        load(folder)
    assert set(decoded) <= {f"row {row} of split 'train' of 'set'" for row in range(32, 40)}  # the last piece only
    whole = write(tmp_path / "whole")
    load(whole)
    decoded.clear()
    load(whole)
    assert decoded == []
    load(whole, cache_dir=tmp_path / "another")
    assert len(decoded) == 49


def test_part_of_the_rows_does_not_vouch_for_the_rest(tmp_path, decoded, load):
    folder = write(tmp_path / "set")
    load(folder, max_train_samples=9, max_eval_samples=3)
    assert len(decoded) == 9 + 3 + 3
    load(folder)
    assert len(decoded) == 15 + 49


def test_processes_of_one_machine_share_the_work(tmp_path, decoded, monkeypatch, load):
    """The second of two starts in the middle; both end with everything looked at."""
    monkeypatch.setattr(data_integrity, "_PIECE", 10)
    folder = write(tmp_path / "set")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    load(folder)
    assert set(decoded[:10]) == {f"row {row} of split 'train' of 'set'" for row in range(20, 30)}
    assert len(decoded) == 49
    monkeypatch.setenv("LOCAL_RANK", "0")
    load(folder)
    assert len(decoded) == 49


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, caplog, load):
    images = load(write(tmp_path / "set"), check_images="none").train._encoded
    (tmp_path / "file").write_text("")
    data_integrity.find_unreadable(images, np.arange(len(images)), "all", tmp_path / "file" / "marks", progress=False)
    assert "could not be kept" in caplog.text


def test_an_unknown_check_is_refused(tmp_path, load):
    with pytest.raises(UnknownNameError, match=r"unknown check_images 'header'; did you mean 'headers'\?"):
        load("digits", check_images="header")
