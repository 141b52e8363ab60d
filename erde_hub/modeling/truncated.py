"""A model cut off after one exit: a static network without decisions, as a transformers model of its own.

For hardware that cannot branch, for tools that take one fixed graph, and as the baseline that every measurement of
routing is compared with. The layers after the exit are not merely skipped but removed, weights included.

A checkpoint of such a model is a folder like any other: its config says how the whole backbone is built and which
modules to take out again (``removed_modules``), so that loading needs neither the model it was cut from nor a run of
the network. The alternative, a bare ``state_dict`` and a note how to rebuild the rest, would lose preprocessing, class
names and ``pipeline``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from erde_hub.backbones import BackboneAdapter, get_adapter
from erde_hub.backbones.decoders import create_heads
from erde_hub.backbones.tracing import weightless_copy
from erde_hub.config import EarlyExitConfig
from erde_hub.engine.inputs import TEXT_INPUTS, ModelInputs
from erde_hub.engine.routing import read_feature, run_head
from erde_hub.engine.rows import tensors
from erde_hub.engine.runner import ExitRunner
from erde_hub.engine.stages import run_stages
from erde_hub.errors import ConfigError, ExitNotReachedError, ExitPointError, InputTypeError, nearest
from erde_hub.heads import ExitHead, FeatureSpec, LMHead
from erde_hub.outputs import EarlyExitOutput

from .pretrained import EarlyExitPreTrainedModel

M = TypeVar("M", bound=nn.Module)

#: Fields of a routed model's config that say nothing about a network without decisions, or are set anew.
_ROUTING_FIELDS = (
    "model_type", "architectures", "transformers_version", "exits", "exit_features", "policy", "policy_kwargs",
    "threshold", "threshold_profile", "calibrator", "calibrator_kwargs", "prediction_sets", "exit_weights",
)  # fmt: skip


class TruncatedConfig(EarlyExitConfig):
    """Configuration of a :class:`TruncatedModel`; :func:`truncate` writes it.

    ``exits`` and ``exit_features`` hold the one exit that answers, or nothing where the classifier does.

    Args:
        removed_modules: Names of the backbone's modules that come after the exit.
    """

    model_type: ClassVar[str] = "early_exit_truncated"

    removed_modules: list[str] | tuple[str, ...] | None = None

    def check(self) -> None:
        """As for any early-exit config; also that there is one exit, and that the names are names."""
        super().check()
        if self.exits is not None and len(self.exits) > 1:
            raise ConfigError(f"a truncated model answers at one exit, got exits={self.exits}")
        removed = self.removed_modules
        if removed is not None and not all(isinstance(name, str) and name for name in removed):
            raise ConfigError(f"removed_modules must be a list of module names, got {removed!r}")


class TruncatedModel(EarlyExitPreTrainedModel):
    """The static network up to one exit: a stem, some stages, a head; made by ``model.truncate(exit)``.

    Its logits are those of that exit in the model it was cut from, bit for bit (a calibrator stored there, which works
    after the logits, stays there). There is nothing to decide and no threshold, so it traces: ``torch.export``,
    ``torch.onnx.export`` and ``torch.compile`` take it as they take any module (in one graph for families whose stages
    are known; other backbones end by an exception, which ``torch.compile`` leaves to Python). ``save_pretrained``,
    ``from_pretrained``, ``AutoModelForImageClassification`` and ``pipeline`` work as for the whole model.

    Args:
        config: As :func:`truncate` writes it.
        backbone: The living backbone, whole, for configs that cannot rebuild it; it is copied.
        head: The living head, with a backbone that has been cut already.

    Raises:
        ExitPointError: The backbone lacks a module that the config names.

    Example:
        >>> model = EarlyExitWrapper(timm.create_model("resnet18", num_classes=10), exits=["layer1", "layer2"])
        >>> static = model.eval().truncate("layer1")
        >>> static(torch.randn(2, 3, 224, 224)).logits.shape
        torch.Size([2, 10])
    """

    config_class = TruncatedConfig
    config: TruncatedConfig

    def __init__(
        self, config: TruncatedConfig, backbone: nn.Module | None = None, head: ExitHead | None = None
    ) -> None:
        if not isinstance(config, TruncatedConfig):
            raise InputTypeError(f"TruncatedModel takes a TruncatedConfig, got {type(config).__name__}: cut one off a"
                                 " model with model.truncate(exit)")  # fmt: skip
        if backbone is not None and not isinstance(backbone, nn.Module):
            raise InputTypeError(f"backbone must be an nn.Module, got {type(backbone).__name__}")
        super().__init__(config)
        adapter = get_adapter(config.library)
        removed = config.removed_modules or ()
        module = adapter.build(config) if backbone is None else backbone
        if head is None:  # not what truncate() hands in, which is cut already
            if backbone is not None:
                module = _copy_without(backbone, removed)
            for name in removed:
                _replace(module, name, RemovedModule(name))
            for values in config.exit_features or ():
                spec = FeatureSpec.from_dict(values)
                (head,) = create_heads(config.head, [spec], config.num_outputs, module, **(config.head_kwargs or {}))
        self._assemble(adapter, module, head, adopted=backbone is not None)

    def _assemble(self, adapter: BackboneAdapter, backbone: nn.Module, head: ExitHead | None, adopted: bool) -> None:
        self._adapter = adapter
        self._costs = {}
        self.backbone = backbone
        self.head = head
        self.main_input_name = "input_ids" if adapter.is_text(backbone) else "pixel_values"
        self._runner = ExitRunner(adapter, backbone, self.config.exits or (), self.config.exit_hooks)
        on_meta = any(p.device.type == "meta" for p in self.parameters())
        self._keep_weights(on_meta, adopted)
        self._find_shared_weights(adopted)
        self.post_init()

    @property
    def exit_name(self) -> str:
        """Name of the exit that answers, ``"classifier"`` for the backbone's own."""
        return self.config.exits[0] if self.config.exits else "classifier"

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> EarlyExitOutput | tuple[Any, ...]:
        """Runs the network up to its exit.

        Args:
            pixel_values: (N, C, H, W) float, preprocessed; for image models.
            labels: (N,) int64 class indices, for a regression (N, D) floats; with them ``loss`` is the cross-entropy,
                or the mean squared error.
            return_dict: False returns a tuple of what is set.
            **kwargs: ``input_ids`` and the like of text models; otherwise passed on to the backbone's own forward,
                where its stages are not known.

        Raises:
            ShapeError: Inputs or labels of the wrong shape.
            InputTypeError: Inputs or labels of the wrong type.
            LabelError: Labels outside the classes.
        """
        inputs = self._inputs(pixel_values, {name: kwargs.pop(name, None) for name in TEXT_INPUTS}, kwargs)
        if labels is not None:
            labels = self._labels(labels, inputs)
        logits = self._logits(inputs)
        loss = None if labels is None else self._loss_of(logits, labels)
        output = EarlyExitOutput(loss=loss, logits=logits)
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return output if use_dict else output.to_tuple()

    def _logits(self, inputs: ModelInputs) -> Tensor:
        if self.head is None:
            return self._adapter.logits(self.backbone(*inputs.args, **inputs.kwargs))
        cut, runner = _Cut(), self.runner
        runner.run(cut, inputs.args, inputs.kwargs)
        if not cut.reached:
            raise ExitNotReachedError(
                f"the forward pass did not reach {self.exit_name!r}: the backbone took another path than before"
            )
        mask = runner.token_mask(inputs.kwargs) if self.head.spec.masked else None
        return run_head(self.head, read_feature(cut.output, self.head.spec.output_index), mask)

    def exits_and_heads(self) -> list[tuple[str, ExitHead | None]]:
        """Returns name and head of the one exit; the backbone's own classifier has no head."""
        return [(self.exit_name, self.head)]


