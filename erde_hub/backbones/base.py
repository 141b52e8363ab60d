"""What the engine needs to know about a backbone, and the places where exits can sit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from erde_hub._tables import PrintsAsTable, Rows
from erde_hub.engine.hooks import ExitHook, HookRunner, parse_exit
from erde_hub.engine.rows import tensors
from erde_hub.engine.stages import Stage
from erde_hub.errors import CheckpointError, ConfigError, ErdeError, ExitPointError, InputTypeError, nearest
from erde_hub.heads import FeatureSpec

from .layouts import FeatureFormats
from .tracing import StageCall, Trace, trace

if TYPE_CHECKING:
    from erde_hub.config import EarlyExitConfig


@dataclass(frozen=True)
class ExitPoint:
    """A place where an exit can sit.

    Attributes:
        name: Module name in the backbone.
        width: Number of channels of its output.
        format: Order of the axes of its output.
        macs: MACs per sample up to and including it, without heads.
        share: ``macs`` as a fraction of the whole backbone.
        spec: All that a head needs to know.
    """

    name: str
    width: int
    format: str
    macs: int
    share: float
    spec: FeatureSpec


class ExitPoints(PrintsAsTable, list[ExitPoint]):
    """Exit points, shallow to deep; prints as a table."""

    def _table(self) -> tuple[Sequence[str], Rows]:
        rows = [
            (
                p.name,
                str(p.width),
                p.format,
                "x".join(map(str, p.spec.size)) or "-",
                f"{p.macs / 1e6:.1f}",
                f"{p.share:.1%}",
            )
            for p in self
        ]
        return ("name", "width", "format", "size", "MMACs", "share"), rows


class BackboneAdapter:
    """Knows one kind of backbone. Stateless: every method gets the module."""

    #: Value of ``config.library``.
    library: ClassVar[str]
    #: Where a module says how many classes it has.
    classes_attribute: ClassVar[str] = "num_classes"

    def matches(self, module: nn.Module) -> bool:
        """Tells whether this adapter is for that module."""
        raise NotImplementedError

    def describe(self, module: nn.Module) -> dict[str, Any]:
        """Returns what can be read off a living module: ``architecture``, ``preprocessing``, ``input_size``."""
        raise NotImplementedError

    def creation_arguments(self, module: nn.Module, given: dict[str, Any] | None) -> dict[str, Any]:
        """Returns what the config stores as ``backbone_kwargs``: as given, or as the module tells."""
        return dict(given or {})

    def notable_arguments(self, config: EarlyExitConfig) -> dict[str, Any]:
        """Returns what of ``backbone_kwargs`` is worth telling people: what differs from the network's defaults."""
        return dict(config.backbone_kwargs or {})

    def with_attention(self, config: EarlyExitConfig, attention: str) -> dict[str, Any]:
        """Returns ``backbone_kwargs`` for another implementation of attention, where ``build`` can choose one.

        Raises:
            ConfigError: It cannot, and another one than the usual is asked for.
        """
        if attention != "sdpa":
            raise ConfigError(
                f"attn_implementation={attention!r} is for backbones of transformers; this one ({config.architecture})"
                " chooses its attention itself (timm.layers.set_fused_attn for models of timm)"
            )
        return dict(config.backbone_kwargs or {})

    def build(self, config: EarlyExitConfig) -> nn.Module:
        """Builds the backbone from a config alone; runs nothing."""
        raise NotImplementedError

    def check_rebuild(self, module: nn.Module, config: EarlyExitConfig) -> nn.Module | None:
        """Raises :class:`~erde_hub.errors.RebuildError` if ``build`` would give another network than ``module``.

        Returns:
            What was built, with random weights that let every layer show; None where there is nothing to build from.
        """
        return None

    def candidates(self, module: nn.Module, traced: Trace) -> list[str]:
        """Names of the modules worth offering as exits."""
        raise NotImplementedError

    def feature_spec(
        self, module: nn.Module, name: str, call: StageCall, traced: Trace, formats: FeatureFormats
    ) -> FeatureSpec:
        """Width and layout of a stage's output, as seen in a trace; ``formats`` is what the user says about layouts."""
        raise NotImplementedError

    def declared_spec(self, module: nn.Module, name: str) -> FeatureSpec:
        """Width and layout of a stage from what the backbone says of itself, without running it."""
        raise ExitPointError(
            f"the config does not say what exit {name!r} reads (exit_features), and {type(module).__name__} does not"
            " say it either: wrap the living model once with EarlyExitWrapper(model, exits=[...]) and use its config"
        )

    def check_spec(self, module: nn.Module, name: str, spec: FeatureSpec) -> None:
        """Compares what a config says that an exit reads with what the backbone says of itself, where it does.

        Raises:
            CheckpointError: They differ, or the exit is the classifier; the message names it.
        """
        if name in self.classifier_names(module):
            raise CheckpointError(
                f"exit {name!r} of the config is the classifier of {type(module).__name__}: exits lie before it"
            )
        try:
            declared = self.declared_spec(module, name)
        except ExitPointError:
            return
        if (declared.width, declared.format) != (spec.width, spec.format):
            raise CheckpointError(
                f"the stages of {type(module).__name__} do not match its config: exit_features give exit {name!r}"
                f" {spec.width} channels ({spec.format}), the stage has {declared.width} ({declared.format}); to move"
                " an exit, wrap the model again"
            )

    def classifier_names(self, module: nn.Module) -> list[str]:
        """Names of the classifier's modules, where the backbone knows them."""
        return []

    def pooling_names(self, module: nn.Module) -> list[str]:
        """Names of the modules that make features into what the classifier reads, where the backbone knows them."""
        return []

    def declared_classes(self, module: nn.Module) -> int | None:
        """Returns the number of classes that the module says it has, where it says so."""
        declared = getattr(module, "num_classes", None)
        return declared if isinstance(declared, int) else None

    def task(self, module: nn.Module) -> str:
        """Returns ``classification``, or ``causal_lm`` for models that answer with logits for every token."""
        return "classification"

    def is_text(self, module: nn.Module) -> bool:
        """Tells whether the model takes token ids (``input_ids``) and not images (``pixel_values``)."""
        return False

    def example_dtype(self, module: nn.Module) -> torch.dtype:
        """Returns the type of the model's main input."""
        if self.is_text(module):
            return torch.int64
        return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

    def add_sync_hooks(self, module: nn.Module, exits: Sequence[str]) -> list[Any]:
        """Puts hooks into the module that keep tensors next to its features in step with the batch; returns them."""
        return []

    def hook_runner(self, module: nn.Module, exit_hooks: Sequence[ExitHook], sync_hooks: Sequence[Any]) -> HookRunner:
        """Returns what runs the module's own forward, with hooks on the exits."""
        return HookRunner(module, exit_hooks, sync_hooks)

    def token_mask(self, module: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
        """Returns the mask (N, L) of the tokens that the model's own pooling counts, from its inputs."""
        return None

    def stages(self, module: nn.Module, exits: Sequence[str], checkpointed: bool) -> list[Stage] | None:
        """Returns the stages of the backbone's forward where they are known and end at all of ``exits``, else None."""
        return None

    def needs_stages(self, module: nn.Module) -> bool:
        """Tells whether the batch cannot shrink in the module's own forward, which keeps its first size."""
        return False

    def logits(self, output: Any) -> Tensor:
        """Returns the classifier's logits from the backbone's output."""
        if not isinstance(output, Tensor):
            raise InputTypeError(
                f"the backbone returned {type(output).__name__} where logits (N, K) were expected: wrap a classifier"
            )
        return output

    def explain_failure(self, module: nn.Module, inputs: dict[str, Any]) -> ErdeError | None:
        """Returns what is wrong with inputs on which the model has just failed, where they are the reason."""
        return None

    def classifier_layer(self, module: nn.Module, input_size: Sequence[int]) -> nn.Linear:
        """Returns the linear layer that gives the logits: the one that is called, whatever else the module holds.

        Raises:
            ConfigError: There is none.
        """
        (example,) = example_inputs(input_size, self.example_dtype(module))
        traced = trace(module, (example,))
        logits = self.logits(traced.output)
        for name, calls in traced.calls.items():
            layer = module.get_submodule(name)
            if isinstance(layer, nn.Linear) and calls[-1].output is logits:
                return layer
        raise ConfigError(
            f"features are wanted, but the logits of {type(module).__name__} come from no linear layer as they are: it"
            " ends in something else"
        )

    def init_non_persistent_buffers(self, module: nn.Module) -> None:
        """Fills the buffers of one submodule that no checkpoint holds."""

    def set_gradient_checkpointing(self, module: nn.Module, enable: bool) -> bool:
        """Switches activation checkpointing of the backbone; returns False where it has none."""
        return False


def find_exit_points(adapter: BackboneAdapter, module: nn.Module, traced: Trace, formats: FeatureFormats) -> ExitPoints:
    """Returns the places that the adapter offers, shallow to deep, that lie before the classifier.

    Raises:
        ExitPointError: There are such places, but no head can read what any of them gives; the message says why.
    """
    found: list[tuple[StageCall, ExitPoint]] = []
    reason: ExitPointError | None = None
    limit = classifier_order(adapter, module, traced)
    for name in adapter.candidates(module, traced):
        path, number = parse_exit(name)
        calls = traced.calls.get(path, [])
        if len(calls) != 1 and number is None:
            continue
        call = calls[number or 0]
        if call.order < limit and not call.overwritten:
            try:
                found.append((call, exit_point(adapter, module, name, call, traced, formats)))
            except ExitPointError as error:
                reason = error
    if reason is not None and not found:
        raise reason
    found.sort(key=lambda entry: entry[0].order)
    # The last layer of a sequence gives what the sequence gives: the enclosing one is offered.
    inner = [
        after.output is call.output and point.name.startswith(f"{outer.name}.")
        for (call, point), (after, outer) in itertools.pairwise(found)
    ]
    return ExitPoints(point for (_, point), same in zip(found, [*inner, False], strict=False) if not same)


def exit_point(
    adapter: BackboneAdapter, module: nn.Module, name: str, call: StageCall, traced: Trace, formats: FeatureFormats
) -> ExitPoint:
    """Describes one call of one module."""
    spec = adapter.feature_spec(module, name, call, traced, formats)
    return ExitPoint(name, spec.width, spec.format, call.macs, call.macs / max(traced.total_macs, 1), spec)


def classifier_order(adapter: BackboneAdapter, module: nn.Module, traced: Trace) -> int:
    """When the classifier, or what pools for it, began to end in a trace; from there on all is at or behind it."""
    names = (*adapter.classifier_names(module), *adapter.pooling_names(module))
    return min((traced.calls[n][0].order for n in names if n in traced.calls), default=traced.last_parametrised)


def resolve_exits(
    adapter: BackboneAdapter,
    module: nn.Module,
    exits: Sequence[str] | int | str,
    traced: Trace,
    formats: FeatureFormats,
) -> tuple[list[ExitPoint], str]:
    """Turns names, a number or "auto" into exit points; returns them and, for the log, how they were chosen.

    Raises:
        ExitPointError: Unknown, never called, called several times, out of order, twice, at or behind the classifier,
            or more exits asked for than there are places.
    """
    if isinstance(exits, bool) or not isinstance(exits, (int, str, Sequence)):
        raise ExitPointError(f"exits must be a list of names, a number or 'auto', got {exits!r}")
    if isinstance(exits, str) and exits != "auto":
        hint = nearest(exits, ["auto"]) or f"; for one exit: [{exits!r}]"
        raise ExitPointError(f"exits must be a list of names, a number or 'auto', got {exits!r}{hint}")
    if isinstance(exits, (int, str)):
        return spread_exits(find_exit_points(adapter, module, traced, formats), exits)
    if not exits:
        raise ExitPointError("exits is empty: name at least one place (erde_hub.list_exit_points(model) lists them)")
    points = [_named_exit(adapter, module, name, traced, formats) for name in exits]
    orders = [order for _, order in points]
    for i, name in enumerate(exits):
        if name in exits[:i] or orders[i] in orders[:i]:
            raise ExitPointError(f"exits names {name!r} twice: {list(exits)}")
    if orders != sorted(orders):
        right = [name for _, name in sorted(zip(orders, exits, strict=True))]
        raise ExitPointError(f"exits must run from shallow to deep: got {list(exits)}, the order is {right}")
    return [point for point, _ in points], "as named"


def _named_exit(
    adapter: BackboneAdapter, module: nn.Module, name: str, traced: Trace, formats: FeatureFormats
) -> tuple[ExitPoint, int]:
    if not isinstance(name, str):
        raise ExitPointError(f"exits must hold module names, got {name!r}")
    path, call = parse_exit(name)
    names = dict(module.named_modules())
    if path not in names or not path:
        _check_is_no_other_name(module, path, traced)
        offered = [p.name for p in find_exit_points(adapter, module, traced, formats)]
        hint = nearest(path, offered) or nearest(path, names)
        raise ExitPointError(f"{type(module).__name__} has no stage {name!r}{hint} (exit points: {', '.join(offered)})")
    calls = traced.calls.get(path, [])
    if not calls:
        raise ExitPointError(f"{name!r} is never called in a forward pass, so no exit can sit behind it")
    if call is None and len(calls) > 1:
        listed = ", ".join(f"{path}@{i}" for i in range(len(calls)))
        raise ExitPointError(f"{name!r} is called {len(calls)} times in a forward pass: name the call ({listed})")
    if call is not None and call >= len(calls):
        raise ExitPointError(f"{path!r} is called {len(calls)} times, so the last call is {path}@{len(calls) - 1}")
    seen = calls[call or 0]
    if seen.order >= classifier_order(adapter, module, traced):
        raise ExitPointError(
            f"exit {name!r} is at or behind the classifier, its pooling included, which is an exit anyway; name an"
            " earlier stage"
        )
    if seen.overwritten:
        raise ExitPointError(
            f"the output of {name!r} is overwritten in place by the layer behind it, so a head there could not be"
            " trained: name that layer instead"
        )
    return exit_point(adapter, module, name, seen, traced, formats), seen.order


def _check_is_no_other_name(module: nn.Module, path: str, traced: Trace) -> None:
    """Calls of a module that sits in several places are found under the first of its names.

    Raises:
        ExitPointError: ``path`` is another of them.
    """
    shared = dict(module.named_modules(remove_duplicate=False)).get(path)
    first = next((name for name, other in module.named_modules() if other is shared and name), None)
    if shared is not None and first is not None:
        calls = len(traced.calls.get(first, []))
        listed = ", ".join(f"{first}@{i}" for i in range(calls)) if calls > 1 else first
        raise ExitPointError(
            f"{path!r} is the same module as {first!r}, which is called {calls} times in a forward pass: name it so"
            f" ({listed})"
        )


# Share of the MACs below which two places cost nearly the same, as a stage and the cheap layer behind it do.
_APART = 0.03


def spread_exits(points: ExitPoints, exits: int | str) -> tuple[list[ExitPoint], str]:
    """Chooses places evenly spaced in MACs, and none that costs nearly as much as the one before it if that can be."""
    # Too early and the head sees edges only; too late and an exit saves nothing.
    useful = [p for p in points if 0.08 <= p.share <= 0.92] or [p for p in points if p.share <= 0.99]
    if not isinstance(exits, str) and len(useful) < exits:
        useful = list(points)
    if not useful:
        found = f" that saves computation (the best, {points[0].name!r}, is at {points[0].share:.0%})" if points else ""
        raise ExitPointError(f"no place for an exit{found} was found; name modules yourself: exits=['module.name']")
    number = min(3, len(useful)) if isinstance(exits, str) else exits
    if not 1 <= number <= len(points):
        raise ExitPointError(f"exits={exits!r}: this backbone has {len(points)} places, ask for 1 to {len(points)}")
    picked = _nearest_to_even(useful, number)
    if any(later.share - earlier.share < _APART for earlier, later in itertools.pairwise(picked)):
        apart = useful[:1]
        for point in useful[1:]:
            apart += [point] if point.share - apart[-1].share >= _APART else []
        if isinstance(exits, str) or len(apart) >= number:
            number = min(number, len(apart))
            picked = _nearest_to_even(apart, number)
    places = ", ".join(f"{p.name} ({p.share:.0%} of the MACs)" for p in picked)
    return picked, f"{number} of {len(points)} places, nearest to even shares of the computation: {places}"


def _nearest_to_even(points: Sequence[ExitPoint], number: int) -> list[ExitPoint]:
    chosen: list[int] = []
    for i in range(1, number + 1):
        target = i / (number + 1)
        first = chosen[-1] + 1 if chosen else 0
        last = len(points) - (number - i)  # leave room for those that follow
        chosen.append(min(range(first, last), key=lambda j: abs(points[j].share - target)))
    return [points[j] for j in chosen]


def find_feature(output: Any, batch: int, grouped: bool = False) -> tuple[Tensor, int | None, tuple[int, ...]]:
    """Returns the tensor of a stage's output that a head can read, its position, and those of all batch-first tensors.

    Where the output is one tensor, the position is None and there are no others.

    Args:
        output: Of the stage.
        batch: Number of samples.
        grouped: Other tensors may have several rows per sample, one sample after the other.

    Raises:
        ExitPointError: There is no batch-first tensor.
    """
    if isinstance(output, Tensor):
        return output, None, ()
    found = tensors(output)
    rows = [tensor.shape[0] if tensor.ndim else 0 for tensor in found]
    batched = tuple(i for i, n in enumerate(rows) if n == batch or (grouped and n and n % batch == 0))
    for position in batched:
        if found[position].ndim >= 2 and rows[position] == batch:
            return found[position], position, batched
    raise ExitPointError(
        f"the stage returned {type(output).__name__} without a batch-first tensor: no head can read it"
    )


def spec_of(feature: Tensor, layout: str, **more: Any) -> FeatureSpec:
    """Returns the description of a feature in a known layout."""
    axis = layout.index("C")
    size = tuple(int(side) for i, side in enumerate(feature.shape) if i not in (0, axis))
    return FeatureSpec(int(feature.shape[axis]), layout, size, **more)


def example_inputs(input_size: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Returns one meta input of that size."""
    return (torch.empty((1, *input_size), dtype=dtype, device="meta"),)
