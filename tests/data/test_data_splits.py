"""Which rows are held out: proportions, disjointness, and files that store them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erde_hub.data.splits import halve_split, hold_out, load_plan, plan_splits, stratified_sample
from erde_hub.errors import DataError

label_lists = st.lists(st.integers(0, 4), min_size=1, max_size=80).map(np.array)


@given(label_lists, st.integers(0, 80), st.integers(0, 5))
def test_a_sample_keeps_proportions_to_within_one_row(labels, count, seed):
    count = min(count, len(labels))
    rows = stratified_sample(labels, count, seed)
    assert len(rows) == count
    assert rows.tolist() == sorted(set(rows.tolist()))
    for label, size in zip(*np.unique(labels, return_counts=True), strict=True):
        assert abs((labels[rows] == label).sum() - count * size / len(labels)) < 1


@given(label_lists, st.floats(0.05, 0.5), st.integers(0, 5))
def test_holding_out_partitions_and_keeps_every_class(labels, fraction, seed):
    sizes = np.bincount(labels)
    if (sizes <= 1).all():
        with pytest.raises(DataError, match="too few to hold out"):
            hold_out(labels, fraction, seed)
        return
    kept, held = hold_out(labels, fraction, seed)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert 1 <= len(held) <= max(1, round(fraction * len(labels)))
    assert set(labels[kept]) == set(labels)


@given(label_lists, st.integers(0, 5))
def test_halves(labels, seed):
    if len(labels) < 2:
        with pytest.raises(DataError, match="cannot be halved"):
            halve_split(labels, seed)
        return
    first, second = halve_split(labels, seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    assert len(first) - len(second) in (0, 1)


def test_sst2_numbers():
    labels = np.repeat([0, 1], [428, 444])
    first, second = halve_split(labels)
    assert [np.bincount(labels[half]).tolist() for half in (first, second)] == [[214, 222], [214, 222]]


def test_the_choice_is_fixed_for_good():
    # these rows are in checkpoints of other people: a change of the rule must not go unnoticed
    labels = np.arange(40) % 4
    assert hold_out(labels, 0.1)[1].tolist() == EXPECTED_HELD
    assert hold_out(labels, 0.1, seed=1)[1].tolist() != EXPECTED_HELD


EXPECTED_HELD = [0, 18, 25, 31]


def labels_of(**sizes):
    return {name: np.arange(size) % 3 for name, size in sizes.items()}


def test_all_three_are_taken_as_given():
    plan = plan_splits(labels_of(train=30, validation=9, test=12))
    assert {name: (source, len(rows)) for name, (source, rows) in plan.rows.items()} == {
        "train": ("train", 30),
        "validation": ("validation", 9),
        "test": ("test", 12),
    }
    assert all(entry["rule"] == "given" for entry in plan.info.values())


def test_validation_is_cut_from_train():
    labels = labels_of(train=300, test=12)
    plan = plan_splits(labels)
    assert plan.rows["validation"][0] == "train"
    assert np.bincount(labels["train"][plan.rows["validation"][1]]).tolist() == [10, 10, 10]
    assert not np.isin(plan.rows["validation"][1], plan.rows["train"][1]).any()
    assert len(plan.rows["train"][1]) == 270
    assert plan.info["validation"] | {"digest": ""} == {
        "rows": 30,
        "source": "train",
        "rule": "stratified part of train",
        "fraction": 0.1,
        "seed": 0,
        "digest": "",
    }
    assert plan.info["train"]["rule"] == "rest of train"
    assert json.loads(json.dumps(plan.info)) == plan.info


def test_validation_is_halved_where_there_is_no_test():
    plan = plan_splits(labels_of(train=30, validation=12))
    (source_v, rows_v), (source_t, rows_t) = plan.rows["validation"], plan.rows["test"]
    assert source_v == source_t == "validation"
    assert sorted([*rows_v, *rows_t]) == list(range(12))
    assert len(plan.rows["train"][1]) == 30


def test_train_alone_gives_all_three():
    plan = plan_splits(labels_of(train=300))
    parts = [plan.rows[name][1] for name in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [216, 24, 60]
    assert sorted(np.concatenate(parts)) == list(range(300))


def test_other_seed_other_rows():
    a, b = (plan_splits(labels_of(train=300), seed).rows["test"][1] for seed in (0, 1))
    assert not np.array_equal(a, b)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"test": 3}, r"there is no split 'train' \(found: 'test'\)"),
        ({"train": 30, "test": 0}, "split 'test' is empty"),
    ],
)
def test_no_train_and_empty_splits(sizes, message):
    with pytest.raises(DataError, match=message):
        plan_splits(labels_of(**sizes))


@pytest.mark.parametrize(
    "sizes", [{"train": 60}, {"train": 60, "test": 9}, {"train": 60, "validation": 10}, {"train": 9, "validation": 4}]
)
def test_a_stored_plan_comes_back(tmp_path, sizes):
    labels = labels_of(**sizes)
    plan = plan_splits(labels, seed=5)
    plan.save(tmp_path / "split.json", "toys", "abc")
    again = load_plan(tmp_path / "split.json", labels, "abc")
    assert again.info == plan.info
    for name, (source, rows) in plan.rows.items():
        assert again.rows[name][0] == source
        assert np.array_equal(again.rows[name][1], rows)
    assert [p.name for p in tmp_path.iterdir()] == ["split.json"]


def test_a_stored_plan_is_checked(tmp_path):
    labels, path = labels_of(train=60), tmp_path / "split.json"
    plan_splits(labels).save(path, "toys", "abc")
    good = json.loads(path.read_text())
    with pytest.raises(DataError, match="fingerprint abc, these have xyz"):
        load_plan(path, labels, "xyz")
    for change, message in [
        ({"validation": [*good["rows"]["test"][:2]]}, "named twice"),
        ({"validation": [0, 0]}, "named twice"),
        ({"validation": [60]}, "names rows that 'train' does not have"),
        ({"validation": [-1]}, "names rows that 'train' does not have"),
        ({"validation": ["a"]}, "cannot be used: ValueError"),
    ]:
        path.write_text(json.dumps({**good, "rows": {**good["rows"], **change}}))
        with pytest.raises(DataError, match=message):
            load_plan(path, labels, "abc")
    path.write_text("{")
    with pytest.raises(DataError, match=r"'split.json' cannot be used: JSONDecodeError"):
        load_plan(path, labels, "abc")
    with pytest.raises(DataError, match=r"'gone.json' cannot be used: FileNotFoundError"):
        load_plan(tmp_path / "gone.json", labels, "abc")
