"""results.json: what it holds, what is kept out of it, what is refused, and that it survives a round trip."""

import argparse
import copy
import json
import math
import pathlib
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import erde_hub
from erde_hub.errors import CheckpointWriteError, RecordsError, ResultsError
from erde_hub.evaluation import (
    build_results,
    describe_data,
    describe_model,
    load_results,
    per_exit_metrics,
    save_results,
    sweep_thresholds,
    validate_results,
)
from erde_hub.prediction_sets import ConformalClassifier
from tests.fakes.records import records_of


def make_records(exits=3, seed=0, info=None):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (60,), generator=generator)
    logits = 2 * torch.randn(exits, 60, 10, generator=generator)
    logits[:, torch.arange(60), labels] += 2 * torch.arange(1, exits + 1)[:, None]
    names = [*(f"layer{e + 1}" for e in range(exits - 1)), "classifier"]
    macs = [1_000_000 * (e + 1) for e in range(exits)]
    return records_of(
        logits, labels, exit_names=names, cumulative_macs=macs, class_names=[str(k) for k in range(10)],
        fingerprint="f00d", info=info or {},
    )  # fmt: skip


def make_model(threshold=0.4, exits=("layer1", "layer2"), policy="entropy"):
    """What a report reads of a wrapper."""
    config = SimpleNamespace(
        architecture="resnet8_cifar",
        library="timm",
        backbone_kwargs={"width": 16},
        exits=list(exits),
        head="fc",
        head_kwargs={},
        policy=policy,
        policy_kwargs={},
        threshold=threshold,
        input_size=[3, 32, 32],
    )
    table = SimpleNamespace(cumulative_macs=[1_000_000, 2_000_000, 3_000_000])
    weights = [torch.zeros(10, 5), torch.zeros(7)]
    return SimpleNamespace(config=config, exit_table=lambda: table, parameters=lambda: iter(weights))


def make_data(name="digits"):
    return SimpleNamespace(
        name=name,
        fingerprint="beef",
        num_classes=10,
        class_names=[f"/m/{k}" for k in range(10)],  # looks like a path and is a class
        input_size=(3, 32, 32),
        split_info={"test": {"rows": 60, "rule": "given"}},
        train=SimpleNamespace(num_samples=100),
        validation=SimpleNamespace(num_samples=None),
        test=SimpleNamespace(num_samples=60),
    )


def make_results(**changes):
    arguments = {
        "records": make_records(),
        "student": make_model(),
        "data": make_data(),
        "args": {"epochs": 3, "lr": 0.1},
        "teacher": make_model(),
        "teacher_records": make_records(seed=1),
        "teacher_exits": [0, 1, 2],
        "loss": {"name": "erde", "temperature": 2.0},
        "training": {"epochs": 3, "seconds": 12.5},
        **changes,
    }
    return build_results(**arguments)


def test_holds_the_contract_and_agrees_with_the_records():
    results = make_results()
    records = make_records()
    assert results["erde_hub"] == erde_hub.__version__
    assert set(results) >= {"erde_hub", "args", "teacher", "student", "dataset", "per_exit", "sweep"}
    assert results["per_exit"] == per_exit_metrics(records)
    assert set(results["per_exit"][0]) >= {"exit", "accuracy", "macs", "ece", "nll"}
    assert results["sweep"] == sweep_thresholds(records)
    assert set(results["sweep"][0]) >= {"threshold", "accuracy", "mean_macs", "exit_share"}
    assert len(results["fine_sweep"]) > 50
    assert results["student"]["accuracy"] == results["per_exit"][-1]["accuracy"]
    assert results["student"]["macs"] == 3_000_000
    assert results["student"]["params"] == 57
    assert results["student"]["teacher_exits"] == [0, 1, 2]
    assert results["teacher"]["per_exit"] == per_exit_metrics(make_records(seed=1))
    assert results["teacher"]["fingerprint"] == "f00d"
    assert results["operating_point"] == sweep_thresholds(records, [0.4])[0]
    assert results["dataset"]["train"] == 100
    assert "validation" not in results["dataset"]
    assert results["metrics"]["ece_bins"] == 15
    assert results["metrics"]["samples"] == 60
    shares = {(row["of"], row["share"]) for row in results["matched_cost"]}
    assert shares == {(of, share) for of in ("student", "teacher") for share in (0.25, 0.5, 0.75)}
    quarter = next(row for row in results["matched_cost"] if row["share"] == 0.25)
    assert quarter["accuracy"] is None  # the first exit costs a third


