"""Calibrators against golden vectors, slow loops and themselves: fitted, stored, and the same live as on records."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import pickle
import resource
import time

import numpy as np
import pytest
import timm
import torch

from erde_hub import EarlyExitConfig, EarlyExitWrapper
from erde_hub.calibration import (
    LaplaceCalibrator,
    MIECalibrator,
    TemperatureCalibrator,
    create_calibrator,
    get_calibrator,
    list_calibrators,
)
from erde_hub.calibration.laplace import kronecker_factors, posterior_factor, predictive
from erde_hub.calibration.mie import ensemble_temperatures, ensemble_weights
from erde_hub.calibration.temperature import best_temperature, nlpd
from erde_hub.errors import (
    ConfigError,
    DataError,
    ExportError,
    InputTypeError,
    RecordsError,
    ShapeError,
    UnknownArgumentError,
    UnknownNameError,
)
from erde_hub.evaluation import ExitRecords, calibrate_records, collect_exit_records, sweep_thresholds
from tests.fakes.networks import resnet8
from tests.fakes.processes import CONTEXT
from tests.fakes.records import make_logits, records_of


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


@functools.lru_cache
def make_fitted(name, exits=3, classes=4, samples=300, draws=20):
    logits, labels = make_logits(samples, exits, classes, spread=4.0)
    features = [torch.randn(samples, 5 + e) for e in range(exits)]
    records = records_of(logits, labels, features=features)
    cls = get_calibrator(name).cls
    if name == "laplace":
        return cls.fit(records, draws=draws, temperatures=[0.7, 1.0, 2.0], prior_variances=[0.5, 2.0]), records
    return cls.fit(records), records


# Golden vectors


def test_golden_temperature(golden):
    data = golden("temperature")
    (case,), rtol, atol = data["cases"], data["tolerance"]["float64_rtol"], data["tolerance"]["float64_atol"]
    logits, labels = f64(case["inputs"]["logits"]), torch.tensor(case["inputs"]["labels"])
    grid, expected = case["inputs"]["grid"], case["expected"]
    found = torch.stack([torch.stack([nlpd((z / t).log_softmax(-1), labels) for t in grid]) for z in logits])
    torch.testing.assert_close(found, f64(expected["nlpd_per_exit"]), rtol=rtol, atol=atol)
    assert [best_temperature(z, labels, grid) for z in logits] == expected["temperature_per_exit"]
    weight = ensemble_weights(case["inputs"]["cumulative_cost"]).double()
    chosen, scores = ensemble_temperatures(logits, labels, weight, grid)
    assert chosen.tolist() == expected["temperature_mie_greedy"]
    torch.testing.assert_close(scores, f64(expected["nlpd_mie_greedy"]), rtol=1e-8, atol=atol)  # float32 weights
    for e, z in enumerate(logits):
        free = best_temperature(z, labels)
        assert nlpd((z / free).log_softmax(-1), labels) <= min(expected["nlpd_per_exit"][e]) + 1e-12


def test_golden_mie(golden):
    for case in golden("mie")["cases"]:
        logits = f64(case["inputs"]["logits"])
        calibrator = MIECalibrator(len(logits))
        calibrator.weight = ensemble_weights(case["inputs"]["cumulative_cost"])
        found = calibrator.calibrate(logits).exp()
        torch.testing.assert_close(found.double(), f64(case["expected"]["mie_probs"]), rtol=2e-5, atol=1e-6)
        assert found.argmax(-1).tolist() == case["expected"]["mie_argmax"]


def test_golden_laplace(golden):
    data = golden("laplace")
    cases, rtol, atol = data["cases"], data["tolerance"]["float64_rtol"], data["tolerance"]["float64_atol"]
    factors = next(case for case in cases if case["name"] == "kronecker_factors")
    inputs, expected = factors["inputs"], factors["expected"]
    for e in range(inputs["n_exits"]):
        logits, features = f64(expected["map_logits"][e]), f64(inputs["features"][e])
        for size, key in ((inputs["batch_size"], ""), (None, "_exact_mean_over_samples_times_sqrtN")):
            u, v = kronecker_factors(logits, features, size)
            torch.testing.assert_close(u, f64(expected[f"U{key}"][e]), rtol=rtol, atol=atol)
            torch.testing.assert_close(v, f64(expected[f"V{key}"][e]), rtol=rtol, atol=atol)
    predictions = [case for case in cases if case["name"].startswith("predict")]
    assert len(predictions) == 3
    for case in predictions:
        inputs, expected = case["inputs"], case["expected"]
        log_probs = []
        for e in range(inputs["n_exits"]):
            u, v = (posterior_factor(f64(inputs[key][e]), inputs["prior_variance"][e]) for key in ("U", "V"))
            torch.testing.assert_close(u @ u.T, f64(expected["U_post_cov"][e]), rtol=1e-7, atol=atol)
            torch.testing.assert_close(v @ v.T, f64(expected["V_post_cov"][e]), rtol=1e-7, atol=atol)
            noise = f64(inputs["normal_draws"]) @ u.T
            z, h = f64(expected["mean_logits"][e]), f64(inputs["features"][e])
            found = predictive(z, h, v, noise, inputs["temperature"][e])
            torch.testing.assert_close(found, f64(expected["probs"][e]), rtol=1e-7, atol=atol)
            log_probs.append(found.log())
            spread = predictive(torch.zeros(len(h), 2).double(), h, v, f64([[1.0, 0.0]]), 1.0)[:, 0].logit()
            wanted = f64(expected["variance_scale"][e]).flatten()
            torch.testing.assert_close(spread.square(), wanted, rtol=1e-7, atol=atol)
        ensemble = MIECalibrator(inputs["n_exits"])
        ensemble.weight = f64(expected["mie_weights"])
        torch.testing.assert_close(
            ensemble.calibrate(torch.stack(log_probs)).exp().double(), f64(expected["mie_probs"]), rtol=1e-4, atol=1e-6
        )


# The table


@pytest.mark.parametrize("name", list_calibrators())
def test_fitting_lowers_the_loss_on_overconfident_exits(name):
    calibrator, records = make_fitted(name)
    calibrated = calibrator.calibrate(records.logits, records.features)
    assert calibrated.shape == records.logits.shape
    assert calibrated.isfinite().all()
    raw = nlpd(records.logits.log_softmax(-1), records.labels)
    better = nlpd(calibrated.log_softmax(-1), records.labels)
    assert (better[:2] < raw[:2]).all(), "the first exits are far too sure"
    assert better.mean() < raw.mean()
    if not calibrator.affine:  # log-probabilities
        torch.testing.assert_close(calibrated.exp().sum(-1), torch.ones(3, 300), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list_calibrators())
def test_state_and_copies(name):
    calibrator, records = make_fitted(name)
    expected = calibrator.calibrate(records.logits, records.features)
    again = create_calibrator(name, **json.loads(json.dumps(calibrator.settings())))
    assert not torch.equal(again.calibrate(records.logits, records.features), expected)
    again.load_state_dict(calibrator.state_dict())
    for other in (again, copy.deepcopy(calibrator), pickle.loads(pickle.dumps(calibrator))):
        assert torch.equal(other.calibrate(records.logits, records.features), expected)
    with pytest.raises(ShapeError, match="fitted for 3 exits, got 2"):
        calibrator.calibrate(records.logits[:2], records.features)


@pytest.mark.parametrize("name", list_calibrators())
def test_samples_do_not_see_each_other(name):
    calibrator, records = make_fitted(name)
    expected = calibrator.calibrate(records.logits, records.features)
    rows = torch.randperm(300)[:7]
    found = calibrator.calibrate(records.logits[:, rows], [f[rows] for f in records.features])
    torch.testing.assert_close(found, expected[:, rows], rtol=1e-5, atol=1e-5)


def test_the_table():
    assert list_calibrators() == ["temperature", "mie", "laplace"]
    with pytest.raises(UnknownNameError, match="unknown calibrator 'temprature'; did you mean 'temperature'"):
        create_calibrator("temprature", num_exits=2)
    with pytest.raises(ConfigError, match="num_exits must be a positive integer, got 0"):
        create_calibrator("mie", num_exits=0)
    with pytest.raises(ConfigError, match="feature_sizes must be 2 positive integers"):
        create_calibrator("laplace", num_exits=2, num_classes=3, feature_sizes=[4])


# Each for itself


def test_temperature_by_hand():
    """Two answers of equal confidence, three quarters of them right: the best temperature makes them 0.75 sure."""
    logits = torch.tensor([[8.0, 0.0]]).repeat(100, 1)
    labels = (torch.arange(100) % 4 == 0).long()
    found = best_temperature(logits, labels)
    assert 1 / (1 + math.exp(-8 / found)) == pytest.approx(0.75, abs=1e-6)
    assert best_temperature(logits * 2, labels) == pytest.approx(2 * found, rel=1e-5)
    records = records_of(torch.stack([logits, logits * 2]), labels)
    assert TemperatureCalibrator.fit(records, grid=[1.0, 5.0]).temperature.tolist() == [5.0, 5.0]


def test_temperature_stays_moderate_where_the_samples_tell_none(caplog):
    """Exits that are always right, with an optimum beyond either edge, and with one inside."""
    labels = torch.arange(60) % 2
    right = torch.nn.functional.one_hot(labels, 2).float() * 4
    wrong_once = right.clone()
    wrong_once[0] = wrong_once[0].flip(0)
    faint = 1e-4 * wrong_once
    logits = torch.stack([right, faint, -right, wrong_once])
    found = [best_temperature(z, labels, name=f"exit '{e}'") for e, z in enumerate(logits)]
    assert found[:3] == pytest.approx([1, 0.3, 3])
    assert found[3] == pytest.approx(4 / math.log(59), rel=1e-4), "which makes the exit 59/60 sure"
    first, second, third = (record.getMessage() for record in caplog.records)
    assert first.startswith("exit '0' is correct on all 60 samples")
    assert second.startswith("the best temperature of exit '1' on 60 samples lies at an edge, 0.02, of the search")
    assert "of exit '2' on 60 samples lies at an edge, 50, of the search: it gets 3." in third
    records = records_of(logits, labels)
    given = TemperatureCalibrator.fit(records, grid=[0.1, 5.0]).temperature.tolist()
    assert given == pytest.approx([0.1, 0.1, 5, 5]), "a grid is taken as it is"


@pytest.mark.parametrize("samples", [40, 4000])
def test_the_prior_of_a_temperature_is_a_normal_one_on_its_logarithm_and_fades(samples):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(samples, 5, generator=generator)
    labels = torch.distributions.Categorical(logits=logits).sample()  # T = 0.5 is right for half of these logits
    records = records_of(torch.stack([logits, logits / 2]), labels)
    temperature = float(TemperatureCalibrator.fit(records).temperature[1])
    rows = torch.arange(samples)

    def loss(t):
        nll = -(records.logits[1].double() / t).log_softmax(-1)[rows, labels].sum()
        return float(nll) + math.log(t) ** 2 / (2 * 0.2**2)

    grid = [temperature * (1 + 0.002 * i) for i in range(-100, 101)]
    assert min(grid, key=loss) == pytest.approx(temperature, rel=0.0021)
    distance = abs(math.log(temperature / best_temperature(logits / 2, labels)))
    assert distance > 0.1 if samples == 40 else distance < 0.02


@pytest.mark.parametrize("seed", range(6))
def test_few_samples_with_one_error_give_no_extreme_temperature(seed, caplog):
    """144 samples of an exit that is correct on 93 %, of which one is wrong: without a prior they say T = 0.35."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20_000, 10, generator=generator)
    logits[:, 0] += 5 + 1.5 * torch.rand(20_000, generator=generator)
    labels = torch.distributions.Categorical(logits=logits).sample()
    logits *= 0.6
    correct = logits.argmax(-1) == labels
    rows = torch.cat([correct.nonzero()[:143, 0], (~correct).nonzero()[:1, 0]])
    fitted = TemperatureCalibrator.fit(records_of(logits[None, rows], labels[rows]), allow_missing_classes=True)
    temperature, free = float(fitted.temperature[0]), best_temperature(logits[rows], labels[rows])
    best, fine, extreme = (float(nlpd((logits / t).log_softmax(-1), labels)) for t in (0.6, temperature, free))
    assert fine < 1.1 * best
    assert extreme > 1.15 * best
    assert f"(without the prior {free:.3g})" in fitted.report
    assert fitted.report in caplog.text


