"""Two processes with half a batch each give the loss and the gradients of one process with the whole batch."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from erde_hub.losses import EGADLoss, FeatureKDLoss, ReadoutWeight, list_losses
from tests.fakes.losses import COMBINED, call, create_loss
from tests.fakes.processes import run_pair

SAMPLES, CLASSES, EXITS = 8, 4, 3
LOSSES = [
    ("ce", {}),
    ("kd", {"exit_weights": [0.5, 1.0, 2.0]}),
    ("erde", {}),
    ("erde", {"entropy_weight": 1.0, "reduction": "batch", "entropy_exits": "all"}),
    ("erde", {"entropy_weight": 1.0, "reduction": "subset"}),
    ("erde", {"reduction": "subset", "kd_on_teacher_wrong": True}),
    ("erde", {"reduction": "subset", "kd_on_all_samples_at_final_exit": True, "correctness": "final_exit"}),
    ("erde", {"reduction": "sum"}),
    ("ea_kd", {}),
    ("ea_kd", {"normalize_weights": True}),
    ("dkd", {}),
    ("self", {}),
    ("mse", {}),
    ("dedier", {"readout_source": "head"}),
    ("feature_kd", {}),
    (COMBINED, {"entropy_weight": 1.0}),
    (COMBINED, {"entropy_weight": 1.0, "reduction": "subset"}),
    ("feature_kd+ea_kd", {"exit_weights": [0.5, 1.0, 2.0]}),
    ("egad", {}),
    ("egad", {"feature_weight": 0.0, "entropy_normalizer": "batch_max", "temperature_direction": "decreasing"}),
]


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(6, CLASSES) for _ in range(EXITS))

    def forward(self, inputs):
        return [head(inputs) for head in self.heads]


def make_batch():
    """The teacher is right on different shares of the two halves, and at exit 0 only on samples of the second."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    right = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 1], [1, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1, 0]])
    answers = torch.where(right.bool(), labels, (labels + 1) % CLASSES)
    teacher = torch.randn(EXITS, SAMPLES, CLASSES, generator=generator, dtype=torch.float64)
    return inputs, teacher + 8 * nn.functional.one_hot(answers, CLASSES), labels


def run(rows, wrap):
    """Losses, terms and gradients of each configuration on some rows of the batch."""
    inputs, teacher, labels = make_batch()
    results = []
    for name, arguments in LOSSES:
        torch.manual_seed(5)
        student = wrap(Student().double())
        loss = create_loss(name, **arguments)
        loss.set_epoch(1, 3)
        index = torch.arange(SAMPLES)[rows]
        result = call(loss, student(inputs[rows]), teacher[:, rows].unbind(0), labels[rows], index)
        result.loss.backward()
        terms = torch.stack([result.loss.detach(), *result.terms.values()])
        results.append((terms, [parameter.grad for parameter in student.parameters()]))
    return results


def readout_round(rows, **settings):
    """The table of weights after a round in which a process has some of the samples."""
    _, teacher, labels = make_batch()
    weight = ReadoutWeight(**settings).double()
    weight.allocate(2 * SAMPLES)
    for logits in teacher[:2]:
        summary = weight.update(torch.arange(1, SAMPLES + 1)[rows] * 2 - 1, logits[rows], labels[rows])
    return weight.table, weight.scale, torch.tensor(list(summary.values()))


ROUNDS = [{}, {"readout_sticky": True}, {"readout_normalize": True}]


def projection_gradient(rows):
    """Gradient of the projection of a feature term."""
    inputs, teacher, labels = make_batch()
    loss = FeatureKDLoss().double()
    torch.manual_seed(1)
    loss.extra_terms[0].build([6, None, None], [6, None, None])
    loss.double()
    features = [inputs[rows], None, None]
    logits = [exit_[rows] for exit_ in teacher]
    targets = [inputs[rows].flip(1), None, None]
    loss(logits, logits, labels[rows], student_features=features, teacher_features=targets).loss.backward()
    return loss.extra_terms[0].projections["0"].weight.grad


def hard_token_gradient(rows):
    """Gradient of the projection of EGAD, whose hard tokens are a quantile over the tokens of all processes."""
    inputs, teacher, labels = make_batch()
    labels = labels.masked_fill(torch.arange(SAMPLES) == 1, -100)  # the processes have different numbers of tokens
    loss = EGADLoss(hard_quantile=0.6).double()
    torch.manual_seed(1)
    loss.build([6], [6])
    loss.double()
    features = {"student_features": inputs[rows], "teacher_features": inputs[rows].flip(1)}
    loss(teacher[2][rows], teacher[2][rows], labels[rows], **features).loss.backward()
    return loss.projections["0"].weight.grad


def worker(rank, folder):
    if Path("/sys/class/net/lo").exists():  # the host's name need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    half = SAMPLES // 2
    results = run(slice(rank * half, (rank + 1) * half), DistributedDataParallel)
    for terms, _ in results:
        dist.all_reduce(terms)
        terms /= 2
    rows = slice(rank * half, (rank + 1) * half)
    tables = [readout_round(rows, **settings) for settings in ROUNDS]
    gradient = torch.stack([projection_gradient(rows), hard_token_gradient(rows)])
    dist.all_reduce(gradient)  # as the Distiller averages it
    gradient /= 2
    if rank == 0:
        # In eval mode nobody else is waited for, and the sums are local.
        inputs, teacher, labels = make_batch()
        local = create_loss("erde", reduction="subset").eval()
        torch.manual_seed(5)
        value = local(Student().double()(inputs), teacher.unbind(0), labels).loss.detach()
        torch.save({"results": results, "local": value, "tables": tables, "gradient": gradient}, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    run_pair(worker, tmp_path)
    assert {name.partition("+")[0] for name, _ in LOSSES} == set(list_losses())
    together = torch.load(tmp_path / "results.pt")
    alone = run(slice(None), lambda module: module)
    assert len(together["results"]) == len(LOSSES)
    for (name, arguments), (terms, grads), (expected_terms, expected_grads) in zip(
        LOSSES, together["results"], alone, strict=True
    ):
        message = f"{name} {arguments}"
        torch.testing.assert_close(terms, expected_terms, rtol=1e-9, atol=1e-12, msg=message)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-12, msg=message)
    subset = LOSSES.index(("erde", {"entropy_weight": 1.0, "reduction": "subset"}))
    batch = LOSSES.index(("erde", {"entropy_weight": 1.0, "reduction": "batch", "entropy_exits": "all"}))
    assert not torch.allclose(alone[subset][0][0], alone[batch][0][0])
    inputs, teacher, labels = make_batch()
    torch.manual_seed(5)
    local = create_loss("erde", reduction="subset")(Student().double()(inputs), teacher.unbind(0), labels).loss
    torch.testing.assert_close(together["local"], local)
    for settings, table in zip(ROUNDS, together["tables"], strict=True):
        torch.testing.assert_close(table, readout_round(slice(None), **settings), msg=f"{settings}")
    assert (readout_round(slice(None))[0] > 1).any()
    expected = torch.stack([projection_gradient(slice(None)), hard_token_gradient(slice(None))])
    torch.testing.assert_close(together["gradient"], expected)
