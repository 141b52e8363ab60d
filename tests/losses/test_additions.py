"""Weights and terms that join a loss: every pair of the tables, terms of features and of the last exit, refusals."""

import itertools

import pytest
import torch
from torch import nn

from erde_hub import losses
from erde_hub.errors import ConfigError, InputTypeError, ShapeError
from erde_hub.losses import (
    CELoss,
    DKDLoss,
    EGADLoss,
    EntropyWeight,
    ERDELoss,
    ExtraTerm,
    FeatureKDLoss,
    FeatureTerm,
    KDLoss,
    SampleWeight,
    SelfDistillationLoss,
    SelfDistillationTerm,
    create_addition,
    functional,
    get_addition,
    list_additions,
    list_losses,
)
from tests.fakes.losses import call, create_loss, ready

PAIRS = list(itertools.product(list_losses(), list_additions()))


def make_batch(exits=3, samples=6, classes=5, dtype=torch.float32):
    labels = torch.arange(samples) % classes
    student = [torch.randn(samples, classes, dtype=dtype, requires_grad=True) for _ in range(exits)]
    return student, [torch.randn(samples, classes, dtype=dtype) for _ in range(exits)], labels


@pytest.mark.parametrize(("name", "addition"), PAIRS, ids=lambda value: value)
def test_every_pair_works_or_says_why_not(name, addition):
    loss, joined = losses.create_loss(name), create_addition(addition)
    student, teacher, labels = make_batch()
    try:
        loss.add(joined)
    except ConfigError as error:
        refusal = str(error)
        assert repr(addition) in refusal
        assert "already" in refusal or not loss.distillation_terms() or not loss.reads_teacher
        return
    result = call(ready(loss), student, teacher if loss.reads_teacher else None, labels)
    result.loss.backward()
    assert result.non_finite() == []
    assert all(torch.isfinite(logits.grad).all() for logits in student)
    assert joined in loss.additions()
    assert loss.added() == {addition: joined.settings()}
    assert f"+{addition}(" in repr(loss)
    shown = joined.name if isinstance(joined, ExtraTerm) else f"{joined.name}_weight"
    assert shown in result.terms
    assert set(loss.settings()) == set(losses.create_loss(name).settings())


def test_the_tables():
    assert {"ea_kd"} <= set(list_additions(SampleWeight))
    assert {"feature", "self"} == set(list_additions(ExtraTerm))
    for name in list_additions():
        entry = get_addition(name)
        assert entry.cls.name == name
        assert entry.summary
        assert entry.reference.startswith("arXiv")
    with pytest.raises(ConfigError, match="unknown addition 'ea_kt'; did you mean 'ea_kd'"):
        create_addition("ea_kt")
    with pytest.raises(InputTypeError, match=r"add.. takes weights of samples and further terms"):
        KDLoss().add(CELoss())


def test_several_weights_multiply():
    class Constant(SampleWeight):
        name = "constant"

        def weights(self, batch):
            return torch.full((batch.num_samples,), 3.0)

    class PerExit(SampleWeight):
        name = "per_exit"

        def weights(self, batch):
            return torch.arange(3.0)[:, None].expand(3, batch.num_samples)

    student, teacher, labels = make_batch()
    plain = KDLoss()(student, teacher, labels)
    result = KDLoss().add(Constant(), PerExit())(student, teacher, labels)
    torch.testing.assert_close(result.exit_terms["kl"], plain.exit_terms["kl"] * torch.tensor([0.0, 3.0, 6.0]))
    torch.testing.assert_close(result.exit_terms["ce"], plain.exit_terms["ce"])
    assert result.exit_terms["per_exit_weight"].tolist() == [0.0, 1.0, 2.0]


