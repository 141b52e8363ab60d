"""Whether a backbone goes on with fewer samples behind an exit, found before it is used.

A staged forward does by construction. Elsewhere the stage may lie inside a residual block, or the forward may keep the
number of samples, or the whole batch, aside; then the pass fails or returns other rows than were left, and that shows
here. A weightless copy is run. A text model reads the values of masks, so a copy with its weights is run, on a few
short padded texts, and the samples that are left must get the answers that they get in the whole batch. Of other
networks that is seen when they are wrapped, on the rebuilt network or on a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from erde_hub.engine.hooks import HookRunner, add_exit_hooks
from erde_hub.engine.recomputation import without_recomputation
from erde_hub.engine.rows import shrink
from erde_hub.engine.runner import calls_are_replaced
from erde_hub.engine.stages import run_stages
from erde_hub.errors import ExitPointError
from erde_hub.heads import FeatureSpec

from . import BackboneAdapter, ExitPoint, ExitPoints
from .rebuild import networks_to_run, same_values, stages_agree
from .tracing import copy_around, example_batch, weightless_copy

#: What backbones raise when tensors of the whole batch meet tensors of the samples left.
_FAILURES = (RuntimeError, IndexError, ValueError, AssertionError, TypeError)


#: Rows of the samples that are also answered alone: others come before and behind each of them.
_ALONE = (1, 3)


class _DropOneEach:
    """Takes one sample out at every exit, the first and the last one in turn."""

    def __init__(self, batch: int, specs: Sequence[FeatureSpec], device: torch.device) -> None:
        self.batch = self.count = batch
        self.specs = specs
        self.device = device
        self.active: Tensor | None = None
        self.active_by_size: dict[int, Tensor] = {}

    def on_exit(self, exit_index: int, output: Any) -> Any:
        rows = torch.arange(self.count, device=self.device)
        return self.keep(exit_index, output, rows[1:] if exit_index % 2 == 0 else rows[:-1])

    def keep(self, exit_index: int, output: Any, rows: Tensor) -> Any:
        everyone = torch.arange(self.count, device=self.device)
        before = self.active_by_size[self.count] = everyone if self.active is None else self.active
        self.active = before.index_select(0, rows)
        count, self.count = self.count, len(rows)
        return shrink(output, rows, count, self.specs[exit_index].batch_outputs)


class _Company(_DropOneEach):
    """Lets nobody leave, and keeps what the first exit gives to some of the samples, each by itself."""

    def __init__(self, batch: int, specs: Sequence[FeatureSpec], device: torch.device) -> None:
        super().__init__(batch, specs, device)
        self.alone: dict[int, Any] = {}

    def on_exit(self, exit_index: int, output: Any) -> Any:
        for row in _ALONE if exit_index == 0 else ():
            rows = torch.tensor([row], device=self.device)
            self.alone[row] = shrink(output, rows, self.count, self.specs[0].batch_outputs)
        return output


class _Alone(_DropOneEach):
    """Leaves the last sample at the first exit, with what it had there in company, which may be more than it has here.

    Args:
        batch: Number of samples.
        specs: What each exit reads.
        device: Of the backbone.
        feature: What the next layers get.
    """

    def __init__(self, batch: int, specs: Sequence[FeatureSpec], device: torch.device, feature: Any) -> None:
        super().__init__(batch, specs, device)
        self.feature = feature

    def on_exit(self, exit_index: int, output: Any) -> Any:
        if exit_index:
            return output
        self.keep(0, output, torch.tensor([self.count - 1], device=self.device))
        return self.feature


def check_shrinks(
    adapter: BackboneAdapter,
    module: nn.Module,
    exits: Sequence[str],
    specs: Sequence[FeatureSpec],
    inputs: Sequence[Tensor],
    hooked: bool = False,
) -> None:
    """Runs the backbone with a batch that loses a sample at every exit.

    Args:
        adapter: Of the backbone.
        module: The backbone; copies of it are run.
        exits: Names, shallow to deep.
        specs: What each exit reads.
        inputs: Example inputs, batch first.
        hooked: The exits sit on hooks, in a backbone with a staged forward too.

    Raises:
        ExitPointError: The backbone cannot go on with fewer samples behind one of the exits.
    """
    if adapter.task(module) != "classification":
        return
    if not hooked and adapter.stages(module, exits, checkpointed=False) is not None:
        return
    text, batch = adapter.is_text(module), len(exits) + 3
    weight = next(iter(module.parameters()), None)
    if text and weight is not None and weight.device.type == "meta":
        return
    try:
        run = _run_texts if text else _run_copy
        rows = run(adapter, module, exits, specs, inputs, batch)
    except ExitPointError:
        raise
    except _FAILURES as error:
        raise ExitPointError(
            f"the batch cannot shrink behind all of {list(exits)} ({type(error).__name__}: {error}): an exit inside a"
            " residual block, or a backbone that keeps the whole batch aside; name the enclosing block, or take one of"
            " erde_hub.list_exit_points(model)"
        ) from error
    if rows != batch - len(exits):
        raise ExitPointError(
            f"after {len(exits)} samples of {batch} had left, {type(module).__name__} returned {rows} rows: an exit of"
            f" {list(exits)} lies inside a residual block; name the enclosing block"
        )


def feasible_points(
    adapter: BackboneAdapter, module: nn.Module, points: ExitPoints, inputs: Sequence[Tensor]
) -> ExitPoints:
    """Returns the points behind which the backbone goes on with fewer samples, all of them at a time where that works.

    Raises:
        ExitPointError: There are points, but none of them can have an exit; the message says why.
    """
    if _works(adapter, module, points, inputs):
        return points
    found: list[ExitPoint] = []
    reason: ExitPointError | None = None
    for point in points:
        try:
            check_shrinks(adapter, module, [point.name], [point.spec], inputs)
        except ExitPointError as error:
            reason = error
        else:
            found.append(point)
    if points and not found and reason is not None:
        raise ExitPointError(f"{type(module).__name__} can have no exits at its stages: {reason}") from reason
    return ExitPoints(found)


def _works(adapter: BackboneAdapter, module: nn.Module, points: ExitPoints, inputs: Sequence[Tensor]) -> bool:
    try:
        check_shrinks(adapter, module, [p.name for p in points], [p.spec for p in points], inputs)
    except ExitPointError:
        return False
    return True


@torch.no_grad()
def _run_copy(
    adapter: BackboneAdapter,
    module: nn.Module,
    exits: Sequence[str],
    specs: Sequence[FeatureSpec],
    inputs: Sequence[Tensor],
    batch: int,
) -> int:
    clone, device = weightless_copy(module)
    exit_hooks = add_exit_hooks(clone, exits)
    runner = HookRunner(clone, exit_hooks, adapter.add_sync_hooks(clone, exits))
    with device:
        output = runner.run(_DropOneEach(batch, specs, device), example_batch(inputs, batch, device), {})
    return int(adapter.logits(output).shape[0])


@torch.no_grad()
def _run_texts(
    adapter: BackboneAdapter,
    module: nn.Module,
    exits: Sequence[str],
    specs: Sequence[FeatureSpec],
    inputs: Sequence[Tensor],
    batch: int,
) -> int:
    """Number of rows left, after comparing them with those of the whole batch."""
    device = next(iter(module.parameters())).device
    kwargs = _padded_texts(module.config.get_text_config(), batch, min(int(inputs[0].shape[1]), 6), device)  # type: ignore[union-attr,operator]
    clone = copy_around(module, {id(weight): weight for weight in module.parameters()})
    exit_hooks = add_exit_hooks(clone, exits)
    sync_hooks = adapter.add_sync_hooks(clone, exits)
    with without_recomputation(clone):
        whole = adapter.logits(clone(**kwargs))
        dropping = _DropOneEach(batch, specs, device)
        left = adapter.logits(adapter.hook_runner(clone, exit_hooks, sync_hooks).run(dropping, (), kwargs))
    if len(left) == dropping.count and not _alike(left, whole[dropping.active]):
        raise _reads_the_batch(module, exits)
    return len(left)


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether logits of batches of different sizes differ by rounding at most."""
    return same_values(ours, theirs, float32=1e-3, other=5e-2)


