"""Saving and loading: what every early-exit model does as a transformers model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import BitImageProcessor, PreTrainedModel

from . import __version__
from ._files import set_default_mode
from .config import EarlyExitConfig
from .errors import CheckpointError, CheckpointWriteError, ConfigError
from .preprocessing import build_image_processor, check_preprocessing


class EarlyExitPreTrainedModel(PreTrainedModel):
    """Checkpoints: config, safetensors, preprocessing; loaded tensors are copied out of the mapped file."""

    config_class = EarlyExitConfig
    config: EarlyExitConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _supports_sdpa = True
    model_tags: ClassVar[list[str]] = ["erde_hub", "early-exit"]

    #: The model without its exits.
    backbone: nn.Module

    def set_preprocessing(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: Sequence[int],
        interpolation: str = "bilinear",
        crop_pct: float = 1.0,
    ) -> None:
        """Stores how images become ``pixel_values``; saved in the config and as ``preprocessor_config.json``.

        Args:
            mean: Per channel, of pixels in [0, 1].
            std: Per channel, of pixels in [0, 1].
            size: (H, W) in pixels.
            interpolation: ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``.
            crop_pct: The shorter side is resized to size / crop_pct, then the centre is cropped.

        Raises:
            ConfigError: A value that is not allowed.
        """
        self.config.preprocessing = check_preprocessing(
            {"mean": mean, "std": std, "size": size, "interpolation": interpolation, "crop_pct": crop_pct}
        )

    def image_processor(self) -> BitImageProcessor:
        """Returns the transformers image processor that makes this model's ``pixel_values``.

        Raises:
            ConfigError: The model has no preprocessing; :meth:`set_preprocessing` sets it.
        """
        if not self.config.preprocessing:
            raise ConfigError(
                "this model has no preprocessing: set it with model.set_preprocessing(mean=..., std=..., size=...)"
            )
        return build_image_processor(self.config.preprocessing)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Saves config, weights (safetensors) and, where the preprocessing is known, ``preprocessor_config.json``.

        See :meth:`transformers.PreTrainedModel.save_pretrained` for the arguments.

        Raises:
            CheckpointWriteError: The disk is full, or the folder cannot be written.
        """
        self.config.erde_hub_version = __version__
        if not args and kwargs.get("state_dict") is None and hasattr(self.backbone, "_orig_mod"):
            # torch.compile puts its own module around the backbone, which a checkpoint must not show.
            kwargs["state_dict"] = {name.replace("_orig_mod.", ""): t for name, t in self.state_dict().items()}
        try:
            result = super().save_pretrained(save_directory, *args, **kwargs)
            if self.config.preprocessing and kwargs.get("is_main_process", True):
                self.image_processor().save_pretrained(save_directory)
            for weights in Path(save_directory).glob("*.safetensors"):
                set_default_mode(weights)  # their writer makes files that nobody but their owner can read
        # safetensors reports a full disk as an error of its own; what the Hub answers is an OSError too, and stays one
        except (OSError, SafetensorError) as error:
            if kwargs.get("push_to_hub"):
                raise
            raise CheckpointWriteError(
                f"the model could not be saved to {os.fspath(save_directory)!r}: {error}; make space, or choose another"
                " folder"
            ) from error
        return result

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Loads a checkpoint, in eval mode; ``threshold=`` and other config fields may be overridden.

        Args:
            pretrained_model_name_or_path: Folder or Hub repository.
            *model_args: As for any transformers model.
            **kwargs: As for any transformers model; also ``backbone=module`` for checkpoints of plain modules.

        Raises:
            CheckpointError: Weights that are missing, left over or of other shapes than the config says, or a plain
                backbone without ``backbone=``.
        """
        backbone = kwargs.get("backbone")
        wants_info = kwargs.pop("output_loading_info", False)
        must_be_empty = {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}
        if kwargs.pop("ignore_mismatched_sizes", False):
            must_be_empty.remove("mismatched_keys")
        kept = _non_persistent_buffers(backbone) if isinstance(backbone, nn.Module) else {}
        # Other shapes are let through and found below, since transformers names them in its log alone.
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(
                f"the weights of {pretrained_model_name_or_path} are damaged ({error}): the file was cut short or is no"
                " safetensors file; save it, or download it, again"
            ) from error
        wrong = {k: sorted(map(str, v)) for k, v in info.items() if k in must_be_empty and v}
        if wrong:
            what = "; ".join(f"{k.replace('_', ' ')}: {len(v)}, first {v[0]!r}" for k, v in wrong.items())
            raise CheckpointError(
                f"the weights of {pretrained_model_name_or_path} do not match its config ({what}): the file belongs to"
                " another model, or the config was edited"
            )
        with torch.no_grad():
            present = dict(model.backbone.named_buffers())
            for name, value in kept.items():
                module, _, leaf = name.rpartition(".")
                if name in present:  # a truncated model has lost those behind its exit
                    setattr(model.backbone.get_submodule(module), leaf, value)
            for tensor in (*model.parameters(), *model.buffers()):
                # Loaded tensors are views of the mapped file, at unaligned addresses: outputs would differ in the last
                # bits from those of the model that was saved, and rewriting the file would change this one.
                if tensor.device.type == "cpu":
                    tensor.data = tensor.data.clone(memory_format=torch.preserve_format)
        return (model, info) if wants_info else model


def _non_persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    stored = set(module.state_dict())
    return {name: buffer.clone() for name, buffer in module.named_buffers() if name not in stored}
