"""Reads the features of exits: what the heads of a wrapped model are given, and what losses with features compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from erde_hub.engine.features import capture_inputs
from erde_hub.errors import ConfigError
from erde_hub.heads import ExitHead, FeatureSpec


class ExitFeatures:
    """Captures what the head of each early exit read in the last forward pass, for losses that compare features.

    The :class:`~erde_hub.training.Distiller` does this by itself. In your own loop, build one for the student and one
    for the teacher, build the projections of a :class:`~erde_hub.losses.FeatureTerm` from their :attr:`widths`, and
    pass on what :meth:`take` returns. Every exit must run: in train mode, or with ``output_all_exits=True``. The
    student's features carry gradients. Hooks exist only within :meth:`watching`, so the model and its checkpoint stay
    as they are.

    Args:
        model: With early exits of this library, such as an :class:`~erde_hub.EarlyExitWrapper`; not what DDP wraps
            around it.

    Raises:
        ConfigError: It has none.

    Shape:
        :meth:`take` returns per exit what its head reads, channels last: (N, H, W, D) of maps, (N, L, D) of tokens,
        (N, D) of vectors. The last entry, that of the backbone's classifier, is None.

    Example:
        >>> import timm
        >>> import torch
        >>> from erde_hub import EarlyExitWrapper
        >>> backbone = timm.create_model("resnet8_cifar", num_classes=10, width=4)
        >>> student = EarlyExitWrapper(backbone, exits=["layer1", "layer2"], backbone_kwargs={"width": 4})
        >>> features = ExitFeatures(student)
        >>> features.widths
        [4, 8, None]
        >>> with features.watching():
        ...     output = student.train()(torch.randn(2, 3, 32, 32))
        ...     [None if feature is None else tuple(feature.shape) for feature in features.take()]
        [(2, 32, 32, 4), (2, 16, 16, 8), None]
    """

    def __init__(self, model: nn.Module) -> None:
        self.heads = exit_heads(model)
        self._seen: dict[int, Tensor] | None = None

    @property
    def widths(self) -> list[int | None]:
        """Channels per exit; the last exit, the backbone's classifier, has no head of ours and so no feature."""
        return [*(head.spec.width for head in self.heads), None]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps features as long as this lasts."""
        try:
            with capture_inputs(dict(enumerate(self.heads))) as self._seen:
                yield
        finally:
            self._seen = None

    def take(self, channels_last: bool = True) -> list[Tensor | None]:
        """Returns the features of the last forward pass and releases them; None at exits that did not run since.

        Args:
            channels_last: As losses take them; otherwise in the backbone's own layout.

        Raises:
            ConfigError: Called outside of :meth:`watching`.
        """
        if self._seen is None:
            raise ConfigError("features are kept within watching() only: call the model and take() inside of it")
        features = [self._seen.pop(index, None) for index in range(len(self.heads))]
        if channels_last:
            features = [_channels_last(x, head.spec) for x, head in zip(features, self.heads, strict=True)]
        return [*features, None]


def exit_heads(model: nn.Module) -> list[ExitHead]:
    """Returns the heads of a model's early exits.

    Raises:
        ConfigError: It has none of ours.
    """
    heads = getattr(getattr(model, "heads", None), "active", ())
    found = [head for head in heads if isinstance(head, ExitHead)]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no early exits whose features could be read: wrap it by EarlyExitWrapper"
        )
    return found


def _channels_last(feature: Tensor | None, spec: FeatureSpec) -> Tensor | None:
    return feature.movedim(1, -1) if feature is not None and spec.format in ("NCHW", "NCL") else feature
