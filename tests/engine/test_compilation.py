"""Compiled stages give the same answers, are compiled a bounded number of times, and belong to no copy or file."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from erde_hub import EarlyExitWrapper, route_batches
from erde_hub.errors import ExitPointError
from tests.fakes.networks import all_logits, images, quantile_thresholds, wrap


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Backend:
    """Counts what it is given to compile and runs it as it is."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


@pytest.mark.parametrize("name", ["sequential"])
def test_answers_stay_and_shrinking_batches_compile_a_bounded_number_of_times(name):
    model, x = wrap(name), images(name, 24)
    cuts = quantile_thresholds(model, x)
    sizes = [24, 17, 13, 11, 9, 7, 6, 5, 3, 2]
    with torch.no_grad():
        expected = [model(x[:n], threshold=cuts) for n in sizes]
        alone = [model(x[i : i + 1], threshold=cuts) for i in range(6)]
        full = all_logits(model, x)
        backend = Backend()
        model.compile_stages(backend=backend)
        parts = 2 * len(model.heads) + 1
        for n, before in zip(sizes, expected, strict=True):
            out = model(x[:n], threshold=cuts)
            assert torch.equal(out.exit_index, before.exit_index)
            assert torch.equal(out.logits, before.logits)
        assert parts <= backend.graphs <= 2 * parts, "one per part, a second where a size repeats or is 1"
        many = backend.graphs
        for i, before in enumerate(alone):
            assert torch.equal(model(x[i : i + 1], threshold=cuts).logits, before.logits)
        assert backend.graphs <= many + parts
        assert all(torch.equal(a, b) for a, b in zip(all_logits(model, x), full, strict=True))
        done = backend.graphs
        model(x[:10], threshold=cuts), model(x[:19], threshold=cuts)
        assert backend.graphs == done


def test_a_stream_runs_compiled_stages_and_heads():
    model, x, backend = wrap("sequential"), images("sequential", 8), Backend()
    with torch.no_grad():
        expected = model(x, threshold=[100.0, 0.0, 0.0])
    model.compile_stages(backend=backend)
    (answer,) = route_batches(model, [x], threshold=[100.0, 0.0, 0.0], batch_size=8)
    assert backend.graphs == 2  # what lies before the first exit, and its head
    assert torch.equal(answer.logits, expected.logits)


def test_two_models_of_a_kind_do_not_share_a_limit():
    """The compiler counts per code object and gives up on the ninth, without a word that anybody reads."""
    backend = Backend()
    x = images("sequential", 4)
    with torch.no_grad():
        for count in range(1, 10):
            model = wrap("sequential", exits=["0"])
            model.compile_stages(backend=backend)
            model(x, threshold=100.0)
            assert backend.graphs == 2 * count  # what lies before the exit, and its head


def test_the_compiler_of_autograd_takes_it_too():
    model, x = wrap("sequential", exits=["0"]), images("sequential", 6)
    cuts = quantile_thresholds(model, x)
    expected = model(x, threshold=cuts)
    model.compile_stages(backend="aot_eager")
    out = model(x, threshold=cuts)
    assert torch.equal(out.exit_index, expected.exit_index)
    torch.testing.assert_close(out.logits, expected.logits)
    out.logits.sum().backward()
    assert model.backbone[0].conv.weight.grad is not None


def test_training_copies_and_files_are_those_of_the_model_itself(tmp_path):
    model, x = wrap("resnet"), images("resnet", 4)
    full = all_logits(model, x)
    keys = list(model.state_dict())
    backend = Backend()
    model.compile_stages(backend=backend)
    assert list(model.state_dict()) == keys
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.runner.compiler is None
        assert torch.equal(copied(x, threshold=100.0).logits, full[0])
    assert model.exit_table() == wrap("resnet").exit_table()
    assert torch.equal(model.truncate(1)(x).logits, full[1])
    model.train()(x, labels=torch.arange(4)).loss.backward()
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(EarlyExitWrapper.from_pretrained(tmp_path)(x, threshold=100.0).logits.isnan(), full[0].isnan())
    assert backend.graphs == 0, "nothing of all this compiles"


@pytest.mark.parametrize("place", ["backbone", "stage", "head"])
def test_a_part_that_was_replaced_is_not_run(place):
    model, x = wrap("resnet"), images("resnet", 4)
    with torch.no_grad():
        for compiled in (False, True):
            if compiled:
                model.compile_stages(backend="eager")
            before = model(x, threshold=100.0).logits
            if place == "backbone":
                model.backbone = copy.deepcopy(model.backbone)
                model.backbone.conv1.weight.mul_(2)
            elif place == "stage":
                model.backbone.layer1 = nn.Sequential(model.backbone.layer1, nn.Tanh())
            else:
                model.heads[0] = copy.deepcopy(model.heads[0])
                model.heads[0].fc.bias.add_(1)
            after = model(x, threshold=100.0).logits
            assert not torch.equal(before, after)
            assert torch.equal(after, all_logits(copy.deepcopy(model), x)[0])


def test_a_backbone_driven_by_hooks_is_told_what_to_do():
    model = wrap("swin")
    with pytest.raises(ExitPointError, match=r"SwinTransformer is driven by hooks.*torch\.compile\(model\.backbone\)"):
        model.compile_stages()
    assert model.runner.compiler is None