def test_a_last_exit_that_is_clearly_worse_than_an_earlier_one_is_a_warning():
    def warnings(wrong, more=0):
        """The last exit is wrong on some of 60 samples, the first on others, and the second on none."""
        records = make_records()
        records.logits[:] = 5.0 * torch.nn.functional.one_hot(records.labels, 10)
        records.logits[2, :wrong] *= -1
        records.logits[0, 60 - more :] *= -1
        return make_results(records=records)["warnings"]

    assert warnings(0) == []
    assert warnings(9) == [], "3 standard deviations are chance"
    (text,) = warnings(10, more=1)
    assert "the last exit is correct on 83.3 % of the samples, layer2 on 100.0 %: most often the training" in text
    assert make_results()["warnings"] == []


def test_a_bare_evaluation_and_descriptions_in_place_of_objects():
    results = build_results(make_records(), describe_model(make_model()), describe_data(make_data()), {}, fine=0)
    assert results["teacher"] is None
    assert results["loss"] is None
    assert results["fine_sweep"] == []
    assert results["student"]["accuracy"] == results["per_exit"][-1]["accuracy"]


def test_the_stored_policy_and_per_exit_thresholds_are_used():
    model = make_model(threshold=[0.9, 0.8], policy="confidence")
    results = build_results(make_records(), model, make_data(), {})
    assert results["operating_point"]["threshold"] == [0.9, 0.8]
    assert results["sweep"] == sweep_thresholds(make_records(), policy="confidence")
    assert results["sweep"][-1]["threshold"] == "inf"


def test_static_student():
    results = make_results(static_student=make_model(exits=()), static_records=make_records(exits=1))
    assert results["static_student"]["accuracy"] == per_exit_metrics(make_records(exits=1))[0]["accuracy"]


def test_split_name_comes_with_the_records():
    assert make_results()["metrics"]["split"] == "test"
    results = make_results(records=make_records(info={"split": "validation"}))
    assert results["metrics"]["split"] == "validation"


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ("/home/ada/runs/a", "a"),
        ("/home/ada lovelace/my runs/a", "a"),
        (pathlib.PurePosixPath("/scratch/x/teacher"), "teacher"),
        (pathlib.Path("runs/a"), "runs/a"),
        ("runs/a", "runs/a"),
        ("C:\\Users\\ada\\data", "data"),
        ("D:/data/set", "set"),
        ("\\\\server\\share\\set", "set"),
        ("~/data/set", "set"),
        ("~ada/data/set", "set"),
        ("file:///home/ada/set.zip", "set.zip"),
        ("--data=/home/ada/set --fast", "--data=set --fast"),
        ("see '/home/ada/set' and more", "see 'set' and more"),
        ("/", "root"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("uoft-cs/cifar10", "uoft-cs/cifar10"),
        ("1/2 and a / b", "1/2 and a / b"),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.arange(3), [0, 1, 2]),
        (torch.tensor([1.5]), [1.5]),
        (torch.bfloat16, "torch.bfloat16"),
        ((1, (2, 3)), [1, [2, 3]]),
        ({3, 1}, [1, 3]),
        (math.inf, "inf"),
        (None, None),
        (True, True),
    ],
)
def test_arguments_become_plain_json_without_places(value, stored):
    results = make_results(args={"key": value, "nested": {"list": [value]}})
    assert results["args"]["key"] == stored
    assert results["args"]["nested"]["list"][0] == stored
    assert type(results["args"]["key"]) is type(stored)
    json.dumps(results, allow_nan=False)


def test_arguments_come_in_every_usual_form_and_secrets_stay_out():
    @dataclass
    class Arguments:
        epochs: int = 3
        output_dir: str = "/home/ada/runs/a"

    class Public(Arguments):
        def public_dict(self):
            return {"epochs": 3}

    assert make_results(args=Arguments())["args"] == {"epochs": 3, "output_dir": "a"}
    assert make_results(args=Public())["args"] == {"epochs": 3}
    assert make_results(args=argparse.Namespace(epochs=3))["args"] == {"epochs": 3}
    kept = make_results(args={"hub_token": "x", "api_key": "x", "token": "x", "max_tokens": 7, "token_pool": "avg"})
    assert kept["args"] == {"max_tokens": 7, "token_pool": "avg"}
    with pytest.raises(ResultsError, match="list"):
        make_results(args=[1])


def test_local_data_appear_by_name(tmp_path):
    folder = tmp_path / "birds"
    folder.mkdir()
    results = make_results(data=make_data(str(folder)), args={"dataset": str(folder)})
    assert results["dataset"]["name"] == results["args"]["dataset"] == "birds"
    assert make_results(data=make_data("uoft-cs/cifar10"))["dataset"]["name"] == "uoft-cs/cifar10"
    assert str(tmp_path) not in json.dumps(results)


