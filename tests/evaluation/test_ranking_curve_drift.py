"""Ranking metrics, area under the curve, drift, diagnostic pictures: against slow definitions and made-up changes."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest
import torch
from PIL import Image

from erde_hub.calibration import TemperatureCalibrator, choose_threshold
from erde_hub.errors import (
    ConfigError,
    InputTypeError,
    RecordsError,
    RepeatedSamplesWarning,
    ShapeError,
    ThresholdError,
    UnknownNameError,
)
from erde_hub.evaluation import (
    accuracy_at_cost,
    area_difference,
    aurc,
    auroc,
    calibrate_records,
    compare_records,
    curve_area,
    exit_metrics,
    fine_thresholds,
    per_exit_metrics,
    plot_curves,
    route_records,
    sweep_thresholds,
)
from erde_hub.evaluation.diagnostics import plot_contact_sheet, plot_fractions, plot_reliability, plot_scores
from erde_hub.evaluation.ranking import mean_of_defined
from tests.fakes.records import records_of


def make_records(samples=400, exits=3, classes=6, seed=0, harder=0.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    common = torch.randn(samples, classes, generator=generator)
    logits = []
    for e in range(exits):
        z = common + (2.0 - 0.5 * e) * torch.randn(samples, classes, generator=generator)
        z[torch.arange(samples), labels] += 1.5 + 2.5 * e - harder
        logits.append(1.5 * z)
    names = [*(f"layer{e}" for e in range(exits - 1)), "classifier"]
    macs = [100 * (e + 1) for e in range(exits)]
    return records_of(torch.stack(logits), labels, exit_names=names, cumulative_macs=macs, fingerprint="a" * 32)


def test_aurc_is_the_mean_over_orders_of_ties():
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.5, 0.5, 0.1])
    correct = torch.tensor([True, False, True, False, True, False])
    rng, values = random.Random(0), []
    for _ in range(4000):
        order = sorted(range(6), key=lambda i: (-float(confidence[i]), rng.random()))
        wrong = [0.0 if correct[i] else 1.0 for i in order]
        values.append(sum(sum(wrong[:i]) / i for i in range(1, 7)) / 6)
    assert aurc(confidence, correct) == pytest.approx(sum(values) / len(values), abs=0.01)
    assert aurc(torch.tensor([0.1, 0.9]), torch.tensor([True, True])) == 0
    with pytest.raises(ShapeError, match=r"got \(2,\) and \(3,\)"):
        aurc(torch.zeros(2), torch.zeros(3))


def test_auroc_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (60,), generator=generator).float()
    positive = torch.rand(60, generator=generator) < 0.4
    pairs = [(float(a > b) + 0.5 * float(a == b)) for a in scores[positive] for b in scores[~positive]]
    assert auroc(scores, positive) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(scores, torch.ones(60).bool()) is None
    assert mean_of_defined([None, 0.5, 0.7]) == pytest.approx(0.6)
    assert mean_of_defined([None]) is None


def test_rows_hold_the_new_metrics():
    records = make_records()
    rows = per_exit_metrics(records)
    assert [("eefp" in row) for row in rows] == [True, True, False]
    for row, logits in zip(rows, records.logits, strict=True):
        confidence = logits.double().softmax(-1).amax(-1)
        right = logits.argmax(-1) == records.labels
        assert row["aurc"] == pytest.approx(aurc(confidence, right))
        assert row["aurc"] == exit_metrics(logits, records.labels)["aurc"]
    json.dumps(rows, allow_nan=False)
    assert "aurc" in sweep_thresholds(records, [0.5])[0]


def test_golden_metrics(golden):
    data = golden("metrics")
    for case in data["cases"]:
        logits = torch.tensor(case["inputs"]["logits"], dtype=torch.float64)
        labels, expected = torch.tensor(case["inputs"]["labels"]), case["expected"]
        found = exit_metrics(logits, labels)
        pairs = {"accuracy": "accuracy", "nll": "nlpd", "brier": "brier", "ece": "ece15_right_closed"}
        for ours, theirs in pairs.items():
            assert found[ours] == pytest.approx(expected[theirs], rel=1e-9)
        assert exit_metrics(logits, labels, bins=10)["ece"] == pytest.approx(expected["ece10_right_closed"], rel=1e-9)


def test_the_area_is_the_mean_accuracy_over_costs():
    records = make_records(2000)
    found = curve_area(records, "entropy", 0.4, 0.9, resamples=50)
    rows = sweep_thresholds(records, fine_thresholds(records, "entropy"), "entropy")
    costs = [0.4 + 0.5 * (i + 0.5) / 400 for i in range(400)]
    expected = sum(accuracy_at_cost(rows, 300 * cost) for cost in costs) / 400
    assert found.area == pytest.approx(expected, abs=2e-3)
    assert found.interval[0] < found.area < found.interval[1]
    width = found.interval[1] - found.interval[0]
    assert width == pytest.approx(2 * 1.96 * (found.area * (1 - found.area) / 2000) ** 0.5, rel=0.4)
    assert curve_area(records, "entropy", 0.4, 0.9, resamples=50) == found
    assert curve_area(records, resamples=0).low == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match=r"begin at the lowest cost that can be reached, 0\.3333 of the full cost"):
        curve_area(records, "entropy", 0.2)


def test_costs_that_a_policy_cannot_reach_are_not_credited():
    """Patience exits at the second exit at the earliest: between the costs of the first two it has no accuracy."""
    records = make_records(2000, exits=4)
    patience, entropy = curve_area(records, "patience", resamples=0), curve_area(records, "entropy", resamples=0)
    assert entropy.low == pytest.approx(0.25)
    cheapest = sweep_thresholds(records, [1.0], "patience")[0]["mean_macs"] / 400
    assert patience.low == pytest.approx(cheapest)
    assert cheapest > 0.5
    with pytest.raises(ConfigError, match="must rise and begin at the lowest cost that can be reached"):
        curve_area(records, "patience", 0.3)
    for first, second in (("patience", "entropy"), ("entropy", "patience")):
        difference = area_difference(records, first, records, second, resamples=0)
        assert difference.low == pytest.approx(cheapest)
        common = [curve_area(records, policy, cheapest, resamples=0).area for policy in (first, second)]
        assert difference.area == pytest.approx(common[0] - common[1])
    assert area_difference(records, "patience", records, "entropy", resamples=0).area < 0


def test_areas_are_compared_on_the_same_samples():
    records = make_records(1500)
    better = dataclasses.replace(records, logits=torch.stack([records.logits[2] * 0.99, *records.logits[1:]]))
    difference = area_difference(better, "entropy", records, "entropy", resamples=60)
    assert difference.interval[0] > 0
    same = area_difference(records, "entropy", records, "entropy", resamples=20)
    assert same.area == 0
    assert same.interval == (0, 0)
    single = curve_area(records, "entropy", resamples=60)
    difference = area_difference(records, "confidence", records, "entropy", resamples=60)
    assert abs(difference.area) < 0.02
    assert difference.interval[1] - difference.interval[0] < single.interval[1] - single.interval[0]
    with pytest.raises(RecordsError, match="different samples"):
        area_difference(records, "entropy", records.select(range(10)), "entropy")


@pytest.mark.parametrize(
    ("target", "bound", "says"), [("disagreement", 0.1, "promised: 10 %"), ("brier_increase", 0.1, "promised: 0.1")]
)
def test_drift_speaks_of_what_was_promised(target, bound, says):
    before, now = make_records(3000), make_records(3000, seed=1)
    choice = choose_threshold(before, "entropy", confidence=0.9, **{f"max_{target}": bound})
    fine = compare_records(before, now, "entropy", choice.threshold, 1.2 * bound, target=target)
    assert fine.verdict == "holds"
    assert fine.loss[0] == pytest.approx(choice.value)
    assert fine.loss[1] < fine.supported_bound <= 1.2 * bound
    broken = compare_records(before, make_records(3000, seed=2, harder=1.2), "entropy", 1.2, bound, target=target)
    assert broken.verdict == "broken"
    assert says in str(broken)
    with pytest.raises(UnknownNameError, match="did you mean 'disagreement'"):
        compare_records(before, now, "entropy", 0.5, target="disagrement")


def test_drift_is_found_and_its_absence_too():
    before, now = make_records(3000), make_records(3000, seed=1)
    choice = choose_threshold(before, "entropy", max_accuracy_drop=0.05, confidence=0.9)
    fine = compare_records(before, now, "entropy", choice.threshold, 0.06)
    assert fine.verdict == "holds"
    assert fine.share_p_value > 0.01
    assert fine.accuracy_drop[0] == pytest.approx(choice.value)
    assert fine.exit_share[0] == pytest.approx(choice.exit_share)
    harder = make_records(3000, seed=2, harder=1.2)
    changed = compare_records(before, harder, "entropy", 0.8, 0.05)
    assert changed.verdict == "broken"
    assert changed.share_p_value < 1e-6
    assert compare_records(before, harder, "entropy", 0.8).verdict == "changed"
    assert compare_records(before, now, "entropy", choice.threshold).verdict == "same"
    few = compare_records(before, now.select(range(40)), "entropy", choice.threshold, 0.05)
    assert few.verdict == "open"
    assert "too few new samples to tell" in str(few)
    with pytest.raises(RecordsError, match="different weights"):
        compare_records(before, dataclasses.replace(now, fingerprint="b" * 32), "entropy", 0.5)
    with pytest.raises(RecordsError, match="different models"):
        compare_records(before, make_records(30, exits=2), "entropy", 0.5)


def blurred(records):
    """The same samples with half of the evidence of every exit gone: routing follows the full model down."""
    generator = torch.Generator().manual_seed(5)
    noise = 1.5 * torch.randn(records.logits.shape[1:], generator=generator)
    return dataclasses.replace(records, logits=0.4 * records.logits + noise)


def test_threshold_model_and_input_have_a_verdict_each_with_the_next_command():
    before, now = make_records(3000), make_records(3000, seed=1)
    fine = compare_records(before, now, "entropy", 0.2, 0.2)
    assert (fine.verdict, fine.model_verdict, fine.input_verdict) == ("holds", "same", "same")
    found = compare_records(before, blurred(now), "entropy", 0.2, 0.2)
    assert found.full_accuracy[1] < found.full_accuracy[0] - 0.1
    assert (found.verdict, found.model_verdict, found.input_verdict) == ("holds", "worse", "changed")
    lines = str(found).splitlines()[-3:]
    assert [line.split(":")[0] for line in lines] == ["threshold", "model", "input"]
    assert "which no threshold mends" in lines[1]
    assert "python recipes/distill.py --dataset DATA" in lines[1]
    broken = compare_records(before, make_records(3000, seed=2, harder=1.2), "entropy", 0.8, 0.05)
    assert "python recipes/calibrate.py" in str(broken).splitlines()[-3]


def test_images_without_labels_are_compared_by_exits_and_scores():
    before, now = make_records(3000), make_records(3000, seed=1)
    unlabelled = dataclasses.replace(now, labels=None)
    assert not unlabelled.labelled
    assert not unlabelled.select(range(10)).labelled
    found = compare_records(before, unlabelled, "entropy", 0.5, 0.2)
    assert (found.verdict, found.model_verdict, found.input_verdict) == ("unknown", "unknown", "same")
    assert found.accuracy[1] is None
    assert found.exit_share == compare_records(before, now, "entropy", 0.5).exit_share
    assert "label some" in str(found)
    assert (
        compare_records(before, dataclasses.replace(blurred(now), labels=None), "entropy", 0.5).input_verdict
        == "changed"
    )
    agreed = compare_records(before, unlabelled, "entropy", 0.5, 0.5, target="disagreement")
    assert agreed.verdict == "holds", "disagreement with the full model needs no labels"
    for function in (sweep_thresholds, per_exit_metrics, curve_area, TemperatureCalibrator.fit):
        with pytest.raises(RecordsError, match="needs labels, these records have none"):
            function(unlabelled)


def test_a_sample_that_is_repeated_counts_once_in_a_comparison():
    before, now = make_records(300), make_records(60, seed=1)
    once = compare_records(before, now, "entropy", 0.5, 0.2)
    with pytest.warns(RepeatedSamplesWarning, match="2940 of 3000 rows repeat a sample index"):
        many = compare_records(before, now.select(torch.arange(60).repeat(50)), "entropy", 0.5, 0.2)
    assert many == once


def test_drift_names_the_exits_and_writes_its_confidence_no_larger_than_it_is():
    records = dataclasses.replace(make_records(300), exit_names=["backbone.stages.1.blocks", "b", "classifier"])
    lines = str(compare_records(records, records, "entropy", 0.5, 0.2, 0.764783)).splitlines()
    assert sum(line.startswith("exit at backbone.stages.1.blocks, % ") for line in lines) == 1
    assert sum(line.startswith("exit at classifier, %") for line in lines) == 1
    assert len({len(line) for line in lines[1:9]}) == 1, "columns stay below each other"
    assert any("with 76.4 % confidence" in line for line in lines)


@pytest.mark.parametrize(("args", "error", "message"), [
    ({"policy": 3}, InputTypeError, "policy must be a name"),
    ({"bound": "abc"}, InputTypeError, "bound must be a number at least 0, got 'abc'"),
    ({"bound": math.nan}, ConfigError, "bound must be finite"),
    ({"confidence": 1.5}, ConfigError, r"confidence must be between 0 and 1, both excluded, got 1\.5"),
    ({"now": "now.safetensors"}, InputTypeError, "now must be ExitRecords"),
    ({"before": None}, InputTypeError, "before must be ExitRecords"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(args, error, message):
    records = make_records(30)
    with pytest.raises(error, match=message):
        compare_records(**{"before": records, "now": records, "policy": "entropy", "threshold": 0.5} | args)


@pytest.mark.parametrize(("args", "error", "message"), [
    ({"policy": None}, InputTypeError, "policy must be a name"),
    ({"low": "abc"}, InputTypeError, "low must be a number"),
    ({"high": math.inf}, ConfigError, "high must be finite"),
    ({"full_macs": 0}, ConfigError, "full_macs must be finite and above 0, got 0"),
    ({"resamples": -1}, ConfigError, "resamples must be at least 0, got -1"),
    ({"level": 1.5}, ConfigError, r"level must be finite and above 0 and below 1, got 1\.5"),
    ({"seed": "abc"}, InputTypeError, "seed must be a whole number"),
])  # fmt: skip
def test_areas_of_nonsense_are_refused(args, error, message):
    with pytest.raises(error, match=message):
        curve_area(make_records(30), **args)


def test_titles_of_scores_hold_the_threshold_as_tables_do(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes  # noqa: PLC0415

    titles, draw = [], Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda self, text, *a, **k: titles.append(text) or draw(self, text, *a, **k))
    plot_scores(make_records(60), "confidence", [0.9995, 2.0], tmp_path / "scores.png")
    assert titles == ["layer0\nexit → at θ = 0.9995", "layer1\nno sample exits"]


def test_calibrated_records():
    records = make_records(harder=1.2)  # else the last exit is always right and keeps its temperature
    calibrator = TemperatureCalibrator.fit(records)
    calibrated = calibrate_records(records, calibrator)
    assert calibrated.info["calibrator"] == "temperature"
    assert torch.equal(calibrated.logits, calibrator.calibrate(records.logits))
    assert sweep_thresholds(calibrated, [0.0])[0]["nll"] < sweep_thresholds(records, [0.0])[0]["nll"]
    with pytest.raises(RecordsError, match=r"calibrated already \(temperature\)"):
        calibrate_records(calibrated, calibrator)


@pytest.mark.parametrize("policy", ["entropy", "confidence"])
def test_pictures_are_drawn_and_reproducible(policy, tmp_path):
    pytest.importorskip("matplotlib")
    records = make_records(200)
    for again in ("a", "b"):
        plot_reliability(records, tmp_path / f"reliability-{again}.png")
        plot_scores(records, policy, [0.5, 0.7], tmp_path / f"scores-{again}.png")
        plot_fractions(records, policy, tmp_path / f"fractions-{again}.png")
    for name in ("reliability", "scores", "fractions"):
        assert (tmp_path / f"{name}-a.png").read_bytes() == (tmp_path / f"{name}-b.png").read_bytes()
        with Image.open(tmp_path / f"{name}-a.png") as picture:
            assert picture.width >= 1200
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    with pytest.raises(ThresholdError, match="2 early exits"):
        plot_scores(records, policy, [0.1], tmp_path / "x.png")


def test_a_contact_sheet_shows_images_of_every_exit_with_wrong_predictions_named(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes  # noqa: PLC0415

    titles, asked, draw = [], [], Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **k: titles.append(text) or draw(self, text, **k))
    records = dataclasses.replace(make_records(300), index=torch.arange(300) + 1000)

    def images(index):
        asked.append(index)
        return [torch.zeros(8, 8, 3).numpy() for _ in index]

    plot_contact_sheet(records, "entropy", 0.5, images, tmp_path / "sheet.png", per_exit=4)
    taken, logits = route_records(records, "entropy", 0.5)
    assert [len(index) for index in asked] == [4, 4, 4]
    for e, index in enumerate(asked):
        rows = torch.tensor(index) - 1000
        assert taken[rows].tolist() == [e] * 4
    rows = torch.tensor([i for index in asked for i in index]) - 1000
    for text, prediction, label in zip(titles, logits.argmax(-1)[rows], records.labels[rows], strict=True):
        assert text == (f"c{prediction}" if prediction == label else f"c{prediction}\nnot c{label}")
    with Image.open(tmp_path / "sheet.png") as figure:
        assert figure.width > figure.height
    nobody = plot_contact_sheet(records, "entropy", 0.0, images, tmp_path / "sheet.png", per_exit=4)
    assert nobody is None
    assert [len(index) for index in asked[3:]] == [4]
    with pytest.raises(ConfigError, match="per_exit must be at least 1, got 0"):
        plot_contact_sheet(records, "entropy", 0.5, images, tmp_path / "sheet.png", per_exit=0)


def test_curves_of_methods_have_a_line_and_a_band_over_seeds():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure  # noqa: PLC0415

    axes = Figure().subplots()
    seeds = [make_records(500, seed=seed) for seed in range(3)]
    methods = {"kd": [dataclasses.replace(own, logits=-own.logits) for own in seeds], "erde": seeds, "one": seeds[0]}
    assert plot_curves(methods, axes) is axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["kd", "erde", "one"]
    assert len(axes.collections) == 2, "a single run has no band"
    costs, accuracy = axes.lines[1].get_data()
    rows = [sweep_thresholds(own, fine_thresholds(own)) for own in seeds]
    for cost, value in zip(costs[::40], accuracy[::40], strict=True):
        expected = [accuracy_at_cost(own, cost * 3) for own in rows]
        assert value == pytest.approx(100 * sum(expected) / 3, abs=1e-6)
    spread = torch.tensor([[accuracy_at_cost(own, costs[100] * 3) for own in rows]]).std() * 100
    edge = axes.collections[1].get_paths()[0].vertices
    at = edge[abs(edge[:, 0] - costs[100]) < 1e-9][:, 1]
    assert at.max() - at.min() == pytest.approx(2 * float(spread), abs=1e-3)
    for wrong in ({}, {"kd": []}):
        with pytest.raises(ConfigError, match="needs records of every method"):
            plot_curves(wrong)
    with pytest.raises(InputTypeError, match="kd must be ExitRecords"):
        plot_curves({"kd": ["records.safetensors"]}, axes)


def test_records_as_a_table_of_pandas():
    pytest.importorskip("pandas")
    records = make_records(50)
    table = records.to_pandas()
    assert len(table) == 150
    for e, row in enumerate(per_exit_metrics(records)):
        own = table[table["exit_index"] == e]
        assert set(own["exit"]) == {row["exit"]}
        assert own["correct"].mean() == pytest.approx(row["accuracy"])
        assert own["index"].tolist() == records.index.tolist()
        expected = torch.distributions.Categorical(logits=records.logits[e]).entropy()
        assert own["entropy"].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
        assert own["confidence"].tolist() == pytest.approx(records.logits[e].softmax(-1).amax(-1).tolist(), abs=1e-5)
    assert "correct" not in dataclasses.replace(records, labels=None).to_pandas()
    targets = dataclasses.replace(records, labels=torch.zeros(50, 6), problem_type="regression").to_pandas()
    assert targets["output_2"][50:100].tolist() == records.logits[1, :, 2].tolist()
    assert "<td>layer1</td>" in records._repr_html_()
