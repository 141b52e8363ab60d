"""A stream gets the answers of single calls, late stages get full batches, and memory does not grow."""

from __future__ import annotations

import functools
import itertools
import sys

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from erde_hub import EarlyExitWrapper, route_batches
from erde_hub.calibration import create_calibrator
from erde_hub.engine.batch_sync import Carried
from erde_hub.engine.features import last_linears
from erde_hub.engine.rows import cut_rows, join_rows, shrink
from erde_hub.errors import ConfigError, ExitNotReachedError, InputTypeError, ShapeError, ThresholdError
from tests.fakes.networks import CLASSES, StructureNet, images, quantile_thresholds, spread, wrap

SIZES = [1, 7, 0, 11, 3, 1, 1, 6]  # 30 images


@functools.cache
def model_of(name: str, policy: str = "entropy") -> EarlyExitWrapper:
    return wrap(name, policy=policy)


@functools.cache
def thresholds_of(name: str) -> list[float]:
    return quantile_thresholds(model_of(name), images(name, 30))


def stream(model, batches, **kwargs):
    return list(route_batches(model, batches, **kwargs))


def assert_same(answers, expected):
    assert torch.equal(torch.cat([out.exit_index for out in answers]), expected.exit_index)
    logits = torch.cat([out.logits for out in answers])
    scale = max([1.0, *expected.logits.detach().abs().flatten().tolist()])
    torch.testing.assert_close(logits / scale, expected.logits / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "convnext", "vit", "swin", "beit", "plain", "sequential"])
def test_every_sample_gets_the_answer_of_a_single_call(name):
    model, x = model_of(name), images(name, 30)
    with torch.no_grad():
        expected = model(x, threshold=thresholds_of(name))
    assert len(set(expected.exit_index.tolist())) == 4
    for batch_size, pending in ((4, 64), (8, 2), (64, 1)):
        sizes = {"batch_size": batch_size, "max_pending": pending}
        answers = stream(model, x.split(SIZES), threshold=thresholds_of(name), **sizes)
        assert [out.index for out in answers] == list(range(len(SIZES)))
        assert [len(out.logits) for out in answers] == SIZES
        assert_same(answers, expected)


@given(
    name=st.sampled_from(["resnet", "plain"]),
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    batch_size=st.integers(1, 9),
    pending=st.integers(1, 9),
    shares=st.lists(st.floats(0, 1.6), min_size=3, max_size=3),
)
def test_any_stream(name, sizes, batch_size, pending, shares):
    model, x = model_of(name), images(name, sum(sizes), seed=len(sizes))
    with torch.no_grad():
        expected = model(x, threshold=shares)
    answers = stream(model, x.split(sizes), threshold=shares, batch_size=batch_size, max_pending=pending)
    assert [len(out.logits) for out in answers] == sizes
    assert_same(answers, expected)


@pytest.mark.parametrize("name", ["sequential", "plain"])
def test_a_policy_with_a_memory(name):
    model, x = model_of(name, "patience"), images(name, 30)
    with torch.no_grad():
        expected = model(x, threshold=1)
    assert len(set(expected.exit_index.tolist())) > 1
    assert_same(stream(model, x.split(SIZES), threshold=1, batch_size=4, max_pending=3), expected)


@pytest.mark.parametrize("name", ["resnet", "plain"])
@pytest.mark.parametrize("kind", ["mie", "laplace"])
def test_a_calibrator_with_a_memory_and_one_that_reads_features(name, kind):
    model, x = wrap(name), images(name, 30)
    if kind == "mie":
        calibrator = create_calibrator("mie", num_exits=4)
        calibrator.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    else:
        sizes = [layer.in_features for layer in last_linears(model).values()]
        calibrator = create_calibrator("laplace", num_exits=4, num_classes=CLASSES, feature_sizes=sizes)
        for key, buffer in calibrator.named_buffers():
            if "factor" in key or key == "normal":
                buffer.copy_(0.3 * torch.randn(buffer.shape))
    model.set_calibrator(calibrator)
    cuts = quantile_thresholds(wrap(name), x)
    for threshold in (cuts, [0.0, *cuts[1:]]):
        with torch.no_grad():
            expected = model(x, threshold=threshold)
        assert len(set(expected.exit_index.tolist())) > 1
        assert_same(stream(model, x.split(SIZES), threshold=threshold, batch_size=4, max_pending=3), expected)