def test_weights_do_not_count_among_the_samples_under_a_mask():
    """A weight times a mask, over the samples under the mask: (2 x 3 x 1 + 2 x 5 x 0) / 1, by hand."""

    class Half(losses.ExitLoss):
        needs_teacher = False

        def distillation_terms(self):
            return ("part",)

        def terms(self, batch):
            return [losses.Term("part", batch.student_logits[..., 0], 1.0, batch.labels.bool().expand(1, -1))]

    class Two(SampleWeight):
        name = "two"

        def weights(self, batch):
            return torch.full((batch.num_samples,), 2.0)

    logits = [torch.tensor([[3.0, 0.0], [5.0, 0.0]])]
    result = Half(reduction="subset").add(Two())(logits, None, torch.tensor([1, 0]))
    assert result.loss.item() == 6.0  # weights do not enter the denominator


@pytest.mark.parametrize(
    ("shape", "message"),
    [((6, 3), r"weights of 'odd' must have shape \(3, 6\) or \(6,\).* got \(6, 3\)"), ((3,), r"got \(3,\)")],
)
def test_weights_of_another_shape_are_refused(shape, message):
    class Odd(SampleWeight):
        name = "odd"

        def weights(self, batch):
            return torch.ones(shape)

    with pytest.raises(ShapeError, match=message):
        KDLoss().add(Odd())(*make_batch())


@pytest.mark.parametrize("kind", [SampleWeight, ExtraTerm])
def test_an_addition_without_a_name_is_refused(kind):
    class Nameless(kind):
        pass

    for loss in (KDLoss(), CELoss(), EGADLoss()):
        with pytest.raises(ConfigError, match=r'Nameless has no name: .* as in name = "nameless"'):
            loss.add(Nameless())


def test_the_order_of_additions_does_not_matter():
    given = EntropyWeight(), FeatureTerm()
    for order in (given, given[::-1]):
        loss = ERDELoss(kl_weight=0.0).add(*order)  # there is nothing to weigh but the features
        assert loss.distillation_terms() == ("feature",)
        assert loss.additions() == [given[1], given[0]]
        assert list(loss.added()) == [addition.name for addition in order]


@pytest.mark.parametrize("bad", [EntropyWeight(), CELoss(), None])
def test_where_one_addition_is_refused_none_has_joined(bad):
    loss = KDLoss().add(SelfDistillationTerm())
    with pytest.raises((ConfigError, InputTypeError)):
        loss.add(EntropyWeight(), FeatureTerm(), bad)
    assert [addition.name for addition in loss.additions()] == list(loss.added()) == ["self"]
    assert loss.distillation_terms() == ("kl",)
    loss.add(FeatureTerm(), EntropyWeight())
    assert list(loss.added()) == ["self", "feature", "ea_kd"]


# Decoupled distillation


def test_dkd_is_hinton_where_the_second_weight_is_the_mass_of_the_other_classes():
    student, teacher, labels = make_batch(exits=1, samples=1, dtype=torch.float64)
    mass = 1 - functional.log_probs(teacher[0], 4.0).exp()[0, labels[0]].item()
    dkd = DKDLoss(4.0, target_weight=1.0, nontarget_weight=mass, ce_weight=0.0)(student, teacher, labels).loss
    kd = KDLoss(4.0, kl_weight=1.0, ce_weight=0.0)(student, teacher, labels).loss
    torch.testing.assert_close(dkd, kd)


def test_dkd_with_two_classes_has_no_others():
    student, teacher, labels = make_batch(classes=2)
    result = DKDLoss()(student, teacher, labels)
    assert result.terms["nontarget"].abs() < 1e-6


def test_dkd_warms_up():
    student, teacher, labels = make_batch()
    loss = DKDLoss(ce_weight=0.0, warmup_epochs=4)
    complete = loss(student, teacher, labels).loss
    for epoch, share in ((1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)):
        loss.set_epoch(epoch, 10)
        torch.testing.assert_close(loss(student, teacher, labels).loss, share * complete)
    with pytest.raises(InputTypeError, match=r"warmup_epochs must be a whole number, got 0.5"):
        DKDLoss(warmup_epochs=0.5)
    with pytest.raises(ConfigError, match="warmup_epochs must be at least 0, got -1"):
        DKDLoss(warmup_epochs=-1)


