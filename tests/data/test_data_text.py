"""Texts: tokenised once, padded batch by batch, cut into splits as images are."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from erde_hub.data.images import BatchLoader
from erde_hub.data.texts import load_text_data
from erde_hub.errors import ConfigError, DataError, InputTypeError
from tests.fakes.texts import columns, make_tokenizer, write_encoder, write_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    return write_texts(path / "set", {"train": columns(150), "validation": columns(40, first=300)})


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return load_text_data(folder, make_tokenizer(), max_length=10, cache_dir=cache, progress=False)


def load(folder, tmp_path, tokenizer=None, **kwargs):
    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    return load_text_data(folder, tokenizer, cache_dir=tmp_path / "cache", progress=False, **kwargs)


def test_batches_hold_the_tokens_and_no_more_padding_than_they_need(data):
    stored = columns(150)
    tokenizer = make_tokenizer()
    for batch in BatchLoader(data.train, 16):
        assert set(batch) == {"input_ids", "attention_mask", "labels", "index"}
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
        texts = [stored["sentence"][row] for row in batch["index"]]
        expected = tokenizer(texts, truncation=True, max_length=10, padding=True, return_tensors="pt")
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["attention_mask"], expected["attention_mask"])
        assert batch["labels"].tolist() == [stored["label"][row] for row in batch["index"]]
    assert data.input_size == (10,)
    assert data.num_classes == 2


def test_left_padding(folder, tmp_path):
    tokenizer = make_tokenizer(padding_side="left")
    batch = next(iter(BatchLoader(load(folder, tmp_path, tokenizer).train, 8)))
    expected = tokenizer(columns(8)["sentence"], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert (batch["attention_mask"][:, -1] == 1).all()


def test_an_epoch_of_training_is_every_row_once_in_batches_of_like_length(data):
    loader = BatchLoader(data.train, 4, shuffle=True, seed=3)
    batches = list(loader)
    index = torch.cat([batch["index"] for batch in batches])
    assert sorted(index.tolist()) == list(range(150))
    padded = sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)
    lengths = data.train.lengths
    drawn = np.random.default_rng(0).permutation(150)
    at_random = sum(int(lengths[p].max() * len(p) - lengths[p].sum()) for p in np.split(drawn, range(4, 150, 4)))
    assert padded < at_random / 3
    first = [int(batch["attention_mask"].sum(1).max()) for batch in batches[:16]]
    assert first != sorted(first)  # batches of a window come in any order
    assert len(batches[-1]["labels"]) == 2  # the short last batch stays last

    loader.set_epoch(1)
    other = torch.cat([batch["index"] for batch in loader])
    assert not torch.equal(index, other)
    loader.set_epoch(0, first_batch=5)
    assert torch.equal(torch.cat([batch["index"] for batch in loader]), index[20:])
    halves = [list(BatchLoader(data.train, 2, shuffle=True, seed=3, rank=r, world_size=2)) for r in (0, 1)]
    joined = torch.cat([torch.cat([a["index"], b["index"]]) for a, b in zip(*halves, strict=True)])
    assert torch.equal(joined, index)


def test_evaluation_keeps_the_order_of_the_split(data):
    assert torch.equal(torch.cat([b["index"] for b in BatchLoader(data.validation, 7)]), data.validation.indices)


def test_splits_and_their_file(data, folder, tmp_path):
    assert {name: how["rule"] for name, how in data.split_info.items()} == {
        "train": "given", "validation": "rest of validation", "test": "stratified half of validation",
    }  # fmt: skip
    assert len(data.validation) == len(data.test) == 20
    other = load(folder, tmp_path, seed=1)
    assert not torch.equal(other.test.indices, data.test.indices)
    data.save_split(tmp_path / "split.json")
    again = load(folder, tmp_path, seed=1, split_file=tmp_path / "split.json")
    assert torch.equal(again.test.indices, data.test.indices)
    assert again.fingerprint == data.fingerprint
    limited = load(folder, tmp_path, max_train_samples=30, max_eval_samples=6)
    assert (len(limited.train), len(limited.validation), len(limited.test)) == (30, 6, 6)
    assert set(limited.test.indices.tolist()) < set(data.test.indices.tolist())
    changed = write_texts(tmp_path / "changed", {"train": columns(151), "validation": columns(40, first=300)})
    with pytest.raises(DataError, match="was written for data with fingerprint"):
        load(changed, tmp_path, split_file=tmp_path / "split.json")


def test_what_is_tested_is_not_trained_on(tmp_path):
    own = columns(60)
    test = columns(10, first=100)
    test["sentence"][3], test["sentence"][4] = own["sentence"][7], own["sentence"][8] + " "
    data = load(write_texts(tmp_path / "set", {"train": own, "test": test}), tmp_path)
    left_out = data.split_info["train"]["copies_left_out"]
    held_out = {7, 8} - set(data.validation.indices.tolist())
    assert left_out == len(held_out)
    assert not held_out & set(data.train.indices.tolist())
    assert len(data.train) + len(data.validation) + left_out == 60
    assert len(data.test) == 10
    data.save_split(tmp_path / "split.json")
    again = load(tmp_path / "set", tmp_path, split_file=tmp_path / "split.json")
    assert torch.equal(again.train.indices, data.train.indices)
    with pytest.raises(DataError, match="nothing is left to train on"):
        load(write_texts(tmp_path / "same", {"train": own, "validation": own, "test": own}), tmp_path)


def test_columns_are_found_or_named(tmp_path):
    own = {"text": columns(30)["sentence"], "title": columns(30)["sentence"], "label": ["a", "b"] * 15}
    folder = write_texts(tmp_path / "set", {"train": own})
    with pytest.raises(DataError, match=r"several text columns: text, title; choose one with --text_column"):
        load(folder, tmp_path)
    data = load(folder, tmp_path, text_column="title")
    assert data.class_names == ["a", "b"]
    with pytest.raises(DataError, match=r"no text column 'titel'; did you mean 'title'"):
        load(folder, tmp_path, text_column="titel")
    numbers = write_texts(tmp_path / "numbers", {"train": {"label": [0, 1] * 9, "size": [0, 1] * 9}})
    with pytest.raises(DataError, match=r"no text column found .*name it with --text_column"):
        load(numbers, tmp_path)
    with pytest.raises(DataError, match=r"text column 'size' of 'numbers' is of type ClassLabel: give a column of str"):
        load(numbers, tmp_path, text_column="size")


@pytest.mark.parametrize("name", ["NA", "None", "null", "nan", "n/a"])
def test_a_class_of_a_csv_file_may_be_called_na(tmp_path, name):
    (tmp_path / "set").mkdir()
    lines = [f"{text},{(name, 'EU')[i % 2]}" for i, text in enumerate(columns(60)["sentence"])]
    (tmp_path / "set" / "train.csv").write_text("\n".join(["text,label", *lines]))
    assert load(tmp_path / "set", tmp_path).class_names == sorted([name, "EU"])
    numbers = [f"{text},{(name, '0', '1')[i % 3]}" for i, text in enumerate(columns(60)["sentence"])]
    (tmp_path / "set" / "train.csv").write_text("\n".join(["text,label", *numbers]))
    with pytest.raises(DataError, match=f"are numbers and '{name}' .first in row 0 of train."):
        load(tmp_path / "set", tmp_path)
    empty = [f"{text},{('', 'EU', 'US')[i % 3]}" for i, text in enumerate(columns(60)["sentence"])]
    (tmp_path / "set" / "train.csv").write_text("\n".join(["text,label", *empty]))
    with pytest.raises(DataError, match="20 rows of split 'train' of 'set' have no label"):
        load(tmp_path / "set", tmp_path)


@pytest.mark.parametrize("empty", ["", "  ", "\t", None])
def test_an_empty_label_is_none(tmp_path, empty):
    """In files other than CSV too; NA and None are classes there as well."""
    own = columns(60)
    own["label"] = [("NA", "None")[i % 2] for i in range(60)]
    test = {**columns(9, first=100), "label": [empty] * 9}  # as in the test splits of many benchmarks
    kinds = dict.fromkeys(own, datasets.Value("string"))
    data = load(write_texts(tmp_path / "set", {"train": own, "test": test}, kinds), tmp_path)
    assert data.class_names == ["NA", "None"]
    assert len(data.train) + len(data.validation) + len(data.test) == 60
    own["label"][5] = own["label"][17] = empty
    with pytest.raises(DataError, match=r"2 rows of split 'train' of 'empty' have no label .* first is row 5: remove"):
        load(write_texts(tmp_path / "empty", {"train": own}, kinds), tmp_path)


def test_rows_without_text(folder, tmp_path):
    own = columns(30)
    own["sentence"][11] = None
    features = {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    with pytest.raises(DataError, match=r"row 11 of split 'train' of 'set' has no text in 'sentence'"):
        load(write_texts(tmp_path / "set", {"train": own}, features), tmp_path)
    own["sentence"][11] = "  "
    empty = write_texts(tmp_path / "empty", {"train": own})
    with pytest.raises(DataError, match=r"the text in row 11 of split 'train' of 'empty' has no tokens"):
        load(empty, tmp_path, make_tokenizer(special=False))
    assert load(empty, tmp_path).train.lengths.min() == 2  # with [CLS] and [SEP] it has


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_length": 2}, r"max_length=2 is not allowed: give a number of tokens, 3 to 64"),
        ({"max_length": 65}, "3 to 64, what the tokenizer was made for"),
        ({"max_train_samples": 0}, "max_train_samples=0 is not allowed"),
        ({"tokenizer": "no/such"}, "no tokenizer could be loaded from 'no/such'"),
        ({"tokenizer": 3}, "tokenizer must be one of transformers"),
    ],
)
def test_what_is_refused(folder, tmp_path, change, words):
    with pytest.raises((ConfigError, InputTypeError), match=words):
        load(folder, tmp_path, **change)


def test_settings_of_images_are_refused(data):
    with pytest.raises(ConfigError, match="augment='crop_flip' is for images"):
        BatchLoader(data.train, 4, augment="crop_flip")
    with pytest.raises(ConfigError, match="channels_last is a memory format of images"):
        BatchLoader(data.train, 4, channels_last=True)


def test_the_tokenizer_goes_with_a_checkpoint(folder, data, tmp_path):
    data.tokenizer.save_pretrained(tmp_path / "run")
    again = load(folder, tmp_path, tmp_path / "run", max_length=10)
    first, second = (next(iter(BatchLoader(own.test, 20))) for own in (data, again))
    assert torch.equal(first["input_ids"], second["input_ids"])
    write_encoder(tmp_path / "encoder")
    assert load(folder, tmp_path, tmp_path / "encoder").max_length == 64
    make_tokenizer(pad_token=None).save_pretrained(tmp_path / "unpadded")
    with pytest.raises(ConfigError, match="has no padding token"):
        load(folder, tmp_path, tmp_path / "unpadded")


@pytest.mark.parametrize("names", [["positive", "negative"], ["negative", "positive", "mixed"], ["negative"]])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("files", [("train", "test"), ("train-0", "train-1")])
def test_files_that_name_their_classes_differently_are_refused(tmp_path, names, kind, files):
    """``datasets`` reads all with the names of the first file."""
    for file, own in zip(files, (["negative", "positive"], names), strict=True):
        kinds = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=own)})
        values = {**columns(60), "label": [0] * 60}
        if kind == "parquet":
            write_texts(tmp_path / "set", {file: values}, kinds)
        else:
            (tmp_path / "set").mkdir(exist_ok=True)
            table = datasets.Dataset.from_dict(values, features=kinds).data.table
            with pa.ipc.new_stream(str(tmp_path / "set" / f"{file}.arrow"), table.schema) as stream:
                stream.write_table(table)
    with pytest.raises(DataError, match=r"name the classes of 'label' differently, \['negative', 'positive'\] and \['"):
        load(tmp_path / "set", tmp_path)


def write_csv(path, labels=("a", "b"), separator=",", encoding="utf-8", count=60, first=0):
    lines = [f"{text}{separator}{labels[i % len(labels)]}" for i, text in enumerate(columns(count, first)["sentence"])]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([f"text{separator}label", *lines]), encoding=encoding)


@pytest.mark.parametrize("name", ["more.csv", "more.jsonl", "more.json", "more.tsv", "more.txt", "more.CSV"])
def test_tables_of_texts_that_are_not_used_are_told(tmp_path, caplog, name):
    write_csv(tmp_path / "set" / "train.csv")
    write_csv(tmp_path / "set" / name, first=100)
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    data = load(tmp_path / "set", tmp_path)
    assert len(data.train) + len(data.validation) + len(data.test) == 60
    assert f"1 of 2 tables in set are not used ({name})" in caplog.text


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("train.CSV", {}, "in small letters, not like 'train.CSV'"),
        ("train.csv", {"encoding": "latin-1", "labels": ("ä", "b")}, "save its files as UTF-8"),
        ("train.csv", {"separator": ";"}, "'train.csv' of 'set' separates its columns by ';' .*save it with commas"),
        ("train.csv", {"separator": "\t"}, r"separates its columns by '\\t'"),
    ],
)
def test_a_csv_file_of_another_form_says_what_to_do(tmp_path, name, options, message):
    write_csv(tmp_path / "set" / name, **options)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "set", tmp_path)


@pytest.mark.parametrize(
    ("written", "names"),
    [(("007", "042", "1"), ["007", "042", "1"]), (("10", "9", " 0"), ["0", "9", "10"]), (("1.0", "2"), ["1.0", "2"])],
)
@pytest.mark.parametrize("column", [None, "text_class"])
def test_labels_of_csv_files_stay_as_they_are_written(tmp_path, written, names, column):
    """Whole numbers in their usual form are classes in their order, as before."""
    write_csv(tmp_path / "set" / "train.csv", written)
    write_csv(tmp_path / "set" / "test.csv", written[:1], count=20, first=500)
    options = {}
    if column is not None:
        for path in (tmp_path / "set").iterdir():
            path.write_text(path.read_text().replace("text,label", f"text,{column}"))
        options = {"text_column": "text", "label_column": column}
    data = load(tmp_path / "set", tmp_path, **options)
    assert data.class_names == names
    assert {data.class_names[label] for label in data.test.labels.tolist()} == {written[0]}
