"""Prediction sets that a model stores: the same in torch, NumPy, checkpoint and file; read with care."""

import json
import math

import numpy as np
import pytest
import torch

from erde_hub import EarlyExitConfig, EarlyExitWrapper
from erde_hub.calibration import TemperatureCalibrator
from erde_hub.errors import (
    CheckpointError,
    ConfigError,
    InputTypeError,
    NotSupportedError,
    RepeatedSamplesWarning,
    ShapeError,
)
from erde_hub.evaluation import route_records
from erde_hub.export.metadata import FileInfo
from erde_hub.prediction_sets import AVCSClassifier, ConformalClassifier
from erde_hub.stored_sets import StoredSets
from tests.fakes.networks import images, quantile_thresholds, wrap
from tests.fakes.records import make_records, records_of

SETS = ConformalClassifier([0.5, 0.8, 0.9, math.inf], alpha=0.1, randomized=False)


@pytest.mark.parametrize("method", ["aps", "raps"])
def test_numpy_and_torch_give_the_same_sets(method):
    records = make_records(400)
    fitted = ConformalClassifier.fit(records, 0.1, method, randomized=False)
    expected = fitted.sets(records.logits)
    assert torch.equal(fitted.sets(records.logits), expected)  # nothing is drawn
    for e, logits in enumerate(records.logits):
        found = fitted.stored().sets(logits.numpy(), np.full(400, e))
        np.testing.assert_array_equal(found, expected[e].numpy())
    index = np.arange(400) % 3
    mixed = fitted.stored().sets(records.logits.numpy()[index, np.arange(400)], index)
    np.testing.assert_array_equal(mixed, expected.numpy()[index, np.arange(400)])


def traps(samples, seed):
    """Of two exits, the first is sure of 40 %: a quarter it gets right, 15 % wrong. The last is right and unsure."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (samples,), generator=generator)
    kind = torch.rand(samples, generator=generator)
    answer = torch.where(kind < 0.15, (labels + 1) % 5, labels)
    logits = torch.randn(2, samples, 5, generator=generator)
    logits[0, torch.arange(samples), answer] += torch.where(kind < 0.4, 12.0, 0.5)
    logits[1, torch.arange(samples), labels] += 2.0
    return records_of(logits, labels)


def test_sets_of_routed_answers_cover_at_every_exit_that_is_taken():
    """Sets of all samples do not: the first exit's hold for those that go on, too."""
    held_out, new = traps(4000, seed=1), traps(20_000, seed=2)
    taken = route_records(held_out, "entropy", 0.1)[0]
    index, logits = route_records(new, "entropy", 0.1)

    def coverage(fitted):
        inside = fitted.stored().sets(logits.numpy(), index.numpy())[np.arange(20_000), new.labels.numpy()]
        return [inside[(index == e).numpy()].mean() for e in range(2)]

    routed = ConformalClassifier.fit(held_out, 0.2, randomized=False, exit_index=taken)
    of_all = ConformalClassifier.fit(held_out, 0.2, randomized=False)
    for e, covered in enumerate(coverage(routed)):  # three deviations, of the fit and of what is counted
        assert covered > 0.8 - 3 * math.sqrt(0.16 / int((taken == e).sum()) + 0.16 / int((index == e).sum()))
    assert coverage(of_all)[0] < 0.7
    assert routed.stored().routed
    assert not of_all.stored().routed


def test_an_exit_with_too_few_samples_gives_all_classes():
    records = make_records(100)
    taken = torch.full((100,), 2)
    taken[:8] = 0  # nine are needed for 90 %
    fitted = ConformalClassifier.fit(records, 0.1, randomized=False, exit_index=taken)
    assert fitted.quantiles[:2] == [math.inf, math.inf]
    assert fitted.stored().sets(records.logits[0, :3].numpy(), np.zeros(3, int)).all()


def test_what_is_not_finite_excludes_no_class():
    logits = np.array([[5.0, 0.0, 0.0], [np.nan, 1.0, 2.0], [np.inf, 1.0, 2.0]])
    found = StoredSets(0.1, [0.5, 0.5]).sets(logits, np.array([0, 1, 1]))
    assert found.tolist() == [[True, False, False], [True] * 3, [True] * 3]
    assert StoredSets(0.1, [0.0]).sets(np.zeros((0, 3)), np.zeros(0, int)).shape == (0, 3)