# The last exit as the teacher


def test_self_distillation_teaches_the_earlier_exits_and_leaves_the_last_alone():
    student, _, labels = make_batch()
    term = SelfDistillationLoss(self_weight=1.0, self_temperature=2.0)(student, None, labels)
    kd = KDLoss(2.0, kl_weight=1.0, ce_weight=1.0)(student[:2], [student[2]], labels)
    torch.testing.assert_close(term.exit_terms["self"][:2], kd.exit_terms["kl"])
    assert term.exit_terms["self"][2] == 0.0
    term.loss.backward()
    alone = student[2].detach().requires_grad_()
    CELoss()([alone], None, labels).loss.backward()
    torch.testing.assert_close(student[2].grad, alone.grad)


def test_self_distillation_needs_an_earlier_exit():
    SelfDistillationTerm().check_exits(2)
    with pytest.raises(ConfigError, match=r"'self' teaches the earlier exits .* one exit in all"):
        SelfDistillationTerm().check_exits(1)


# Features


def test_arguments_of_the_feature_term_are_those_of_the_loss():
    loss = FeatureKDLoss(feature_weight=2, feature_size=3)
    assert (loss.feature_weight, loss.projection, loss.feature_size) == (2.0, "linear", 3)
    assert loss.extra_terms[0].settings() == {"feature_weight": 2.0, "projection": "linear", "feature_size": 3}


@pytest.mark.parametrize("ce_weight", [1.0, 0.0])
def test_features_of_two_networks_through_a_projection(ce_weight):
    torch.manual_seed(3)
    loss = FeatureKDLoss(kl_weight=0.0, ce_weight=ce_weight, feature_weight=2.0)
    term = loss.extra_terms[0]
    term.build([2, None, None], [3, 3, None])
    assert [tuple(p.shape) for p in loss.parameters()] == [(3, 2)]
    student, teacher, labels = make_batch()
    own, target = torch.randn(6, 4, 4, 2, requires_grad=True), torch.randn(6, 4, 4, 3, requires_grad=True)
    features = {"student_features": [own, None, None], "teacher_features": [target, torch.randn(6, 3), None]}
    result = loss(student, teacher, labels, **features)
    layer = term.projections["0"]
    expected = (own @ layer.weight.T - target).square().mean()
    torch.testing.assert_close(result.exit_terms["feature"][0], expected.detach())
    assert result.exit_terms["feature"][1:].tolist() == [0.0, 0.0]
    result.loss.backward()
    grad = torch.autograd.grad(2.0 * expected, (own, layer.weight))
    torch.testing.assert_close((own.grad, layer.weight.grad), grad)
    assert target.grad is None


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sides", [(8, 8), (4, 12), (16, 8), (6, 10)])
def test_large_maps_are_averaged_down(sides, channels_last):
    student, teacher, labels = make_batch(exits=1, dtype=torch.float64)
    shape = (6, *sides, 2) if channels_last else (6, 2, *sides)
    own, target = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    own, target = (x if channels_last else x.permute(0, 2, 3, 1) for x in (own, target))
    own.requires_grad_()
    loss = FeatureKDLoss(projection="none", feature_size=4)
    result = loss(student, teacher, labels, student_features=[own], teacher_features=[target])
    pooled = [torch.nn.functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 4) for x in (own, target)]
    expected = (pooled[0] - pooled[1]).square().mean()
    torch.testing.assert_close(result.terms["feature"], expected.detach())
    (grad,) = torch.autograd.grad(expected, own)
    own.grad = None
    result.loss.backward()
    torch.testing.assert_close(own.grad, grad)
    with pytest.raises(ConfigError, match="feature_size must be at least 1, got 0"):
        FeatureTerm(feature_size=0)


