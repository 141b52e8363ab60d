"""Staged forwards of the transformers families that keep the number of samples aside while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from erde_hub.engine.stages import Stage


def pvt_stages(module: nn.Module, exits: Sequence[str]) -> list[Stage] | None:
    """PVT and PVT v2 reshape between their stages with the number of samples that they began with.

    What goes from one stage to the next is what their layers return: tokens, height and width.
    """
    parts = _PARTS.get(type(module).__name__)
    if parts is None:
        return None
    stages: list[Stage] = []
    found: list[int] = []
    for name, run in parts(module):
        stages.append(Stage(run))
        if name in exits:
            stages[-1].exit_index = exits.index(name)
            found.append(exits.index(name))
    return stages if found == list(range(len(exits))) else None


def _pvt(module: Any) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    encoder = module.pvt.encoder

    def layer(block: Any) -> Callable[[Any], Any]:
        return lambda state: (block(*state)[0], *state[1:])

    for i, (embedding, blocks) in enumerate(zip(encoder.patch_embeddings, encoder.block, strict=True)):
        if i:
            yield "", _as_map
        yield "", embedding
        for j, block in enumerate(blocks):
            yield f"pvt.encoder.block.{i}.{j}", layer(block)
    yield "", lambda state: module.classifier(encoder.layer_norm(state[0])[:, 0])


def _pvt_v2(module: Any) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    def stage(layer: Any) -> Callable[[Any], Any]:
        return lambda x: layer(x, False)

    def tokens(state: Any) -> Any:
        return (state[0][0], *state[1:])

    for i, layer in enumerate(module.pvt_v2.encoder.layers):
        if i:
            yield "", lambda state: _as_map(tokens(state))
        yield f"pvt_v2.encoder.layers.{i}", stage(layer)
    yield "", lambda state: module.classifier(tokens(state)[0].mean(1))


def _as_map(state: Any) -> Tensor:
    tokens, height, width = state
    return tokens.reshape(tokens.shape[0], height, width, -1).permute(0, 3, 1, 2).contiguous()


_PARTS: dict[str, Callable[[Any], Iterator[tuple[str, Callable[[Any], Any]]]]] = {
    "PvtForImageClassification": _pvt,
    "PvtV2ForImageClassification": _pvt_v2,
}