def fit_many_classes(file):
    n, k = 600, 21841
    z, y = torch.randn(2, n, k), torch.arange(n)
    z[:, y, y] += 12
    records = ExitRecords(z, y.roll(1), y, ["a", "b"], [1, 2], list(map(str, range(k))), info={"split": "validation"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for cls in (TemperatureCalibrator, MIECalibrator):
        cls.fit(records, grid=[0.5, 1.0, 2.0], allow_missing_classes=True)
    sweep_thresholds(records, [0.5])
    file.write_text(str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024))


def test_many_classes_take_little_memory(tmp_path):
    """Temperatures and ensembles read the probability of the label; no table of all classes is kept."""
    process = CONTEXT.Process(target=fit_many_classes, args=(tmp_path / "grown",))
    process.start()
    process.join()
    assert int((tmp_path / "grown").read_text()) < 300, "MiB; the logits have 100, and twice that in float64"


def test_mie_weighs_by_cost_and_leaves_the_temperature_alone_where_told():
    logits, labels = make_logits(100, 3, 4)
    records = records_of(logits, labels, cumulative_macs=[1, 4, 9])
    calibrator = MIECalibrator.fit(records, grid=None)
    assert calibrator.temperature.tolist() == [1, 1, 1]
    probs = logits.double().softmax(-1)
    expected = (1 * probs[0] + 4 * probs[1] + 9 * probs[2]) / 14
    torch.testing.assert_close(calibrator.calibrate(logits)[2].exp().double(), expected, rtol=1e-5, atol=1e-7)


def test_laplace_without_prior_variance_is_the_softmax_and_far_features_are_flatter():
    logits, labels = make_logits(400, 2, 4)
    features = [torch.randn(400, 6), torch.randn(400, 3)]
    records = records_of(logits, labels, features=features)
    sure = LaplaceCalibrator.fit(records, prior_variances=[1e-12], temperatures=[1.0])
    torch.testing.assert_close(sure.calibrate(logits, features).exp(), logits.softmax(-1), rtol=1e-3, atol=1e-4)
    fitted = LaplaceCalibrator.fit(records, prior_variances=[4.0], temperatures=[1.0])
    near = fitted.calibrate(logits, features)
    far = fitted.calibrate(logits, [30 * f for f in features])
    assert far.amax(-1).mean() < near.amax(-1).mean() - 0.05
    assert torch.equal(fitted.calibrate(logits, features), near), "the draws are stored"
    both = LaplaceCalibrator.fit(records, ensemble=True, temperatures=[1.0], prior_variances=[1.0])
    assert both.uses_history
    assert not fitted.uses_history


def test_laplace_joint_choice_is_the_best_of_the_grid():
    logits, labels = make_logits(200, 2, 3, spread=3.0)
    features = [torch.randn(200, 4), torch.randn(200, 4)]
    records = records_of(logits, labels, features=features)
    grid = {"temperatures": [0.7, 1.0, 2.0], "prior_variances": [0.5, 4.0]}
    best = nlpd(LaplaceCalibrator.fit(records, **grid).calibrate(logits, features), labels)
    for temperature in grid["temperatures"]:
        for variance in grid["prior_variances"]:
            other = LaplaceCalibrator.fit(records, temperatures=[temperature], prior_variances=[variance])
            assert (best <= nlpd(other.calibrate(logits, features), labels) + 1e-5).all()


def test_bad_data_are_refused():
    logits, labels = make_logits(100, 2, 3)
    records = records_of(logits, labels)
    with pytest.raises(RecordsError, match="Laplace needs features"):
        LaplaceCalibrator.fit(records)
    with pytest.raises(DataError, match="1 of 100 samples were trained on"):
        TemperatureCalibrator.fit(records, training_index=[5, 400])
    with pytest.raises(DataError, match="class 'c2' has no sample"):
        MIECalibrator.fit(records.select(labels != 2))
    with pytest.raises(ConfigError, match="positive numbers"):
        MIECalibrator.fit(records, grid=[0.0])
    calibrator, other = make_fitted("laplace")
    with pytest.raises(RecordsError, match="needs features"):
        calibrator.calibrate(other.logits)


# In the model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return resnet8(4, head="linear").eval()


@pytest.fixture
def fitted(model):
    """Records of the model on noise whose labels are its own answers, and how each calibrator fits them."""
    images = torch.randn(120, 3, 32, 32)
    with torch.no_grad():
        raw = model(images, output_all_exits=True).logits
    labels = torch.multinomial(raw.softmax(-1), 1).squeeze(1)
    labels[:4] = torch.arange(4)
    records = collect_exit_records(
        model, [(images, labels)], features=True, progress=False, info={"split": "validation"}
    )
    return images, records


@pytest.mark.parametrize(
    ("name", "ensemble"), [("temperature", False), ("mie", False), ("laplace", False), ("laplace", True)]
)
def test_live_equals_records(name, ensemble, model, fitted, tmp_path):
    images, records = fitted
    cls = get_calibrator(name).cls
    options = {}
    if name == "laplace":
        options = {"draws": 10, "ensemble": ensemble, "temperatures": [0.7, 1.0], "prior_variances": [2.0]}
    calibrator = cls.fit(records, allow_missing_classes=True, **options)
    raw = model(images, output_all_exits=True)
    free = model.exit_table().cumulative_macs
    model.set_calibrator(calibrator)
    added = 0
    for e, row in enumerate(model.exit_table()):  # sums of products are counted, as everywhere
        size = records.features[e].shape[1]
        added += (2 * 4 * 10 + 2 * size**2 + 5 * size + 2) // 2 if name == "laplace" else 0
        assert row.cumulative_macs == free[e] + added
    assert calibrate_records(records, calibrator).cumulative_macs == model.exit_table().cumulative_macs
    collected = collect_exit_records(model, [(images, records.labels)], progress=False)
    assert collected.cumulative_macs == list(free), "raw logits have not passed it"
    calibrated = calibrator.calibrate(records.logits, records.features)
    entropy = -(calibrated.log_softmax(-1).exp() * calibrated.log_softmax(-1)).sum(-1)
    threshold = [float(entropy[0].median()), float(entropy[1].quantile(0.3))]
    expected = torch.where(entropy[0] < threshold[0], 0, torch.where(entropy[1] < threshold[1], 1, 2))
    clear = ((entropy[:2] - torch.tensor(threshold)[:, None]).abs() > 1e-4).all(0)
    with torch.no_grad():
        for batch in (images[clear], images[clear][:1]):
            out = model(batch, threshold=threshold)
            assert out.exit_index.tolist() == expected[clear][: len(batch)].tolist()
            rows = torch.arange(len(records))[clear][: len(batch)]
            torch.testing.assert_close(out.logits, calibrated[out.exit_index, rows], rtol=1e-3, atol=1e-4)
        every = model(images, output_all_exits=True)
        for own, before in zip(every.exit_logits, raw.exit_logits, strict=True):
            assert torch.equal(own, before), "exit_logits stay raw"
        torch.testing.assert_close(every.logits, calibrated[-1], rtol=1e-3, atol=1e-4)
        full = model(images, threshold=0.0)
        torch.testing.assert_close(full.logits, calibrated[-1], rtol=1e-3, atol=1e-4)
        assert set(expected.tolist()) == {0, 1, 2}
        model.save_pretrained(tmp_path)
        loaded = EarlyExitWrapper.from_pretrained(tmp_path)
        assert torch.equal(loaded(images, threshold=threshold).logits, model(images, threshold=threshold).logits)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(images, threshold=threshold).logits, model(images, threshold=threshold).logits)
        assert collected.fingerprint == records.fingerprint
        model.set_calibrator(None)
        assert torch.equal(model(images, threshold=0.0).logits, raw.logits), "bit for bit without one"
    assert not any(m._forward_pre_hooks for m in model.modules())
    built = EarlyExitWrapper(loaded.config)
    assert type(built.calibrator) is cls


