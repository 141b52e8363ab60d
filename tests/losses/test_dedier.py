"""DEDIER against the golden vectors, its table of weights, and what it refuses."""

import math

import pytest
import torch

from erde_hub.errors import ConfigError, InputTypeError, LabelError, ShapeError
from erde_hub.losses import (
    CELoss,
    DEDIERLoss,
    EntropyWeight,
    ERDELoss,
    KDLoss,
    ReadoutWeight,
    create_loss,
    dedier_loss,
    readout_weights,
)


def cases_of(data):
    cases = [case for case in data["cases"] if "student_logits" in case["inputs"]]
    assert len(cases) >= 6
    return cases


def settings_of(given):
    return {
        "temperature": given["temperature"],
        "kl_weight": given["kd_fraction"],
        "ce_weight": 1 - given["kd_fraction"],
        "readout_alpha": given["alpha"],
        "readout_beta": given["beta"],
    }


def test_weights(golden, precision, assert_matches):
    data = golden("dedier")
    for case in cases_of(data):
        given, expected = case["inputs"], case["expected"]
        logits, labels = torch.tensor(given["aux_logits"], dtype=precision), torch.tensor(given["labels"])
        weights, wrong = readout_weights(logits, labels, given["alpha"], given["beta"])
        assert_matches(weights, expected["weight"], data["tolerance"], case["name"])
        assert wrong.int().tolist() == [int(value) for value in expected["aux_wrong"]]
        assert logits.argmax(-1).tolist() == expected["aux_prediction"]


def test_values_and_gradients(golden, precision, assert_matches):
    data, both = golden("dedier"), 0
    for case in cases_of(data):
        given, expected, name = case["inputs"], case["expected"], case["name"]
        labels, aux = torch.tensor(given["labels"]), torch.tensor(given["aux_logits"], dtype=precision)
        teacher = torch.tensor(given["teacher_logits"], dtype=precision)
        for key in ("kd_only", "kd_and_ce"):
            student = torch.tensor(given["student_logits"], dtype=precision, requires_grad=True)
            settings = settings_of(given) | {"readout_weighs_ce": key == "kd_and_ce"}
            value = dedier_loss([student], [teacher], labels, aux, **settings)
            value.backward()
            assert_matches(value, expected[f"loss_weight_on_{key}"], data["tolerance"], f"{name} {key}")
            if f"grad_weight_on_{key}" in expected:
                both += 1
                assert_matches(student.grad, expected[f"grad_weight_on_{key}"], data["tolerance"], f"{name} {key}")
        plain = DEDIERLoss(**settings_of(given), readout_source="head")
        unweighted = plain([student], [teacher], labels).loss  # before the first round
        assert_matches(unweighted, expected["loss_unweighted_kd"], data["tolerance"], name)
    assert both >= 7


@pytest.mark.parametrize(("sticky", "key"), [(True, "weights_sticky_as_released"), (False, "weights_reset_each_round")])
def test_three_rounds(golden, precision, assert_matches, sticky, key):
    data = golden("dedier")
    case = next(case for case in data["cases"] if case["name"] == "three_reweighting_rounds")
    given, labels = case["inputs"], torch.tensor(case["inputs"]["labels"])
    weight = ReadoutWeight(given["alpha"], given["beta"], readout_sticky=sticky).to(precision)
    weight.allocate(len(labels))
    for logits, expected in zip(given["aux_logits_per_round"], case["expected"][key], strict=True):
        weight.update(torch.arange(len(labels)), torch.tensor(logits, dtype=precision), labels)
        assert_matches(weight.table, expected, data["tolerance"], f"sticky {sticky}")


def make_batch(samples=6, classes=4, exits=2):
    labels = torch.arange(samples) % classes
    return [torch.randn(samples, classes) for _ in range(exits)], [torch.randn(samples, classes)] * exits, labels


def wrong_everywhere(labels, classes=4, margin=1.0):
    """Logits of a read-out that is wrong on every sample."""
    return 50.0 * margin * torch.nn.functional.one_hot((labels + 1) % classes, classes).float()


