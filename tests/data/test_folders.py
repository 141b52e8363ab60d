"""Folders of images: what lies there is what is used, and what is not used is said."""

from __future__ import annotations

import json
import logging
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from erde_hub.data import image_data_from_arrays
from erde_hub.data.opening import open_tables
from erde_hub.errors import DataError, LabelError
from tests.fakes.images import rows, write_parquet


def save(path, seed, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path, **how)


def fill(root, classes, count=12, first=0, ending="png", **how):
    for number, label in enumerate(classes):
        for i in range(count):
            save(root / label / f"{i}.{ending}", first + 1000 * number + i, **how)
    return root


def used(data):
    return len(data.train) + len(data.validation) + len(data.test)


@pytest.fixture(autouse=True)
def _everything_is_logged(caplog):
    caplog.set_level(logging.INFO, logger="erde_hub")


def test_rows_classes_and_fingerprint_are_those_of_earlier_releases(tmp_path, load):
    """The split.json of a run names rows by number: the order of the files must not change."""
    number = 0
    for split in ("train", "test"):
        for label in ("cat", "cat 2", "dog-a", "dog"):
            for i in range(6):
                number += 1
                save(tmp_path / "pets" / split / label / f"{'x y'[i % 3]}{i}.bmp", number)
    data = load(tmp_path / "pets")
    assert data.fingerprint == "9924e05e3a46de17"
    assert data.class_names == ["cat", "cat 2", "dog", "dog-a"]
    assert data.validation.indices.tolist() == [0, 9]


@pytest.mark.parametrize(
    "name", ["train", "at the train museum", "val (2)", "test[1]", "a*b", "validation?", "testing"]
)
def test_names_of_files_classes_and_the_folder_decide_nothing(tmp_path, load, name):
    root = fill(tmp_path / f"{name} [x]*", ["cat", f"{name} class"])
    save(root / "cat" / f"{name}.png", 77)
    data = load(root)
    assert data.class_names == sorted(["cat", f"{name} class"])
    assert used(data) == data.files["used"] == data.files["seen"] == 25


@pytest.mark.parametrize("name", ["train", "test", "Val"])
def test_a_class_may_be_called_like_a_split(tmp_path, load, caplog, name):
    data = load(fill(tmp_path / "set", ["bus", "car", name]))
    assert data.class_names == sorted(["bus", "car", name])
    assert used(data) == 36
    assert f"'{name}' is read as a class" in caplog.text


@pytest.mark.parametrize("around", ["", "archive", "ILSVRC/Data/CLS-LOC"])
@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "Validation", "Testing")])
def test_splits_of_class_folders(tmp_path, load, around, names):
    for number, split in enumerate(names):
        fill(tmp_path / "set" / around / split, ["cat", "dog"], 6 - number, first=100 * number)
    data = load(tmp_path / "set")
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 10, 8)
    assert data.class_names == ["cat", "dog"]


def test_splits_below_the_classes(tmp_path, load):
    for number, split in enumerate(("train", "test")):
        for label in ("cat", "dog"):
            for i in range(10):
                save(tmp_path / "set" / label / split / f"{i}.png", 1000 * number + 100 * (label == "dog") + i)
    data = load(tmp_path / "set")
    assert data.class_names == ["cat", "dog"]
    assert (len(data.train) + len(data.validation), len(data.test)) == (20, 20)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            {"train": "cat dog", "": "extra"},
            "two ways: 'train' holds folders like a split, .*'extra' lies next to it",
        ),
        ({"": "cat dog", "test": "cat dog"}, "two ways: 'test' .* 'cat' lies next to it"),
        ({"train": "cat dog", "val": "cat dog", "valid": "cat dog"}, "two splits that mean 'validation'"),
        ({"test": "cat dog"}, r"no split 'train' \(found: 'test'\)"),
        ({"": "."}, r"holds 12 images and no class folders: .* metadata\.csv"),
        ({"": "train test"}, "holds 24 images and no class folders"),
        ({"": "images"}, "holds 12 images and a single class folder, 'images'"),
    ],
)
def test_folders_in_doubt_are_refused(tmp_path, load, classes, message):
    for number, (split, names) in enumerate(classes.items()):
        fill(tmp_path / "set" / split, names.split(), first=500 * number)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "set")


