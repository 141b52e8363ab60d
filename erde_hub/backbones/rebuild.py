"""Whether a config builds the same network again, and whether its stages one by one give what its own forward gives.

Compared on random weights, which let every layer show.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from erde_hub.engine.hooks import HookRunner, add_exit_hooks
from erde_hub.engine.routing import read_feature
from erde_hub.engine.stages import run_stages
from erde_hub.errors import RebuildError
from erde_hub.heads import FeatureSpec

from .base import BackboneAdapter
from .shared_weights import all_tensors, shared_weights
from .tracing import copy_around


@torch.no_grad()
def check_same_network(
    module: nn.Module,
    rebuilt: nn.Module,
    make_input: Callable[[torch.Generator], Tensor],
    logits: Callable[[Any], Tensor],
    name: str,
    advice: str,
    classifier: Sequence[str] = (),
) -> nn.Module:
    """Compares the answers of two networks to one random input with the same random weights in both.

    Weights of a fresh network hide whole branches behind zeros and tiny layer scales, and what differs inside them
    would show after training only. A copy of the module runs with the weights of the rebuilt network, so the weights
    are in memory once more and not twice.

    Args:
        module: The backbone; it is neither run nor written to.
        rebuilt: What its config builds; its weights are overwritten.
        make_input: Makes one input of batch size 1 on the CPU.
        logits: Reads the logits from an output.
        name: What to call the network in messages.
        advice: What to do about a difference.
        classifier: Names of the classifier's modules.

    Returns:
        ``rebuilt``, in eval mode and with the random weights.

    Raises:
        RebuildError: Other weights, other shared weights or another answer.
    """
    differs = _differing_weights(module, rebuilt)
    if differs:
        advice = _changed_by_hand(module, rebuilt, differs, classifier) or advice
        raise RebuildError(
            f"{name} rebuilt from its config has other weights ({len(differs)} differ, first {differs[0]!r}){advice}"
        )
    groups = [{frozenset(names) for names in shared_weights(m)} for m in (module, rebuilt)]
    shared = sorted(groups[0] ^ groups[1], key=sorted)
    if shared:
        raise RebuildError(
            f"{name} rebuilt from its config shares other weights between its layers than this one (first"
            f" {sorted(shared[0])}){advice}"
        )
    mine_off, theirs_off = _random_rates(module), _random_rates(rebuilt)
    for place in sorted({*mine_off, *theirs_off}):
        # A network that was built in bfloat16 has its rates rounded.
        if not math.isclose(mine_off.get(place, 0.0), theirs_off.get(place, 0.0), rel_tol=0.01):
            raise RebuildError(
                f"{name} rebuilt from its config has a dropout or stochastic depth of {theirs_off.get(place, 0.0)}"
                f" where this one has {mine_off.get(place, 0.0)}, at {place!r}: they would train differently{advice}"
            )
    weight = next(iter(module.parameters()))
    if weight.device.type == "meta":
        return rebuilt
    generator = torch.Generator().manual_seed(0)
    x = make_input(generator)
    x = x.to(weight.device, weight.dtype) if x.is_floating_point() else x.to(weight.device)
    _cast_like(rebuilt.eval(), module)
    _scatter_weights(rebuilt, generator)
    theirs = _stored_tensors(rebuilt)
    same = copy_around(module, {id(tensor): theirs[name] for name, tensor in _stored_tensors(module).items()})
    ours, other = logits(same(x)), logits(rebuilt(x))
    if not same_values(ours, other):
        raise RebuildError(f"{name} rebuilt from its config gives another output with the same weights{advice}")
    return rebuilt


def networks_to_run(
    module: nn.Module, rebuilt: nn.Module | None, inputs: Sequence[Tensor]
) -> Iterator[tuple[nn.Module, tuple[Tensor, ...]]]:
    """Yields what is run in place of a module, in eval mode, and five samples; nothing for a module on meta.

    Args:
        module: It is neither run nor written to.
        rebuilt: The same network with random weights, to be run; None is a copy, with its own weights, then with
            random ones.
        inputs: Example inputs, batch first; of those without values, random ones of their shapes.
    """
    if any(p.is_meta for p in module.parameters()):
        return
    generator = torch.Generator().manual_seed(0)
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    samples = tuple(_five_samples(x, generator).to(weight.device) for x in inputs)
    network = rebuilt if rebuilt is not None else copy_around(module, {})
    yield network, samples
    if rebuilt is None:
        _scatter_weights(network, generator)
        yield network, samples


def _five_samples(x: Tensor, generator: torch.Generator) -> Tensor:
    if not x.is_meta and len(x) > 1:
        return x[torch.arange(5, device=x.device) % len(x)]
    if x.is_floating_point():  # of different scales, which are in no order: sorting must move every sample
        scales = torch.tensor([0.75, 1.0, 2.0, 0.5, 1.5]).view(5, *[1] * (x.ndim - 1))
        return (torch.randn((5, *x.shape[1:]), generator=generator) * scales).to(x.dtype)
    if x.is_meta:
        return torch.zeros((5, *x.shape[1:]), dtype=x.dtype)
    return torch.cat([x // divisor for divisor in range(1, 6)])  # other indices, and no larger ones


class _Features:
    """A pass that keeps what each exit reads, and lets nobody leave."""

    def __init__(self, specs: Sequence[FeatureSpec]) -> None:
        self.specs = specs
        self.seen: list[tuple[int, Tensor]] = []

    def on_exit(self, exit_index: int, output: Any) -> Any:
        self.seen.append((exit_index, read_feature(output, self.specs[exit_index].output_index).clone()))
        return output


def stages_agree(
    adapter: BackboneAdapter,
    network: nn.Module,
    exits: Sequence[str],
    specs: Sequence[FeatureSpec],
    batch: tuple[Tensor, ...],
) -> bool:
    """Tells whether the stages of a network, run one by one, give what its own forward gives, at each exit too.

    Args:
        adapter: Of the backbone.
        network: From :func:`networks_to_run`.
        exits: Names, shallow to deep.
        specs: What each exit reads.
        batch: Inputs of one sample.
    """
    own, staged = _Features(specs), _Features(specs)
    stages = adapter.stages(network, exits, checkpointed=False) or []
    try:
        ours = adapter.logits(HookRunner(network, add_exit_hooks(network, exits)).run(own, batch, {}))
        theirs = adapter.logits(run_stages(stages, staged, *batch))
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError):
        return False
    if [index for index, _ in own.seen] != [index for index, _ in staged.seen]:
        return False
    return all(
        same_values(a, b) for (_, a), (_, b) in zip([*own.seen, (0, ours)], [*staged.seen, (0, theirs)], strict=True)
    )


def same_values(ours: Tensor, theirs: Tensor, float32: float = 1e-4, other: float = 1e-2) -> bool:
    """Whether two outputs differ by rounding at most: another memory format or kernel differs in the last bits.

    Args:
        ours: Any shape.
        theirs: To compare with.
        float32: Largest difference for that type, as a fraction of the largest value.
        other: The same for other types.
    """
    scale = theirs.abs().max().clamp_min(1e-6)
    tolerance = float32 if ours.dtype == torch.float32 else other
    return ours.shape == theirs.shape and torch.allclose(ours / scale, theirs / scale, 0, tolerance, equal_nan=True)


def check_config_builds(model: Any, adapter: Any) -> None:
    """Checks that a model with exits is still what its config builds; weights take no memory for it.

    Names and shapes of all weights are compared, and the kinds of layers without weights, activations for instance.
    Only where such a kind differs do both networks run, since many stand in for one another. Plain modules, which no
    config builds, and compiled ones pass.

    Args:
        model: An :class:`~erde_hub.EarlyExitWrapper`.
        adapter: Of its backbone.

    Raises:
        ConfigError, ExitPointError, ThresholdError: A field was changed to what is not allowed.
        RebuildError: Other weights or another answer.
    """
    model.config.check()
    compiled = any(hasattr(module, "_orig_mod") for module in model.modules())
    if model.config.library == "torch" or compiled or any(p.device.type == "meta" for p in model.parameters()):
        return
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        rebuilt = type(model)(copy.deepcopy(model.config))
    differs = _differing_weights(model, rebuilt)
    if differs:
        raise RebuildError(
            f"a checkpoint of this {type(model.backbone).__name__} could not be loaded: its config builds other weights"
            f" ({len(differs)} differ, first {differs[0]!r}). It was changed after wrapping: change the network first,"
            " then wrap it"
        )
    if _plain_layers(model.backbone) != _plain_layers(rebuilt.backbone):
        adapter.check_rebuild(model.backbone, model.config)


def _changed_by_hand(
    module: nn.Module, rebuilt: nn.Module, differs: Sequence[str], classifier: Sequence[str]
) -> str | None:
    """Says what was done to a network after it was created, and what to do about it; None where it does not show."""
    texts = getattr(module, "main_input_name", None) == "input_ids"  # without a mask, as a Sequential takes one input
    inputs = "example_inputs=input_ids) for texts without padding" if texts else "input_size=...)"
    own_class = (
        f"; to keep it, wrap EarlyExitWrapper(nn.Sequential(model), {inputs}, whose checkpoints load with"
        " from_pretrained(path, backbone=nn.Sequential(model))"
    )
    parts, before = dict(module.named_modules()), dict(rebuilt.named_modules())
    first = differs[0]
    computed = next((name for name, part in parts.items() if parametrize.is_parametrized(part)), None)
    if computed is not None:
        return (
            f": weights of {computed!r} are computed by a parametrisation (weight_norm, say): make them plain with"
            f" torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') before wrapping"
        )
    if any(".lora_" in name or ".base_layer." in name for name in differs):
        return ": it holds adapters of PEFT: wrap model.merge_and_unload() instead, or the model before they were added"
    pruned = next((name for name in differs if name.endswith("_mask")), None)
    if pruned is not None:
        path, _, weight = pruned.removesuffix("_mask").rpartition(".")
        return (
            f": {path!r} is pruned: torch.nn.utils.prune.remove(module, {weight!r}) makes it permanent before wrapping"
        )
    spectral = next((name for name in differs if name.endswith("_orig")), None)
    if spectral is not None:
        path, _, weight = spectral.removesuffix("_orig").rpartition(".")
        return (
            f": {path!r} has spectral_norm: torch.nn.utils.remove_spectral_norm(module, {weight!r}) makes the weight"
            " plain before wrapping"
        )
    doubled = next((name.partition(".aux_bn.")[0] for name in differs if ".aux_bn." in name), None)
    if doubled is not None:
        return (
            f": the batch norm {doubled!r} was split by convert_splitbn_model: wrap the network as it was before, which"
            " takes these weights with load_state_dict(weights, strict=False)"
        )
    if any(name.endswith("weight_g") for name in differs):
        return f": {first!r} belongs to weight_norm: torch.nn.utils.remove_weight_norm(module) before wrapping"
    frozen = next((name for name, part in parts.items() if type(part).__name__.startswith("FrozenBatchNorm")), None)
    if frozen is not None:
        return (
            f": the batch norm {frozen!r} was frozen: timm.utils.unfreeze(model) before wrapping, and then"
            " model.freeze_backbone(), or requires_grad_(False) on the layers that should not learn"
        )
    fusing = [name for name, part in before.items() if any(hasattr(part, m) for m in ("fuse", "reparameterize"))]
    fused = next(
        (n for n in fusing for d in differs if d.startswith(f"{n}.") or type(parts.get(n)) is nn.Identity), None
    )
    norms = [name for name, part in before.items() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    fused = fused or next((name for name in norms if type(parts.get(name)) is nn.Identity), None)
    if fused is not None:
        return f": {fused!r} was fused or reparameterised: wrap the network as it was before{own_class}"
    if classifier and all(name.startswith(tuple(f"{c}." for c in classifier)) for name in differs):
        reset = (
            ", model.reset_classifier(num_classes) makes one that it knows"
            if hasattr(module, "reset_classifier")
            else ""
        )
        return f": its classifier {classifier[0]!r} was replaced by hand, which no config says{reset}{own_class}"
    return None


def _differing_weights(module: nn.Module, rebuilt: nn.Module) -> list[str]:
    """Names of the weights and stored buffers that only one of two networks has, or that differ in shape."""
    mine, theirs = ({name: tensor.shape for name, tensor in m.state_dict().items()} for m in (module, rebuilt))
    return [name for name in (*mine, *theirs) if mine.get(name) != theirs.get(name)]


def _plain_layers(module: nn.Module) -> dict[str, type[nn.Module]]:
    """Kinds of the layers that have neither weights nor parts."""
    return {
        name: type(child)
        for name, child in module.named_modules()
        if next(child.children(), None) is None and not child.state_dict()
    }


def _random_rates(module: nn.Module) -> dict[str, float]:
    """Rates of dropout and stochastic depth above 0 by their places: they change nothing in eval mode."""
    rates: dict[str, float] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        for attribute in ("p", "drop_prob", "drop_rate"):
            value = getattr(child, attribute, None)
            if attribute == "p" and not isinstance(child, nn.modules.dropout._DropoutNd):
                continue
            if isinstance(value, float) and value > 0:
                rates[f"{name}.{attribute}"] = value
    return rates


def _stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, and the buffers that a checkpoint holds, by each of their names."""
    stored = set(module.state_dict())
    return {name: tensor for name, tensor in all_tensors(module).items() if name in stored}


def _cast_like(module: nn.Module, other: nn.Module) -> None:
    """Gives every tensor the device and the type that it has in the other network: some keep buffers in float32."""
    tensors = all_tensors(other)
    module.to(next(iter(other.parameters())).device)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in tensors:
            tensor.data = tensor.data.to(tensors[name].dtype)


def _scatter_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Sets all weights and stored buffers to random values that let every layer show."""
    for tensor in {id(tensor): tensor for tensor in _stored_tensors(module).values()}.values():
        if not tensor.is_floating_point():
            continue
        in_place = tensor.device.type == "cpu" and tensor.dtype.itemsize > 1  # no second copy of a large tensor
        values = tensor if in_place else torch.empty(tensor.shape)
        if tensor.ndim < 2:  # gains, biases, statistics: variances must be positive
            values.uniform_(0.5, 1.5, generator=generator)
        else:
            values.normal_(0, (len(tensor) / tensor.numel()) ** 0.5, generator=generator)
        tensor.copy_(values)
