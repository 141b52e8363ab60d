"""Saving and loading: what every early-exit model does as a transformers model."""

from __future__ import annotations

import contextvars
import inspect
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BitImageProcessor, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from erde_hub._files import disk_errors, replacing_all
from erde_hub._published_weights import FILENAME, check_backbone_weights, fetch, published_weights
from erde_hub._version import __version__
from erde_hub.backbones import BackboneAdapter, get_adapter
from erde_hub.backbones.shared_weights import (
    all_tensors,
    load_into,
    save_once,
    share_again,
    shared_modules,
    shared_weights,
)
from erde_hub.config import EarlyExitConfig, check_input_size, read_field
from erde_hub.engine.inputs import TEXT_INPUTS, ModelInputs, check_pixel_values, check_text_inputs
from erde_hub.engine.runner import ExitRunner
from erde_hub.errors import CheckpointError, ConfigError, ErdeError, InputTypeError, RebuildError, nearest
from erde_hub.heads import ExitHead
from erde_hub.preprocessing import build_image_processor, check_preprocessing
from erde_hub.tasks import (
    REGRESSION,
    check_class_labels,
    check_targets,
    check_token_labels,
    mean_squared_error,
    token_cross_entropy,
)

from .exit_table import ExitTable, count_exits
from .heads_only import own_tensors, read_backbone

logger = logging.getLogger(__name__)

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


_NO_TEXTS: dict[str, Any] = dict.fromkeys(TEXT_INPUTS)