@pytest.mark.parametrize(
    ("folder", "found"), [("images", "a single class folder, 'images'"), ("train", "no class fold")]
)
def test_a_table_of_another_name_describes_no_images(tmp_path, load, folder, found):
    (fill(tmp_path / "set", [folder]) / "train.csv").write_text("file,label\n0.png,cat\n")
    with pytest.raises(DataError, match=rf"holds 12 images and {found}.* or name each image and its label in metadata"):
        load(tmp_path / "set")


@pytest.mark.parametrize("picture", ["plot.png", "figures/plot.png", "logo.svg"])
def test_a_picture_next_to_tables_of_texts_is_no_data(tmp_path, picture):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("text,label\ngood,1\nbad,0\n")
    if picture.endswith("png"):
        save(tmp_path / picture, 0)
    else:
        (tmp_path / picture).write_text("<svg/>")
    opened = open_tables(str(tmp_path), None, str(tmp_path / ".cache"))
    assert [opened.splits[split]["text"][:] for split in ("train", "test")] == 2 * [["good", "bad"]]


def test_links_are_followed_and_circles_end(tmp_path, load, caplog):
    away = fill(tmp_path / "away", ["cat", "dog"])
    root = fill(tmp_path / "set", ["fox"], first=5000)
    (root / "cat").symlink_to(away / "cat")
    (root / "dog").mkdir()
    for i in range(12):
        (root / "dog" / f"{i}.png").symlink_to(away / "dog" / f"{i}.png")
    (root / "fox" / "again").symlink_to(root)
    (root / "fox" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(root / "fox" / "pipe.png")
    data = load(root)
    assert data.class_names == ["cat", "dog", "fox"]
    assert used(data) == 36
    assert data.files["left_out"] == {"no file (a broken link or a device)": 2}
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "train").symlink_to(away)
    assert used(load(tmp_path / "links")) == 24


FORMATS = {"PNG": "PnG", "JPEG": "JFIF", "AVIF": "avif", "WEBP": "", "TIFF": "scan", "BMP": "1", "GIF": "Gif",
           "JPEG2000": "jp2", "TGA": "tga", "QOI": "qoi", "PPM": "data"}  # fmt: skip


def test_every_raster_format_is_read_whatever_its_ending(tmp_path, load):
    root = tmp_path / "set"
    for number, (kind, ending) in enumerate(FORMATS.items()):
        for label in ("cat", "dog"):
            for i in range(2):
                name = f"{kind}{i}.{ending}" if ending else f"{kind}{i}"
                save(root / label / name, 10 * number + i + 500 * (label == "dog"), format=kind)
    data = load(root)
    assert used(data) == 4 * len(FORMATS)


METADATA = "metadata, while the folders tell the classes"


