"""EGAD against the golden vectors and a plain implementation; chunks, memory, vocabularies, refusals."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from erde_hub.errors import ConfigError, InputTypeError, LabelError, ShapeError
from erde_hub.losses import EGADLoss, EntropyWeight, FeatureTerm, egad_loss, functional, next_token_labels
from erde_hub.losses._tokens import TokenLosses, token_entropy


def test_golden(golden, precision, assert_matches):
    data = golden("egad")
    assert len(data["cases"]) >= 3
    for case in data["cases"]:
        given, expected, name = case["inputs"], case["expected"], case["name"]
        student, teacher, own, target, projection = (
            torch.tensor(given[key], dtype=precision)
            for key in ("student_logits", "teacher_logits", "student_hidden", "teacher_hidden", "projection")
        )
        labels, valid = torch.tensor(given["labels"]), torch.tensor(given["valid"]).bool()
        for chunk_size in (None, 1, 5):
            loss = EGADLoss(
                given["t_min"],
                given["t_max"],
                temperature_direction=given["temperature_direction"],
                hard_quantile=given["hard_quantile"],
                feature_weight=given["feature_weight"],
                chunk_size=chunk_size,
            ).to(precision)
            loss.build([own.shape[-1]], [target.shape[-1]])
            loss.to(precision).projections["0"].weight.data.copy_(projection)
            loss.set_progress(given["progress"])
            result = loss(student, teacher, labels, mask=valid, student_features=own, teacher_features=target)
            for key, term in (("kd_loss", "kl"), ("feature_loss", "feature"), ("ce", "ce")):
                assert_matches(result.terms[term], expected[key], data["tolerance"], f"{name} {key}")
            both = result.loss - result.terms["ce"]
            assert_matches(both, expected["loss_kd_plus_feature"], data["tolerance"], name)
        entropy, _ = token_entropy(teacher.flatten(0, 1), given["vocab"])
        assert_matches(entropy.view(labels.shape), expected["teacher_entropy"], data["tolerance"], name)
        softness = entropy / torch.tensor(given["vocab"]).to(precision).log()
        if given["temperature_direction"] == "decreasing":
            softness = 1 - softness
        temperature = given["t_min"] + (given["t_max"] - given["t_min"]) * softness
        kl, _ = TokenLosses.apply(
            student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten(), temperature, given["vocab"], 4, False
        )
        keep = valid.flatten()
        wanted = torch.tensor(expected["token_kl"], dtype=precision).flatten()[keep]
        assert_matches(kl[keep], wanted.tolist(), data["tolerance"], f"{name} token_kl")


def slow_egad(student, teacher, labels, progress, low, high, reverse=False):
    """Without chunks, by autograd, no feature term."""
    valid = labels >= 0
    entropy = functional.entropy(functional.log_probs(teacher))
    h = entropy / torch.tensor(float(teacher.shape[-1]), dtype=teacher.dtype).log()
    t = (low + (high - low) * h)[..., None]
    p, q = torch.log_softmax(teacher / t, -1), torch.log_softmax(student / t, -1)
    kl = (q.exp() * (q - p) if reverse else p.exp() * (p - q)).sum(-1)
    c = (1 - progress) * (1 - h) + progress * h
    c = c / c[valid].mean()
    ce = torch.nn.functional.cross_entropy(student[valid], labels[valid])
    return ce + (c * t[..., 0] ** 2 * kl)[valid].mean()


def make_batch(words=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    student = torch.randn(2, 7, words, generator=generator, dtype=dtype) * 2
    teacher = torch.randn(2, 7, words, generator=generator, dtype=dtype) * 3
    labels = torch.randint(words, (2, 7), generator=generator)
    labels[0, 5:] = -100
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_values_and_gradients_are_those_of_autograd(divergence, chunk_size):
    student, teacher, labels = make_batch()
    loss = EGADLoss(1.0, 3.0, feature_weight=0.0, divergence=divergence, chunk_size=chunk_size)
    loss.set_progress(0.3)
    value = loss(student, teacher, labels).loss
    expected = slow_egad(student, teacher, labels, 0.3, 1.0, 3.0, divergence == "reverse")
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, student)[0] for v in (value, expected)))
    (grad,) = torch.autograd.grad(loss(student, teacher, labels).loss, student)
    assert grad[0, 5:].abs().sum() == 0  # nothing is learnt there


def test_what_the_teacher_gets_right_is_a_share_of_the_valid_tokens():
    student, teacher, labels = make_batch()
    answers = teacher.argmax(-1)
    labels[:] = (answers + 1) % 11
    labels[:, :3] = answers[:, :3]
    labels[0, 5:] = -100
    result = EGADLoss(feature_weight=0.0)(student, teacher, labels)
    assert result.terms["teacher_right"].item() == pytest.approx(6 / 12)


def test_it_is_differentiable_once():
    student, teacher, labels = make_batch()
    value = egad_loss(student, teacher, labels)
    (grad,) = torch.autograd.grad(value, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()
    assert not EGADLoss.twice_differentiable


def test_without_progress_or_curriculum_all_tokens_count_alike():
    student, teacher, labels = make_batch()
    plain = egad_loss(student, teacher, labels)
    assert torch.equal(plain, egad_loss(student, teacher, labels, curriculum=False))
    torch.testing.assert_close(plain, slow_egad(student, teacher, labels, 0.5, 1.0, 4.0))
    loss = EGADLoss(feature_weight=0.0)
    values = []
    for epoch in (1, 2, 3):
        loss.set_epoch(epoch, 3)
        values.append(loss(student, teacher, labels).loss)
        torch.testing.assert_close(values[-1], slow_egad(student, teacher, labels, (epoch - 1) / 2, 1.0, 4.0))
    assert len({round(value.item(), 6) for value in values}) == 3


def test_equal_temperatures_are_a_constant_one():
    student, teacher, labels = make_batch()
    for direction in ("increasing", "decreasing"):
        value = egad_loss(student, teacher, labels, min_temperature=2.0, max_temperature=2.0, ce_weight=0.0,
                          temperature_direction=direction)  # fmt: skip
        keep = labels >= 0
        logs = [functional.log_probs(logits[keep], 2.0) for logits in (teacher, student)]
        torch.testing.assert_close(value, 4 * functional.kl_divergence(*logs).mean())


def test_other_readings():
    student, teacher, labels = make_batch()
    largest = EGADLoss(feature_weight=0.0, entropy_normalizer="batch_max")
    entropy = functional.entropy(functional.log_probs(teacher))
    valid = labels >= 0
    hardness = largest._hardness(entropy.flatten(), valid.flatten(), 11).view(labels.shape)
    torch.testing.assert_close(hardness[valid], entropy[valid] / entropy[valid].max())
    assert torch.isfinite(largest(student, teacher, labels).loss)

    own, target = torch.randn(2, 7, 3, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)
    soft = EGADLoss(hard_tokens="soft", kl_weight=0.0, ce_weight=0.0, feature_weight=1.0).double()
    soft.build([3], [3])
    soft.double()
    value = soft(student, teacher, labels, student_features=own, teacher_features=target).loss
    h = (entropy / torch.tensor(11.0).double().log())[valid]
    distance = (own @ soft.projections["0"].weight.T - target).square().mean(-1)[valid]
    torch.testing.assert_close(value, (h * distance).sum() / h.sum())


def test_padded_embeddings_and_other_vocabularies():
    student, teacher, labels = make_batch()
    padded = torch.cat([student.detach(), torch.full((2, 7, 5), 9.0, dtype=torch.float64)], -1).requires_grad_()
    with pytest.raises(ShapeError, match=r"the student has 16 words and the teacher 11.*set vocab_size"):
        egad_loss(padded, teacher, labels)
    value = egad_loss(padded, teacher, labels, vocab_size=11)
    torch.testing.assert_close(value, egad_loss(student, teacher, labels))
    (grad,) = torch.autograd.grad(value, padded)
    assert grad[..., 11:].abs().sum() == 0
    assert grad[..., :11].abs().sum() > 0
    with pytest.raises(ShapeError, match="vocab_size is 12, but the logits have 16 and 11 columns"):
        egad_loss(padded, teacher, labels, vocab_size=12)


def test_labels_are_shifted_and_the_mask_is_kept():
    tokens = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 0]])
    assert next_token_labels(tokens).tolist() == [[1, 4, 1, -100], [9, 2, 0, -100]]
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])  # a prompt, and padding
    assert next_token_labels(tokens, mask).tolist() == [[-100, 4, 1, -100], [9, 2, -100, -100]]
    student, teacher, labels = make_batch()
    keep = torch.rand(labels.shape) < 0.5
    value = EGADLoss(feature_weight=0.0)(student, teacher, labels, mask=keep).loss
    torch.testing.assert_close(value, egad_loss(student, teacher, labels.masked_fill(~keep, -100)))


def test_a_batch_in_which_nothing_is_learnt_gives_0():
    student, teacher, labels = make_batch()
    loss = EGADLoss()
    loss.build([3], [3])
    features = {"student_features": torch.randn(2, 7, 3), "teacher_features": torch.randn(2, 7, 3)}
    result = loss(student, teacher, torch.full_like(labels, -100), **features)
    result.loss.backward()
    assert result.loss == 0
    assert student.grad.abs().sum() == 0


class Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that were made and are alive, and their peak."""

    def __init__(self, *given):
        super().__init__()
        self.live = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in given}  # there before, and not counted

    def note(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return out


def test_memory_of_8_x_512_tokens_over_32000_words():
    """Beside both logits and the student's gradient at most half of one float32 tensor of logits."""
    tokens, words = 8 * 512, 32_000
    student = torch.zeros(tokens, words).requires_grad_()
    teacher = torch.zeros(tokens, words)
    labels = torch.randint(words, (tokens,))
    features = {"student_features": torch.randn(tokens, 64), "teacher_features": torch.randn(tokens, 128)}
    loss = EGADLoss()
    loss.build([64], [128])
    with Allocations(student, teacher) as memory:
        loss(student, teacher, labels, **features).loss.backward()
    assert student.grad is not None
    gradient, logits = student.grad.nbytes, 4 * tokens * words
    assert gradient == logits
    assert memory.peak > gradient, "the counter sees the gradient"
    assert memory.peak - gradient <= logits / 2, f"{(memory.peak - gradient) / logits:.2f} of the logits"
    assert memory.peak - gradient <= logits / 8, "what it takes today"
    with Allocations(student, teacher) as plain:
        torch.log_softmax(student[:8], -1)
    assert plain.peak == 8 * 4 * words, "the counter counts"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"min_temperature": 3.0, "max_temperature": 2.0}, ConfigError, r"max_temperature 2\.0 is below min_temperature 3\.0"),  # noqa: E501
        ({"temperature_direction": "up"}, ConfigError, "unknown temperature_direction 'up'"),
        ({"hard_quantile": 1.0}, ConfigError, r"hard_quantile.*below 1, got 1\.0"),
        ({"curriculum": "yes"}, InputTypeError, "curriculum must be True or False"),
        ({"entropy_normalizer": "log"}, ConfigError, "unknown entropy_normalizer 'log'; did you mean 'log_v'"),
        ({"vocab_size": 1}, ConfigError, "vocab_size must be at least 2, got 1"),
        ({"chunk_size": 0}, ConfigError, "chunk_size must be at least 1, got 0"),
        ({"divergence": "js"}, ConfigError, "unknown divergence 'js'"),
        ({"kl_weight": 0, "ce_weight": 0, "feature_weight": 0}, ConfigError, "EGADLoss has nothing to train"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        EGADLoss(**arguments)


def test_bad_calls():
    student, teacher, labels = make_batch()
    loss = EGADLoss(feature_weight=0.0)
    with pytest.raises(InputTypeError, match="teacher_logits=None"):
        loss(student, None, labels)
    with pytest.raises(ShapeError, match="14 positions and teacher_logits 7"):
        loss(student, teacher[0], labels)
    with pytest.raises(ShapeError, match=r"labels \(2, 6\) do not belong to the 14 positions \(2, 7\)"):
        loss(student, teacher, labels[:, 1:])
    with pytest.raises(ShapeError, match=r"labels \(7, 2\) do not belong to the 14 positions"):
        loss(student, teacher, labels.T)
    with pytest.raises(InputTypeError, match="labels must be a tensor of tokens, got list"):
        loss(student, teacher, labels.tolist())
    with pytest.raises(InputTypeError, match="mask must be a tensor, True where something is learnt, got list"):
        loss(student, teacher, labels, mask=[True] * 14)
    with pytest.raises(InputTypeError, match="student_logits are on cpu and teacher_logits on meta"):
        loss(student, teacher.to("meta"), labels)
    with pytest.raises(LabelError, match="label 11 at position 0 is outside the 11 words"):
        loss(student, teacher, torch.full_like(labels, 11))
    with pytest.raises(InputTypeError, match=r"labels must be tokens \(int64\), got torch.float32"):
        loss(student, teacher, labels.float())
    with pytest.raises(ShapeError, match=r"mask has shape \(2, 6\)"):
        loss(student, teacher, labels, mask=torch.ones(2, 6))
    with pytest.raises(ShapeError, match=r"student_logits\[0\] must be \(B, L, V\) or \(N, V\)"):
        loss(student[0, 0], teacher, labels)
    with pytest.raises(
        InputTypeError, match=r"student_logits\[0\] must be a floating-point tensor of logits, got NoneType"
    ):
        loss(None, teacher, labels)
    with pytest.raises(ConfigError, match=r"progress must be a fraction from 0 to 1, got 1\.5"):
        loss.set_progress(1.5)
    features = {"student_features": torch.randn(2, 7, 3), "teacher_features": torch.randn(2, 7, 4)}
    loss = EGADLoss()
    with pytest.raises(ConfigError, match="no projection for exit 0: call build"):
        loss(student, teacher, labels, **features)
    loss.build([5], [4])
    with pytest.raises(ShapeError, match=r"3 .student. and 4 .teacher. wide, the projection was built for 5 and 4"):
        loss(student, teacher, labels, **features)
    with pytest.raises(InputTypeError, match=r"pass student_features= .* or build it with feature_weight=0"):
        loss(student, teacher, labels)
    with pytest.raises(InputTypeError, match="student_features must be a sequence"):
        loss(student, teacher, labels, **{**features, "student_features": 3.0})


@pytest.mark.parametrize(
    ("widths", "error", "message"),
    [
        ((48, 96), InputTypeError, "student_widths must be a list .*, got 48"),
        (([48], [96, 96]), ConfigError, "student_widths has 1 entries and teacher_widths 2"),
        (([None], [96]), ConfigError, r"no exit has features on both sides .*set feature_weight=0"),
        (([48], ["96"]), InputTypeError, r"teacher_widths\[0\] must be a whole number, got '96'"),
    ],
)
def test_widths_that_are_none(widths, error, message):
    with pytest.raises(error, match=message):
        EGADLoss().build(*widths)


def test_tokens_that_cannot_be_shifted():
    tokens = torch.tensor([[3, 1, 4]])
    with pytest.raises(ShapeError, match=r"input_ids must be \(B, L\).* got \(3,\)"):
        next_token_labels(tokens[0])
    with pytest.raises(ShapeError, match=r"got \(1, 3\) and an attention_mask \(1, 2\)"):
        next_token_labels(tokens, torch.ones(1, 2))
    with pytest.raises(InputTypeError, match=r"input_ids must be tokens \(int64\), got torch.float32"):
        next_token_labels(tokens.float())


@pytest.mark.parametrize("addition", [EntropyWeight(), FeatureTerm()])
def test_nothing_joins_it(addition):
    with pytest.raises(ConfigError, match=f"'{addition.name}' cannot join EGADLoss"):
        EGADLoss().add(addition)