def _reads_the_batch(module: nn.Module, exits: Sequence[str], what: str = "") -> ExitPointError:
    return ExitPointError(
        f"samples that stay in {type(module).__name__} get other answers when others leave at {list(exits)}:"
        f" something behind these exits reads the whole batch, as batch norm without running statistics does{what}"
    )


def _answer(
    adapter: BackboneAdapter,
    network: nn.Module,
    exits: Sequence[str],
    samples: tuple[Tensor, ...],
    hooked: bool,
    visitor: Any,
) -> Tensor:
    stages = None if hooked else adapter.stages(network, exits, checkpointed=False)
    if stages is not None:
        return adapter.logits(run_stages(stages, visitor, *samples))
    runner = adapter.hook_runner(network, add_exit_hooks(network, exits), adapter.add_sync_hooks(network, exits))
    return adapter.logits(runner.run(visitor, samples, {}))


@torch.no_grad()
def check_exits_run(
    adapter: BackboneAdapter,
    module: nn.Module,
    rebuilt: nn.Module | None,
    exits: Sequence[str],
    specs: Sequence[FeatureSpec],
    inputs: Sequence[Tensor],
) -> bool:
    """Runs the network with its exits: stage by stage as its own forward does, and sample by sample as in a batch.

    Args:
        adapter: Of the backbone.
        module: The backbone; it is neither run nor written to.
        rebuilt: The same network with random weights, see :func:`~erde_hub.backbones.rebuild.networks_to_run`.
        exits: Names, shallow to deep.
        specs: What each exit reads.
        inputs: Example inputs, batch first.

    Returns:
        Whether the exits must sit on hooks, because the stages one by one give another answer.

    Raises:
        ExitPointError: The batch cannot shrink, or a sample gets another answer when another one has exited.
    """
    staged = adapter.stages(module, exits, checkpointed=False) is not None
    hooked = calls_are_replaced(module, exits)
    if hooked:
        check_shrinks(adapter, module, exits, specs, inputs, hooked=True)
    differs = False
    for network, samples in networks_to_run(module, rebuilt, inputs):
        one = tuple(x[:1] for x in samples)
        if staged and not differs and not stages_agree(adapter, network, exits, specs, one):
            differs = hooked = True
            check_shrinks(adapter, module, exits, specs, inputs, hooked=True)
        if not adapter.is_text(module):  # whose padding counts: see _run_texts
            _check_samples_are_apart(adapter, network, exits, specs, samples, hooked)
    return differs


