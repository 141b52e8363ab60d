"""Rounds of DEDIER in the Distiller: who answers, when, in what order, and that a resumed run does the same."""

import dataclasses
import logging
import math

import numpy as np
import pytest
import torch

from erde_hub.calibration import LaplaceCalibrator
from erde_hub.data.loader import BatchLoader
from erde_hub.errors import ConfigError
from erde_hub.evaluation import collect_exit_records
from erde_hub.heads import FeatureSpec
from erde_hub.losses import DEDIERLoss, ReadoutWeight, create_loss
from erde_hub.prediction_sets import AVCSClassifier
from erde_hub.training import Distiller, readout
from erde_hub.training._checks import all_exits
from erde_hub.training.readout import ConvReadout, new_readout
from tests.fakes.training import TinyExits, assert_same, make_args, make_data, network, weights


@pytest.fixture(scope="module")
def data():
    return make_data(rows=60)


def run(data, loss, student=None, **changes):
    student = TinyExits() if student is None else student
    teacher = TinyExits(seed=1) if isinstance(student, TinyExits) else network(seed=1)
    distiller = Distiller(student, data, make_args(**changes), loss, teacher)
    return distiller, distiller.train()


def test_the_table_holds_what_the_early_exit_of_the_student_got_wrong(data):
    """One round, after the first of two epochs: its weights are those of the student at that moment."""
    loss = DEDIERLoss(readout_alpha=0.5, readout_beta=2.0)
    student = TinyExits()
    seen = {}
    update = loss.readout.update

    def spy(index, logits, labels):
        images, rows = data.train, index.tolist()
        assert rows == data.train.indices.tolist(), "every sample once, in the order of the split"
        assert not student.training
        pixels = images.preprocessing.normalize(images.pixels(np.arange(len(rows))), False)
        with torch.no_grad():
            expected = all_exits(student, {"pixel_values": pixels})[0]
        torch.testing.assert_close(logits, expected)
        assert torch.equal(labels, data.train.labels)
        summary = update(index, logits, labels)
        seen.update(summary, logits=logits)
        return summary

    loss.readout.update = spy
    _, result = run(data, loss, student, epochs=2)
    probs = seen["logits"].softmax(-1).sort(-1).values
    wrong = seen["logits"].argmax(-1) != data.train.labels
    by_hand = torch.where(wrong, torch.exp(2.0 * (probs[:, -1] - probs[:, -2]) ** 0.5), torch.ones(len(wrong)))
    torch.testing.assert_close(loss.readout.table[data.train.indices], by_hand)
    assert 0 < wrong.sum() < len(wrong)
    assert result.history[0]["readout"]["wrong"] == pytest.approx(wrong.double().mean().item())
    assert "readout" not in result.history[1], "nobody would use a round after the last epoch"
    assert result.history[1]["train"]["terms"]["dedier_weight"] > 1.0
    assert result.history[0]["train"]["terms"]["dedier_weight"] == 1.0


@pytest.mark.parametrize(("every", "due"), [(1, [1, 2, 3, 4]), (2, [1, 3]), (3, [1, 4])])
def test_rounds_are_run_when_they_are_due(data, every, due):
    loss = DEDIERLoss(readout_every=every)
    calls = []
    loss.readout.update = lambda *_: calls.append(1) or {"wrong": 0.0, "mean_weight": 1.0, "max_weight": 1.0}
    _, result = run(data, loss, epochs=5)
    assert [entry["epoch"] for entry in result.history if "readout" in entry] == due
    assert len(calls) == len(due)


