"""Models that answer with real numbers: built, trained, routed by intervals, stored, cut off; and what they refuse."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, pipeline

from erde_hub import EarlyExitConfig, EarlyExitWrapper, route_batches
from erde_hub.calibration import TemperatureCalibrator, choose_threshold
from erde_hub.errors import ConfigError, DataError, ExportError, InputTypeError, LabelError, RecordsError, ShapeError
from erde_hub.evaluation import (
    ExitRecords,
    collect_exit_records,
    curve_area,
    exit_scores,
    fine_thresholds,
    per_exit_metrics,
    regression_per_exit,
    route_records,
    sweep_thresholds,
    sweep_widths,
)
from erde_hub.export import export_onnx
from erde_hub.policies import EEFPPolicy, EntropyPolicy, IntervalWidthPolicy, SetSizePolicy
from erde_hub.prediction_sets import (
    AVCSClassifier,
    BayesianLinearRegression,
    ConformalRegressor,
    avcs_quadratics,
    intersect_intervals,
    interval_metrics,
    solve_intervals,
)
from tests.fakes.networks import Plain, resnet8
from tests.fakes.records import records_of

EXITS = ["stem", "trunk.a"]


def make_model(targets=2, **kwargs):
    torch.manual_seed(0)
    return EarlyExitWrapper(
        Plain(targets), EXITS, input_size=(3, 16, 16), problem_type="regression", **{"head": "linear", **kwargs}
    ).eval()


def make_records(samples=60, exits=3, targets=2, seed=0, noise=0.5):
    """Features of exit e tell the targets up to noise that falls with depth; the outputs are the targets, off a bit."""
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(samples, 4, generator=generator)]
    slope = torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.0, 2.0, 0.0, 1.0]])[:targets]
    labels = features[0] @ slope.T + 2 + 0.1 * torch.randn(samples, targets, generator=generator)
    features = [
        features[0] + noise * (exits - 1 - e) * torch.randn(samples, 4, generator=generator) for e in range(exits)
    ]
    logits = torch.stack([f @ slope.T + 2 for f in features])
    return records_of(logits, labels, features=features, problem_type="regression")


def inputs_and_targets(samples=48, targets=2, seed=0, side=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, side, side, generator=generator)
    y = torch.stack([40 * x[:, d].mean((1, 2)) for d in range(targets)], 1)
    return x, y


def collected(model, seed=0, samples=48, side=16):
    """Inputs, and records whose targets every exit can tell a part of."""
    x, y = inputs_and_targets(samples, model.config.num_labels, seed, side)
    records = collect_exit_records(model, [(x[:30], y[:30]), (x[30:], y[30:])], features=True, progress=False)
    assert torch.equal(records.labels, y)
    parts = [(f - f.mean(0)) / f.std(0).clamp_min(1e-6) for f in records.features]
    generator = torch.Generator().manual_seed(1)
    told = sum(part @ torch.randn(part.shape[1], y.shape[1], generator=generator) for part in parts)
    return x, dataclasses.replace(records, labels=told + 0.3 * torch.randn(y.shape, generator=generator))


# The model


def test_outputs_and_losses():
    model = make_model(exit_weights=[0.5, 0.0, 2.0])
    assert (model.config.policy, model.config.num_labels, model.policy.never_leaves(0.5)) == ("never", 2, True)
    x, y = inputs_and_targets(5)
    backbone = model.backbone(x)
    routed = model(x, labels=y)
    assert torch.equal(routed.logits, backbone), "nobody leaves: the backbone's own answer, bit for bit"
    assert routed.exit_index.tolist() == [2] * 5
    torch.testing.assert_close(routed.loss, (backbone - y).square().mean())
    every = model(x, labels=y, output_all_exits=True)
    assert [tuple(exit_.shape) for exit_ in every.exit_logits] == [(5, 2)] * 3
    expected = sum(w * F.mse_loss(z, y) for w, z in zip([0.5, 0.0, 2.0], every.exit_logits, strict=True))
    torch.testing.assert_close(every.loss, expected)
    assert model.train()(x, labels=y).loss.requires_grad
    one = make_model(1)
    x, y = inputs_and_targets(5, 1)
    assert one(x, labels=y[:, 0]).loss == one(x, labels=y).loss
    assert model.half()(x.half(), labels=torch.zeros(5, 2)).loss.dtype == torch.float32
    assert make_model()(x[:0]).logits.shape == (0, 2)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), InputTypeError, "must be floats, got torch.int64"),
        (torch.zeros(3), ShapeError, r"must have shape \(3, 2\), one number per sample and target, got \(3,\)"),
        (torch.full((3, 2), math.inf), LabelError, r"labels\[0, 0\] is inf"),
    ],
)
def test_labels_that_are_none(labels, error, message):
    with pytest.raises(error, match=message):
        make_model()(torch.randn(3, 3, 16, 16), labels=labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "entropy"}, "policy 'entropy' reads class probabilities.*use 'never' or 'set_size'"),
        ({"policy": "patience"}, "policy 'patience' reads class probabilities"),
        ({"policy": "nevr"}, "unknown regression policy 'nevr'; did you mean 'never'"),
        ({"policy": "set_size"}, "IntervalWidthPolicy is learned and has nothing to decide with yet"),
        ({"calibrator": "temperature"}, "calibrator 'temperature' reads class probabilities"),
        ({"task": "causal_lm"}, "problem_type='regression' does not go with task='causal_lm'"),
        ({"num_labels": 0}, "num_labels must be an integer of at least 1, got 0"),
        (
            {"problem_type": "multi_label_classification", "num_labels": 2},
            "'multi_label_classification' is not supported",
        ),
    ],
)
def test_configs_that_are_none(settings, message):
    fields = {"architecture": "resnet8_cifar", "exits": ["layer1"], "num_labels": 1, "problem_type": "regression"}
    assert EarlyExitConfig(**fields).policy == "never"
    with pytest.raises(ConfigError, match=message):
        EarlyExitConfig(**fields | settings)


def test_a_backbone_with_one_output_is_told_what_it_may_be():
    with pytest.raises(InputTypeError, match=r"returns shape \(\d+, 1\).*for real numbers: problem_type='regression'"):
        EarlyExitWrapper(Plain(1), EXITS, input_size=(3, 16, 16))
    squeezed = nn.Sequential(Plain(1), nn.Flatten(0))
    with pytest.raises(InputTypeError, match=r"a regression returns \(N, D\), one column per target"):
        EarlyExitWrapper(squeezed, ["0.stem"], input_size=(3, 16, 16), problem_type="regression")


def test_a_regression_of_transformers_says_so_itself():
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "num_hidden_layers": 2}
    config = BertConfig(**sizes, vocab_size=20, num_labels=1, problem_type="regression")
    model = EarlyExitWrapper(BertForSequenceClassification(config), ["bert.encoder.layer.0"]).eval()
    assert (model.config.problem_type, model.config.policy) == ("regression", "never")
    ids = torch.randint(20, (3, 6))
    out = model(input_ids=ids, labels=torch.tensor([0.5, 1.0, -1.0]))
    assert torch.equal(out.logits, model.backbone(input_ids=ids).logits)
    torch.testing.assert_close(out.loss, (out.logits[:, 0] - torch.tensor([0.5, 1.0, -1.0])).square().mean())
    with pytest.raises(ConfigError, match=r"problem_type='single_label_classification', but .* 'regression'"):
        EarlyExitWrapper(model.backbone, ["bert.encoder.layer.0"], problem_type="single_label_classification")


# Routing by the width of intervals


def slow_intervals(records, policy):
    """Nested intervals from full covariances, one draw and target after the other, cut by hand."""
    found = torch.empty(records.num_exits, records.num_samples, records.num_outputs, 2, dtype=torch.float64)
    for d in range(records.num_outputs):
        fits = [BayesianLinearRegression.fit(f, records.labels[:, d]) for f in records.features]
        draws = [policy.get_buffer(f"drawn_{e}")[:, d] for e in range(records.num_exits)]
        every = torch.stack(
            [
                solve_intervals(avcs_quadratics(fits, records.features, [own[s] for own in draws], policy.alpha))
                for s in range(policy.draws)
            ]
        )
        for n in range(records.num_samples):
            low, high = -math.inf, math.inf
            for e in range(records.num_exits):
                for own_low, own_high in every[:, e, n].tolist():
                    low, high = max(low, own_low), min(high, own_high)
                    if not low <= high:
                        low, high = math.nan, math.nan
                found[e, n, d] = torch.tensor([low, high])
    return found


@pytest.mark.parametrize(("targets", "draws"), [(1, 1), (2, 3)])
def test_intervals_are_those_of_the_definition(targets, draws):
    records = make_records(targets=targets)
    policy = IntervalWidthPolicy.fit(records, alpha=0.1, draws=draws, seed=4, level_share=0)
    intervals, expected = policy.intervals(records), slow_intervals(records, policy)
    torch.testing.assert_close(intervals, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    widths = (expected[..., 1] - expected[..., 0]).amax(-1)[:-1]
    torch.testing.assert_close(exit_scores(records, policy), widths.float(), rtol=1e-4, atol=1e-4, equal_nan=True)
    fresh = make_records(400, targets=targets, seed=1)
    metrics = interval_metrics(policy.intervals(fresh), fresh.labels)
    assert metrics.consistency == [1.0] * 3
    assert metrics.size[0] > metrics.size[1] > metrics.size[2]
    assert metrics.coverage_so_far == metrics.coverage
    assert min(metrics.coverage) > 0.9
    again = IntervalWidthPolicy.fit(records, alpha=0.1, draws=draws, seed=4, level_share=0)
    assert again.drawn_0.equal(policy.drawn_0)


def test_the_level_of_samples_kept_aside_holds_at_all_exits_at_once():
    """The published level promises under assumptions only; here it is far too careful."""
    coverage, published = [], []
    for seed in range(12):
        records, fresh = make_records(120, targets=1, seed=seed), make_records(500, targets=1, seed=100 + seed)
        for share, found in ((0.5, coverage), (0.0, published)):
            policy = IntervalWidthPolicy.fit(records, alpha=0.2, draws=10, seed=seed, level_share=share)
            found.append(interval_metrics(policy.intervals(fresh), fresh.labels).coverage_so_far[-1])
    assert sum(coverage) / 12 == pytest.approx(0.8, abs=0.04)
    assert sum(published) / 12 > 0.9
    assert policy.level.tolist() == pytest.approx([-math.log(0.2)])
    few = IntervalWidthPolicy.fit(make_records(30), alpha=0.05, level_share=0.5)
    assert few.level.isinf().all(), "15 samples cannot support 95 %"
    assert exit_scores(make_records(30), few).isinf().all()
    assert set(route_records(make_records(30), few, math.inf)[0].tolist()) == {2}
    for share in (1.0, -0.1, True):
        with pytest.raises(ConfigError, match="level_share must be at least 0 and below 1"):
            IntervalWidthPolicy.fit(make_records(), level_share=share)


def test_exits_that_contradict_each_other_let_nobody_leave():
    records = make_records(targets=1)
    policy = IntervalWidthPolicy.fit(records, alpha=0.1, level_share=0)
    far = dataclasses.replace(records, features=[records.features[0], records.features[1] + 1e3, records.features[2]])
    assert exit_scores(far, policy)[1].isnan().any()
    index, _ = route_records(far, policy, [0.0, math.inf])
    gone = exit_scores(far, policy)[1].isnan()
    assert set(index[gone].tolist()) == {2}
    assert set(index[~gone].tolist()) <= {1}


@pytest.fixture(scope="module")
def fitted():
    """A model with intervals, the records they were fitted on, and a width at which every exit is taken."""
    model = make_model()
    x, records = collected(model)
    policy = IntervalWidthPolicy.fit(records, alpha=0.2, draws=5)
    widths = exit_scores(records, policy)
    model.set_policy(policy, [widths[0].quantile(0.4).item(), widths[1].quantile(0.5).item()])
    return model, x, records


def test_routing_live_is_routing_on_records(fitted):
    model, x, records = fitted
    index, outputs = route_records(records, model.policy, model.threshold)
    assert set(index.tolist()) == {0, 1, 2}
    out = model(x)
    assert torch.equal(out.exit_index, index)
    torch.testing.assert_close(out.logits, outputs)
    assert [model(x[i : i + 1]).exit_index.item() for i in range(12)] == index[:12].tolist()
    streamed = list(route_batches(model, x.split(7), batch_size=16))
    assert torch.cat([batch.exit_index for batch in streamed]).equal(index)
    assert torch.equal(model(x, threshold=0).logits, model.backbone(x)), "bit for bit"
    assert model(x, threshold=0).exit_index.unique().tolist() == [2]
    assert model(x, threshold=math.inf).exit_index.unique().tolist() == [0]


def test_a_sweep_says_what_a_width_costs(fitted):
    model, _, records = fitted
    rows = sweep_widths(records, model.policy, [0.0, model.threshold, math.inf])
    alone = regression_per_exit(records, model.policy.intervals(records))
    assert [row["exit_share"] for row in rows[::2]] == [[0, 0, 1], [1, 0, 0]]
    for row, own in ((rows[0], alone[2]), (rows[2], alone[0])):
        assert row["mean_macs"] == own["macs"]
        for key in ("mae", "rmse", "width", "coverage", "empty"):
            assert row[key] == pytest.approx(own[key])
    index, outputs = route_records(records, model.policy, model.threshold)
    assert rows[1]["mae"] == pytest.approx((outputs - records.labels).abs().mean().item())
    macs = torch.tensor(records.cumulative_macs, dtype=torch.float64)
    assert rows[1]["mean_macs"] == pytest.approx(macs[index].mean().item())
    shares = [row["exit_share"][0] for row in sweep_widths(records, model.policy)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)


def test_a_checkpoint_keeps_the_intervals(fitted, tmp_path):
    model, x, _ = fitted
    model.save_pretrained(tmp_path)
    loaded = EarlyExitWrapper.from_pretrained(tmp_path, backbone=Plain(2))
    assert (loaded.config.problem_type, loaded.config.policy) == ("regression", "set_size")
    assert loaded.policy.settings() == model.policy.settings()
    expected, out = model(x), loaded(x)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.exit_index, expected.exit_index)
    assert {buffer.dtype for buffer in loaded.half().policy.buffers()} == {torch.float32}
    static = model.truncate("trunk.a")
    assert torch.equal(static(x).logits, model(x, output_all_exits=True).exit_logits[1])
    assert static(x, labels=torch.zeros(len(x), 2)).loss == static(x).logits.square().mean()
    static.save_pretrained(tmp_path / "static")
    assert torch.equal(type(static).from_pretrained(tmp_path / "static", backbone=Plain(2))(x).logits, static(x).logits)


def test_a_pipeline_gives_the_number_itself(tmp_path):
    model = resnet8(1, 4, 8, ("layer1",), problem_type="regression", id2label=["angle"]).eval()
    model.set_preprocessing(mean=[0.5] * 3, std=[0.5] * 3, size=[8, 8])
    model.save_pretrained(tmp_path)
    image = Image.fromarray(torch.arange(192, dtype=torch.uint8).view(8, 8, 3).numpy())
    pixels = model.image_processor()(image, return_tensors="pt")["pixel_values"]
    (answer,) = pipeline("image-classification", model=str(tmp_path), device="cpu")(image)
    assert answer["label"] == "angle"
    assert answer["score"] == pytest.approx(model(pixels).logits.item(), rel=1e-5)


def test_compiled_stages_route_alike():
    model = resnet8(2, 4, 8, ("layer1",), problem_type="regression", head="linear").eval()
    x, records = collected(model, samples=40, side=8)
    policy = IntervalWidthPolicy.fit(records, alpha=0.2, draws=3)
    model.set_policy(policy, exit_scores(records, policy)[0].quantile(0.5).item())
    expected = model(x)
    model.compile_stages(backend="eager")
    out = model(x)
    torch._dynamo.reset()
    assert torch.equal(out.exit_index, expected.exit_index)
    torch.testing.assert_close(out.logits, expected.logits)


def test_a_policy_of_other_answers_or_exits_is_refused(fitted):
    model, x, _ = fitted
    with pytest.raises(ConfigError, match="policy 'entropy' reads class probabilities"):
        model.set_policy(EntropyPolicy())
    with pytest.raises(ConfigError, match="SetSizePolicy is not for models that predict real numbers"):
        model.set_policy(SetSizePolicy(3))
    other = IntervalWidthPolicy.fit(make_records())
    with pytest.raises(ShapeError, match=r"fitted for features \[4, 4, 4\] and 2 targets, the exits have"):
        model.set_policy(other)
    classifier = EarlyExitWrapper(Plain(), EXITS, input_size=(3, 16, 16))
    with pytest.raises(ConfigError, match="IntervalWidthPolicy is not for models that predict classes"):
        classifier.set_policy(other)
    with pytest.raises(ConfigError, match="TemperatureCalibrator reads class probabilities"):
        model.set_calibrator(TemperatureCalibrator(3))
    byhand = make_model()
    byhand.policy = EntropyPolicy()
    with pytest.raises(ConfigError, match="policy 'entropy' reads class probabilities"):
        byhand(x)
    assert model(x).exit_index.unique().tolist() == [0, 1, 2], "what was refused changed nothing"


# Records


def test_records_of_a_regression_are_stored_and_selected(fitted, tmp_path):
    _, _, records = fitted
    assert (records.problem_type, records.labels.dtype, records.num_outputs) == ("regression", torch.float32, 2)
    assert "2 targets" in repr(records)
    records.save(tmp_path / "r.safetensors")
    loaded = ExitRecords.load(tmp_path / "r.safetensors")
    assert loaded.problem_type == "regression"
    assert torch.equal(loaded.labels, records.labels)
    assert torch.equal(records.select([3, 1]).labels, records.labels[[3, 1]])
    with pytest.raises(ShapeError, match=r"must have shape \(48, 2\)"):
        dataclasses.replace(records, labels=records.labels[:, :1])
    with pytest.raises(ConfigError, match="unknown problem_type 'regresion'; did you mean 'regression'"):
        dataclasses.replace(records, problem_type="regresion")


@pytest.mark.parametrize(
    "use",
    [
        sweep_thresholds,
        per_exit_metrics,
        fine_thresholds,
        curve_area,
        TemperatureCalibrator.fit,
        EEFPPolicy.fit,
        SetSizePolicy.fit,
        AVCSClassifier.fit,
        lambda records: choose_threshold(records, "entropy", max_accuracy_drop=0.01),
        lambda records: route_records(records, "confidence", 0.5),
    ],
)
def test_what_reads_probabilities_refuses_records_of_a_regression(use):
    with pytest.raises(ConfigError, match="reads class probabilities, which problem_type='regression' does not give"):
        use(make_records())


def test_fits_need_records_of_a_regression_with_features():
    records = make_records()
    classes = dataclasses.replace(
        records, labels=torch.zeros(60, dtype=torch.int64), problem_type=None, logits=records.logits
    )
    for use in (IntervalWidthPolicy.fit, ConformalRegressor.fit, regression_per_exit):
        with pytest.raises(ConfigError, match="is for real numbers, these records are of 2 classes"):
            use(classes)
    with pytest.raises(RecordsError, match="IntervalWidthPolicy needs features"):
        IntervalWidthPolicy.fit(dataclasses.replace(records, features=None))
    with pytest.raises(DataError, match="records are of the training split"):
        IntervalWidthPolicy.fit(dataclasses.replace(records, info={"split": "train"}))
    with pytest.raises(RecordsError, match="no line can be fitted to 30 targets: it meets every one of them"):
        IntervalWidthPolicy.fit(dataclasses.replace(records, labels=torch.zeros(60, 2)))
    blind = dataclasses.replace(records, features=[torch.ones(60, 4), *records.features[1:]])
    widths = [exit_scores(seen, IntervalWidthPolicy.fit(seen))[0] for seen in (blind, records)]
    assert widths[0].min() > widths[1].max(), "an exit that sees nothing is not sure, and no error"
    policy = IntervalWidthPolicy.fit(records)
    with pytest.raises(ShapeError, match="fitted for 3 exits, got 2"):
        policy.intervals(make_records(exits=2))
    for settings, message in (
        ({"num_exits": 3, "feature_sizes": [4, 4]}, "feature_sizes must be 3 integers from 1 to 8192"),
        ({"num_exits": 2, "feature_sizes": [4, 10**6]}, "feature_sizes must be 2 integers from 1 to 8192"),
        ({"num_exits": 2, "feature_sizes": [4, 4], "draws": 0}, "draws must be a positive integer, got 0"),
        ({"num_exits": 2, "feature_sizes": [4, 4], "alpha": 1}, "alpha must be between 0 and 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            IntervalWidthPolicy(**settings)


def test_conformal_intervals_hold_at_each_exit_and_those_of_all_exits_at_once():
    records, fresh = make_records(400, noise=1.0), make_records(4000, seed=1, noise=1.0)
    each = interval_metrics(ConformalRegressor.fit(records, 0.2).intervals(fresh.logits), fresh.labels)
    assert each.coverage == pytest.approx([0.8] * 3, abs=0.04)
    assert each.coverage_so_far[2] < 0.75, "exits of their own do not hold the truth at once"
    at_once = ConformalRegressor.fit(records, 0.2, all_exits=True)
    nested = interval_metrics(intersect_intervals(at_once.intervals(fresh.logits)), fresh.labels)
    assert nested.consistency == [1.0] * 3
    assert nested.coverage_so_far[2] > 0.78
    errors = (records.logits - records.labels).abs().double()
    ranks = errors.sort(1).values[:, math.ceil(401 * 0.8) - 1]
    torch.testing.assert_close(ConformalRegressor.fit(records, 0.2).radii, ranks)
    assert ConformalRegressor.fit(make_records(20), 0.01).radii.isinf().all(), "too few samples: everything is in"
    with pytest.raises(ShapeError, match=r"fitted for \(3, 2\) exits and targets"):
        at_once.intervals(fresh.logits[:2])


# Export


def test_an_onnx_file_is_refused_with_what_to_write_instead(fitted, tmp_path):
    with pytest.raises(ExportError, match=r"a regression has no class probabilities.*model.truncate\(exit\)"):
        export_onnx(fitted[0], tmp_path / "model.onnx")