def test_what_a_model_refuses(model):
    with pytest.raises(ShapeError, match="fitted for 2 exits, got 3"):
        model.set_calibrator(TemperatureCalibrator(2))
    with pytest.raises(InputTypeError, match="a calibrator of the table is needed"):
        model.set_calibrator(torch.nn.Identity())
    with pytest.raises(UnknownNameError, match="unknown calibrator 'temp'; did you mean 'temperature'"):
        EarlyExitConfig(architecture="resnet8_cifar", num_labels=4, exits=["layer1"], calibrator="temp")


def test_laplace_costs_little_beside_a_small_network():
    torch.set_num_threads(1)
    calibrator = LaplaceCalibrator(4, 10, [64, 128, 256, 512])
    calibrator.normal.normal_()
    for e in range(4):
        getattr(calibrator, f"logit_factor_{e}").copy_(torch.eye(10))
        getattr(calibrator, f"feature_factor_{e}").copy_(torch.eye([64, 128, 256, 512][e] + 1))
    network = timm.create_model("resnet10_cifar", num_classes=10, width=64).eval()
    images, features, logits = torch.randn(32, 3, 32, 32), torch.randn(256, 512), torch.randn(256, 10)
    with torch.no_grad():
        times = {"laplace": [], "network": []}
        for _ in range(3):
            start = time.process_time()
            calibrator(3, logits, features, [])
            times["laplace"].append(time.process_time() - start)
            start = time.process_time()
            network(images)
            times["network"].append((time.process_time() - start) * 8)  # a batch of 256
    assert np.median(times["laplace"]) < 0.1 * np.median(times["network"])


