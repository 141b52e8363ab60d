"""Which axis of a feature holds the channels, found from what can be known of a network; never guessed from lengths.

A weightless copy is run on inputs of other sizes: where it takes one, the axes that follow the size are no channels.
Where it takes none, the layers that make or read a feature tell, a convolution or a linear layer for instance, unless
the sizes, as far as the copy got, contradict them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from erde_hub.engine.rows import tensors
from erde_hub.errors import ConfigError, ExitPointError, nearest
from erde_hub.heads.base import FORMATS

from .tracing import Trace, example_batch, weightless_copy

#: Formats by the number of axes: channels in front of all other axes, and behind them.
_FORMATS = {4: ("NCHW", "NHWC"), 3: ("NCL", "NLC")}

#: Axis of the channels, 1 or -1, by a layer of that name in that call.
_Claim = tuple[int, str, int]

_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
_CHANNELS_LAST = (nn.Linear, nn.Embedding, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.RNNBase)


class FeatureFormats:
    """What the user says about the layout of features: one format for all exits, or one per exit.

    Args:
        given: A format, a sequence with one per exit, or a mapping from exit names; None says nothing.
        exits: As given to the model.

    Raises:
        ConfigError: Unknown formats, or exits that are not named.
    """

    def __init__(self, given: str | Sequence[str] | Mapping[str, str] | None, exits: Sequence[str] | int | str) -> None:
        self.everywhere = given if isinstance(given, str) else None
        self.by_name: dict[str, str] = {}
        names = list(exits) if isinstance(exits, Sequence) and not isinstance(exits, str) else []
        if isinstance(given, Mapping):
            self.by_name = dict(given)
            unknown = [name for name in given if names and name not in names]
            if unknown:
                raise ConfigError(f"feature_format names {unknown[0]!r}, which is no exit{nearest(unknown[0], names)}")
        elif given is not None and not isinstance(given, str):
            if len(given) != len(names):
                raise ConfigError(f"feature_format has {len(given)} entries for {len(names)} named exits")
            self.by_name = dict(zip(names, given, strict=True))
        for value in (*self.by_name.values(), *([given] if isinstance(given, str) else [])):
            if value not in FORMATS:
                raise ConfigError(f"feature_format must be one of {', '.join(FORMATS)}, got {value!r}")

    def of(self, name: str, axes: int) -> str | None:
        """Returns what was said about an exit whose feature has that many axes, None where nothing was.

        Raises:
            ConfigError: A format with another number of axes was given for this exit.
        """
        own = self.by_name.get(name)
        if own is not None and len(own) != axes:
            raise ConfigError(f"feature_format[{name!r}]={own!r}, but the output of this stage has {axes} axes")
        everywhere = self.everywhere
        return own or (everywhere if everywhere is not None and len(everywhere) == axes else None)


def find_format(module: nn.Module, name: str, feature: Tensor, position: tuple[int, int], traced: Trace) -> str:
    """Returns the format of a feature.

    Args:
        module: The backbone; a weightless copy of it is run.
        name: Of the stage.
        feature: As traced.
        position: Number of the stage's call, and of the tensor in its output.
        traced: Of the backbone.

    Raises:
        ExitPointError: Features of other numbers of axes, without a batch axis in front, or whose layout stays open.
    """
    shape = tuple(feature.shape)
    if shape[0] != traced.batch or feature.ndim not in (2, *_FORMATS):
        raise ExitPointError(
            f"exit {name!r}: an output of shape {shape} for {traced.batch} samples is no map, tokens or vector with the"
            " samples along its first axis"
        )
    if feature.ndim == 2:
        return "NC"
    if traced.layout_runs is None:
        traced.layout_runs = [_Run(module, traced.inputs, traced.batch), *_resized(module, traced)]
    own, *others = traced.layout_runs
    first, last = _FORMATS[feature.ndim]
    axes = _fixed_axis(own, [run for run in others if run.ended], "made", name, position)
    if not axes:
        claims = own.claims(name, position)
        axes = {axis for axis, _, _ in claims} | _fixed_axis(own, others, "made", name, position)
        for _, layer, call in claims:  # a linear layer over the tokens of (N, C, T) reads an axis that follows the size
            axes |= _fixed_axis(own, others, "read", layer, (call, 0))
    for axis, others_are_one in ((1, max(shape[2:]) == 1), (-1, max(shape[1:-1]) == 1)):
        if axes == {axis} or (not axes and others_are_one):
            return first if axis == 1 else last
    sizes = ", ".join(["N", *map(str, shape[1:])])
    raise ExitPointError(
        f"exit {name!r}: it cannot be told which axis of its output, ({sizes}), holds the channels: write"
        f" feature_format={{{name!r}: {first!r}}} where it is the second, {{{name!r}: {last!r}}} where it is the last"
    )


def _fixed_axis(own: _Run, others: Sequence[_Run], what: str, name: str, position: tuple[int, int]) -> set[int]:
    """The outer axis, 1 or -1, that keeps its length where the other one follows the size; empty where that is open."""
    shape = own.shape(what, name, position)
    found: set[int] = set()
    for run in others:
        other = run.shape(what, name, position)
        if shape is not None and other is not None and len(other) == len(shape) > 2:
            moved = [a != b for a, b in zip(shape, other, strict=True)]
            found |= {-1 if moved[1] else 1} if moved[1] != moved[-1] else set()
    return found if len(found) == 1 else set()


def _resized(module: nn.Module, traced: Trace) -> list[_Run]:
    """Runs on inputs that are twice as large along all axes but the channels, which come first or last."""
    runs = []
    for kept in (1, -1):
        inputs = []
        for x in traced.inputs:
            size = [2 * side for side in x.shape]
            if x.ndim > 2:
                size[kept] = x.shape[kept]
            inputs.append(torch.empty(size, dtype=x.dtype, device="meta"))
        runs.append(_Run(module, inputs, traced.batch + 2))
    return runs


class _Run:
    """One pass of a weightless copy, as far as it gets: what came out of each module, and what read or made it.

    Args:
        module: The backbone.
        inputs: Example inputs, batch first.
        batch: Number of samples.

    Attributes:
        ended: Whether the network takes inputs of that size.
    """

    @torch.no_grad()
    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], batch: int) -> None:
        clone, device = weightless_copy(module)
        self.ended = False
        self._shown: dict[str, dict[str, list[list[Tensor]]]] = {"made": {}, "read": {}}  # by name, then by call
        self._claims: dict[int, set[_Claim]] = {}  # by the id of a tensor, all of which are kept
        self._same: dict[int, int] = {}  # tensors that an activation or dropout made of others
        self._inside: list[tuple[tuple[int, ...], _Claim]] = []  # with the shape of what the layer makes
        for name, child in clone.named_modules():
            child.register_forward_pre_hook(lambda m, args, name=name: self._note("read", name, args[:1]))
            child.register_forward_hook(lambda m, args, output, name=name: self._note_layer(name, m, args, output))
        try:
            with device:
                clone(*example_batch(inputs, batch, device))
            self.ended = True
        except Exception:  # noqa: BLE001 - a size that the network does not take; what ran before counts
            return

    def _note(self, what: str, name: str, tree: Any) -> None:
        self._shown[what].setdefault(name, []).append(tensors(tree))

    def _note_layer(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._note("made", name, output)
        calls = self._shown["made"][name]
        made = calls[-1]
        read = [x for x in args[:1] if isinstance(x, Tensor)]
        elementwise = type(module).__module__ in ("torch.nn.modules.activation", "torch.nn.modules.dropout")
        axis = _channel_axis(module)
        if axis is not None:
            claim = (axis, name, len(calls) - 1)
            self._inside += [(tuple(tensor.shape), claim) for tensor in made[:1]]
            for tensor in (*read, *made[:1]):
                self._claims.setdefault(self._root(tensor), set()).add(claim)
        elif elementwise and read and made and self._root(read[0]) != self._root(made[0]):
            self._same[self._root(made[0])] = self._root(read[0])

    def _root(self, tensor: Tensor) -> int:
        key = id(tensor)
        while key in self._same:
            key = self._same[key]
        return key

    def _tensor(self, what: str, name: str, position: tuple[int, int]) -> Tensor | None:
        call, number = position
        calls = self._shown[what].get(name, [])
        return calls[call][number] if call < len(calls) and number < len(calls[call]) else None

    def shape(self, what: str, name: str, position: tuple[int, int]) -> tuple[int, ...] | None:
        """Shape of what a module "made" or "read", None where the pass did not get there."""
        tensor = self._tensor(what, name, position)
        return None if tensor is None else tuple(tensor.shape)

    def claims(self, name: str, position: tuple[int, int]) -> set[_Claim]:
        """Where the layers that made or read a feature have its channels.

        Where none did, layers inside the stage count whose outputs have its shape, if no other axis is as long.
        """
        tensor = self._tensor("made", name, position)
        if tensor is None:
            return set()
        if self._root(tensor) in self._claims:
            return self._claims[self._root(tensor)]
        shape = tuple(tensor.shape)
        return {
            claim
            for made, claim in self._inside
            if claim[1].startswith(f"{name}.") and made == shape and shape[1:].count(shape[claim[0]]) == 1
        }


def _channel_axis(module: nn.Module) -> int | None:
    """The axis of channels of what a layer reads and makes, None where it does not tell."""
    if isinstance(module, _CHANNELS_FIRST) or type(module).__module__ == "torch.nn.modules.pooling":
        return 1
    if isinstance(module, _CHANNELS_LAST):
        return -1 if getattr(module, "batch_first", True) else None
    if type(module) in (nn.LayerNorm, nn.RMSNorm):  # subclasses normalise maps
        return -1 if len(module.normalized_shape) == 1 else None  # type: ignore[arg-type]
    return None
