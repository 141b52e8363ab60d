"""How a backbone is run with its exits.

A runner executes the backbone and calls a visitor after each stage that has an exit. Where the stages of a backbone are
known, they are run one after the other; any other backbone runs its own forward, with hooks on the exits' modules.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from erde_hub.errors import ExitPointError, ShapeError

from .compilation import StageCompiler
from .hooks import ExitHook, HookRunner, add_exit_hooks, parse_exit
from .stages import ExitVisitor, Stage, run_stages

#: Hooks that torch calls for every module there is, as ``register_module_forward_hook`` keeps them.
_GLOBAL_HOOKS: tuple[Mapping[int, Any], ...] = (
    torch_modules._global_forward_hooks,
    torch_modules._global_forward_pre_hooks,
    torch_modules._global_backward_hooks,
    torch_modules._global_backward_pre_hooks,
)

#: Methods named ``forward...`` by class, as they were when a network of that class was first wrapped.
_WRAPPED_FORWARDS: weakref.WeakKeyDictionary[type[nn.Module], dict[str, Any]] = weakref.WeakKeyDictionary()


class Adapter(Protocol):
    """What a runner asks of the adapter of its backbone; see :class:`erde_hub.backbones.BackboneAdapter`."""

    def stages(self, module: nn.Module, exits: Sequence[str], checkpointed: bool) -> list[Stage] | None:
        """Returns the stages, or None where they are not known."""

    def needs_stages(self, module: nn.Module) -> bool:
        """Tells whether the batch cannot shrink in the backbone's own forward."""

    def add_sync_hooks(self, module: nn.Module, exits: Sequence[str]) -> list[Any]:
        """Puts hooks into the module that keep other tensors in step with the batch."""

    def hook_runner(self, module: nn.Module, exit_hooks: Sequence[ExitHook], sync_hooks: Sequence[Any]) -> HookRunner:
        """Returns what runs the backbone's own forward."""

    def example_dtype(self, module: nn.Module) -> torch.dtype:
        """Returns the type of the backbone's main input."""

    def logits(self, output: Any) -> Tensor:
        """Returns the classifier's logits from the backbone's output."""

    def token_mask(self, module: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
        """Returns the mask (N, L) of the tokens that heads pool, from the backbone's inputs."""

    def classifier_layer(self, module: nn.Module, input_size: Sequence[int]) -> nn.Linear:
        """Returns the linear layer that gives the logits."""


class ExitRunner:
    """Runs a backbone with its exits.

    Which way is taken is decided for each call. Running stages skips the calls of the modules that contain them; hooks
    on one of those, or a ``forward`` that was replaced there or in its class, would be skipped as well, so the backbone
    then runs its own forward.

    A copy or a pickle of a runner finds its own stages; compiled ones belong to the modules they were made from.

    Args:
        adapter: Knows this kind of backbone.
        backbone: The backbone.
        exits: Names of the early exits, shallow to deep.
        hooked: Never run stages.

    Raises:
        ExitPointError: An exit names no module.
    """

    def __init__(self, adapter: Adapter, backbone: nn.Module, exits: Sequence[str], hooked: bool = False) -> None:
        self.adapter = adapter
        self.backbone = backbone
        self.exits = list(exits)
        self.hooked = hooked
        self.compiler: StageCompiler | None = None
        self._found: _Found | None = None
        self._hooks: tuple[nn.Module, list[ExitHook], list[Any]] | None = None
        if self.stages() is None:
            self._place_hooks(_uncompiled(backbone))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiler": None, "_found": None}

    def stages(self) -> list[Stage] | None:
        """Returns the stages to run, compiled ones after :meth:`compile`; None where hooks are used.

        They are kept as long as no module among them is replaced.
        """
        found = self._found
        if found is None or found.backbone is not self.backbone or not found.holds():
            found = self._found = self._find()
        skips = found.stages is None or any(found.hooks) or (any(_GLOBAL_HOOKS) and _are_hooks_of_others())
        return None if skips else found.stages

    def _find(self) -> _Found:
        backbone = _uncompiled(self.backbone)
        bypassed = [backbone] if self.hooked else list(_bypassed(backbone, self.exits))
        stages = None
        if not self.hooked and not any(_has_own_forward(m) or _class_is_patched(type(m)) for m in bypassed):
            stages = self.adapter.stages(backbone, self.exits, checkpointed=False)
        if stages is not None and self.compiler is not None:
            stages = self.compiler.stages(stages)
        return _Found(self.backbone, bypassed, stages)

    def run(
        self, visitor: ExitVisitor, args: tuple[Any, ...], kwargs: dict[str, Any], *, checkpointed: bool = False
    ) -> Any | None:
        """Runs the backbone; returns its output, None where the visitor ended the pass.

        Args:
            visitor: Is called at each exit.
            args: Positional inputs of the backbone; stages take one tensor.
            kwargs: Named inputs; stages take none.
            checkpointed: Recompute activations in the backward pass where the backbone is set to; never compiled.
        """
        stages = self.stages()
        if stages is None:
            return self._hook_runner().run(visitor, args, kwargs)
        if checkpointed:
            stages = self.adapter.stages(_uncompiled(self.backbone), self.exits, checkpointed=True) or []
        (x,) = args
        return run_stages(stages, visitor, x)

    def token_mask(self, kwargs: dict[str, Any]) -> Tensor | None:
        """Returns the mask (N, L) of the tokens that heads pool, from the backbone's inputs; None where all count.

        Raises:
            ShapeError: A mask of another shape.
        """
        mask = self.adapter.token_mask(_uncompiled(self.backbone), kwargs)
        if mask is not None and mask.ndim != 2:
            raise ShapeError(f"heads pool tokens by an attention_mask of shape (N, L), got {tuple(mask.shape)}")
        return mask

    def classifier_layer(self, input_size: Sequence[int]) -> nn.Linear:
        """Returns the linear layer that gives the backbone's logits.

        Raises:
            ConfigError: There is none.
        """
        return self.adapter.classifier_layer(_uncompiled(self.backbone), input_size)

    def heads(self, heads: Sequence[nn.Module]) -> list[Any]:
        """Returns what is run in place of the heads: themselves, or compiled ones after :meth:`compile`."""
        return list(heads) if self.compiler is None else self.compiler.heads(list(heads))

    def compile(self, options: dict[str, Any]) -> None:
        """Compiles the stages and the heads, each when it first runs.

        Raises:
            ExitPointError: The backbone's stages are not known, or would skip other hooks.
        """
        if self.stages() is None:
            raise ExitPointError(
                f"{type(_uncompiled(self.backbone)).__name__} is driven by hooks, so there are no stages to compile one"
                " by one: compile the backbone instead, model.backbone = torch.compile(model.backbone), which breaks"
                " its graph at every exit"
            )
        self.compiler, self._found = StageCompiler(options), None

    def check_shrinks(self) -> None:
        """Checks that samples can be taken out of a batch, for callers who have found no stages to run.

        Raises:
            ExitPointError: The backbone's own forward keeps the number of samples, and other hooks make it run.
        """
        backbone = _uncompiled(self.backbone)
        if not self.hooked and self.adapter.needs_stages(backbone):
            raise ExitPointError(
                f"samples can exit {type(backbone).__name__} only where its stages are run one by one, which skips"
                " hooks on the modules that contain them and a forward that was replaced there: put hooks on the stages"
                " themselves, or take them off"
            )

    def _place_hooks(self, backbone: nn.Module) -> None:
        exit_hooks = add_exit_hooks(backbone, self.exits)
        sync_hooks = self.adapter.add_sync_hooks(backbone, self.exits)
        self._hooks = backbone, exit_hooks, sync_hooks
        # A network that is wrapped again and again does not keep the hooks of models that are gone.
        hooks = [*exit_hooks, *sync_hooks]
        weakref.finalize(self, _remove_hooks, weakref.ref(backbone), hooks).atexit = False

    def _hook_runner(self) -> HookRunner:
        """Returns what runs the backbone's own forward; places the hooks where they are needed for the first time."""
        backbone = _uncompiled(self.backbone)
        if self._hooks is None or self._hooks[0] is not backbone:
            try:
                self._place_hooks(backbone)
            except ExitPointError as error:
                raise ExitPointError(
                    f"{type(backbone).__name__} is not the backbone that was wrapped: {error}; wrap it anew"
                ) from error
        return self.adapter.hook_runner(self.backbone, *self._hooks[1:])  # type: ignore[index]


class _Found:
    """The stages of a backbone, and what tells whether a new look would find others.

    Args:
        backbone: What the runner runs.
        bypassed: The modules whose own calls are skipped where the stages are run.
        stages: None where the stages are not known or not to be run.

    Attributes:
        hooks: The hooks of the backbone and the bypassed modules, as the modules keep them.
    """

    __slots__ = ("_children", "_forwards", "_kept", "_lengths", "_methods", "_sized", "backbone", "hooks", "stages")

    def __init__(self, backbone: nn.Module, bypassed: Sequence[nn.Module], stages: list[Stage] | None) -> None:
        self.backbone = backbone
        self.stages = stages
        self.hooks = _hooks_of(bypassed if backbone is bypassed[0] else [backbone, *bypassed])
        self._children = [part._modules for module in bypassed for part in _with_lists(module)]
        self._kept = [*chain.from_iterable(map(dict.values, self._children))]
        self._sized: list[dict[str, Any]] = [*self._children, *map(vars, bypassed)]  # a forward of its own is in vars
        self._lengths = [*map(len, self._sized)]
        self._methods = [(attrgetter(*_forwards(kind)), kind) for kind in {*map(type, bypassed)}]
        self._forwards = [read(kind) for read, kind in self._methods]

    def holds(self) -> bool:
        """Tells whether nothing was replaced, added or taken away since: three comparisons, which every call makes."""
        return (
            [*map(len, self._sized)] == self._lengths
            and [*chain.from_iterable(map(dict.values, self._children))] == self._kept
            and (
                torch.compiler.is_compiling()  # dynamo cannot trace an attrgetter
                or [read(kind) for read, kind in self._methods] == self._forwards
            )
        )


def calls_are_replaced(backbone: nn.Module, exits: Sequence[str]) -> bool:
    """Tells whether hooks, or a replaced forward, sit on modules that are not called where stages are run."""
    bypassed = list(_bypassed(_uncompiled(backbone), exits))
    return any(_hooks_of(bypassed)) or _are_hooks_of_others() or any(map(_has_own_forward, bypassed))


def _forwards(kind: type[nn.Module]) -> dict[str, Any]:
    """The methods of a class named ``forward...``, as they were when a network of that class was first wrapped."""
    if kind not in _WRAPPED_FORWARDS:
        _WRAPPED_FORWARDS[kind] = {name: getattr(kind, name) for name in dir(kind) if name.startswith("forward")}
    return _WRAPPED_FORWARDS[kind]


def _class_is_patched(kind: type[nn.Module]) -> bool:
    """Whether a method of a class was replaced since, as patchers of kernels do."""
    return any(getattr(kind, name) is not method for name, method in _forwards(kind).items())


def _uncompiled(backbone: nn.Module) -> nn.Module:
    """Returns what torch.compile has wrapped."""
    return backbone._modules.get("_orig_mod") or backbone


def _bypassed(backbone: nn.Module, exits: Sequence[str]) -> Iterator[nn.Module]:
    """The modules that contain the exits: the stages inside are called, and not they themselves."""
    paths = {"": None}
    for name in exits:
        path, _ = parse_exit(name)
        paths.update(dict.fromkeys(path[:i] for i, letter in enumerate(path) if letter == "."))
    for path in paths:
        try:
            yield backbone.get_submodule(path)
        except AttributeError:  # the exits of another backbone; whoever needs them says so
            return


def _hooks_of(modules: Sequence[nn.Module]) -> list[Mapping[int, Any]]:
    """The hooks of modules, as the modules keep them."""
    return [
        hooks
        for module in modules
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    ]


def _are_hooks_of_others() -> bool:
    """Tells whether there are hooks on every module; those of torch's own counters only watch."""
    return any(
        not str(getattr(hook, "__module__", "")).startswith("torch.")
        for hooks in _GLOBAL_HOOKS
        for hook in hooks.values()
    )


def _remove_hooks(backbone: weakref.ref[nn.Module], owned: Sequence[object]) -> None:
    network = backbone()
    for module in () if network is None else network.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if any(hook is own for own in owned)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _with_lists(module: nn.Module) -> Iterator[nn.Module]:
    """A module and the lists and dicts of modules in it, whose members its own forward calls one by one."""
    yield module
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _with_lists(child)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether the forward of this very module was replaced, or a part of it such as timm's ``forward_features``."""
    replaced = {name: value for name, value in vars(module).items() if name.startswith("forward")}
    # What accelerate's hooks have put back is the method of the class again.
    return any(
        getattr(value, "__func__", None) is not getattr(type(module), name, None) for name, value in replaced.items()
    )