@pytest.mark.parametrize("name", ["resnet", "plain"])
@pytest.mark.parametrize("threshold", [0.0, 100.0, [0.0, 0.0, 100.0], [0.0, 100.0, 0.0], 1e-30])
def test_the_ends(name, threshold):
    model, x = model_of(name), images(name, 9)
    with torch.no_grad():
        expected = model(x, threshold=threshold)
    assert_same(stream(model, x.split(4), threshold=threshold, batch_size=4), expected)


@pytest.mark.parametrize("name", ["resnet", "plain"])
def test_late_stages_run_on_full_batches(name):
    """Of 12 batches of 8, half leave at each exit: in single calls the last stage sees 12 batches of about 1."""
    model = model_of(name)
    x = images(name, 96)
    cuts = quantile_thresholds(model, x, 0.5)
    seen: list[int] = []
    last = model.backbone.layer4[0] if name == "resnet" else model.backbone.fc
    handle = last.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    try:
        with torch.no_grad():
            alone = [model(part, threshold=cuts).exit_index for part in x.split(8)]
        single, seen[:] = list(seen), []
        answers = stream(model, x.split(8), threshold=cuts, batch_size=8)
    finally:
        handle.remove()
    reached = int((torch.cat(alone) == 3).sum())
    assert sum(seen) == sum(single) == reached > 4
    assert [count for count in seen if count < 8] == [reached % 8][: reached % 8]
    assert len(single) > len(seen)
    assert torch.equal(torch.cat([out.exit_index for out in answers]), torch.cat(alone))


def test_requests_are_put_together_and_answers_come_before_the_end():
    model, x = model_of("resnet"), images("resnet", 16)
    read = 0

    def requests():
        nonlocal read
        for sample in x.split(1):
            read += 1
            yield {"pixel_values": sample}

    answers = route_batches(model, requests(), threshold=100.0, batch_size=4)
    assert next(answers).index == 0
    assert read == 4, "nothing is read ahead"
    assert [out.index for out in answers] == list(range(1, 16))


def test_memory_is_bounded():
    model, x = model_of("resnet"), images("resnet", 8)
    cuts = thresholds_of("resnet")
    streamed = route_batches(model, itertools.repeat((x, "labels")), threshold=cuts, batch_size=16, max_pending=3)
    for index, out in enumerate(itertools.islice(streamed, 40)):
        state = streamed.gi_frame.f_locals["stream"]
        assert len(state.pending) <= 4
        assert all(queue.count < 16 for queue in state.queues)
        assert out.index == index


@pytest.mark.parametrize("name", ["resnet", "plain"])
def test_freed_places_are_filled_at_once(name):
    """No batch is hurried here, so that nothing but a full queue makes the last stage run before the stream ends."""
    model, x = model_of(name), images(name, 8)
    cuts = quantile_thresholds(model, x, 0.5)
    read, seen = 0, []

    def requests():
        nonlocal read
        for _ in range(24):
            queues = streamed.gi_frame.f_locals["stream"].queues
            assert all(queue.count < 8 for queue in queues)
            read += 1
            yield x

    last = model.backbone.layer4[0] if name == "resnet" else model.backbone.fc
    handle = last.register_forward_pre_hook(lambda _m, args: seen.append((read, len(args[0]))))
    try:
        streamed = route_batches(model, requests(), threshold=cuts, batch_size=8, max_pending=1000)
        answers = list(streamed)
    finally:
        handle.remove()
    early = [rows for number, rows in seen if number < 24]
    assert early, "the last stage waited for the end"
    assert set(early) == {8}
    with torch.no_grad():
        assert_same(answers[:1], model(x, threshold=cuts))
        assert_same(answers[-1:], model(x, threshold=cuts))


@pytest.mark.parametrize("ordered", [True, False])
def test_work_per_batch_does_not_grow_with_what_is_pending(ordered):
    """Counted in lines of the module that run, while every sample waits for a batch that the stream never fills."""
    model, x = model_of("plain"), images("plain", 1)

    def lines(batches: int) -> int:
        count = 0

        def trace(frame, event, _):
            nonlocal count
            if not frame.f_code.co_filename.endswith("streaming.py"):
                return None
            count += event == "line"
            return trace

        sizes = {"batch_size": 1000, "max_pending": 1000, "ordered": ordered}
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            answers = stream(model, [x] * batches, **sizes)
        finally:
            sys.settrace(before)
        assert len(answers) == batches
        return count

    assert lines(240) < 2.2 * lines(120)