def test_weights_follow_the_index_and_not_the_place_in_the_batch():
    student, teacher, labels = make_batch()
    loss = DEDIERLoss(readout_alpha=1.0, readout_beta=2.0, readout_source="head")
    loss.readout.allocate(100)
    rows = torch.tensor([70, 3, 99, 0, 41, 8])
    logits = wrong_everywhere(labels)
    logits[3] = 50.0 * torch.nn.functional.one_hot(labels[3], 4)  # right
    loss.readout.update(rows, logits, labels)
    order = torch.tensor([4, 0, 5, 3, 2, 1])
    value = loss(student, teacher, labels, index=rows)
    shuffled = loss([s[order] for s in student], [t[order] for t in teacher], labels[order], index=rows[order])
    torch.testing.assert_close(value.loss, shuffled.loss)
    kl = KDLoss(3.0, kl_weight=1.0, ce_weight=0.0)
    by_hand = sum(
        (1.0 if n == 3 else math.exp(2.0))
        * kl([s[n : n + 1] for s in student], [t[n : n + 1] for t in teacher], labels[n : n + 1]).loss
        for n in range(6)
    )
    torch.testing.assert_close(value.loss, by_hand / 6)
    assert loss.readout.table[[1, 2, 50]].tolist() == [1.0] * 3  # not seen


def test_normalized_weights_have_the_mean_1_over_the_training_set():
    student, teacher, labels = make_batch()
    loss = DEDIERLoss(readout_normalize=True, readout_source="head")
    loss.readout.allocate(50)
    logits = wrong_everywhere(labels)
    logits[:3] = 50.0 * torch.nn.functional.one_hot(labels[:3], 4)
    summary = loss.readout.update(torch.arange(6), logits, labels)
    assert summary["wrong"] == 0.5
    assert summary["mean_weight"] == pytest.approx((1 + math.exp(4)) / 2)
    assert summary["max_weight"] == pytest.approx(math.exp(4))
    result = loss(student, teacher, labels, index=torch.arange(6))
    assert result.terms["dedier_weight"].item() == pytest.approx(1.0)


def test_it_joins_erde_and_multiplies_with_other_weights():
    student, teacher, labels = make_batch()
    loss = create_loss("erde").add(ReadoutWeight(readout_source="head"), EntropyWeight())
    loss.sample_weights[0].allocate(6)
    loss.sample_weights[0].update(torch.arange(6), wrong_everywhere(labels), labels)
    both = loss(student, teacher, labels, index=torch.arange(6))
    entropy = ERDELoss().add(EntropyWeight())(student, teacher, labels)
    torch.testing.assert_close(both.exit_terms["kl"], math.exp(4) * entropy.exit_terms["kl"])
    torch.testing.assert_close(both.exit_terms["ce"], entropy.exit_terms["ce"])
    torch.testing.assert_close(both.exit_terms["entropy"], entropy.exit_terms["entropy"])


def test_an_exit_that_is_read_is_not_weighed_itself():
    student, teacher, labels = make_batch(exits=4)
    plain = KDLoss(3.0, kl_weight=1.0, ce_weight=0.0)(student, teacher, labels).exit_terms["kl"]
    for exit_ in (0, 2):
        loss = DEDIERLoss(readout_exit=exit_)
        loss.readout.allocate(6)
        loss.readout.update(torch.arange(6), wrong_everywhere(labels), labels)
        ratio = loss(student, teacher, labels, index=torch.arange(6)).exit_terms["kl"] / plain
        expected = [1.0] * (exit_ + 1) + [math.exp(4.0)] * (3 - exit_)
        torch.testing.assert_close(ratio, torch.tensor(expected))


def test_a_sample_that_two_processes_hold_counts_once(monkeypatch):
    """As where a loader fills up the last batch of each process; both send the same rows here."""
    labels = torch.arange(6) % 4
    logits = wrong_everywhere(labels)
    logits[3] = 50.0 * torch.nn.functional.one_hot(labels[3], 4)  # right
    alone, both = ReadoutWeight(), ReadoutWeight()
    for weight in (alone, both):
        weight.allocate(6)
    expected = alone.update(torch.arange(6), logits, labels)
    distributed = {"is_available": lambda: True, "is_initialized": lambda: True, "get_world_size": lambda: 2}
    for name, function in {**distributed, "all_reduce": lambda tensor: tensor.mul_(2)}.items():
        monkeypatch.setattr(torch.distributed, name, function)
    assert both.update(torch.arange(6), logits, labels) == expected
    assert torch.equal(both.table, alone.table)


def test_the_table_is_state_that_travels():
    loss = DEDIERLoss()
    loss.readout.allocate(6)
    labels = torch.arange(6) % 4
    loss.readout.update(torch.arange(6), wrong_everywhere(labels), labels)
    other = DEDIERLoss()
    other.readout.allocate(6)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.readout.table, loss.readout.table)
    assert set(loss.state_dict()) == {"sample_weights.0.table", "sample_weights.0.scale"}


