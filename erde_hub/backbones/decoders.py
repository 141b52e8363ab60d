"""Causal language models of one shape: an embedding, a list of layers, a final norm, an output embedding.

What is needed of them is read from the model; no family has an entry here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from erde_hub.errors import ExitPointError, InputTypeError
from erde_hub.heads import ExitHead, FeatureSpec, LMHead, create_head

from .rebuild import same_values


class Decoder(NamedTuple):
    """The parts of a causal language model.

    Attributes:
        layers: Name of the list of its layers.
        depth: Number of layers.
        norm: Name of its final norm, None where it has none.
    """

    layers: str
    depth: int
    norm: str | None


def read_decoder(backbone: nn.Module) -> Decoder:
    """Finds the parts of a causal language model.

    The layers are the first list with as many modules as the config names layers. The final norm stands next to them
    and is the one module there whose parameters are all vectors.

    Raises:
        InputTypeError: No such list, several modules that may be the norm, or no output embedding; the message says
            which.
    """
    name, config = type(backbone).__name__, backbone.config
    depth = int(config.get_text_config().num_hidden_layers)  # type: ignore[union-attr,operator]
    lists = (n for n, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    layers = next(lists, None)
    if layers is None:
        raise InputTypeError(f"{name} has no list of the {depth} layers that its config names: its exits are unknown")
    embedding = backbone.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(embedding, nn.Module):
        raise InputTypeError(f"{name} has no output embedding (get_output_embeddings()), so its exits cannot speak")
    parent = layers.rpartition(".")[0]
    norms = [
        child
        for child, module in backbone.get_submodule(parent).named_children()
        if any(True for _ in module.parameters()) and all(p.ndim == 1 for p in module.parameters())
    ]
    if len(norms) > 1:
        raise InputTypeError(f"{name} has several modules that may be its final norm: {', '.join(norms)}")
    return Decoder(layers, depth, ".".join(filter(None, (parent, *norms))) if norms else None)


def exit_layers(backbone: nn.Module, exits: Sequence[str]) -> list[int]:
    """Returns the number of the layer, from 0, that each exit of a causal language model comes after.

    Raises:
        ExitPointError: An exit at the last layer, in the middle of a layer, or elsewhere.
    """
    layers, depth, _ = read_decoder(backbone)
    numbers = []
    for name in exits:
        number = name.removeprefix(f"{layers}.")
        if name == number or not number.isdigit() or int(number) >= depth:
            place = "in the middle of a layer" if name != number else "at no layer"
            raise ExitPointError(
                f"exit {name!r} of {type(backbone).__name__} lies {place}: exits of a language model are whole layers,"
                f" {layers}.0 to {layers}.{depth - 2}"
            )
        if int(number) == depth - 1:
            raise ExitPointError(f"exit {name!r} is the last layer, after which the model answers anyway: take it out")
        numbers.append(int(number))
    return numbers


def create_heads(
    name: str, specs: Sequence[FeatureSpec], num_labels: int, backbone: nn.Module, **kwargs: Any
) -> list[ExitHead]:
    """Builds a head per exit, and gives those that share weights with the backbone what they share.

    Args:
        name: Key of the heads table.
        specs: What each exit reads.
        num_labels: Number of classes, or of tokens.
        backbone: Of the model.
        **kwargs: Of the head.
    """
    heads = [create_head(name, spec, num_labels, **kwargs) for spec in specs]
    for head in heads:
        if isinstance(head, LMHead):
            head.bind(backbone, read_decoder(backbone).norm)
    return heads


@torch.no_grad()
def check_readout(network: nn.Module, spec: FeatureSpec) -> None:
    """Checks that head ``lm`` on the last layer gives the backbone's own logits.

    Args:
        network: The backbone with random weights, in eval mode; it is run.
        spec: What an exit reads.

    Raises:
        InputTypeError: The backbone does something else after its last layer.
    """
    decoder = read_decoder(network)
    vocabulary = int(network.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
    device = next(network.parameters()).device
    ids = torch.randint(0, vocabulary, (1, 4), generator=torch.Generator().manual_seed(0)).to(device)
    outputs: list[Any] = []
    last = network.get_submodule(f"{decoder.layers}.{decoder.depth - 1}")
    handle = last.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        own: Tensor = network(ids, use_cache=False).logits
    finally:
        handle.remove()
    (head,) = create_heads("lm", [spec], vocabulary, network)
    hidden = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]
    try:
        same = same_values(head(hidden), own)
    except RuntimeError:  # sizes that do not fit
        same = False
    if not same:
        raise InputTypeError(
            f"{type(network).__name__} does more after its last layer than its final norm ({decoder.norm}) and its"
            " output embedding, so head 'lm' would not speak as it does: take head='linear'"
        )