def _check_samples_are_apart(
    adapter: BackboneAdapter,
    network: nn.Module,
    exits: Sequence[str],
    specs: Sequence[FeatureSpec],
    samples: tuple[Tensor, ...],
    hooked: bool,
) -> None:
    """Compares the answers that some samples get in a batch with those that they get where all others have exited."""
    run = functools.partial(_answer, adapter, network, exits)
    batch, device = len(samples[0]), samples[0].device
    company = _Company(batch, specs, device)
    try:
        whole = run(samples, hooked, company)
    except _FAILURES:  # as a type for which this device has no kernels
        return
    for row in _ALONE:
        # Of two where the rest of the pass must go on with fewer samples; stages do by themselves.
        count = 2 if hooked else 1
        alone = tuple(x[row + 1 - count : row + 1] for x in samples)
        try:
            left = run(alone, hooked, _Alone(count, specs, device, company.alone[row]))
        except _FAILURES as error:
            raise _reads_the_batch(network, exits, f" ({type(error).__name__}: {error})") from error
        same = _alike(left, whole[row : row + 1])
        if not same and torch.equal(run(samples, hooked, _Company(batch, specs, device)), whole):  # else it is random
            raise _reads_the_batch(network, exits)


def _padded_texts(config: Any, batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Texts of different lengths."""
    ids = torch.randint(0, int(config.vocab_size), (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, length - row % max(length - 1, 1) :] = 0
    ids[mask == 0] = int(config.pad_token_id or 0)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
