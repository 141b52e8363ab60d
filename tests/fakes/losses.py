"""Every loss of the table with whatever it needs beside logits, so that one test covers all of them."""

import torch
from torch import nn

from erde_hub import losses
from erde_hub.losses import EGADLoss, FeatureTerm, ReadoutWeight, SelfDistillationTerm

WIDTHS = (3, 4)  # channels of the student's and of the teacher's features


#: One loss with everything that can join it.
COMBINED = "erde+ea_kd+dedier+feature+self"


def create_loss(name, **arguments):
    """A loss, and what joins it after a plus, that is ready to be called, for up to four exits."""
    name, *additions = name.split("+")
    return ready(losses.create_loss(name, **arguments).add(*map(losses.create_addition, additions)))


def ready(loss, exits=4):
    for term in loss.extra_terms:
        if isinstance(term, FeatureTerm):
            term.build([WIDTHS[0]] * exits, [WIDTHS[1]] * exits)
            for layer in term.projections.values():
                nn.init.eye_(layer.weight)
    if isinstance(loss, EGADLoss):
        loss.build([WIDTHS[0]] * exits, [WIDTHS[1]] * exits)
        for layer in loss.projections.values():
            nn.init.eye_(layer.weight)
    for weight in loss.sample_weights:
        if isinstance(weight, ReadoutWeight):  # as after a round whose read-out was right on some samples
            weight.allocate(64)
            answers = torch.randn(64, 5, generator=torch.Generator().manual_seed(2))
            weight.eval().update(torch.arange(64), answers, torch.arange(64) % 5)  # the same in every process
            weight.train()
    return loss


def features(index, exits, width):
    """Features of samples by their number, at all exits but the last."""
    table = torch.randn(3, 64, 2, width, generator=torch.Generator().manual_seed(width))
    return [*(table[exit_ % 3][index] for exit_ in range(exits - 1)), None]


def call(loss, student, teacher, labels, index=None):
    """Calls a loss with stable numbers of the samples, with features where it compares them, with what it learns."""
    if loss.task == "regression":  # a column per class, 1 at the label's
        labels = nn.functional.one_hot(labels, student[0].shape[1]).float()
    index = torch.arange(len(student[0])) if index is None else index
    extra = {}
    if loss.reads_features:
        extra["student_features"] = features(index, len(student), WIDTHS[0])
        if teacher is not None:
            extra["teacher_features"] = features(index, len(teacher), WIDTHS[1])
        if isinstance(loss, EGADLoss):  # one position per sample
            extra = {key: [f if f is None else f[:, 0] for f in values] for key, values in extra.items()}
    return loss(student, teacher, labels, index=index, **extra)


def hold_detached_parts(loss, student, teacher, labels):
    """Makes what a loss takes from the student but detaches a constant, so that finite differences do not see it.

    Returns the exits that may then be varied.
    """
    batches = []
    hooks = [(weight, weight.weights) for weight in loss.sample_weights]
    for weight, compute in hooks:
        weight.weights = lambda batch, compute=compute: batches.append(compute(batch)) or batches[-1]
    call(loss, student, teacher, labels)
    for (weight, _), values in zip(hooks, [batch.detach() for batch in batches], strict=True):
        weight.weights = lambda batch, values=values: values
    imitates_itself = any(isinstance(term, SelfDistillationTerm) for term in loss.extra_terms)
    return student[:-1] if imitates_itself else student