def test_complete_batches_need_not_wait_for_their_turn():
    model, x = model_of("plain"), images("plain", 12)
    with torch.no_grad():
        first = model(x, output_all_exits=True).exit_logits[0].log_softmax(-1)
    entropy = -(first.exp() * first).sum(-1)
    order = entropy.argsort(descending=True)  # the first batch holds the hardest sample
    cut = (entropy[order[0]] + entropy[order[1]]).item() / 2
    answers = stream(model, x[order].split(4), threshold=[cut, 0.0, 0.0], batch_size=4, ordered=False)
    assert [out.index for out in answers] == [1, 2, 0]


def test_structures_between_stages_wait_whole():
    torch.manual_seed(0)
    model = spread(EarlyExitWrapper(StructureNet("tuple"), exits=["a", "b"], input_size=(3, 8, 8))).eval()
    x = torch.randn(21, 3, 8, 8)
    cuts = quantile_thresholds(model, x, 0.4)
    assert_same(stream(model, x.split(5), threshold=cuts, batch_size=8), model(x, threshold=cuts))


def test_cells_that_read_two_cells_before():
    """What cells read beside the last one's map waits with the samples; its size alone tells nobody whose it is."""
    kwargs = {"stem_size": 8, "num_features": 192}
    torch.manual_seed(0)
    backbone = timm.create_model("nasnetalarge", num_classes=CLASSES, **kwargs).train()
    x = torch.randn(15, 3, 64, 64) * torch.linspace(0.3, 3, 15).view(-1, 1, 1, 1)
    with torch.no_grad():
        backbone(x)  # statistics far from which deep networks answer all alike
    exits = ["cell_2", "cell_5", "cell_6", "cell_12"]
    model = spread(EarlyExitWrapper(backbone, exits=exits, input_size=(3, 64, 64), backbone_kwargs=kwargs)).eval()
    cuts = quantile_thresholds(model, x)
    for threshold in (cuts, [0.0, cuts[1], 0.0, cuts[3]]):
        with torch.no_grad():
            expected = model(x, threshold=threshold)
        assert len(set(expected.exit_index.tolist())) > 1
        for batch_size, pending in ((4, 64), (3, 1)):
            sizes = {"batch_size": batch_size, "max_pending": pending}
            assert_same(stream(model, x.split([4, 1, 5, 2, 3]), threshold=threshold, **sizes), expected)


def test_what_was_computed_too_long_ago_is_an_error_and_no_other_sample():
    first, second, third = torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    carried = Carried()
    for tensors in ([first], [first, second], [second, third]):
        carried.start_call()
        assert [carried.take(tensor) for tensor in tensors] == tensors
    waited = {place: tensor + 1 for place, tensor in carried.recent().items()}
    assert len(waited) == 3
    carried.start_call()
    carried.take(third)
    carried.rows = {place: tensor + 1 for place, tensor in carried.recent().items()}
    assert (carried.take(second) == 1).all()
    with pytest.raises(ExitNotReachedError, match="more than two layers before"):
        carried.take(first)


def test_several_rows_per_sample_wait_with_theirs():
    """tnt carries the pixels of each patch, so many rows per sample, beside the patches."""
    kwargs = {"img_size": 64, "embed_dim": 24, "inner_dim": 8, "depth": 3, "num_heads_inner": 2, "num_heads_outer": 2}
    torch.manual_seed(0)
    backbone = timm.create_model("tnt_s_legacy_patch16_224", num_classes=CLASSES, **kwargs)
    model = EarlyExitWrapper(backbone, exits=["blocks.0", "blocks.1"], backbone_kwargs=kwargs)
    model, x = spread(model).eval(), torch.randn(15, 3, 64, 64)
    cuts = quantile_thresholds(model, x)
    with torch.no_grad():
        expected = model(x, threshold=cuts)
    assert len(set(expected.exit_index.tolist())) == 3
    for batch_size, pending in ((4, 64), (3, 1), (7, 2)):
        sizes = {"batch_size": batch_size, "max_pending": pending}
        assert_same(stream(model, x.split([4, 1, 5, 2, 3]), threshold=cuts, **sizes), expected)


def tree_of(samples: list[int], rows: list[int]) -> dict[str, object]:
    """A table, which belongs to nobody, and for each of ``rows`` a tensor of so many rows per sample, which name it."""
    named = [torch.tensor([[100 * n + r] for n in samples for r in range(per)]).reshape(-1, 1) for per in rows]
    return {"table": torch.arange(12), "rows": tuple(named)}


