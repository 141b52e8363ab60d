"""Routing a stream, for servers: freed places are filled again, so that late stages run on full batches.

When one batch is routed, the later stages get fewer and fewer samples, and a layer on 3 samples takes far more than a
tenth of its time on 32. Here the samples that do not exit wait in a queue of that exit until there are enough of them
for a full batch; the same pass then goes on with the samples that have waited. When the stream ends, or a batch has
waited too long, a stage runs on the samples there are.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from erde_hub.errors import ConfigError, ExitNotReachedError, InputTypeError, ShapeError

from .batch_sync import Carried
from .features import capture_features
from .inputs import check_pixel_values
from .routing import RoutingPlan, check_all_reached, check_due, exit_mask, read_feature, score_exit
from .rows import cut_rows, join_rows, select_rows, shrink
from .stages import run_stages


class RoutingModel(Protocol):
    """What a stream asks of a model, which an :class:`~erde_hub.EarlyExitWrapper` has."""

    backbone: nn.Module
    config: Any
    main_input_name: str
    training: bool

    def routing_plan(self, threshold: float | Sequence[float] | None = None) -> RoutingPlan:
        """Returns what routing at a threshold needs, by default at the stored one."""


@dataclass(frozen=True)
class RoutedBatch:
    """The answers to one batch of a stream.

    Attributes:
        index: Position of the batch in the stream, from 0.
        logits: (N, K), of the exit that each sample took.
        exit_index: (N,) int64, 0 = first exit, number of early exits = the backbone's own classifier.
    """

    index: int
    logits: Tensor
    exit_index: Tensor


def route_batches(
    model: RoutingModel,
    batches: Iterable[Any],
    *,
    threshold: float | Sequence[float] | None = None,
    batch_size: int = 32,
    max_pending: int = 64,
    ordered: bool = True,
) -> Iterator[RoutedBatch]:
    """Routes a stream of batches of any sizes; every sample gets the answer that ``model(batch)`` gives it.

    The answers differ from those of single calls only as far as a kernel's arithmetic depends on the size of its batch
    (last bits of float32). No gradients are recorded. One batch at a time is read from ``batches``; at each exit fewer
    than ``batch_size`` samples wait, so the memory does not grow with the stream.

    Args:
        model: In eval mode; for images. Backbones whose stages are known are entered at a stage. Others run
            one empty image through the stages before it, which happens only where a stage runs on part of a batch.
        batches: Batches of ``pixel_values`` (N, C, H, W) of one size, dtype and device; also mappings that hold
            ``pixel_values``, and tuples that begin with them, as data loaders give them.
        threshold: For this stream: one number, or one per early exit; None takes the model's.
        batch_size: Samples that every stage waits for; batches of the stream are put together and split up to it.
        max_pending: Batches of the stream that may wait for answers. When there are more, the stages that the oldest
            waits for run on what there is. Smaller answers sooner, larger fills batches better.
        ordered: Answers come in the order of the stream; False: as soon as a batch is complete (see ``index``).

    Returns:
        An iterator of answers, one per batch.

    Raises:
        InputTypeError: Not an :class:`EarlyExitWrapper`, a model that reads texts, or a batch of another type.
        ConfigError: A model in train mode, or a size below 1.
        ShapeError: A batch whose images differ in size from those of the first.
        ThresholdError: A threshold that the policy does not take.
        ExitNotReachedError: While streaming: samples have waited at an exit, and a later layer reads what was
            computed long before it. What lies one or two layers back, which NASNet's cells read, waits with them.

    Example:
        >>> model = EarlyExitWrapper(timm.create_model("resnet18", num_classes=10), exits=["layer1", "layer2"]).eval()
        >>> requests = (torch.randn(1, 3, 32, 32) for _ in range(6))
        >>> [out.index for out in route_batches(model, requests, threshold=2.0, batch_size=4)]
        [0, 1, 2, 3, 4, 5]
    """
    if not hasattr(model, "routing_plan"):
        raise InputTypeError(f"route_batches takes an EarlyExitWrapper, got {type(model).__name__}: wrap it first")
    if model.main_input_name != "pixel_values":
        raise InputTypeError(
            f"route_batches streams images of one size; {type(model.backbone).__name__} reads {model.main_input_name}:"
            " texts of different batches differ in length, and in the masks and positions that layers get next to the"
            " features, so they cannot share a stage; call model(...) on padded batches"
        )
    if model.training:
        raise ConfigError("the model is in train mode, where nothing is routed: call model.eval()")
    for name, value in (("batch_size", batch_size), ("max_pending", max_pending)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
    model.routing_plan(threshold)  # raises for a threshold that is not allowed
    return _answers(_Stream(model, threshold, batch_size, ordered), batches, max_pending)


def _answers(stream: _Stream, batches: Iterable[Any], max_pending: int) -> Iterator[RoutedBatch]:
    for index, batch in enumerate(batches):
        stream.feed(index, _pixel_values(batch, index))
        if len(stream.pending) > max_pending:
            stream.hurry()
        yield from stream.complete()
    stream.drain()
    yield from stream.complete()


def _pixel_values(batch: Any, index: int) -> Any:
    if isinstance(batch, Mapping):
        if "pixel_values" not in batch:
            raise InputTypeError(f"batch {index} of the stream has no 'pixel_values', it has {sorted(batch)}")
        return batch["pixel_values"]
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


class _Pending:
    """Answers to a batch of the stream, as far as they are known."""

    def __init__(self, samples: int) -> None:
        self.missing = samples
        self.exit_index = torch.zeros(samples, dtype=torch.int64)
        self.logits: Tensor | None = None

    def answer(self, rows: Tensor, logits: Tensor, exit_index: int) -> None:
        if self.logits is None:
            self.logits = logits.new_empty((len(self.exit_index), logits.shape[1]))
        dtype = torch.promote_types(self.logits.dtype, logits.dtype)  # under autocast heads and classifier may differ
        self.logits = self.logits.to(dtype)
        self.logits[rows.to(logits.device)] = logits.to(dtype)
        self.exit_index[rows] = exit_index
        self.missing -= len(rows)


@dataclass
class _Group:
    """Samples in the same place.

    Attributes:
        tickets: (N, 2) int64 on the CPU: batch of the stream, row in it.
        tree: What the next stage gets.
        history: Log-probabilities of the exits before, for policies that read them.
        state: What a calibrator keeps of the exits before.
        batch_outputs: Positions of the batch-first tensors of ``tree``.
        carried: What later layers read next to ``tree``; see :class:`~erde_hub.engine.batch_sync.Carried`.
    """

    tickets: Tensor
    tree: Any
    history: list[Tensor]
    state: list[Tensor]
    batch_outputs: Sequence[int] = ()
    carried: dict[int, Tensor] = field(default_factory=dict)

    def split(self, samples: int) -> tuple[_Group, _Group]:
        """Returns the first samples and the others."""
        count = len(self.tickets)
        parts = [(0, samples), (samples, count)]
        first, second = (
            _Group(
                self.tickets[i:j],
                cut_rows(self.tree, i, j, count, self.batch_outputs),
                [h[i:j] for h in self.history],
                [s[i:j] for s in self.state],
                self.batch_outputs,
                {place: t[i:j] for place, t in self.carried.items()},
            )
            for i, j in parts
        )
        return first, second


class _Queue:
    """Samples that wait for a stage, first in, first out."""

    def __init__(self) -> None:
        self.groups: deque[_Group] = deque()
        self.count = 0

    def put(self, group: _Group) -> None:
        self.groups.append(group)
        self.count += len(group.tickets)

    def take(self, limit: int) -> _Group:
        """Takes up to ``limit`` samples out, as one group."""
        taken: list[_Group] = []
        room = limit
        while self.groups and room:
            group = self.groups.popleft()
            if len(group.tickets) > room:
                group, rest = group.split(room)
                self.groups.appendleft(rest)
            taken.append(group)
            room -= len(group.tickets)
        self.count -= limit - room
        if len(taken) == 1:
            return taken[0]
        batched = taken[0].batch_outputs
        histories = [torch.cat(parts) for parts in zip(*(group.history for group in taken), strict=True)]
        states = [torch.cat(parts) for parts in zip(*(group.state for group in taken), strict=True)]
        tree = join_rows([group.tree for group in taken], batched)
        carried = {place: torch.cat([group.carried[place] for group in taken]) for place in taken[0].carried}
        return _Group(torch.cat([group.tickets for group in taken]), tree, histories, states, batched, carried)

    def holds(self, index: int) -> bool:
        """Tells whether a sample of that batch of the stream waits here."""
        return any(bool((group.tickets[:, 0] == index).any()) for group in self.groups)


class _Stream:
    """The queues of one stream, and the answers so far.

    Queue 0 holds images, queue e + 1 the samples that exit e has kept.
    """

    def __init__(
        self, model: RoutingModel, threshold: float | Sequence[float] | None, batch_size: int, ordered: bool
    ) -> None:
        self.model = model
        self.threshold = threshold
        self.batch_size = batch_size
        self.ordered = ordered
        self.queues = [_Queue() for _ in range(len(model.routing_plan(threshold).thresholds) + 1)]
        self.pending: dict[int, _Pending] = {}
        self.answered: list[int] = []  # unordered: batches of ``pending`` of which nothing is missing
        self.like: Tensor | None = None  # one empty image

    @torch.no_grad()
    def feed(self, index: int, images: Any) -> None:
        """Takes a batch in and runs what is full."""
        images = check_pixel_values(images, self.model.config.input_size or ())
        if self.like is None:
            self.like = images.new_zeros((1, *images.shape[1:]))
        if images.shape[1:] != self.like.shape[1:]:
            raise ShapeError(
                f"batch {index} of the stream holds images of shape {tuple(images.shape[1:])}, the first one of"
                f" {tuple(self.like.shape[1:])}: samples of different sizes cannot share a batch"
            )
        if images.dtype != self.like.dtype or images.device != self.like.device:
            raise InputTypeError(
                f"batch {index} of the stream is {images.dtype} on {images.device}, the first one {self.like.dtype} on"
                f" {self.like.device}"
            )
        self.pending[index] = _Pending(len(images))
        if len(images):
            tickets = torch.stack([torch.full((len(images),), index), torch.arange(len(images))], 1)
            self.queues[0].put(_Group(tickets, images, [], []))
        elif not self.ordered:
            self.answered.append(index)
        while self.queues[0].count >= self.batch_size:
            self.run(0)

    @torch.no_grad()
    def hurry(self) -> None:
        """Brings the oldest batch of the stream to its end, whatever the stages are filled with."""
        index = next(iter(self.pending))
        while self.pending[index].missing:
            self.run(next(stage for stage, queue in enumerate(self.queues) if queue.holds(index)))

    @torch.no_grad()
    def drain(self) -> None:
        """Runs everything that waits."""
        for stage, queue in enumerate(self.queues):
            while queue.count:
                self.run(stage)

    def complete(self) -> Iterator[RoutedBatch]:
        """Hands out the batches that are answered in full; ordered, up to the first that is not."""
        if self.ordered:
            due = list(itertools.takewhile(lambda index: not self.pending[index].missing, self.pending))
        else:
            due, self.answered = sorted(self.answered), []
        for index in due:
            pending = self.pending.pop(index)
            logits, exit_index = pending.logits, pending.exit_index
            if logits is None:
                out = self.model(self.like[:0] if self.like is not None else None)  # type: ignore[operator]
                logits, exit_index = out.logits, out.exit_index
            yield RoutedBatch(index, logits, exit_index.to(logits.device))

    def run(self, stage: int) -> None:
        """Runs a stage on what waits for it, up to a full batch, and whatever is full after it."""
        plan = self.model.routing_plan(self.threshold)
        runner, group = plan.runner, self.queues[stage].take(self.batch_size)
        visitor, stages = _StreamVisitor(self, plan, stage - 1, group), runner.stages()
        if stages is None:
            runner.check_shrinks()
        with capture_features(visitor.features):
            if stage == 0:
                final = runner.run(visitor, (group.tree,), {})
            elif stages is None:
                final = runner.run(visitor, (self.like,), {})
            else:
                visitor.entered, visitor.next_exit = True, stage
                start = next(i for i, own in enumerate(stages) if own.exit_index == stage - 1) + 1
                final = run_stages(stages[start:], visitor, group.tree)
            if final is not None:
                logits = runner.adapter.logits(final)
                check_all_reached(visitor.next_exit, runner.exits)
                visitor.check_rows(len(logits), "the classifier")
                logits = visitor.calibrate(len(runner.exits), logits)
                self.answer(visitor.group.tickets, logits, len(runner.exits))

    def answer(self, tickets: Tensor, logits: Tensor, exit_index: int) -> None:
        """Notes what samples of any batches were answered at an exit."""
        for index in tickets[:, 0].unique().tolist():
            own = (tickets[:, 0] == index).nonzero().squeeze(1)
            pending = self.pending[index]
            pending.answer(tickets[own, 1], logits[own.to(logits.device)], exit_index)
            if not (pending.missing or self.ordered):
                self.answered.append(index)


class _StreamVisitor:
    """Visitor that swaps the samples that an exit keeps for a full batch of those that have waited there, or ends.

    Args:
        stream: Holds the queues.
        plan: Heads, policy, calibrator and thresholds.
        entry: Index of the exit after which the samples enter; -1 for the beginning.
        group: The samples.
    """

    def __init__(self, stream: _Stream, plan: RoutingPlan, entry: int, group: _Group) -> None:
        self.stream = stream
        self.plan = plan
        self.entry = entry
        self.group = group
        self.entered = entry < 0
        self.next_exit = 0
        self.calibrated = plan.calibrated()
        self.features: dict[int, Tensor] = {} if self.calibrated is None else self.calibrated.features
        self.carried = Carried()

    def on_exit(self, exit_index: int, output: Any) -> Any | None:
        check_due(exit_index, self.next_exit)
        self.next_exit += 1
        if not self.entered:  # an empty image, on its way to where the samples enter
            self.entered = exit_index == self.entry
            return self.start(self.group) if self.entered else output
        plan = self.plan
        if not plan.runs_head[exit_index]:
            return output
        head = plan.heads[exit_index]
        feature = read_feature(output, head.spec.output_index)
        self.check_rows(len(feature), f"exit {exit_index}")
        history = list(self.group.history)
        calibrate = functools.partial(self.calibrate, exit_index) if self.calibrated else None
        logits, scores = score_exit(head, plan.policy, feature, None, history, calibrate)
        state = self.calibrated.state if self.calibrated else []
        mask = exit_mask(plan.policy, scores, plan.thresholds[exit_index], logits)
        exited, kept = mask.nonzero().squeeze(1), mask.logical_not().nonzero().squeeze(1)
        batch_outputs, tickets, carried = head.spec.batch_outputs, self.group.tickets, self.carried.recent()
        if len(exited):
            self.stream.answer(tickets[exited.cpu()], logits.index_select(0, exited), exit_index)
            output = shrink(output, kept, len(tickets), batch_outputs) if len(kept) else output
            history, state = ([t.index_select(0, kept) for t in own] for own in (history, state))
            tickets = tickets[kept.cpu()]
            carried = {place: select_rows(t, kept) for place, t in carried.items()}
        elif len(kept) >= self.stream.batch_size:
            self.group = _Group(tickets, output, history, state, batch_outputs)
            return output
        queue = self.stream.queues[exit_index + 1]
        if len(kept):
            queue.put(_Group(tickets, output, history, state, batch_outputs, carried))
        if queue.count < self.stream.batch_size:
            return None
        return self.start(queue.take(self.stream.batch_size))

    def start(self, group: _Group) -> Any:
        """Puts these samples in the place of those before and returns what the next layers get."""
        self.group = group
        self.carried.rows = dict(group.carried)
        return group.tree

    def calibrate(self, exit_index: int, logits: Tensor) -> Tensor:
        """Calibrates the logits of the group that is there now, where there is a calibrator."""
        if self.calibrated is None:
            return logits
        self.calibrated.state = list(self.group.state)
        return self.calibrated(exit_index, logits)

    def check_rows(self, rows: int, where: str) -> None:
        """Raises :class:`~erde_hub.errors.ExitNotReachedError` where rows and samples differ in number."""
        if rows != len(self.group.tickets):
            raise ExitNotReachedError(f"{where} saw {rows} rows where {len(self.group.tickets)} samples are active")