@pytest.mark.parametrize("value", [math.nan, object(), b"bytes", {"deep": [math.nan]}])
def test_what_json_cannot_hold_is_refused_by_name(value):
    with pytest.raises(ResultsError, match=r"args\.key"):
        make_results(args={"key": value})


def change(path, value):
    """Returns results with one place changed, or removed."""
    results = copy.deepcopy(make_results())
    place = results
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return results


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["sweep"], None, "no 'sweep'"),
        (["student"], None, "no 'student'"),
        (["student", "macs"], None, "student has no 'macs'"),
        (["student"], [], "student must be a mapping"),
        (["per_exit"], [], "per_exit is empty"),
        (["per_exit", 0, "accuracy"], 92.3, "per_exit[0].accuracy must be a fraction in [0, 1], got 92.3"),
        (["per_exit", 1, "macs"], 1.5, "per_exit[1].macs must be an integer"),
        (["sweep", 3, "accuracy"], "high", "sweep[3].accuracy"),
        (["sweep", 3, "accuracy"], True, "sweep[3].accuracy"),
        (["sweep", 3, "exit_share"], [0.5, 0.5], "sweep[3].exit_share must be 3 fractions"),
        (["sweep", 3, "exit_share"], [0.5, 0.2, 0.2], "sum to 1"),
        (["sweep", 3, "threshold"], "high", "sweep[3].threshold"),
        (["fine_sweep", 0, "mean_macs"], -1, "fine_sweep[0].mean_macs"),
        (["teacher", "accuracy"], None, "teacher has no 'accuracy'"),
        (["dataset", "num_classes"], "10", "dataset.num_classes"),
        (["args", "lr"], math.inf, "args.lr is inf"),
        (["args", "lr"], {1: 2}, "the key 1"),
        (["args", "lr"], (1, 2), "args.lr holds a tuple"),
        (["args", "data"], "/home/ada/set", "args.data holds a place on the machine"),
        (["training", "log"], ["x", "~/logs/a"], "training.log[1]"),
    ],
)
def test_validation_names_the_place(path, value, words):
    with pytest.raises(ResultsError) as caught:
        validate_results(change(path, value))
    assert words in str(caught.value)


def test_validation_accepts_what_it_made_and_more():
    results = make_results()
    assert validate_results(results) == results
    assert validate_results({**results, "latency": [{"batch": 1, "ms": 2.0}], "teacher": None})["latency"]
    with pytest.raises(ResultsError, match="mapping"):
        validate_results([results])


def test_file_round_trip(tmp_path):
    results = make_results()
    path = tmp_path / "results.json"
    save_results(results, path)
    assert load_results(path) == results == json.loads(path.read_text())
    lines = path.read_text().splitlines()
    assert sum(line.startswith('    {"threshold"') for line in lines) == len(results["sweep"]) + len(
        results["fine_sweep"]
    )
    before = path.read_bytes()
    with pytest.raises(ResultsError):
        save_results({**results, "sweep": []}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
    with pytest.raises(CheckpointWriteError):
        save_results(results, tmp_path / "missing" / "results.json")
    with pytest.raises(ResultsError, match="finished run"):
        load_results(tmp_path / "other.json")
    path.write_text("{")
    with pytest.raises(ResultsError, match="not JSON"):
        load_results(path)


def test_coverage_and_set_size_come_from_sets_fitted_on_held_out_records():
    held_out = make_records(seed=1, info={"split": "validation"})
    results = build_results(make_records(), make_model(), make_data(), {}, held_out=held_out, set_alpha=0.2)
    facts = {"method": "split conformal, APS", "alpha": 0.2, "split": "validation", "samples": 60}
    assert results["metrics"]["sets"] == facts
    sets = ConformalClassifier.fit(held_out, 0.2).sets(make_records().logits)
    for key in ("per_exit", "sweep", "fine_sweep"):
        assert all(0 <= row["coverage"] <= 1 and 1 <= row["set_size"] <= 10 for row in results[key])
    assert results["per_exit"][-1]["set_size"] == pytest.approx(sets[-1].sum(-1).double().mean().item())
    assert "coverage" in results["operating_point"]
    assert "sets" not in build_results(make_records(), make_model(), make_data(), {})["metrics"]
    with pytest.raises(RecordsError, match="cannot be fitted on the split that is reported, 'test'"):
        build_results(make_records(), make_model(), make_data(), {}, held_out=make_records(info={"split": "test"}))
    with pytest.raises(RecordsError, match="different models"):
        build_results(make_records(), make_model(), make_data(), {}, held_out=make_records(exits=2))