@given(
    pieces=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    rows=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    order=st.randoms(use_true_random=False),
)
def test_cut_join_and_shrink_keep_every_row_with_its_sample(pieces, rows, order):
    count, batched = sum(pieces), range(1, len(rows) + 1)
    whole, starts = tree_of(list(range(count)), rows), [0, *itertools.accumulate(pieces)]

    def assert_trees(tree, samples):
        expected = tree_of(samples, rows)
        assert torch.equal(tree["table"], expected["table"])
        assert all(torch.equal(a, b) for a, b in zip(tree["rows"], expected["rows"], strict=True))

    parts = []
    for start, stop in itertools.pairwise(starts):
        parts.append((list(range(start, stop)), cut_rows(whole, start, stop, count, batched)))
        assert_trees(parts[-1][1], parts[-1][0])
    order.shuffle(parts)
    joined, samples = join_rows([tree for _, tree in parts], batched), [n for own, _ in parts for n in own]
    assert_trees(joined, samples)
    stay = sorted(order.sample(range(count), order.randint(1, count)))
    assert_trees(shrink(joined, torch.tensor(stay), count, batched), [samples[n] for n in stay])
    single = torch.arange(count)
    assert torch.equal(join_rows([cut_rows(single, i, j, count) for i, j in itertools.pairwise(starts)]), single)


def test_rows_that_are_not_so_many_per_sample():
    with pytest.raises(ShapeError, match=r"shape \(7, 2\) for 3 active samples"):
        cut_rows((torch.zeros(7, 2),), 0, 1, 3, (0,))
    with pytest.raises(ShapeError, match=r"shape \(6, 2\) for 3 active samples"):
        cut_rows(torch.zeros(6, 2), 0, 1, 3)


def test_nan_neither_leaves_early_nor_spreads():
    model, x = model_of("plain"), images("plain", 9).clone()
    x[4, 0, 2, 2] = float("nan")
    answers = stream(model, x.split(3), threshold=100.0, batch_size=3)
    assert torch.cat([out.exit_index for out in answers]).tolist() == [0, 0, 0, 0, 3, 0, 0, 0, 0]
    assert torch.cat([out.logits for out in answers]).isnan().any(1).nonzero().flatten().tolist() == [4]


def test_two_streams_of_one_model_and_no_gradients():
    model, x = model_of("plain"), images("plain", 12)
    cuts = thresholds_of("plain")
    with torch.no_grad():
        expected = model(x, threshold=cuts)
    one, two = (route_batches(model, x.split(3), threshold=cuts, batch_size=4) for _ in range(2))
    pairs = list(zip(one, two, strict=True))
    assert torch.is_grad_enabled()
    assert_same([a for a, _ in pairs], expected)
    assert_same([b for _, b in pairs], expected)
    assert not any(out.logits.requires_grad for pair in pairs for out in pair)


def test_an_exception_in_the_stream_leaves_a_usable_model():
    model, x = model_of("plain"), images("plain", 4)

    def broken():
        yield x
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        stream(model, broken(), threshold=0.5)
    with torch.no_grad():
        assert torch.equal(model(x, threshold=0.0).logits, model.backbone(x))


def test_bad_input():
    model, x = model_of("plain"), images("plain", 4)
    with pytest.raises(InputTypeError, match="takes an EarlyExitWrapper, got Linear"):
        route_batches(nn.Linear(2, 2), [])
    with pytest.raises(ConfigError, match=r"model\.eval"):
        route_batches(wrap("plain").train(), [])
    with pytest.raises(ConfigError, match="batch_size must be an integer of at least 1, got 0"):
        route_batches(model, [], batch_size=0)
    with pytest.raises(ConfigError, match="max_pending"):
        route_batches(model, [], max_pending=True)
    with pytest.raises(ThresholdError, match="2 thresholds for 3"):
        route_batches(model, [], threshold=[0.1, 0.2])
    with pytest.raises(ShapeError, match=r"batch 1 of the stream holds images of shape \(3, 16, 18\)"):
        stream(model, [x, torch.zeros(1, 3, 16, 18)])
    with pytest.raises(InputTypeError, match=r"batch 1 of the stream is torch\.float64"):
        stream(model, [x, x.double()])
    with pytest.raises(InputTypeError, match=r"batch 0 of the stream has no 'pixel_values', it has \['images'"):
        stream(model, [{"images": x}])
    with pytest.raises(ShapeError, match="channels"):
        stream(model, [torch.zeros(1, 4, 16, 16)])
    assert stream(model, []) == []
    (empty,) = stream(model, [x[:0]])
    assert empty.logits.shape == (0, CLASSES)