class EarlyExitPreTrainedModel(PreTrainedModel):
    """Checkpoints: config, safetensors, preprocessing; loaded tensors are copied out of the mapped file."""

    config_class = EarlyExitConfig
    config: EarlyExitConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _told_of_no_preprocessing = False
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _supports_sdpa = True
    model_tags: ClassVar[list[str]] = ["erde_hub", "early-exit"]

    #: The model without its exits.
    backbone: nn.Module
    _adapter: BackboneAdapter
    _runner: ExitRunner
    #: Names of one tensor, and of one module, in the backbone.
    _shared_weights: Sequence[Sequence[str]] = ()
    _shared_modules: Sequence[Sequence[str]] = ()
    #: Tensors of a backbone that was given, while a checkpoint is loaded into it.
    _given: dict[str, Tensor]
    #: Exit tables by input size.
    _costs: dict[tuple[int, ...], ExitTable]

    def _check_config_builds_it(self) -> None:
        """Raises what loading would raise, while the model that is to be saved still lives."""

    def exits_and_heads(self) -> list[tuple[str, ExitHead | None]]:
        """Returns name and head of every exit, shallow to deep; the backbone's own classifier has no head."""
        raise NotImplementedError

    @property
    def runner(self) -> ExitRunner:
        """What runs the backbone with its exits."""
        runner, backbone = self._runner, self._modules["backbone"]
        if runner.backbone is not backbone:  # replaced, by what torch.compile makes of it for example
            runner.backbone = backbone
        return runner

    def exit_table(self, input_size: Sequence[int] | None = None) -> ExitTable:
        """Returns what each exit costs, in MACs per sample and parameters, heads included.

        Args:
            input_size: Shape of one input without the batch; None takes the config's. Results are kept per size.

        Raises:
            ExitPointError: The backbone does not run on inputs of that size.
        """
        size = input_size or self.config.input_size
        if not size:
            raise ConfigError("the config has no input_size: pass input_size=(C, H, W)")
        size = check_input_size(size)
        if size not in self._costs:
            self._costs[size] = count_exits(self.runner, self.exits_and_heads(), size, self.config.head)
        return self._costs[size]

    def set_preprocessing(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: Sequence[int],
        interpolation: str = "bilinear",
        crop_pct: float = 1.0,
        crop_mode: str = "center",
    ) -> None:
        """Stores how images become ``pixel_values``; saved in the config and as ``preprocessor_config.json``.

        Args:
            mean: Per channel, of pixels in [0, 1].
            std: Per channel, of pixels in [0, 1].
            size: (H, W) in pixels.
            interpolation: ``nearest``, ``bilinear``, ``bicubic`` or ``lanczos``.
            crop_pct: The shorter side is resized to size / crop_pct, then the centre is cropped.
            crop_mode: ``squash`` resizes both sides to size / crop_pct instead, without keeping their ratio.

        Raises:
            ConfigError: A value that is not allowed.
        """
        self.config.preprocessing = check_preprocessing(
            {
                "mean": mean,
                "std": std,
                "size": size,
                "interpolation": interpolation,
                "crop_pct": crop_pct,
                "crop_mode": crop_mode,
            }
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
        *,
        heads_only: bool = False,
        backbone_weights: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Saves config, weights (safetensors) and, where the preprocessing is known, ``preprocessor_config.json``.

        A checkpoint that is already in the folder is replaced when the new one is complete, and not before. A
        transformers image model whose preprocessing is not known is saved without, which is logged as a warning.

        Args:
            save_directory: Folder; made if it is not there.
            is_main_process: Whether this process writes.
            state_dict: Other tensors to save than the model's own.
            heads_only: Leave out the backbone, whose weights are published and unchanged: loading fetches them and
                checks their hash. A classifier of its own is saved with the heads.
            backbone_weights: Where they are published; taken from the backbone where it says it. See
                :func:`~erde_hub._published_weights.check_backbone_weights`.
            push_to_hub: Upload it as well; the arguments of ``push_to_hub`` (``repo_id``, ``private``, ...) may follow.
            **kwargs: See :meth:`transformers.PreTrainedModel.save_pretrained`.

        Raises:
            CheckpointWriteError: The disk is full, or the folder cannot be written.
            CheckpointError: ``heads_only``, and the backbone's weights are not the published ones, or not to be had.
            RebuildError: The model was changed after wrapping, so that its config would build another one.
            ConfigError: A field of its config was changed to what is not allowed.
        """
        if state_dict is None:
            self._check_config_builds_it()
        self.config.erde_hub_version = __version__
        if (pushed := _pushed.get()) is not None:  # transformers saves what it pushes without saying how
            heads_only, backbone_weights = pushed["heads_only"], pushed["backbone_weights"]
        if backbone_weights is not None and not heads_only:
            raise ConfigError("backbone_weights says where a left-out backbone is published: pass heads_only=True")
        self.config.backbone_weights = None
        rounded = {buffer.dtype for buffer in _rotary_frequencies(self.backbone)} - {torch.float32}
        self.config.rotary_dtype = str(rounded.pop()).removeprefix("torch.") if rounded else None
        if heads_only:
            state_dict = self._heads_only_state(backbone_weights, kwargs.get("token"))
        hub = {key: kwargs.pop(key) for key in _HUB_ARGUMENTS if key in kwargs}
        if not is_main_process or kwargs.get("distributed_checkpoint"):  # all processes write one folder together
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            return
        if state_dict is None:
            # torch.compile puts its own module around the backbone, which a checkpoint must not show.
            state_dict = {name.replace("_orig_mod.", ""): t for name, t in self.state_dict().items()}
        state_dict = self._saved_once(state_dict)
        empty = not state_dict
        with replacing_all(save_directory, last="config.json") as staging, disk_errors(Path(save_directory)):
            super().save_pretrained(staging, is_main_process, state_dict, **kwargs)
            if empty:  # heads that share all they use with a published backbone
                save_file({}, staging / FILENAME, metadata={"format": "pt"})
            if self.config.preprocessing:
                self.image_processor().save_pretrained(staging)
            else:
                self._warn_of_no_preprocessing()
            written = {path.name for path in staging.iterdir()}
        if kwargs.get("variant") is None:
            _remove_other_weights(Path(save_directory), written)
        if push_to_hub:
            repo_id = hub.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, heads_only=heads_only, backbone_weights=backbone_weights, **hub)

    def push_to_hub(
        self, *args: Any, heads_only: bool = False, backbone_weights: dict[str, str] | None = None, **kwargs: Any
    ) -> Any:
        """As for any transformers model; ``heads_only`` and ``backbone_weights`` as for :meth:`save_pretrained`."""
        token = _pushed.set({"heads_only": heads_only, "backbone_weights": backbone_weights})
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            _pushed.reset(token)

    def _warn_of_no_preprocessing(self) -> None:
        """Once per model: other transformers image models bring theirs, so that nobody looks for it in this one."""
        known = self.config.library == "transformers" and self.main_input_name == "pixel_values"
        if known and not self._told_of_no_preprocessing:
            self._told_of_no_preprocessing = True
            logger.warning(
                "the preprocessing of %s is not known, so the checkpoint holds none and pipelines will find no image"
                " processor: set it with model.set_preprocessing(mean=..., std=..., size=...) before saving",
                self.config.architecture,
            )

    def _heads_only_state(self, given: dict[str, str] | None, token: Any) -> dict[str, Tensor]:
        """Sets ``config.backbone_weights`` and returns the tensors to save."""
        weights = published_weights(self.backbone) if given is None else check_backbone_weights(given)
        path, digest = fetch(weights, {} if token is None else {"token": token})
        known = isinstance(self.backbone, PreTrainedModel)
        published = read_backbone(type(self.backbone) if known else None, getattr(self.backbone, "config", None), path)
        own = own_tensors(self.state_dict(), published, tuple(self._adapter.classifier_names(self.backbone)))
        self.config.backbone_weights = {**weights, "sha256": digest}
        return own

    def _check_is_as_large_as_its_file(self) -> None:
        """While a checkpoint is loaded: a config that describes far more than the file holds would fill the memory.

        Raises:
            CheckpointError: The network has more than eight times the parameters that the file can hold.
        """
        held = _bytes_of_weights.get()
        described = sum(p.numel() for p in self.parameters())
        if held is not None and described > 8 * held + 1_000_000:
            raise CheckpointError(
                f"the config describes a network of {described:,} parameters, but the weights are {held:,} bytes: it"
                " was edited, or belongs to other weights"
            )

    def _find_shared_weights(self, given: bool) -> None:
        """Notes what the backbone shares between its modules, and its tensors where it was given to be loaded."""
        self._shared_weights = [[f"backbone.{name}" for name in group] for group in shared_weights(self.backbone)]
        self._shared_modules = shared_modules(self.backbone)
        if given and torch.get_default_device().type == "meta":
            self._given = all_tensors(self.backbone)

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """As transformers', which ties what its own models declare; also what else a loaded backbone shares."""
        super().tie_weights(missing_keys=missing_keys, recompute_mapping=recompute_mapping)
        if missing_keys is not None:
            share_again(self, self._shared_weights, missing_keys)

    def _saved_once(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves out what loading shares again, and copies what it cannot know to be shared.

        Raises:
            RebuildError: A module that sat in several places when it was wrapped was replaced in one of them.
        """
        modules = dict(self.backbone.named_modules(remove_duplicate=False))
        modules = {name.replace("_orig_mod.", ""): module for name, module in modules.items()}
        for names in self._shared_modules:
            if len({id(modules[name]) for name in names if name in modules}) > 1:
                raise RebuildError(
                    f"{names[0]!r} and {names[1]!r} of this {type(self.backbone).__name__} were one module when it was"
                    " wrapped, and loading makes them one again: change the network first, then wrap it"
                )
        state, repeated = save_once(state, self._shared_weights, self.all_tied_weights_keys)
        if repeated and self.config.library != "torch":
            logger.warning(
                "%s shares its tensor with another weight, which the config does not say: each is saved by itself, and"
                " they are trained apart once they are loaded",
                ", ".join(sorted(repeated)),
            )
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As for any module; tensors may have the older names of a transformers backbone, as in checkpoints.

        transformers saves under the names that its first release gave to weights. Its Trainer, when it resumes, hands
        over what it reads and takes no notice of what found no place.

        Raises:
            CheckpointError: A tensor in the file is made of several of the backbone's.
        """
        own = self.state_dict(keep_vars=True)
        if not state_dict.keys() <= own.keys() and isinstance(self.backbone, PreTrainedModel):
            names = {id(tensor): name for name, tensor in own.items()}
            written = revert_weight_conversion(self, dict(own))
            for name in state_dict.keys() - own.keys() & written.keys():
                if id(written[name]) not in names:
                    raise CheckpointError(
                        f"{name!r} of the checkpoint is made of several weights of {type(self.backbone).__name__}: load"
                        " the checkpoint with from_pretrained(), and train that model on"
                    )
            state_dict = {
                name if name in own or name not in written else names[id(written[name])]: tensor
                for name, tensor in state_dict.items()
            }
        return super().load_state_dict(state_dict, strict, assign)

    # What every forward pass begins and ends with

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Sets what a checkpoint did not hold while it is loaded: buffers, weights of changed shapes if allowed."""
        super()._init_weights(module)
        self._adapter.init_non_persistent_buffers(module)

    def _keep_weights(self, on_meta: bool, adopted: bool) -> None:
        """Marks what constructors, or the user, have set: every weight that is not on meta.

        ``post_init()`` would set again whatever it does not know to be set, trained weights and batch-norm statistics
        included.
        """
        for module in [*(() if on_meta else self.modules()), *(self.backbone.modules() if adopted else ())]:
            module._is_hf_initialized = True

    def _inputs(self, pixel_values: Any, texts: dict[str, Any], more: dict[str, Any]) -> ModelInputs:
        """Checks what a call was given; ``texts`` holds the usual names, None where absent, ``more`` all others."""
        if self.main_input_name == "input_ids":
            name = type(self.backbone).__name__
            if pixel_values is not None:
                raise InputTypeError(f"{name} reads texts: call model(input_ids=..., attention_mask=...)")
            accepted = inspect.signature(type(self.backbone).forward).parameters
            if "use_cache" in accepted:
                if more.get("use_cache"):
                    raise InputTypeError(f"use_cache=True: {name} with exits keeps no keys and values between calls")
                more = {**more, "use_cache": False}
            return check_text_inputs({**texts, **more}, accepted, name)
        inputs = check_pixel_values(pixel_values, read_field(self.config, "input_size") or ())
        if texts == _NO_TEXTS and not more:
            return ModelInputs((inputs,), {}, inputs)
        kwargs = {key: value for key, value in texts.items() if value is not None} | more
        if kwargs and self.config.exits and self.runner.stages() is not None:
            name = type(self.backbone).__name__
            key = sorted(kwargs)[0]
            others = {"self", "kwargs", *texts, *TEXT_INPUTS}
            takes = [name for name in inspect.signature(type(self).forward).parameters if name not in others]
            raise InputTypeError(
                f"{name} with exits takes no argument {key!r}{nearest(key, takes)} (it takes: {', '.join(takes)})"
            )
        return ModelInputs((inputs,), kwargs, inputs)

    def _labels(self, labels: Any, inputs: ModelInputs) -> Tensor:
        """Checks labels; on an accelerator their range would wait for the device, there the loss kernel asserts."""
        values = isinstance(labels, Tensor) and labels.device.type == "cpu"
        if self.config.task == "causal_lm":
            return check_token_labels(labels, inputs.main.shape[:2], self.config.num_outputs, values=values)
        if self.config.problem_type == REGRESSION:
            return check_targets(labels, len(inputs.main), self.config.num_labels, values=values)
        return check_class_labels(labels, len(inputs.main), self.config.num_labels, values=values)

    def _loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of one exit, over tokens for language models; of a regression the mean squared error."""
        if self.config.problem_type == REGRESSION:
            return mean_squared_error(logits, labels)
        return (token_cross_entropy if self.config.task == "causal_lm" else F.cross_entropy)(logits, labels)

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
        wants_info = kwargs.pop("output_loading_info", False)
        must_be_empty = {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}
        if kwargs.pop("ignore_mismatched_sizes", False):
            must_be_empty.remove("mismatched_keys")
        # Other shapes are let through and found below, since transformers names them in its log alone.
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
        try:
            source, model_args, kwargs = _with_published(cls, pretrained_model_name_or_path, model_args, kwargs)
            token = _bytes_of_weights.set(_weights_size(source, kwargs))
            try:
                model, info = super().from_pretrained(source, *model_args, **kwargs)
            finally:
                _bytes_of_weights.reset(token)
        except (ErdeError, torch.OutOfMemoryError):
            raise
        except (TypeError, AttributeError, LookupError, ArithmeticError, StrictDataclassError) as error:
            raise CheckpointError(
                f"{pretrained_model_name_or_path} could not be loaded: config or files are damaged, or an argument"
                f" of from_pretrained is none ({type(error).__name__}: {error})"
            ) from error
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
            given = vars(model).pop("_given", {})
            own = {id(tensor) for tensor in load_into(model.backbone, given)}
            types = {p.dtype for p in model.backbone.parameters() if p.is_floating_point()}
            if given and types and model.config.dtype not in (None, *types):  # transformers leaves it as it was given
                model.backbone.to(model.config.dtype)
            if model.config.rotary_dtype == str(model.dtype).removeprefix("torch."):
                for buffer in _rotary_frequencies(model.backbone):
                    buffer.data = buffer.data.to(model.dtype)
            for tensor in (*model.parameters(), *model.buffers()):
                # Loaded tensors are views of the mapped file, at unaligned addresses: outputs would differ in the last
                # bits from those of the model that was saved, and rewriting the file would change this one.
                if tensor.device.type == "cpu" and id(tensor) not in own:
                    tensor.data = tensor.data.clone(memory_format=torch.preserve_format)
        return (model, info) if wants_info else model


#: How what is being pushed is saved; None while nothing is.
_pushed: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("erde_hub_pushed", default=None)

#: Size of the weights that are being loaded; None where they are not known, and while nothing is.
_bytes_of_weights: contextvars.ContextVar[int | None] = contextvars.ContextVar("erde_hub_bytes", default=None)


def _rotary_frequencies(backbone: nn.Module) -> list[Tensor]:
    """Buffers that transformers computes in float32 whatever the type of the weights is."""
    if not isinstance(backbone, PreTrainedModel):
        return []
    return [buffer for name, buffer in backbone.named_buffers() if name.endswith("inv_freq")]


def _weights_size(source: Any, kwargs: dict[str, Any]) -> int | None:
    if kwargs.get("state_dict") is not None:
        return sum(tensor.nbytes for tensor in kwargs["state_dict"].values())
    if isinstance(source, (str, os.PathLike)) and Path(source).is_dir():
        folder = Path(source) / kwargs.get("subfolder", "")
        return sum(path.stat().st_size for path in folder.glob("*.safetensors")) or None
    if source is None:
        return None
    reaching: dict[str, Any] = {key: kwargs[key] for key in _REACHING if key in kwargs}
    found = cached_file(source, FILENAME, _raise_exceptions_for_missing_entries=False, **reaching)
    if found is not None:
        return Path(found).stat().st_size
    index = cached_file(source, f"{FILENAME}.index.json", _raise_exceptions_for_missing_entries=False, **reaching)
    if index is None:
        return None
    shards = get_checkpoint_shard_files(source, index, **reaching)[0]
    return sum(Path(shard).stat().st_size for shard in shards)


#: Arguments of ``from_pretrained`` that say how to reach the Hub.
_REACHING = ("token", "cache_dir", "local_files_only", "force_download", "subfolder", "revision")


def _with_published(
    cls: type[EarlyExitPreTrainedModel], source: Any, model_args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """For checkpoints of heads alone: puts the published weights beside them, once their hash is checked."""
    if model_args or kwargs.get("state_dict") is not None or source is None:
        return source, model_args, kwargs
    reaching: dict[str, Any] = {key: kwargs[key] for key in _REACHING if key in kwargs}
    config = kwargs.get("config")
    if config is None:
        found = cached_file(source, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **reaching)
        try:
            stored = json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
        except ValueError as error:  # not JSON, or not text
            raise CheckpointError(
                f"{CONFIG_NAME} of {str(source)!r} is damaged: {error}; save the checkpoint again, or fetch it again"
            ) from error
        if not isinstance(stored, dict) or stored.get("backbone_weights") is None:
            return source, model_args, kwargs
        fields = {key: kwargs.pop(key) for key in list(kwargs) if key in EarlyExitConfig.__annotations__}
        config = cls.config_class.from_pretrained(source, **reaching, **fields)
    if not isinstance(config, EarlyExitConfig) or config.backbone_weights is None:
        return source, model_args, kwargs
    weights = check_backbone_weights(config.backbone_weights)
    if "sha256" not in weights:
        raise ConfigError("backbone_weights of a stored config must hold the sha256 of the file")
    heads = cached_file(source, FILENAME, **reaching)
    path, _ = fetch(weights, {key: value for key, value in reaching.items() if key not in ("subfolder", "revision")})
    backbone = get_adapter(config.library).build(config) if config.library == "transformers" else None
    read = read_backbone(None if backbone is None else type(backbone), getattr(backbone, "config", None), path)
    state = {f"backbone.{name}": tensor for name, tensor in read.items()} | load_file(heads)
    left = {key: value for key, value in kwargs.items() if key not in _REACHING}
    return None, (), {**left, "config": config, "state_dict": state}


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
