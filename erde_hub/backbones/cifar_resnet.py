"""Residual networks for 32x32 images, registered with timm: a 3x3 stem of stride 1, no max-pool, any width.

timm's own ``resnet18`` halves a 32x32 image twice before the first block. The networks here keep the full resolution
through the first stage, as the literature on CIFAR does, and are otherwise timm's :class:`timm.models.resnet.ResNet`:
same blocks, same names in the state dict, same methods. Once this module is imported,
``timm.create_model("resnet10_cifar", num_classes=10, width=16)`` works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, model_entrypoint, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from erde_hub.errors import ConfigError

__all__ = ["CifarResNet", "resnet8_cifar", "resnet10_cifar", "resnet18_cifar", "resnet50_cifar"]

# What `width` decides; timm's ResNet takes them, so they have to be refused by name.
_SET_BY_WIDTH = ("channels", "stem_type", "stem_width", "replace_stem_pool")


class CifarResNet(ResNet):
    """timm's ResNet with a 3x3 stem of stride 1, without max-pool, with three or four stages.

    Stage i (from 0) has ``width * 2**i`` planes and, from the second stage on, stride 2.

    Args:
        block: ``BasicBlock`` or ``Bottleneck`` of ``timm.models.resnet``.
        layers: Blocks per stage, three or four numbers.
        width: Channels of the stem and planes of the first stage; even and positive.
        **kwargs: Arguments of timm's ResNet (``num_classes``, ``in_chans``, ``drop_rate``, ``drop_path_rate``,
            ``zero_init_last``, ``act_layer``, ...). ``output_stride`` counts as if the stem reduced by 4, as in timm.

    Shape:
        Input (N, in_chans, H, W), output (N, num_classes); 32x32 gives 4x4 after four stages, 8x8 after three.

    Raises:
        ConfigError: ``width`` is not an even positive integer, or an argument is given that ``width`` decides.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        width: int = 64,
        **kwargs: Any,
    ) -> None:
        if isinstance(width, bool) or not isinstance(width, int) or width < 2 or width % 2:
            raise ConfigError(
                f"width={width!r} is not allowed: give an even integer of 2 or more, the number of channels of the stem"
                " and of the first stage (64 is full width)"
            )
        for name in _SET_BY_WIDTH:
            if name in kwargs:
                raise ConfigError(f"{name}={kwargs[name]!r} cannot be set: it follows from width={width}")
        if len(layers) not in (3, 4):
            raise ConfigError(f"layers={tuple(layers)!r} is not allowed: give the blocks of three or of four stages")

        # Only timm's deep stem lets the first stage see another number of channels than 64: it hands on 2 * stem_width.
        super().__init__(
            block,
            tuple(layers),
            stem_type="deep",
            stem_width=width // 2,
            channels=tuple(width * 2**stage for stage in range(len(layers))),
            **kwargs,
        )
        like = next(self.parameters())
        self.in_chans = kwargs.get("in_chans", 3)  # older releases of timm do not keep it
        self.conv1 = nn.Conv2d(
            self.in_chans, width, kernel_size=3, padding=1, bias=False, device=like.device, dtype=like.dtype
        )
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for info in self.feature_info:  # timm counts a stem that reduces by 2 and a pool that does so again
            info["reduction"] = max(1, info["reduction"] // 4)
        if len(layers) == 3:
            self.layer4 = nn.Sequential()  # as timm leaves a stage that it prunes: its forward names four of them

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, **kwargs: Any
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As timm's, with indices that count this network's stages (0 is the stem)."""
        return super().forward_intermediates(x, self._timm_indices(indices), **kwargs)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, **kwargs: Any) -> list[int]:
        """As timm's, with indices that count this network's stages (0 is the stem)."""
        super().prune_intermediate_layers(self._timm_indices(indices), **kwargs)
        return feature_take_indices(len(self.feature_info), indices)[0]

    def _timm_indices(self, indices: int | list[int] | None) -> list[int]:
        # timm counts the stem and four stages; the last of three stages is what its (empty) fourth hands on.
        last = len(self.feature_info) - 1
        taken, _ = feature_take_indices(last + 1, indices)
        return [4 if index == last else index for index in taken]


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (4, 4),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        # the usual figures of CIFAR-10; what a network was trained with travels in its checkpoint
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "resnet8_cifar": _cfg(pool_size=(8, 8)),
        "resnet10_cifar": _cfg(),
        "resnet18_cifar": _cfg(),
        "resnet50_cifar": _cfg(),
    }
)


def _register(fn: Callable[..., CifarResNet]) -> Callable[..., CifarResNet]:
    # timm warns when a name is registered twice. That is right for a name that somebody else took, and noise when this
    # very module is imported again.
    name = fn.__name__
    if is_model(name) and model_entrypoint(name).__module__ == fn.__module__:
        return fn
    return register_model(fn)


def _create(variant: str, pretrained: bool, layers: tuple[int, ...], **kwargs: Any) -> CifarResNet:
    kwargs.setdefault("feature_cfg", {"out_indices": tuple(range(len(layers) + 1))})  # read with features_only=True
    return build_model_with_cfg(CifarResNet, variant, pretrained, layers=layers, **kwargs)


@_register
def resnet8_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8: three stages of one basic block each; 194.71 MMACs and 1.23 M parameters at width 64."""
    return _create("resnet8_cifar", pretrained, block=BasicBlock, layers=(1, 1, 1), **kwargs)


@_register
def resnet10_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-10: four stages of one basic block each; 253.43 MMACs and 4.90 M parameters at width 64."""
    return _create("resnet10_cifar", pretrained, block=BasicBlock, layers=(1, 1, 1, 1), **kwargs)


@_register
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18: four stages of two basic blocks each; 555.42 MMACs and 11.17 M parameters at width 64."""
    return _create("resnet18_cifar", pretrained, block=BasicBlock, layers=(2, 2, 2, 2), **kwargs)


@_register
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-50: bottlenecks (3, 4, 6, 3); 1297.83 MMACs and 23.52 M parameters at width 64."""
    return _create("resnet50_cifar", pretrained, block=Bottleneck, layers=(3, 4, 6, 3), **kwargs)
