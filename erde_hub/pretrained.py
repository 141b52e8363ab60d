"""Saving and loading: what every early-exit model does as a transformers model."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import BitImageProcessor, PreTrainedModel

from . import __version__
from ._files import replacing_all
from .config import EarlyExitConfig
from .errors import CheckpointError, ConfigError
from .preprocessing import build_image_processor, check_preprocessing

#: Arguments of ``save_pretrained`` that say how to upload and not what to save.
_HUB_ARGUMENTS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "token",
    "create_pr",
    "revision",
    "tags",
)

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


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

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Saves config, weights (safetensors) and, where the preprocessing is known, ``preprocessor_config.json``.

        A checkpoint that is already in the folder is replaced when the new one is complete, and not before.

        Args:
            save_directory: Folder; made if it is not there.
            is_main_process: Whether this process writes.
            state_dict: Other tensors to save than the model's own.
            push_to_hub: Upload it as well; the arguments of ``push_to_hub`` (``repo_id``, ``private``, ...) may follow.
            **kwargs: See :meth:`transformers.PreTrainedModel.save_pretrained`.

        Raises:
            CheckpointWriteError: The disk is full, or the folder cannot be written.
        """
        self.config.erde_hub_version = __version__
        hub = {key: kwargs.pop(key) for key in _HUB_ARGUMENTS if key in kwargs}
        if state_dict is None and hasattr(self.backbone, "_orig_mod"):
            # torch.compile puts its own module around the backbone, which a checkpoint must not show.
            state_dict = {name.replace("_orig_mod.", ""): t for name, t in self.state_dict().items()}
        if not is_main_process or kwargs.get("distributed_checkpoint"):  # all processes write one folder together
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            return
        with replacing_all(save_directory, last="config.json") as staging:
            super().save_pretrained(staging, is_main_process, state_dict, **kwargs)
            if self.config.preprocessing:
                self.image_processor().save_pretrained(staging)
            written = {path.name for path in staging.iterdir()}
        if kwargs.get("variant") is None:
            _remove_other_weights(Path(save_directory), written)
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)

    def _find_shared_weights(self) -> None:
        """Declares the weights that a backbone shares between its modules: saved once, loaded everywhere."""
        if isinstance(self.backbone, PreTrainedModel):  # these declare their own
            return
        first: dict[int, str] = {}
        shared: dict[str, str] = {}
        for entries in (self.named_parameters, self.named_buffers):
            for name, tensor in entries(remove_duplicate=False):
                owner = first.setdefault(id(tensor), name)
                if owner != name:
                    shared[name] = owner
        self._tied_weights_keys = shared or None

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """As transformers', which looks at shared embeddings only, with all that is shared."""
        tied: dict[str, str] = super().get_expanded_tied_weights_keys(all_submodels=all_submodels)
        return {**tied, **(self._tied_weights_keys or {})} if all_submodels else tied

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Loads a checkpoint, in eval mode; ``threshold=`` and other config fields may be overridden.

        Args:
            pretrained_model_name_or_path: Folder or Hub repository.
            *model_args: As for any transformers model.
            **kwargs: As for any transformers model; also ``backbone=module`` for checkpoints of plain modules.

        Raises:
            CheckpointError: No such folder, or one without a checkpoint; weights that are missing, left over or of
                other shapes than the config says; a plain backbone without ``backbone=``.
        """
        _check_is_there(pretrained_model_name_or_path, kwargs)
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


def _check_is_there(name: Any, kwargs: dict[str, Any]) -> None:
    """Raises :class:`CheckpointError` for a path without a checkpoint, which transformers takes for a repository."""
    if not isinstance(name, (str, os.PathLike)) or kwargs.get("config") is not None or kwargs.get("gguf_file"):
        return
    path = Path(name)
    if path.is_dir():
        if not (path / kwargs.get("subfolder", "") / "config.json").is_file():
            raise CheckpointError(
                f"{str(name)!r} holds no checkpoint: save_pretrained, or a finished run, leaves config.json and"
                " model.safetensors in a folder"
            )
    elif isinstance(name, os.PathLike) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        home = "" if not str(name).startswith("~") else f" (from here, ~ is not expanded: {path.expanduser()})"
        raise CheckpointError(f"there is no folder {str(name)!r}{home}; a repository of the Hub is named 'org/name'")


def _remove_other_weights(folder: Path, written: set[str]) -> None:
    """Deletes one file of weights beside newer shards, or shards beside a newer file: loading would find both."""
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name not in written:
            path.unlink()


def _non_persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    stored = set(module.state_dict())
    return {name: buffer.clone() for name, buffer in module.named_buffers() if name not in stored}