def test_maps_of_different_size_are_pooled_and_other_layouts_averaged():
    student, teacher, labels = make_batch(exits=1)
    loss = FeatureKDLoss(projection="none")
    big, small = torch.randn(6, 4, 4, 2), torch.randn(6, 2, 2, 2)
    pooled = big.unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2))
    for own, target in ((big, small), (small, big)):
        result = loss(student, teacher, labels, student_features=[own], teacher_features=[target])
        torch.testing.assert_close(result.terms["feature"], (pooled - small).square().mean())
    tokens = torch.randn(6, 7, 2)
    result = loss(student, teacher, labels, student_features=[big], teacher_features=[tokens])
    torch.testing.assert_close(result.terms["feature"], (big.mean((1, 2)) - tokens.mean(1)).square().mean())


def test_features_that_do_not_fit_are_refused():
    student, teacher, labels = make_batch(exits=2)
    one = [torch.randn(6, 3), None]
    loss = FeatureKDLoss()
    with pytest.raises(ConfigError, match="no projection for exit 0: call build"):
        loss(student, teacher, labels, student_features=one, teacher_features=one)
    loss.extra_terms[0].build([4, None], [3, None])
    with pytest.raises(ShapeError, match=r"features of exit 0 have 3 .* and 3 .* built for 4 and 3"):
        loss(student, teacher, labels, student_features=one, teacher_features=one)
    with pytest.raises(InputTypeError, match=r"student_features must be a sequence .* got NoneType"):
        loss(student, teacher, labels)
    with pytest.raises(ShapeError, match="student_features has 1 entries for 2 exits"):
        loss(student, teacher, labels, student_features=one[:1], teacher_features=one)
    with pytest.raises(ShapeError, match=r"teacher_features\[0\] must be \(N, ..., D\) with N = 6.*\(5, 3\)"):
        loss(student, teacher, labels, student_features=one, teacher_features=[torch.randn(5, 3), None])
    with pytest.raises(InputTypeError, match=r"student_features\[1\].*torch.int64"):
        loss(student, teacher, labels, student_features=[None, labels], teacher_features=one)
    none = FeatureKDLoss(projection="none")
    with pytest.raises(ShapeError, match="projection='none', but the features of exit 0 have 3 and 4"):
        none(student, teacher, labels, student_features=one, teacher_features=[torch.randn(6, 4), None])
    with pytest.raises(ConfigError, match="feature of exit 1 has 2 channels and the teacher's 3"):
        FeatureTerm(projection="none").build([None, 2], [None, 3])
    with pytest.raises(ConfigError, match="no pair of exits has features on both sides"):
        FeatureTerm().build([None, 2], [3, None])
    with pytest.raises(ConfigError, match="student_widths has 2 entries and teacher_widths 1: give both one per"):
        FeatureTerm().build([2, None], [3])
    with pytest.raises(InputTypeError, match=r"student_widths must be a list .*, got 2; .* a list of one"):
        FeatureTerm().build(2, 3)
    with pytest.raises(ConfigError, match=r"teacher_widths\[0\] must be at least 1, got 0"):
        FeatureTerm().build([2], [0])


def test_projections_travel_with_the_loss_and_nothing_else():
    loss = create_loss("erde").add(FeatureTerm(), EntropyWeight())
    loss.extra_terms[0].build([2, None], [3, None])
    assert list(loss.state_dict()) == ["extra_terms.0.projections.0.weight"]
    assert all(not isinstance(module, nn.BatchNorm2d) for module in loss.modules())


@pytest.mark.parametrize("index", [torch.arange(6.0), [0, 1], torch.ones(6, dtype=torch.bool)])
def test_numbers_of_samples_that_are_none(index):
    student, teacher, labels = make_batch()
    with pytest.raises(InputTypeError, match="index must be a tensor of whole numbers"):
        ERDELoss()(student, teacher, labels, index=index)
    with pytest.raises(ShapeError, match=r"index must have shape \(6,\)"):
        ERDELoss()(student, teacher, labels, index=torch.arange(5))