def test_what_is_no_image_is_counted(tmp_path, load, caplog):
    root = fill(tmp_path / "set", ["cat", "dog"])
    save(root / "cover.png", 999)
    (root / "metadata.csv").write_text("file_name,label\ncat/0.png,dog\n")
    for label in ("cat", "dog"):
        for i in range(12):
            (root / label / f"{i}.json").write_text('{"label": "wrong"}')
            (root / label / f"{i}.txt").write_text("0 0.5 0.5 1 1")
    save(root / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png", 998)
    (root / "dog" / "._0.png").write_bytes(b"resource fork")
    Image.new("RGB", (8, 8)).save(root / "dog" / "drawing.eps")
    (root / "fox").mkdir()
    data = load(root)
    assert data.class_names == ["cat", "dog"]
    assert used(data) == 24
    assert data.files == {
        "seen": 77,
        "used": 24,
        "left_out": {"no image": 49, "hidden": 2, "in no class folder": 1, METADATA: 1},
    }
    assert "24 of 77 files are used" in caplog.text
    assert "1 in no class folder (cover.png)" in caplog.text
    assert "folders without an image are no classes: fox" in caplog.text
    assert data.summary()["files"] == data.files


def test_images_that_pillow_does_not_read_are_told(tmp_path, load, caplog):
    root = fill(tmp_path / "set", ["cat", "dog"])
    (root / "cat" / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (root / "dog" / "B.SVG").write_text("<svg/>")
    data = load(root)
    assert data.files == {"seen": 26, "used": 24, "left_out": {"in an image format that Pillow does not read": 2}}
    assert [r.levelname for r in caplog.records if "24 of 26 files are used" in r.message] == ["WARNING"]
    for label in ("cat", "dog"):
        for i in range(12):
            (root / label / f"{i}.png").unlink()
    with pytest.raises(DataError, match=r"'set' holds 2 files in an image format that Pillow does not read .*plugin"):
        load(root)


@pytest.mark.parametrize(
    ("folder", "told"), [(".net", True), ("cat/.old", True), (".git", False), ("cat/.ipynb_checkpoints", False)]
)
def test_images_in_hidden_folders_are_told(tmp_path, load, caplog, folder, told):
    root = fill(tmp_path / "set", ["cat", "dog"])
    save(root / folder / "0.png", 999)
    data = load(root)
    assert data.class_names == ["cat", "dog"]
    assert used(data) == 24
    warned = [r.message for r in caplog.records if r.levelname == "WARNING" and "24 of 25 files are used" in r.message]
    assert [
        f"1 in a hidden folder, which is no class (rename it to read it) ({folder}/0.png)" in w for w in warned
    ] == ([True] if told else [])


def describe(folder, labels, prefix="", count=24, first=0, kind="csv"):
    """Images whose classes a file next to them tells."""
    lines = []
    for i in range(count):
        save(folder / prefix / f"{i}.png", first + i)
        row = {"file_name": f"{prefix}{i}.png", "label": labels[i % len(labels)]}
        lines.append(json.dumps(row) if kind == "jsonl" else ",".join(map(str, row.values())))
    text = "\n".join(lines if kind == "jsonl" else ["file_name,label", *lines])
    (folder / f"metadata.{kind}").write_text(text)
    return folder


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("prefix", ["", "images/", "a[1]*/b/"])
@pytest.mark.parametrize("labels", [["cat", "dog", "fox"], ["NA", "None", "nan"], [7, 10, 9], ["007", "042", "1"]])
def test_metadata_tell_the_classes_where_folders_do_not(tmp_path, load, kind, prefix, labels):
    root = describe(tmp_path / "set [2]", labels, prefix, kind=kind)
    save(root / prefix / "stray.png", 900)
    data = load(root)
    assert data.class_names == list(map(str, sorted(labels)))
    assert data.files == {"seen": 26, "used": 25, "left_out": {"not in the metadata": 1}}
    for split in (data.train, data.validation, data.test):
        for label, row in zip(split.labels.tolist(), split.indices.tolist(), strict=True):
            assert data.class_names[label] == str(labels[row % len(labels)])
    assert load(root).fingerprint == data.fingerprint


def test_metadata_of_several_splits(tmp_path, load):
    for number, split in enumerate(("train", "my_val", "test-images")):
        describe(tmp_path / "set" / split, ["cat", "dog"], count=20 - 2 * number, first=100 * number)
    data = load(tmp_path / "set")
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 18, 16)


@pytest.mark.parametrize("around", ["", "archive"])
@pytest.mark.parametrize("labelled", [True, False])
def test_metadata_next_to_classes_called_like_splits(tmp_path, load, caplog, around, labelled):
    names = ["test tube", "train station"]
    root = fill(tmp_path / "set" / around, names)
    lines = [f"{name}/{i}.png,{name}" if labelled else f"{name}/{i}.png,a {i}" for name in names for i in range(12)]
    (root / "metadata.csv").write_text("\n".join([f"file_name,{'label' if labelled else 'text'}", *lines]))
    data = load(tmp_path / "set")
    assert data.class_names == names
    assert data.files == {"seen": 25, "used": 24, "left_out": {"metadata, while the folders tell the classes": 1}}
    assert "metadata, while the folders tell the classes" in caplog.text


@pytest.mark.parametrize("folders", [("train_images", "test_images"), ("train", "my_test"), ("train 1", "train 2")])
def test_metadata_next_to_folders_of_splits(tmp_path, load, folders):
    lines = []
    for number, folder in enumerate(folders):
        fill(tmp_path / "set", [folder], 20, first=100 * number)
        lines += [f"{folder}/{i}.png,{['cat', 'dog'][i % 2]}" for i in range(20)]
    (tmp_path / "set" / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    data = load(tmp_path / "set")
    assert data.class_names == ["cat", "dog"]
    assert data.files["used"] == 41


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,label\n0.png,cat\n", r"metadata\.csv of 'set' cannot be read \(KeyError.* column file_name"),
        ("", r"metadata\.csv of 'set' cannot be read \(EmptyDataError"),
        ("file_name,label\n,cat\n", "cannot be read .*column file_name"),
        ("file_name,image,label\n0.png,1,cat\n", "cannot be read .*image, already exists"),
        ("file_name,label\n0.png,1\n7.png,\n", r"1 rows of split 'train' of 'set' have no label .* row 1"),
        ("file_name,label\n0.png,cat\n../9.png,dog\n", r"names '\.\./9\.png', which is not in the data set's folder"),
        ("file_name,label\n0.png,cat\n7.png,dog\n", r"'7\.png' of row 1 .*cannot be read: there is no such file"),
        ('{"file_name": "0.png", "label": 1}\n{"file_name": "7.png", "label": [1]}', "cannot be read .Arrow"),
        ("[1, 2]", "cannot be read .KeyError"),
        ('{"file_name": "0.png"', "cannot be read .JSONDecodeError"),
    ],
)
def test_metadata_that_name_no_images(tmp_path, load, content, message):
    save(tmp_path / "set" / "0.png", 1)
    save(tmp_path / "9.png", 1)
    (tmp_path / "set" / f"metadata.{'jsonl' if content[:1] in tuple('[{') else 'csv'}").write_text(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "set")


def test_images_of_any_depth_belong_to_the_top_folder(tmp_path, load, caplog):
    root = fill(tmp_path / "set", ["cat", "dog"])
    for i in range(5):
        save(root / "cat" / "2020" / "may" / f"{i}.png", 300 + i)
    data = load(root)
    assert torch.bincount(torch.cat([data.train.labels, data.validation.labels, data.test.labels])).tolist() == [17, 12]
    assert "images in folders below class 'cat' belong to that class" in caplog.text


def test_an_image_that_is_none_is_named(tmp_path, load):
    root = fill(tmp_path / "set", ["cat", "dog"])
    (root / "dog" / "3.png").write_text("<html>not found</html>")
    with pytest.raises(DataError, match=r"row \d+ of split 'train' of 'set' \(dog/3\.png\) cannot be read"):
        load(root)
    Image.new("RGB", (8, 8)).save(root / "dog" / "3.png", "EPS")
    with pytest.raises(DataError, match=r"\(dog/3\.png\) cannot be read"):
        load(root)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_classes_without_training_images_are_refused(tmp_path, load, split):
    fill(tmp_path / "set" / "train", ["cat", "dog"])
    fill(tmp_path / "set" / split, ["Cat", "dog", "fox"], 4, first=500)
    with pytest.raises(
        LabelError, match=rf"split '{split}' of 'set' have no training image: 'Cat', 'fox'.*did you mean 'cat'"
    ):
        load(tmp_path / "set")
    columns = rows(20, classes=2)
    table = write_parquet(tmp_path / "table", {"train": columns, split: rows(6, classes=3, first_seed=50)})
    with pytest.raises(LabelError, match=rf"split '{split}' of 'table' have no row in train: class 2"):
        load(table)


def test_parquet_with_pictures_next_to_it_is_a_table(tmp_path, load):
    folder = write_parquet(tmp_path / "set", {"train": rows(30)})
    fill(tmp_path / "set" / "figures", ["a", "b"])
    assert load(folder).num_classes == 3


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather", "damaged", "empty"])
def test_a_table_without_images_next_to_class_folders_is_left_out(tmp_path, load, caplog, kind):
    names = ["cat", "dog", "test tube"]
    root = fill(tmp_path / "set", names, 8)
    for number, file in enumerate(("train.png", "val_1.png", "7.Jpg", "none")):
        save(root / "cat" / file, 900 + number, format="PNG")
    table = datasets.Dataset.from_dict({"file_name": ["cat/0.png"], "boxes": [[1.0, 2.0]]})
    file = root / f"annotations.{'parquet' if kind == 'parquet' else 'arrow'}"
    if kind == "parquet":
        table.to_parquet(str(file))
    elif kind == "arrow":
        table.save_to_disk(str(tmp_path / "saved"))
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(file)
    elif kind == "feather":
        table.to_pandas().to_feather(file)
    else:
        file.write_bytes(b"ARROW1 and no table" if kind == "damaged" else b"")
    data = load(root)
    assert data.class_names == names
    assert data.files == {"seen": 29, "used": 28, "left_out": {"tables, while the folders tell the classes": 1}}
    assert f"1 tables, while the folders tell the classes ({file.name})" in caplog.text


def test_texts_in_tables_with_folders_of_pictures_next_to_them(tmp_path):
    datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]}).to_parquet(str(tmp_path / "train.parquet"))
    fill(tmp_path, ["docs", "plots"], 1)
    opened = open_tables(str(tmp_path), None, str(tmp_path / ".cache"), prefer_tables=True)
    assert opened.splits["train"]["text"][:] == ["good", "bad"]


