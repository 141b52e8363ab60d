"""Finding columns, classes and labels, and saying what is wrong with them."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from erde_hub.data.columns import find_columns
from erde_hub.errors import DataError, LabelError
from tests.fakes.images import picture, rows, write_parquet

IMAGE, CLASSES = datasets.Image(), datasets.ClassLabel(names=["a", "b"])


def test_columns_are_found_by_type():
    features = {"id": datasets.Value("int64"), "photo": IMAGE, "kind": CLASSES, "text": datasets.Value("string")}
    assert find_columns(features, "d", None, None) == ("photo", "kind")
    assert find_columns(features, "d", None, "id") == ("photo", "id")
    plain = {"photo": IMAGE, "label": datasets.Value("int64"), "id": datasets.Value("int64")}
    assert find_columns(plain, "d", None, None) == ("photo", "label")
    assert find_columns({"photo": IMAGE, "id": datasets.Value("string")}, "d", None, None) == ("photo", "id")


@pytest.mark.parametrize(
    ("features", "named", "message"),
    [
        ({"img": IMAGE, "y": CLASSES}, {"image_column": "imgs"}, r"no image column 'imgs'; did you mean 'img'\?"),
        (
            {"img": IMAGE, "y": CLASSES},
            {"label_column": "z"},
            r"no label column 'z'.*columns: img \(Image\), y \(ClassLabel",
        ),
        (
            {"img": IMAGE, "left": IMAGE, "y": CLASSES},
            {},
            "several image columns: img, left; choose one with --image_col",
        ),
        ({"img": IMAGE, "fine": CLASSES, "coarse": CLASSES}, {}, "several label columns: fine, coarse; choose one"),
        ({"img": IMAGE, "a": datasets.Value("int8"), "b": datasets.Value("string")}, {}, "several label columns: a, b"),
        ({"y": CLASSES}, {}, "no image column found"),
        ({"img": IMAGE, "y": datasets.Value("float32")}, {}, "no label column found"),
        ({"img": IMAGE, "y": datasets.Value("float32")}, {"label_column": "y"}, "'y' of 'd' is of type float32"),
        ({"img": IMAGE, "y": datasets.List(CLASSES)}, {"label_column": "y"}, "'y' of 'd' is of type List"),
        ({"img": IMAGE, "y": CLASSES}, {"image_column": "y"}, "image column 'y' of 'd' is of type ClassLabel"),
    ],
)
def test_columns_in_doubt(features, named, message):
    named = {"image_column": None, "label_column": None, **named}
    with pytest.raises(DataError, match=message):
        find_columns(features, "d", **named)


def test_an_image_folder(tmp_path, load):
    for split, count in (("train", 12), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_bytes(picture(name == "dog", i + 100 * (split == "test")))
    data = load(tmp_path / "pets")
    assert data.name == "pets"
    assert data.class_names == ["cat", "dog"]
    assert (len(data.train), len(data.validation), len(data.test)) == (22, 2, 6)
    assert str(tmp_path) not in repr(data.summary())
    first = np.asarray(data.train.images([0])[0])
    assert (first[..., 0] == 20 * data.train.labels[0].item()).all()


def test_columns_without_metadata(tmp_path, load):
    """Parquet as other programs write it: bytes and strings."""
    folder = tmp_path / "plain"
    folder.mkdir()
    words = ["zebra", "ant"]
    table = pa.table({"png": [picture(i % 2, i) for i in range(30)], "animal": [words[i % 2] for i in range(30)]})
    pa.parquet.write_table(table, folder / "train.parquet")
    data = load(folder, image_column="png", label_column="animal")
    assert data.class_names == ["ant", "zebra"]
    assert (data.train.labels == (data.train.indices + 1) % 2).all()
    with pytest.raises(
        DataError, match=r"no image column found in 'plain' \(columns: png \(binary\), animal \(string\)\)"
    ):
        load(folder)


def test_integer_labels_get_names(tmp_path, load):
    features = {"img": IMAGE, "label": datasets.Value("int32")}
    columns = rows(30)
    columns["label"] = [10 * label - 10 for label in columns["label"]]
    data = load(write_parquet(tmp_path / "set", {"train": columns}, features))
    assert data.class_names == ["-10", "0", "10"]
    assert set(data.train.labels.tolist()) == {0, 1, 2}

    test = {"img": columns["img"][:4], "label": [0, 0, 5, 10]}
    with pytest.raises(LabelError, match=r"label 5 in row 2 of split 'test' of 'more' does not occur in train"):
        load(write_parquet(tmp_path / "more", {"train": columns, "test": test}, features))


def test_a_column_of_captions_is_no_label(tmp_path, load):
    features = {"img": IMAGE, "text": datasets.Value("string")}
    columns = {"img": rows(50)["img"], "text": [f"picture {i}" for i in range(50)]}
    with pytest.raises(DataError, match="'text' of 'set' has 50 different values in 50 rows, which are hardly classes"):
        load(write_parquet(tmp_path / "set", {"train": columns}, features))


def test_missing_labels(tmp_path, load):
    columns = rows(30)
    columns["label"][7] = None
    columns["label"][9] = -1
    with pytest.raises(
        DataError, match="2 rows of split 'train' of 'set' have no label in 'label', the first is row 7"
    ):
        load(write_parquet(tmp_path / "set", {"train": columns}))


def test_an_unlabelled_test_split_is_left_out(tmp_path, load):
    columns = {"train": rows(30), "validation": rows(12, first_seed=500), "test": {**rows(6), "label": [-1] * 6}}
    data = load(write_parquet(tmp_path / "set", columns))
    assert data.split_info["test"]["rule"] == "stratified half of validation"
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 6, 6)


def test_labels_outside_the_classes(tmp_path, load):
    folder = write_parquet(tmp_path / "set", {"train": rows(30), "test": rows(6, first_seed=500)})
    # datasets refuses to write such a label, other programs do not
    path = tmp_path / "set" / "data" / "test-00000-of-00001.parquet"
    table = pa.parquet.read_table(path)
    broken = table.set_column(1, "label", pa.array([0, 1, 2, 7, 0, 1]))
    pa.parquet.write_table(broken.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(
        LabelError, match=r"label 7 in row 3 of split 'test' of 'set' is outside the 3 classes \(0 to 2\)"
    ):
        load(folder)


def test_a_single_class(tmp_path, load):
    columns = {**rows(30), "label": [1] * 30}
    with pytest.raises(
        DataError, match=r"all rows of split 'train' of 'set' have the same label in 'label' \('class 1'\)"
    ):
        load(write_parquet(tmp_path / "set", {"train": columns}))


def test_empty_and_missing_splits(tmp_path, load):
    empty = {"img": [], "label": []}
    with pytest.raises(DataError, match=r"a split of 'set' is empty .*\"test\""):
        load(write_parquet(tmp_path / "set", {"train": rows(9), "test": empty}))
    with pytest.raises(DataError, match=r"'other' has no split 'train' \(found: 'test'\)"):
        load(write_parquet(tmp_path / "other", {"test": rows(9)}))


def test_split_names_that_mean_the_same(tmp_path, load):
    data = load(write_parquet(tmp_path / "set", {"train": rows(30), "valid": rows(6, first_seed=500)}))
    assert data.split_info["validation"]["source"] == "validation"
    assert len(data.train) == 30


@pytest.mark.parametrize("cell", [None, b"", b"this is no image"])
def test_an_unreadable_image_is_named(tmp_path, load, cell):
    columns = rows(30)
    columns["img"][11] = cell
    with pytest.raises(DataError, match=r"row 11 of split 'train' of 'set'"):
        load(write_parquet(tmp_path / "set", {"train": columns, "test": rows(6, first_seed=500)}))


def test_a_broken_header_of_a_large_image_is_found_at_once(tmp_path, load):
    columns = rows(40, size=(120, 100))
    columns["img"][23] = b"this is no image"
    with pytest.raises(DataError, match=r"row 23 of split 'train' of 'set' cannot be read \(UnidentifiedImageError"):
        load(write_parquet(tmp_path / "set", {"train": columns, "test": rows(6, size=(120, 100))}))


def test_a_file_that_disappeared(tmp_path, load):
    for name in ("cat", "dog"):
        folder = tmp_path / "pets" / "train" / name
        folder.mkdir(parents=True)
        for i in range(9):
            Image.new("RGB", (120, 100), (i, 0, 0)).save(folder / f"{i}.png")
    load(tmp_path / "pets")
    (tmp_path / "pets" / "train" / "dog" / "3.png").write_text("")
    with pytest.raises(DataError, match=r"of split 'train' of 'pets' \(dog/3\.png\)"):
        load(tmp_path / "pets")


def test_nothing_of_that_name(tmp_path, load, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match=r"folder '.*pictures' holds no files"):
        load(tmp_path / "pictures")
    with pytest.raises(DataError, match=r"there is no folder './picture'; did you mean 'pictures'\?"):
        load("./picture")
    with pytest.raises(
        DataError, match=r"data set 'nobody/nothing' is neither 'digits' nor a folder here, and the Hub"
    ):
        load("nobody/nothing")
    (tmp_path / "pictures" / "readme.xyz").write_text("hello")
    with pytest.raises(DataError, match=r"cannot be read by datasets\.load_dataset"):
        load("pictures")
    with pytest.raises(DataError, match="is a file: give the folder"):
        load(tmp_path / "pictures" / "readme.xyz")


@pytest.mark.parametrize("name", ["set[1]", "a*b", "q?", "{x}"])
def test_a_path_is_no_pattern(tmp_path, load, name):
    """A folder a*b was read together with its neighbour aXb."""
    folder = write_parquet(tmp_path / name, {"train": rows(30), "test": rows(9, first_seed=300)})
    for other in ("set1", "aXb", "qX", "x"):
        write_parquet(tmp_path / other, {"train": rows(40, first_seed=900), "test": rows(9, first_seed=600)})
    data = load(folder)
    assert (len(data.train) + len(data.validation), len(data.test)) == (30, 9)
    assert data.name == name


def test_tables_that_are_not_used_are_told(tmp_path, load, caplog):
    folder = write_parquet(tmp_path / "set", {"train": rows(30)})
    for name in ("extra.parquet", "more.PARQUET"):
        (tmp_path / "set" / "data" / name).write_bytes(b"")
    assert len(load(folder).train) == 22
    assert "2 of 3 tables in set are not used (extra.parquet, more.PARQUET)" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_that_name_their_classes_differently_are_refused(tmp_path, load, streaming):
    write_parquet(tmp_path / "set", {"train": rows(30)})
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["class 2", "class 1", "class 0"])}
    folder = write_parquet(tmp_path / "set", {"test": rows(12)}, features)
    with pytest.raises(DataError, match=r"'label' differently, \['class \d', .*\] and \['class \d', .* one ClassLabel"):
        load(folder, streaming=streaming)