def test_a_trained_head_leaves_the_student_and_the_generators_alone(data):
    loss = DEDIERLoss(readout_source="head", readout_exit=1, readout_epochs=3, readout_lr=0.01)
    student = network()
    distiller = Distiller(student, data, make_args(epochs=2), loss, network(seed=1))
    with distiller._prepared():
        before, state = weights(student), torch.get_rng_state()
        student.train()
        summary = distiller.loss_inputs.rounds[0].run(student, epoch=0)
    assert student.training
    assert_same(weights(student), before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in student.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(head._forward_pre_hooks for head in student.heads)
    assert summary["wrong"] < 0.5  # brighter red, green or blue: three epochs on random features are enough
    table = loss.readout.table.clone()
    with distiller._prepared():
        distiller.loss_inputs.rounds[0].run(student, epoch=0)
    assert torch.equal(loss.readout.table, table), "a function of seed and epoch"


@pytest.fixture(scope="module")
def larger_data():
    """With enough validation samples to fit a confidence on."""
    return make_data(rows=300)


@pytest.mark.parametrize("confidence", ["laplace", "prediction_set"])
@pytest.mark.parametrize("exit_", [0, 1])
def test_the_confidence_of_an_exit_is_fitted_on_the_validation_split(larger_data, confidence, exit_):
    student, loss = network(), DEDIERLoss(readout_alpha=0.5, readout_exit=exit_, readout_confidence=confidence)
    distiller = Distiller(student, larger_data, make_args(seed=3), loss, network(seed=1))
    with distiller._prepared():
        summary = distiller.loss_inputs.rounds[0].run(student, epoch=0)
    held_out, train = (
        collect_exit_records(student, BatchLoader(split, 8), features=True, progress=False)
        for split in (larger_data.validation, larger_data.train)
    )
    if confidence == "laplace":  # each exit is fitted by itself
        probs = LaplaceCalibrator.fit(held_out, seed=3).calibrate(train.logits, train.features)[exit_].softmax(-1)
        best = probs.sort(-1).values
        expected = best[:, -1] - best[:, -2]
    else:
        keep = slice(exit_ + 1)
        sets = AVCSClassifier.fit(cut(held_out, keep), seed=3).sets(train.logits[keep])[-1]
        expected = torch.tensor([0.0, 1.0, 0.5, 0.0])[sets.sum(-1)]  # none, one, two or all of three classes
    wrong = train.logits[exit_].argmax(-1) != train.labels
    weight = torch.where(wrong, torch.exp(4.0 * expected**0.5), 1.0)
    torch.testing.assert_close(loss.readout.table[train.index], weight, rtol=1e-4, atol=1e-4)
    assert summary["wrong"] > 0
    assert len(expected[wrong].unique()) > 1


def cut(records, exits):
    return dataclasses.replace(
        records,
        logits=records.logits[exits],
        exit_names=records.exit_names[exits],
        cumulative_macs=records.cumulative_macs[exits],
        features=None,
    )


@pytest.mark.parametrize("confidence", ["laplace", "prediction_set"])
def test_the_confidence_of_a_trained_head_is_its_own(larger_data, confidence):
    loss = DEDIERLoss(readout_source="head", readout_exit=1, readout_confidence=confidence)
    _, result = run(larger_data, loss, network(), batch_size=32)
    assert 1 <= result.history[0]["readout"]["mean_weight"] <= result.history[0]["readout"]["max_weight"] <= math.exp(4)


@pytest.fixture
def made(monkeypatch):
    """The auxiliary heads as they are made, each with its first weights."""
    heads = []

    def keep(spec, num_labels):
        head = new_readout(spec, num_labels)
        heads.append((head, weights(head)))
        return head

    monkeypatch.setattr(readout, "new_readout", keep)
    return heads


def read_out(data, student, batch_size, augment="none", **settings):
    """One round with an auxiliary head."""
    loss = DEDIERLoss(readout_source="head", **settings)
    args = make_args(batch_size=batch_size, augment=augment)
    distiller = Distiller(student, data, args, loss, network(seed=1))
    with distiller._prepared():
        distiller.loss_inputs.rounds[0].run(student, epoch=0)


def test_a_head_sees_the_training_set_without_augmentation_so_many_times(data):
    student, seen, epochs = network(), [], 2
    student.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batches = len(data.train) // 8
    read_out(data, student, 8, "crop_flip", readout_epochs=epochs)
    answering = math.ceil(len(data.train) / 8)
    assert len(seen) == epochs * batches + answering
    rows = np.arange(len(data.train))
    plain = data.train.preprocessing.normalize(data.train.pixels(rows), False).flatten(1)
    chosen = [(images.flatten(1)[:, None] == plain).all(-1) for images in seen]
    assert all(found.any(1).all() for found in chosen), "an image that is not of the training set as it is"
    order = [torch.cat(chosen[k * batches : (k + 1) * batches]).double().argmax(1).tolist() for k in range(epochs)]
    assert len({tuple(rows) for rows in order}) == epochs, "each pass has an order of its own"
    assert all(len(set(rows)) == len(rows) for rows in order)


def test_a_head_learns_at_its_own_rate(data, made):
    """The first step of Adam is as long as its rate in every weight."""
    read_out(data, network(), len(data.train), readout_lr=0.02)
    ((head, before),) = made
    steps = [(value - before[name]).abs().max() for name, value in head.named_parameters()]
    assert max(steps).item() == pytest.approx(0.02, rel=0.02)


def test_an_exit_that_is_there_for_the_head_alone_stays_as_it_is(data):
    """What a student has that is to train as if it had no exits."""
    student = network(exits=("layer1",))
    before = weights(student)
    loss = DEDIERLoss(readout_source="head", exit_weights=[0, 1])
    _, result = run(data, loss, student, epochs=2, weight_decay=0.0)
    after = weights(student)
    early = [name for name, _ in student.named_parameters() if name.startswith("heads.")]
    assert early
    assert_same({name: before[name] for name in early}, {name: after[name] for name in early})
    assert result.history[0]["readout"]["max_weight"] > 1


@pytest.mark.parametrize(
    "settings", [{}, {"readout_source": "head", "readout_sticky": True, "readout_confidence": "laplace"}]
)
def test_a_resumed_run_has_the_same_weights_bit_for_bit(larger_data, tmp_path, settings):
    class Stop(Exception):  # noqa: N818
        pass

    def build(folder, **changes):
        loss = create_loss("erde").add(ReadoutWeight(**settings))
        args = make_args(epochs=3, batch_size=32, output_dir=folder and str(folder), **changes)
        return loss, Distiller(network(), larger_data, args, loss, network(seed=1))

    whole, distiller = build(None)
    distiller.train()
    expected = weights(distiller.student)
    assert whole.sample_weights[0].table.max() > 1

    _, distiller = build(tmp_path / "run", checkpoint_steps=2)
    save, saved = distiller._save, []

    def save_and_stop():
        save()
        saved.append(distiller.position.step)
        if len(saved) == 4:  # within the second epoch: the table is that of the round before
            raise Stop

    distiller._save = save_and_stop
    with pytest.raises(Stop):
        distiller.train()
    assert distiller.position.epoch == 1
    assert distiller.position.batch > 0
    loss, distiller = build(tmp_path / "run", checkpoint_steps=2, resume=True)
    distiller.train()
    assert torch.equal(loss.sample_weights[0].table, whole.sample_weights[0].table)
    assert_same(weights(distiller.student), expected)


@pytest.mark.parametrize(("layout", "shape"), [("NCHW", (2, 6, 4, 4)), ("NHWC", (2, 4, 4, 6)), ("NLC", (2, 5, 6)), ("NC", (2, 6))])  # fmt: skip # noqa: E501
def test_a_head_for_every_layout(layout, shape):
    head = new_readout(FeatureSpec(6, layout, shape[1:-1]), 3)
    assert head(torch.randn(shape)).shape == (2, 3)
    assert isinstance(head, ConvReadout) == (layout in ("NCHW", "NHWC"))
    if layout == "NCHW":  # to twice the channels, twice
        sizes = [tuple(m.weight.shape) for m in head.modules() if isinstance(m, torch.nn.Conv2d)]
        assert sizes == [(12, 6, 3, 3), (12, 12, 3, 3)]


def test_what_cannot_be_read_out_is_refused_before_training(data):
    with pytest.raises(
        ConfigError, match="reads early exit 1 and the student has 1 early exits: give readout_exit 0 to 0"
    ):
        run(data, DEDIERLoss(readout_exit=1))
    with pytest.raises(ConfigError, match="TinyExits has no early exits whose features could be read"):
        run(data, DEDIERLoss(readout_source="head"))

    with pytest.raises(ConfigError, match="TinyExits has no early exits whose features could be read"):
        run(make_data(rows=300), DEDIERLoss(readout_confidence="laplace"))
    with pytest.raises(ConfigError, match=r"'laplace' is fitted on the validation split, which has \d+ samples: .* 20"):
        run(data, DEDIERLoss(readout_confidence="laplace"))

    class Stream:
        class train:  # noqa: N801 - an attribute
            num_samples = None

    from erde_hub.training.readout import ReadoutRounds  # noqa: PLC0415

    with pytest.raises(ConfigError, match="streamed data have no known number"):
        ReadoutRounds(ReadoutWeight(), TinyExits(), Stream(), make_args(), None)


def test_a_training_without_a_round_says_so(data, caplog):
    logging.getLogger("erde_hub").propagate = True
    for epochs, said in ((1, True), (2, False)):
        caplog.clear()
        run(data, DEDIERLoss(), epochs=epochs)
        assert ("this training has one epoch: all weights stay 1" in caplog.text) == said


def test_weights_reach_exp_beta(data):
    loss = DEDIERLoss(readout_alpha=0.05, readout_beta=4.0)
    run(data, loss, epochs=2)
    assert loss.readout.table.min() >= 1
    assert loss.readout.table.max() <= math.exp(4.0)
