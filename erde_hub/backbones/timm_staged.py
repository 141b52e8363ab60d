"""Staged forwards of the timm families that keep the number of samples, or the size of the map, aside while they run.

What goes from one stage to the next is the feature with what belongs to it, so an exit reads the first of several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from timm.models import twins
from torch import nn

from erde_hub.engine.stages import Stage

try:  # later than the oldest timm that is supported
    from timm.models import deepseek_vit, qwen3_vit
except ImportError:
    _ENCODED: tuple[type[nn.Module], ...] = ()
else:
    _ENCODED = (deepseek_vit.DeepseekVitClassifier, qwen3_vit.Qwen3VitClassifier)

NamedStage = tuple[str, Callable[[Any], Any]]


def carries(module: nn.Module) -> bool:
    """Tells whether the module is of one of these families, whose stages hand on more than the feature."""
    return isinstance(module, (twins.Twins, *_ENCODED))


def stage_names(module: nn.Module) -> list[str]:
    """Names of the places behind which these families can have an exit."""
    return [name for name, _ in _parts(module) if name]


def carried_stages(module: nn.Module, exits: Sequence[str]) -> list[Stage] | None:
    """Returns the staged forward, or None where an exit does not lie behind one of its stages."""
    stages: list[Stage] = []
    found: list[int] = []
    for name, run in _parts(module):
        stages.append(Stage(run))
        if name in exits:
            stages[-1].exit_index = exits.index(name)
            found.append(exits.index(name))
    return stages if found == list(range(len(exits))) else None


def _parts(module: nn.Module) -> Iterator[NamedStage]:
    return _twins(module) if isinstance(module, twins.Twins) else _encoded(module)


def _twins(module: Any) -> Iterator[NamedStage]:
    def embed(embedding: Any, drop: Any) -> Callable[[Any], Any]:
        def run(x: Any) -> Any:
            x, size = embedding(x)
            return drop(x), tuple(size)

        return run

    def layer(block: Any) -> Callable[[Any], Any]:
        return lambda state: (block(*state), state[1])

    def as_map(state: Any) -> Any:
        x, size = state
        return x.reshape(x.shape[0], *size, -1).permute(0, 3, 1, 2).contiguous()

    stages = zip(module.patch_embeds, module.pos_drops, module.blocks, module.pos_block, strict=True)
    for i, (embedding, drop, blocks, position) in enumerate(stages):
        if i:
            yield "", as_map
        yield "", embed(embedding, drop)
        for j, block in enumerate(blocks):
            yield f"blocks.{i}.{j}", layer(block)
            if j == 0:
                yield f"pos_block.{i}", layer(position)
    yield "", lambda state: module.forward_head(module.norm(state[0]))


def _encoded(module: Any) -> Iterator[NamedStage]:
    encoder = module.encoder

    def embed(x: Any) -> Any:
        x = encoder.patch_embed(x)
        size = tuple(x.shape[1:3])
        tokens, rope = encoder._pos_embed(x)
        return tokens, rope, size

    def layer(block: Any) -> Callable[[Any], Any]:
        return lambda state: (block(state[0], rope=state[1]), *state[1:])

    def head(state: Any) -> Any:
        tokens, _, size = state
        norm = getattr(encoder, "norm", None)  # one of the two families has it behind its blocks
        x = (tokens if norm is None else norm(tokens)).reshape(tokens.shape[0], *size, -1)
        projector = getattr(encoder, "aligner", None) or getattr(encoder, "merger", None)
        if projector is not None:
            x = projector(x)
        elif encoder.global_pool == "avg":
            x = x.mean((1, 2))
        return module.forward_head(x)

    yield "", embed
    for i, block in enumerate(encoder.blocks):
        yield f"encoder.blocks.{i}", layer(block)
    yield "", head