def test_a_named_column_of_paths_in_a_table_next_to_folders(tmp_path, load):
    root = fill(tmp_path / "set", ["a", "b"], 20)
    files = [str(root / folder / f"{i}.png") for folder in "ab" for i in range(20)]
    columns = {"path": files, "label": [i % 4 for i in range(40)]}
    datasets.Dataset.from_dict(columns).to_parquet(str(root / "train.parquet"))
    assert load(root).num_classes == 2
    assert load(root, image_column="path").num_classes == 4


def test_copies_stay_on_one_side_where_we_cut(tmp_path, load):
    root = fill(tmp_path / "set", ["cat", "dog"], 20)
    for label in ("cat", "dog"):
        for i in range(20):
            for copy in range(i % 4):
                (root / label / f"{i}_{copy}.png").write_bytes((root / label / f"{i}.png").read_bytes())
    data = load(root)
    assert used(data) == 100
    seen = [set(getattr(data, split).content_hashes().tolist()) for split in ("train", "validation", "test")]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert sum(map(len, seen)) == 40
    data.save_split(tmp_path / "split.json")
    again = load(root, split_file=tmp_path / "split.json")
    assert torch.equal(again.train.indices, data.train.indices)


def test_copies_in_arrays_are_treated_alike(caplog):
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), dtype=np.uint8)
    twice, labels = np.concatenate([images[:50], images[:50]]), np.tile(np.arange(50) % 2, 2)
    data = image_data_from_arrays("a", {"train": (twice, labels), "test": (images[40:], np.arange(20) % 2)}, "ab")
    parts = [set(getattr(data, split).content_hashes().tolist()) for split in ("train", "validation", "test")]
    assert not parts[0] & (parts[1] | parts[2])
    assert data.split_info["train"]["copies_left_out"] > 0
    assert "rows of train are copies of held-out rows" in caplog.text