class RemovedModule(nn.Module):
    """Stands where a module after the exit was; has no weights and must not be run."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises :class:`~erde_hub.errors.ExitNotReachedError`."""
        raise ExitNotReachedError(
            f"{self.name!r} was removed when the model was cut off, and the forward pass reached it"
        )


class _Cut:
    """Visitor that keeps the output of the exit's stage and ends the pass there."""

    def __init__(self) -> None:
        self.reached = False
        self.output: Any = None

    def on_exit(self, exit_index: int, output: Any) -> None:
        self.reached, self.output = True, output


def truncate(model: EarlyExitPreTrainedModel, exit: int | str) -> TruncatedModel:
    """Cuts a model off after one exit; see :class:`TruncatedModel`.

    Args:
        model: Is copied, not touched; what comes after the exit is not copied.
        exit: Index or name of the exit; the last, ``"classifier"``, gives the backbone without early exits.

    Returns:
        A model of its own, in the mode of ``model``.

    Raises:
        ExitPointError: No such exit.
    """
    exits = model.exits_and_heads()
    index = _exit_index([name for name, _ in exits], exit)
    name, head = exits[index]
    whole = getattr(model.backbone, "_orig_mod", model.backbone)
    removed = [] if head is None else _modules_after(model, name)
    if isinstance(head, LMHead):
        removed = [n for n in removed if whole.get_submodule(n) not in head.shared_modules()]
    values = {key: value for key, value in model.config.to_dict().items() if key not in _ROUTING_FIELDS}
    config = TruncatedConfig.from_dict(
        {
            **values,
            "exits": None if head is None else [name],
            "exit_features": None if head is None else [head.spec.to_dict()],
            "removed_modules": removed,
        }
    )
    backbone = _copy_without(whole, removed)
    if head is not None:
        head = _without_own_hooks(copy.deepcopy(head, {id(whole): backbone}))
    static = TruncatedModel(config, backbone, head)
    static.training = model.training
    return static