def test_model_checkpoint_and_file_answer_alike(tmp_path):
    model = wrap("resnet")
    x = images("resnet", 12)
    with pytest.raises(ConfigError, match="set_prediction_sets"):
        model(x, output_sets=True)
    model.set_prediction_sets(SETS)
    model.save_pretrained(tmp_path / "model")
    loaded = EarlyExitWrapper.from_pretrained(tmp_path / "model").eval()
    assert loaded.prediction_sets == model.prediction_sets == SETS.stored()
    with torch.no_grad():
        threshold = quantile_thresholds(loaded, x)
        out = loaded(x, threshold=threshold, output_sets=True)
        full = loaded(x, output_all_exits=True, output_sets=True)
        assert loaded(x[:1], threshold=threshold, output_sets=True).sets.tolist() == out.sets[:1].tolist()
        assert loaded(x[:0], output_sets=True).sets.shape == (0, 5)
    assert len(out.exit_counts()) == 4
    assert sum(count > 0 for count in out.exit_counts()) > 1
    by_hand = SETS.sets(torch.stack(full.exit_logits))
    assert torch.equal(out.sets, by_hand[out.exit_index, torch.arange(12)])
    assert full.sets.all()  # the last exit's quantile is infinite
    assert loaded(x, threshold=threshold, output_sets=True, return_dict=False)[-1].dtype is torch.bool
    assert loaded(x).sets is None
    loaded.train()
    with pytest.raises(ConfigError, match="eval mode"):
        loaded(x, output_sets=True)


def test_what_they_were_fitted_for_takes_them_off():
    model = wrap("resnet")
    routed = ConformalClassifier([0.5] * 4, randomized=False, routed=True)
    model.set_prediction_sets(routed)
    model.threshold = 0.3
    assert model.prediction_sets is None
    model.set_prediction_sets(SETS)
    model.threshold = 0.4
    assert model.prediction_sets == SETS.stored()
    model.set_calibrator(TemperatureCalibrator(4))
    assert model.prediction_sets is None
    model.set_prediction_sets(SETS)
    model.set_prediction_sets(None)
    assert model.config.prediction_sets is None


def test_sets_that_no_model_stores():
    model = wrap("resnet")
    with pytest.raises(ConfigError, match="randomized=False"):
        model.set_prediction_sets(ConformalClassifier([0.5] * 4))
    with pytest.raises(ShapeError, match="3 quantiles for 4 exits"):
        model.set_prediction_sets(ConformalClassifier([0.5] * 3, randomized=False))
    with pytest.raises(InputTypeError, match="AVCSClassifier"):
        model.set_prediction_sets(AVCSClassifier([1.0] * 4))
    with pytest.raises(ShapeError, match="exit_index"):
        ConformalClassifier.fit(make_records(100), exit_index=torch.zeros(3, dtype=torch.int64))


GOOD = SETS.stored().to_dict()
DAMAGED = [
    [], "sets", {}, GOOD | {"more": 1}, GOOD | {"alpha": 0}, GOOD | {"alpha": 1.0}, GOOD | {"alpha": "0.1"},
    GOOD | {"alpha": math.nan}, GOOD | {"quantiles": None}, GOOD | {"quantiles": [0.5] * 3},
    GOOD | {"quantiles": [0.5] * 20_000}, GOOD | {"quantiles": [0.5, -1, 0.5, 0.5]},
    GOOD | {"quantiles": [0.5, math.nan, 0.5, 0.5]}, GOOD | {"quantiles": [0.5, "a", 0.5, 0.5]},
    GOOD | {"quantiles": [0.5, True, 0.5, 0.5]}, GOOD | {"quantiles": [10**400] * 4}, GOOD | {"penalty": -1},
    GOOD | {"penalty": math.inf}, GOOD | {"free": 1.5}, GOOD | {"free": 10**30}, GOOD | {"routed": 1},
]  # fmt: skip


@pytest.mark.parametrize("values", DAMAGED, ids=lambda values: repr(values)[:40])
def test_what_is_damaged_is_refused(values):
    stored = {"exits": ["layer1", "layer2", "layer3"], "num_labels": 5, "architecture": "resnet10_cifar"}
    with pytest.raises((ConfigError, ShapeError)):
        EarlyExitConfig.from_dict(stored | {"prediction_sets": values})
    info = FileInfo("0", "entropy", [1.0] * 3, [0.0, 9.0], list("abcd"), [1, 2, 3, 4], {0: "a", 1: "b"}, [3, 8, 8])
    metadata = info.to_metadata()
    assert FileInfo.from_metadata(metadata, "a file") == info
    with pytest.raises(CheckpointError):
        FileInfo.from_metadata(metadata | {"prediction_sets": json.dumps(values)}, "a file")


def test_a_regression_has_no_sets():
    with pytest.raises((ConfigError, NotSupportedError), match="regression"):
        EarlyExitConfig(
            architecture="resnet10_cifar", exits=["layer1"], num_labels=2, problem_type="regression",
            prediction_sets=StoredSets(0.1, [0.5, 0.5]).to_dict(),
        )  # fmt: skip


def test_records_with_a_sample_twice_say_so():
    records = make_records(100)
    twice = records_of(records.logits, records.labels, index=torch.arange(100) // 2)
    with pytest.warns(RepeatedSamplesWarning), pytest.raises(ShapeError, match="50 distinct"):
        ConformalClassifier.fit(twice, exit_index=torch.zeros(100, dtype=torch.int64))