@pytest.mark.parametrize("size", [(8, 8), (120, 100)])
def test_copies_of_held_out_images_are_not_trained_on(tmp_path, load, caplog, size):
    train, test = rows(30, size=size), rows(9, size=size, first_seed=500)
    test["img"][:3] = train["img"][:3]
    data = load(
        write_parquet(
            tmp_path / "set", {"train": train, "test": test, "validation": rows(6, size=size, first_seed=900)}
        )
    )
    assert data.split_info["train"]["copies_left_out"] == 3
    assert data.train.indices.tolist() == list(range(3, 30))
    assert len(data.test) == 9
    assert "3 rows of train are copies of held-out rows" in caplog.text


@pytest.mark.parametrize("check", ["all", "headers", "none"])
def test_copies_that_are_not_looked_for_are_told(tmp_path, load, caplog, monkeypatch, check):
    monkeypatch.setattr("erde_hub.data.decoding._FULL_HASH_BYTES", 4000)
    train = rows(30)
    test = {name: values[:6] for name, values in train.items()}
    data = load(write_parquet(tmp_path / "set", {"train": train, "test": test}), check_images=check)
    told = "copies of images in train are not looked for" in caplog.text
    assert told == (check != "all")
    assert len(data.train) + len(data.validation) == (30 if told else 24)


def test_a_stream_of_class_folders(tmp_path, load):
    root = fill(tmp_path / "set", ["cat", "dog", "train"], 30)
    stream, loaded = load(root, streaming=True), load(root)
    assert stream.class_names == loaded.class_names
    assert stream.prefix_hash == loaded.prefix_hash
    labels = [label for _, _, label in stream.train.rows()]
    assert labels != sorted(labels)
    parts = [{content for _, content, _ in getattr(stream, s).rows()} for s in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 90