def test_the_readout_gets_no_gradient():
    labels, logits = torch.tensor([1, 0]), torch.randn(2, 3, requires_grad=True)
    assert not readout_weights(logits, labels, 0.5, 1.0)[0].requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"readout_alpha": 0.0}, ConfigError, r"readout_alpha must be finite and above 0, got 0\.0"),
        ({"readout_beta": -1.0}, ConfigError, r"readout_beta.*-1\.0"),
        ({"readout_source": "exits"}, ConfigError, "unknown readout_source 'exits'; did you mean 'exit'"),
        ({"readout_confidence": "laplac"}, ConfigError, "unknown readout_confidence 'laplac'; did you mean 'laplace'"),
        ({"readout_exit": -1}, ConfigError, "readout_exit must be at least 0, got -1"),
        ({"readout_every": 0}, ConfigError, "readout_every must be at least 1, got 0"),
        ({"readout_epochs": 1.5}, InputTypeError, r"readout_epochs must be a whole number, got 1\.5"),
        ({"readout_sticky": "no"}, InputTypeError, "readout_sticky must be True or False, got 'no'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    for cls in (ReadoutWeight, DEDIERLoss):
        with pytest.raises(error, match=message):
            cls(**arguments)


def test_another_confidence_is_given_by_whoever_fitted_it():
    labels, index = torch.arange(3) % 4, torch.arange(3)
    logits, given = wrong_everywhere(labels), torch.tensor([0.0, 0.25, 1.0])
    weight = ReadoutWeight(readout_alpha=0.5, readout_beta=2.0, readout_confidence="prediction_set")
    weight.allocate(3)
    weight.update(index, logits, labels, given)
    torch.testing.assert_close(weight.table, torch.tensor([1.0, math.exp(1.0), math.exp(2.0)]))
    with pytest.raises(InputTypeError, match=r"readout_confidence='prediction_set' needs the confidence= \(N,\)"):
        weight.update(index, logits, labels)
    with pytest.raises(ShapeError, match=r"confidence must be \(3,\) as the labels, got \(2,\)"):
        weight.update(index, logits, labels, given[:2])
    softmax = ReadoutWeight()
    softmax.allocate(3)
    with pytest.raises(InputTypeError, match="readout_confidence='softmax' takes none"):
        softmax.update(index, logits, labels, given)


def test_bad_calls():
    student, teacher, labels = make_batch()
    loss = DEDIERLoss()
    with pytest.raises(ConfigError, match="no rows: call allocate"):
        loss.readout.update(torch.arange(6), student[0], labels)
    loss.readout.allocate(5)
    with pytest.raises(InputTypeError, match="'dedier' looks the weight of each sample up: pass index="):
        loss(student, teacher, labels)
    with pytest.raises(ShapeError, match="index 5 is outside the table of 5 weights"):
        loss(student, teacher, labels, index=torch.arange(6))
    with pytest.raises(ShapeError, match="index -1 is outside"):
        loss.readout.update(torch.arange(6) - 1, student[0], labels)
    with pytest.raises(ShapeError, match="logits of at least one sample"):
        loss.readout.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(LabelError, match="label 9 of row 0 is outside"):
        loss.readout.update(torch.tensor([0]), student[0][:1], torch.tensor([9]))


def test_what_it_cannot_join():
    with pytest.raises(ConfigError, match=r"'dedier' weighs the samples of .*, and CELoss has none"):
        CELoss().add(ReadoutWeight())
    with pytest.raises(ConfigError, match="DEDIERLoss has 'dedier' already"):
        DEDIERLoss().add(ReadoutWeight())
    with pytest.raises(ConfigError, match="reads early exit 0 and the student has 0 early exits: give it one"):
        ReadoutWeight().check_exits(1)
    with pytest.raises(ConfigError, match=r"reads early exit 2 and the student has 2 early exits: .* 0 to 1"):
        ReadoutWeight(readout_exit=2).check_exits(3)
    one_exit = r"0 early exits: give it one, where the head reads, and exit_weights=\[0, 1\] to leave it untrained"
    with pytest.raises(ConfigError, match=one_exit):
        ReadoutWeight(readout_source="head").check_exits(1)


@pytest.mark.parametrize("allocated", [False, True])
def test_a_loop_of_ones_own_hears_that_no_exit_could_be_weighed(allocated):
    student, teacher, labels = make_batch()
    for settings, exits, message in (
        ({}, 1, "reads early exit 0 and the student has 0 early exits"),
        ({"readout_exit": 5}, 2, "reads early exit 5 and the student has 1 early exits: give readout_exit 0 to 0"),
    ):
        loss = DEDIERLoss(**settings)
        if allocated:
            loss.readout.allocate(6)
        with pytest.raises(ConfigError, match=message):
            loss(student[:exits], teacher[:exits], labels, index=torch.arange(6))
    DEDIERLoss(readout_source="head")(student[:1], teacher[:1], labels)  # whatever answers is the loop's affair
