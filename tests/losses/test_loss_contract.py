"""What every loss of the table promises, whatever it computes."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from erde_hub import losses
from erde_hub.errors import ConfigError, ErdeError, InputTypeError, ShapeError
from erde_hub.losses import ExitLoss, ReadoutWeight, Term, functional, get_loss, list_losses, register_loss
from tests.fakes.losses import COMBINED, call, create_loss, hold_detached_parts

every_loss = pytest.mark.parametrize("name", [*list_losses(), COMBINED])


def make_batch(exits=3, samples=6, classes=5, dtype=torch.float32, teacher_exits=None):
    """Student and teacher logits, labels; all logits could take gradients, and the teacher is right on some samples."""
    labels = torch.arange(samples) % classes
    student = [torch.randn(samples, classes, dtype=dtype, requires_grad=True) for _ in range(exits)]
    teacher = [torch.randn(samples, classes, dtype=dtype) for _ in range(teacher_exits or exits)]
    for logits in teacher:
        logits[::2] += 4 * nn.functional.one_hot(labels[::2], classes)
    return student, [logits.requires_grad_() for logits in teacher], labels


def gradients(result, student):
    result.loss.backward()
    return [logits.grad for logits in student]


def test_the_table_is_not_empty():
    assert {"ce", "kd", "erde"} <= set(list_losses())


@pytest.mark.parametrize("name", list_losses())
def test_entry_says_what_it_is(name):
    entry = get_loss(name)
    assert issubclass(entry.cls, ExitLoss)
    assert entry.summary
    assert entry.reference.startswith("arXiv")
    assert isinstance(entry.cls.needs_teacher, bool)
    for section in ("Args:", "Shape:", "Raises:", "References:"):
        assert section in entry.cls.__doc__, section


@every_loss
@pytest.mark.parametrize("exits", [1, 2, 4])
@pytest.mark.parametrize("teacher_exits", [1, 3])
def test_finite_with_gradients_for_the_student_and_none_for_the_teacher(name, exits, teacher_exits):
    student, teacher, labels = make_batch(exits, teacher_exits=teacher_exits)
    loss = create_loss(name)
    if exits == 1 and any(isinstance(weight, ReadoutWeight) for weight in loss.sample_weights):
        with pytest.raises(ConfigError, match="'dedier' reads early exit 0 and the student has 0 early exits"):
            call(loss, student, teacher, labels)
        return
    result = call(loss, student, teacher, labels)
    assert result.loss.shape == ()
    assert result.loss.dtype == torch.float32
    assert torch.isfinite(result.loss)
    assert all(torch.isfinite(grad).all() for grad in gradients(result, student))
    assert any(logits.grad.abs().sum() > 0 for logits in student)
    assert all(logits.grad is None for logits in teacher)
    assert result.non_finite() == []
    assert set(result.terms) == set(result.exit_terms)
    for key, value in result.terms.items():
        assert value.shape == (), key
        assert not value.requires_grad, key
        assert result.exit_terms[key].shape == (exits,), key
        assert not result.exit_terms[key].requires_grad, key


@every_loss
def test_the_inputs_are_left_as_they_are(name):
    student, teacher, labels = make_batch()
    before = [tensor.detach().clone() for tensor in (*student, *teacher, labels)]
    call(create_loss(name), student, teacher, labels).loss.backward()
    for tensor, copied in zip((*student, *teacher, labels), before, strict=True):
        assert torch.equal(tensor, copied)


@every_loss
def test_exit_terms_times_exit_weights_are_the_terms(name):
    student, teacher, labels = make_batch()
    weights = [0.2, 0.0, 3.0]
    plain = call(create_loss(name), student, teacher, labels)
    weighted = call(create_loss(name, exit_weights=weights), student, teacher, labels)
    shown = {"teacher_right", *(key for key in plain.terms if key.endswith("_weight"))}
    for key in set(plain.terms) - shown:
        torch.testing.assert_close(plain.exit_terms[key], weighted.exit_terms[key])
        torch.testing.assert_close(plain.terms[key], plain.exit_terms[key].sum())
        torch.testing.assert_close(weighted.terms[key], (plain.exit_terms[key] * torch.tensor(weights)).sum())
    # Linear in the weights, exit by exit.
    parts = [create_loss(name, exit_weights=[float(i == e) for i in range(3)]) for e in range(3)]
    parts = [call(part, student, teacher, labels).loss for part in parts]
    torch.testing.assert_close(weighted.loss, sum(w * part for w, part in zip(weights, parts, strict=True)))
    assert gradients(weighted, student)[1].abs().sum() == 0


@every_loss
def test_batch_of_one(name):
    student, teacher, labels = make_batch(samples=1)
    result = call(create_loss(name), student, teacher, labels)
    assert torch.isfinite(result.loss)
    assert all(torch.isfinite(grad).all() for grad in gradients(result, student))


@every_loss
def test_the_order_of_the_batch_does_not_matter(name):
    student, teacher, labels = make_batch(dtype=torch.float64)
    result = call(create_loss(name), student, teacher, labels)
    plain = gradients(result, student)
    order = torch.randperm(len(labels))
    shuffled = [logits.detach()[order].requires_grad_() for logits in student]
    other = call(create_loss(name), shuffled, [logits[order] for logits in teacher], labels[order], order)
    torch.testing.assert_close(other.loss, result.loss)
    torch.testing.assert_close(gradients(other, shuffled), [grad[order] for grad in plain])


@every_loss
def test_gradients_are_those_of_finite_differences(name):
    loss = create_loss(name)
    if not loss.differentiable:
        pytest.skip(f"{name} declares that it is not differentiable")
    student, teacher, labels = make_batch(exits=2, samples=4, classes=3, dtype=torch.float64, teacher_exits=3)
    teacher = [logits.detach() for logits in teacher]
    moving = hold_detached_parts(loss, student, teacher, labels)
    held = [logits.detach() for logits in student[len(moving) :]]

    def value(*logits):
        result = call(loss, [*logits, *held], teacher, labels).loss
        assert result.dtype == torch.float64
        return result

    assert torch.autograd.gradcheck(value, moving)
    if loss.twice_differentiable:
        assert torch.autograd.gradgradcheck(value, moving)


@every_loss
def test_autocast_does_not_lower_the_precision(name):
    student, teacher, labels = make_batch()
    loss = create_loss(name)
    expected = call(loss, student, teacher, labels).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = call(loss, student, teacher, labels).loss
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_on_in_float32(name, dtype):
    student, teacher, labels = make_batch()
    low = [logits.detach().to(dtype).requires_grad_() for logits in student]
    low_teacher = [logits.detach().to(dtype) for logits in teacher]
    result = call(create_loss(name), low, low_teacher, labels)
    high = [logits.detach().float().requires_grad_() for logits in low]
    expected = call(create_loss(name), high, [logits.float() for logits in low_teacher], labels)
    assert result.loss.dtype == torch.float32
    assert torch.equal(result.loss, expected.loss)
    for grad, wanted in zip(gradients(result, low), gradients(expected, high), strict=True):
        assert grad.dtype == dtype
        assert torch.equal(grad, wanted.to(dtype))


@every_loss
def test_trains_through_a_model_under_bf16_autocast(name):
    model = nn.ModuleList(nn.Linear(8, 5) for _ in range(3))
    inputs, (_, teacher, labels) = torch.randn(6, 8), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = [head(inputs) for head in model]
        result = call(create_loss(name), logits, teacher, labels)
    assert logits[0].dtype == torch.bfloat16
    assert result.loss.dtype == torch.float32
    result.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher_right", [True, False])
def test_one_hot_and_saturated_logits(name, dtype, teacher_right):
    samples, classes = 5, 4
    labels = torch.arange(samples) % classes
    one_hot = nn.functional.one_hot(labels, classes).to(dtype)
    teacher = [(1e4 * one_hot).roll(0 if teacher_right else 1, dims=1)] * 2
    student = [torch.randn(samples, classes).to(dtype) * size for size in (1e4, 1.0)]
    student[0][0], student[0][1] = 1e4 * one_hot[0], -1e4 * one_hot[1]
    student = [logits.requires_grad_() for logits in student]
    result = call(create_loss(name), student, teacher, labels)
    assert result.non_finite() == []
    assert torch.isfinite(result.loss)
    assert all(torch.isfinite(grad).all() for grad in gradients(result, student))


@every_loss
@pytest.mark.parametrize("mixed", [0, 1])
def test_exits_of_different_dtypes(name, mixed):
    student, teacher, labels = make_batch(exits=2)
    student[mixed] = student[mixed].detach().bfloat16().requires_grad_()
    result = call(create_loss(name), student, [teacher[0].double(), teacher[1]], labels)
    assert result.loss.dtype == torch.float32
    assert [grad.dtype for grad in gradients(result, student)] == [logits.dtype for logits in student]


@every_loss
def test_a_teacher_run_in_inference_mode_is_fine(name):
    student, teacher, labels = make_batch()
    with torch.inference_mode():
        teacher = [logits * 1.0 for logits in teacher]
    assert all(
        torch.isfinite(grad).all() for grad in gradients(call(create_loss(name), student, teacher, labels), student)
    )


@every_loss
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_by_term_and_exit(name, bad):
    student, teacher, labels = make_batch()
    with torch.no_grad():
        student[1][0, 2] = bad
    result = call(create_loss(name), student, teacher, labels)
    assert not torch.isfinite(result.loss)
    assert {exit_ for _, exit_ in result.non_finite()} == {1}
    assert {"ce", "kl", "mse"} & {term for term, _ in result.non_finite()}


@every_loss
def test_copies_and_pickles_give_the_same_numbers(name):
    loss = create_loss(name, exit_weights="sdn")
    loss.set_epoch(2, 9)
    student, teacher, labels = make_batch()
    expected = call(loss, student, teacher, labels).loss
    stream = io.BytesIO()
    torch.save(loss, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(call(other, student, teacher, labels).loss, expected)
        assert other.settings() == loss.settings()


@every_loss
def test_settings_rebuild_the_loss(name):
    loss = create_loss(name, exit_weights=[1, 2, 0.5])
    assert loss.settings()["exit_weights"] == [1.0, 2.0, 0.5]
    student, teacher, labels = make_batch()
    rebuilt = create_loss(name, **loss.settings())
    assert torch.equal(call(rebuilt, student, teacher, labels).loss, call(loss, student, teacher, labels).loss)


@every_loss
def test_unknown_arguments_are_refused_with_the_nearest_one(name):
    with pytest.raises(ConfigError, match=r"no argument 'exit_weigths'; did you mean 'exit_weights'"):
        create_loss(name, exit_weigths=[1.0])


@every_loss
def test_a_missing_teacher_is_an_error_only_where_one_is_needed(name):
    student, _, labels = make_batch()
    loss = create_loss(name)
    if loss.needs_teacher:
        with pytest.raises(InputTypeError, match="teacher_logits=None"):
            call(loss, student, None, labels)
    else:
        assert torch.isfinite(call(loss, student, None, labels).loss)


def test_unknown_loss_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"unknown loss 'erd'; did you mean 'erde'.*available: ce, "):
        create_loss("erd")
    with pytest.raises(ErdeError):
        get_loss("")


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ConfigError, match="'erde' is already registered"):
        register_loss("erde", losses.ERDELoss, "again")


def test_a_new_method_is_a_few_terms(golden, monkeypatch):
    """A loss of one's own with per-sample weights, here those of EA-KD, against that method's golden vectors."""
    monkeypatch.setattr(losses._LOSSES, "_entries", dict(losses._LOSSES._entries))

    class WeightedKD(ExitLoss):
        def __init__(self, temperature=4.0, entropy_temperature=3.0):
            super().__init__()
            self.temperature, self.entropy_temperature = temperature, entropy_temperature

        def terms(self, batch):
            kl = functional.kl_divergence(
                batch.teacher_log_probs(self.temperature), batch.student_log_probs(self.temperature)
            )
            teacher = functional.entropy(batch.teacher_log_probs(self.entropy_temperature))
            student = functional.entropy(batch.student_log_probs(self.entropy_temperature))
            weight = 0.5 * teacher * (1 + student / torch.tensor(batch.num_classes).log())
            return [Term("kl", kl * self.temperature**2, 1.0, sample_weights=weight)]

    register_loss("weighted_kd", WeightedKD, "for this test")
    data = golden("ea_kd")
    for case in data["cases"]:
        given, expected = case["inputs"], case["expected"]
        student = torch.tensor(given["student_logits"], dtype=torch.float64, requires_grad=True)
        teacher = torch.tensor(given["teacher_logits"], dtype=torch.float64)
        loss = create_loss(
            "weighted_kd", temperature=given["kd_temperature"], entropy_temperature=given["entropy_temperature"]
        )
        result = loss([student], [teacher], torch.tensor(given["labels"]))
        result.loss.backward()
        assert result.loss.item() == pytest.approx(expected["loss_ea_kd"], rel=1e-6, abs=1e-6), case["name"]
        # The weights are detached.
        torch.testing.assert_close(student.grad, torch.tensor(expected["grad_ea_kd"]).double(), rtol=1e-6, atol=1e-6)


def test_weights_and_masks_of_a_term_by_hand():
    class Shares(ExitLoss):
        needs_teacher = False

        def terms(self, batch):
            values = batch.student_logits[..., 0]
            mask = torch.tensor([[True, False, True], [False, False, False]])
            return [Term("part", values, -2.0, mask, torch.tensor([10.0, 1.0, 1.0]))]

    logits = [torch.tensor([[1.0, 0.0], [5.0, 0.0], [3.0, 0.0]])] * 2
    labels = torch.zeros(3, dtype=torch.int64)
    for reduction, expected in (("batch", 13 / 3), ("subset", 13 / 2), ("sum", 13.0)):
        result = Shares(reduction=reduction)(logits, None, labels)
        assert result.exit_terms["part"].tolist() == pytest.approx([expected, 0.0])
        assert result.loss.item() == pytest.approx(-2.0 * expected)


def test_terms_are_computed_outside_autocast_and_detached_from_the_teacher():
    class Similarity(ExitLoss):
        def terms(self, batch):
            for tensor in (batch.teacher_logits, batch.teacher_final_logits, batch.teacher_log_probs(2.0)):
                assert not tensor.requires_grad
            products = batch.student_logits @ batch.teacher_logits.transpose(1, 2)
            assert products.dtype == torch.float32
            return [Term("similarity", products.diagonal(dim1=1, dim2=2), 1.0)]

    student, teacher, labels = make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = Similarity()(student, teacher, labels)
    expected = sum((s * t).sum(-1).mean() for s, t in zip(student, teacher, strict=True))
    torch.testing.assert_close(result.loss, expected)


def test_terms_without_a_teacher_cannot_ask_for_one():
    class Confused(ExitLoss):
        needs_teacher = False

        def terms(self, batch):
            return [Term("right", batch.teacher_right.float(), 1.0)]

    with pytest.raises(InputTypeError, match="needs_teacher = False"):
        Confused()([torch.randn(2, 3)], None, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda s: [Term("a", s[..., 0].T, 1.0)], ShapeError,
         r"values of term 'a' of Wrong must have shape \(3, 6\), for 3 exits and 6 samples, got \(6, 3\)"),
        (lambda s: [Term("a", s[..., 0].mean(1), 1.0)], ShapeError, r"values of term 'a' .* got \(3,\)"),
        (lambda s: [Term("a", 1.0, 1.0)], InputTypeError, "values of term 'a' of Wrong must be a tensor, got float"),
        (lambda s: [Term("a", s[..., 0], 1.0, s[0, :, 0] > 0)], ShapeError, r"mask of term 'a' .* got \(6,\)"),
        (lambda s: [Term("a", s[..., 0], 1.0, s[..., 0])], InputTypeError, "mask of term 'a' .* bool, got torch.float"),
        (lambda s: [Term("a", s[..., 0], 1.0, None, s[:, 0, 0])], ShapeError,
         r"sample_weights of term 'a' of Wrong must have shape \(3, 6\) or \(6,\).* got \(3,\)"),
        (lambda s: [s[..., 0]], InputTypeError, "Wrong must return a list of Term, it holds tensor"),
        (lambda s: [], ConfigError, "Wrong has no term, and so nothing to train"),
        (lambda s: [Term("a", s[..., 0], 1.0)] * 2, ConfigError, "two terms of Wrong are called 'a'"),
    ],
)  # fmt: skip
def test_terms_of_ones_own_that_are_wrong(make, error, message):
    class Wrong(ExitLoss):
        needs_teacher = False

        def terms(self, batch):
            return make(batch.student_logits)

    student, _, labels = make_batch()
    with pytest.raises(error, match=message):
        Wrong()(student, None, labels)