def test_onnx_answers_with_calibrated_logits(model, tmp_path):
    pytest.importorskip("onnxruntime")
    from erde_hub.export import check_onnx, export_onnx  # noqa: PLC0415

    images = torch.randn(8, 3, 32, 32)
    calibrator = TemperatureCalibrator(3)
    calibrator.temperature.copy_(torch.tensor([0.25, 2.0, 4.0]))
    raw = model(images, threshold=0.0).logits
    model.set_calibrator(calibrator)
    export_onnx(model, tmp_path / "model.onnx")
    check = check_onnx(model, tmp_path / "model.onnx", images, [0.0, 1.2, 1.38, 2.0])
    assert check.same_exit == 1.0
    assert check.max_difference < 1e-5
    torch.testing.assert_close(model(images, threshold=0.0).logits, raw / 4)
    model.set_calibrator(MIECalibrator(3))
    with pytest.raises(ExportError, match=r"calibrator 'mie' cannot be written .*those that can: temperature"):
        export_onnx(model, tmp_path / "model.onnx")


@pytest.mark.parametrize(("name", "args", "error", "message"), [
    ("temperature", {"grid": "abc"}, ConfigError, "temperatures must be positive numbers, .* got 'abc'"),
    ("temperature", {"grid": [None]}, ConfigError, r"temperatures must be positive numbers, .* got \[None\]"),
    ("temperature", {"gird": [1.0]}, UnknownArgumentError, r"TemperatureCalibrator\.fit has no .* mean 'grid'"),
    ("mie", {"grid": 1.5}, ConfigError, r"temperatures must be positive numbers, .* got 1\.5"),
    ("mie", {"trainig_index": [1]}, UnknownArgumentError, "did you mean 'training_index'"),
    ("laplace", {"prior_variances": "abc"}, ConfigError, "prior_variances must be positive numbers"),
    ("laplace", {"batch_size": 0}, ConfigError, "batch_size must be at least 1, got 0"),
    ("laplace", {"tuning_samples": 0}, ConfigError, "tuning_samples must be at least 1, got 0"),
    ("laplace", {"seed": "abc"}, InputTypeError, "seed must be a whole number, got 'abc'"),
    ("laplace", {"ensemble": "no"}, InputTypeError, "ensemble must be True or False, got 'no'"),
    ("laplace", {"training_records": "train"}, InputTypeError, "training_records must be ExitRecords, .* got 'train'"),
])  # fmt: skip
def test_arguments_of_a_fit_that_make_no_sense_are_refused(name, args, error, message):
    logits, labels = make_logits(60)
    records = records_of(logits, labels, features=[torch.randn(60, 4) for _ in range(3)])
    with pytest.raises(error, match=message):
        get_calibrator(name).cls.fit(records, **args)
    if "training_records" in args:
        narrow = dataclasses.replace(records, features=[f[:, :3] for f in records.features])
        with pytest.raises(RecordsError, match=r"another model: 10 classes and features \[3, 3, 3\]"):
            LaplaceCalibrator.fit(records, narrow)
        one, other = (dataclasses.replace(records, fingerprint=letter * 32) for letter in "ab")
        with pytest.raises(RecordsError, match=r"of other weights \(b{12}\) than the held-out records \(a{12}\)"):
            LaplaceCalibrator.fit(one, other)