def _exit_index(names: Sequence[str], exit: int | str) -> int:
    if isinstance(exit, str):
        if exit not in names:
            raise ExitPointError(f"there is no exit {exit!r}{nearest(exit, names)} (exits: {', '.join(names)})")
        return names.index(exit)
    if isinstance(exit, bool) or not isinstance(exit, int) or not 0 <= exit < len(names):
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        raise ExitPointError(f"exit must be an index or a name, got {exit!r} (exits: {listed})")
    return exit


# What comes after an exit


class _Touched(BaseException):
    """Code before the exit reads a module that is never called before it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _Probe(nn.Module):
    """Stands where a module was and raises whatever is done with it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.__dict__["_name"] = name

    def __getattr__(self, attribute: str) -> Any:
        raise _Touched(self.__dict__["_name"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Touched(self.__dict__["_name"])


@torch.no_grad()
def _modules_after(model: EarlyExitPreTrainedModel, exit_name: str) -> list[str]:
    """Names of the modules that a pass up to an exit does not need, found on a weightless copy."""
    clone, device = weightless_copy(model)
    backbone = getattr(clone.backbone, "_orig_mod", clone.backbone)
    clone.backbone = backbone
    size = clone.config.input_size
    if not size:
        raise ConfigError("the config has no input_size, so the network cannot be traced: set model.config.input_size")
    adapter = model.runner.adapter
    dtype = adapter.example_dtype(backbone)
    runner = ExitRunner(adapter, backbone, [exit_name], clone.config.exit_hooks)
    staged = runner.stages() is not None  # before the hooks below, which a runner would not pass over

    def run() -> None:
        with device:
            x = torch.empty((2, *size), dtype=dtype, device=device)
            if staged:
                run_stages(adapter.stages(backbone, [exit_name], checkpointed=False) or [], _Cut(), x)
            else:
                runner.run(_Cut(), (x,), {})

    started: set[int] = set()
    finished: set[int] = set()
    handles = []
    for module in backbone.modules():
        handles.append(module.register_forward_pre_hook(lambda m, _: started.add(id(m))))
        if module is not backbone:
            finish = lambda m, _args, _output: finished.add(id(m))  # noqa: E731 - a hook returns nothing else
            handles.append(module.register_forward_hook(finish, prepend=True))
    run()
    for handle in handles:
        handle.remove()
    names = [n for n in _never_started(backbone, "", started, finished) if not _held_outside(backbone, n)]
    for name in names:
        _replace(backbone, name, _Probe(name))
    whole, _ = weightless_copy(model)
    while True:
        try:
            run()
        except _Touched as touched:  # a module whose weights or methods are used, and which is never called
            _replace(backbone, touched.name, whole.backbone.get_submodule(touched.name))
            names.remove(touched.name)
        else:
            return names


def _never_started(module: nn.Module, prefix: str, started: set[int], finished: set[int]) -> Iterator[str]:
    for name, child in module._modules.items():  # under each of its names
        path = f"{prefix}{name}"
        if child is None or id(child) in finished:
            continue  # its parts may be used without being called
        listed = isinstance(child, (nn.ModuleList, nn.ModuleDict))  # code walks along these, and calls what is in them
        if listed or any(id(part) in started for part in child.modules()):
            yield from _never_started(child, f"{path}.", started, finished)
        else:
            yield path


def _held_outside(backbone: nn.Module, name: str) -> bool:
    """Whether another module keeps a weight of this one in an attribute of its own, and may use it without a call."""
    removed = backbone.get_submodule(name)
    weights, inside = {id(weight) for weight in removed.parameters()}, set(removed.modules())
    kept = (vars(module).items() for module in backbone.modules() if module not in inside)
    return any(
        id(tensor) in weights
        for attributes in kept
        for key, value in attributes
        if key not in ("_parameters", "_buffers", "_modules") and isinstance(value, (Tensor, list, tuple, dict))
        for tensor in tensors(value)
    )


def _replace(module: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    try:
        holder = module.get_submodule(parent)
        holder.get_submodule(leaf)
    except AttributeError as error:
        raise ExitPointError(
            f"{type(module).__name__} has no module {name!r}, which the config removes: the backbone is another one"
        ) from error
    holder._modules[leaf] = by


def _copy_without(backbone: nn.Module, removed: Sequence[str]) -> nn.Module:
    """Copies a backbone without copying what is removed, and without the hooks of the model it comes from."""
    memo: dict[int, Any] = {id(backbone.get_submodule(name)): RemovedModule(name) for name in removed}
    return _without_own_hooks(copy.deepcopy(backbone, memo))


def _without_own_hooks(module_: M) -> M:
    for module in module_.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if type(hook).__module__.startswith("erde_hub.")]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return module_
