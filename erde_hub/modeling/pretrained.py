"""Saving and loading: what every early-exit model does as a transformers model."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BitImageProcessor, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME
from transformers.utils.hub import resolve_revision

from erde_hub._files import disk_errors, replacing_all
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
from erde_hub.fingerprint import hash_tensors
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

from ._quiet import without_bar
from .checkpoint import (
    REACHING,
    add_save_id,
    check_size,
    read_checkpoint,
    read_weights,
    remove_other_weights,
    write_weights,
)
from .exit_table import ExitTable, count_exits
from .heads_only import published_tensors, without_published

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

#: Arguments that say which state of a repository is meant.
_RESOLVING = ("token", "cache_dir", "local_files_only", "revision")
#: Types of stored tensors that tell the type of a model.
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

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

    def __init__(self, config: EarlyExitConfig) -> None:
        attention = getattr(config, "_attn_implementation", None)  # as from_pretrained(attn_implementation=...) sets it
        if attention is not None and config.exits is not None:
            config.backbone_kwargs = get_adapter(config.library).with_attention(config, attention)
        super().__init__(config)

    def _check_and_adjust_attn_implementation(self, *_: Any, **__: Any) -> str | None:
        """What the backbone is built with, None for what it chooses itself: this model has no attention of its own."""
        return (self.config.backbone_kwargs or {}).get("attn_implementation")

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
        """Returns what each exit costs, in MACs per sample and parameters, heads and a stored calibrator included.

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
        table = self._costs[size]
        calibrator = getattr(self, "calibrator", None)  # a truncated model has none
        return table if calibrator is None else table.with_costs(map(calibrator.macs, range(len(table))))

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
        distributed_checkpoint: bool = False,
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
            distributed_checkpoint: Is refused.
            push_to_hub: Upload it as well; the arguments of ``push_to_hub`` (``repo_id``, ``private``, ...) may follow.
            **kwargs: See :meth:`transformers.PreTrainedModel.save_pretrained`.

        Raises:
            CheckpointWriteError: The disk is full, or the folder cannot be written.
            CheckpointError: ``heads_only``, and the backbone's weights are not the published ones, or not to be had.
            RebuildError: The model was changed after wrapping, so that its config would build another one.
            ConfigError: A field of its config was changed to what is not allowed.
        """
        if distributed_checkpoint:
            raise ConfigError("distributed_checkpoint is not supported: the main process writes the weights whole")
        if backbone_weights is not None and not heads_only:
            raise ConfigError("backbone_weights says where a left-out backbone is published: pass heads_only=True")
        if state_dict is None:
            self._check_not_quantized()
            self._check_config_builds_it()
        config = self.config
        config.erde_hub_version = __version__
        config.backbone_weights = config.save_id = None
        rounded = {buffer.dtype for buffer in _rotary_frequencies(self.backbone)} - {torch.float32}
        config.rotary_dtype = str(rounded.pop()).removeprefix("torch.") if rounded else None
        if heads_only:
            classifier = tuple(self._adapter.classifier_names(self.backbone))
            config.backbone_weights, state_dict = without_published(
                self.state_dict(), self.backbone, classifier, backbone_weights, kwargs.get("token")
            )
        if not is_main_process:
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            return
        hub = {key: kwargs.pop(key) for key in _HUB_ARGUMENTS if key in kwargs}
        if state_dict is None:
            # torch.compile puts its own module around the backbone, which a checkpoint must not show.
            state_dict = {name.replace("_orig_mod.", ""): t for name, t in self.state_dict().items()}
        state_dict = self._saved_once(state_dict)
        replacing = replacing_all(save_directory, last=CONFIG_NAME, apart=IMAGE_PROCESSOR_NAME)
        with replacing as staging, disk_errors(Path(save_directory)):
            self._write(staging, state_dict, **kwargs)
            if self.can_generate():
                self.generation_config.save_pretrained(staging)
            if config.preprocessing:
                self.image_processor().save_pretrained(staging)
            else:
                self._warn_of_no_preprocessing()
            written = {path.name for path in staging.iterdir()}
        if kwargs.get("variant") is None:
            remove_other_weights(Path(save_directory), written)
        if push_to_hub:
            repo_id = hub.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, heads_only=heads_only, backbone_weights=backbone_weights, **hub)

    def _check_not_quantized(self) -> None:
        """Raises :class:`RebuildError` for what safetensors cannot hold, as layers that torch has quantised."""
        check_layouts(self.backbone)
        for name, value in self.state_dict().items():
            if not isinstance(value, Tensor) or value.is_quantized:
                raise RebuildError(
                    f"{name!r} is not a tensor of numbers: {type(self.backbone).__name__} was quantised. Save the model"
                    " before it is quantised; erde_hub.export.export_onnx(..., calibration_data=...) writes int8 files"
                )
            if value.dtype.is_complex and value.dtype != torch.complex64:
                raise RebuildError(f"{name!r} is of type {value.dtype}, which no file holds: make it torch.complex64")

    def _write(
        self,
        folder: Path,
        tensors: dict[str, Tensor],
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        save_original_format: bool = True,
        **kwargs: Any,
    ) -> None:
        """Writes config and weights; tensors that are offloaded or sharded, and PEFT's, as transformers does.

        All other arguments, such as Accelerate's ``save_function``, change nothing there either.
        """
        plain = all(type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta for tensor in tensors.values())
        if not plain or self._hf_peft_config_loaded or getattr(self, "hf_quantizer", None) is not None:
            kwargs |= {"max_shard_size": max_shard_size, "variant": variant}
            super().save_pretrained(folder, True, tensors, save_original_format=save_original_format, **kwargs)
            if not self._hf_peft_config_loaded:
                add_save_id(folder, self.config, variant)
            return
        if save_original_format:
            tensors = revert_weight_conversion(self, tensors)
        self.config.save_id = ".".join(filter(None, (hash_tensors(tensors), variant)))
        self.config.dtype = str(self.dtype).removeprefix("torch.")
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        write_weights(folder, tensors, self.config, max_shard_size, variant)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        heads_only: bool = False,
        backbone_weights: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As for any transformers model; ``heads_only`` and ``backbone_weights`` as for :meth:`save_pretrained`."""
        # What transformers pushes it saves without arguments of ours.
        pushed = copy.copy(self)
        pushed.__dict__["save_pretrained"] = partial(
            self.save_pretrained, heads_only=heads_only, backbone_weights=backbone_weights
        )
        return super(EarlyExitPreTrainedModel, pushed).push_to_hub(repo_id, **kwargs)

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

    def _move_missing_keys_from_meta_to_device(self, missing_keys: set[str], *args: Any) -> None:
        """Makes room for what a checkpoint does not hold, unless it is far more than what it holds.

        Raises:
            CheckpointError: The config describes such a network.
        """
        missing = [self.get_parameter_or_buffer(key) for key in missing_keys - self.all_tied_weights_keys.keys()]
        room = sum(t.nbytes for t in (*missing, *(buffer for _, buffer in self.named_non_persistent_buffers())))
        check_size(room, sum(t.nbytes for t in (*self.parameters(), *self.buffers())) - room)
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args)

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
            RebuildError: A module, or a weight of a plain network, that sat in several places when it was wrapped was
                replaced in one of them.
        """
        modules = dict(self.backbone.named_modules(remove_duplicate=False))
        modules = {name.replace("_orig_mod.", ""): module for name, module in modules.items()}
        for names in self._shared_modules:
            if len({id(modules[name]) for name in names if name in modules}) > 1:
                raise RebuildError(
                    f"{names[0]!r} and {names[1]!r} of this {type(self.backbone).__name__} were one module when it was"
                    " wrapped, and loading makes them one again: change the network first, then wrap it"
                )
        weights = {name.replace("_orig_mod.", ""): p for name, p in self.named_parameters(remove_duplicate=False)}
        for names in self._shared_weights if self.config.library == "torch" else ():
            there = [name for name in names if name in weights and not weights[name].is_meta]
            own = {id(weights[name]): name for name in reversed(there)}
            if len(own) > 1:  # loading into the class that was wrapped would end with an error
                one, other = [name.removeprefix("backbone.") for name in sorted(own.values())][:2]
                raise RebuildError(
                    f"{one!r} and {other!r} of this {type(self.backbone).__name__} were one weight when it was wrapped,"
                    " and loading makes them one again: change the network first, then wrap it"
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
        for key in ("output_hidden_states", "output_attentions"):
            if more.pop(key, None):
                raise InputTypeError(f"{key}=True: a model with exits answers with logits; ask model.backbone for them")
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
                other shapes than the config says, or no floats where the model has floats; a plain backbone without
                ``backbone=``.
            ConfigError: ``dtype`` is no floating-point type.
        """
        source = pretrained_model_name_or_path
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        _check_dtype(dtype)
        as_stored = dtype in (None, "auto")
        wants_info = kwargs.pop("output_loading_info", False)
        may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            if source is not None and kwargs.get("state_dict") is None:
                kwargs = cls._read(source, kwargs)
            # Other shapes are let through and found below, since transformers names them in its log alone.
            with without_bar():
                model, info = super().from_pretrained(
                    None, *model_args, **kwargs, output_loading_info=True, ignore_mismatched_sizes=True
                )
        except (ErdeError, torch.OutOfMemoryError):
            raise
        except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError, StrictDataclassError) as error:
            raise CheckpointError(
                f"{source} could not be loaded: config or files are damaged, or from_pretrained"
                f" has no such argument ({type(error).__name__}: {error})"
            ) from error
        _check_all_fits(source, info, may_differ)
        _check_floats(source, kwargs.get("state_dict") or {}, model)
        model.config.name_or_path = model.name_or_path = "" if source is None else str(source)
        model._own_what_was_loaded(kwargs.get("state_dict") or {} if as_stored else {})
        size, own = (model.config.preprocessing or {}).get("size"), model.config.input_size or ()
        if size is not None and len(own) == 3 and list(size) != list(own[1:]):
            logger.warning(
                "the preprocessing of %s makes images of %s pixels, costs are counted for input_size=%s: one was"
                " edited, or set for other images",
                source,
                list(size),
                list(own),
            )
        return (model, info) if wants_info else model

    @classmethod
    def _read(cls, source: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Reads config and weights, and puts them in the place of the arguments that say where they are."""
        _check_is_there(source, kwargs)
        reaching = {key: kwargs.pop(key) for key in REACHING if key in kwargs}
        variant = kwargs.pop("variant", None)
        if isinstance(source, str):
            reaching["revision"] = resolve_revision(
                source, **{key: value for key, value in reaching.items() if key in _RESOLVING}
            )
        overrides = {key: kwargs.pop(key) for key in [*kwargs] if key in cls.config_class.overridable()}
        config = kwargs.pop("config", None)
        if config is None:
            build = partial(cls.config_class.from_dict, **overrides)
            config, tensors = read_checkpoint(source, reaching, variant, build)
        else:
            if not isinstance(config, EarlyExitConfig):
                config = cls.config_class.from_pretrained(config)
            config = copy.deepcopy(config)
            for key, value in overrides.items():
                setattr(config, key, value)
            read_here = config.name_or_path == str(source)  # as the auto classes do
            tensors = read_weights(source, reaching, variant, config if read_here else None)
        if kwargs.get("dtype", "auto") in (None, "auto"):
            _check_dtype(config.dtype)
        if config.backbone_weights is not None:
            hub = {key: value for key, value in reaching.items() if key not in ("subfolder", "revision")}
            tensors = published_tensors(config, hub) | tensors
        if config.dtype is None and kwargs.get("dtype", "auto") == "auto":
            kwargs["dtype"] = next((t[:].dtype for t in tensors.values() if t.get_dtype() in _FLOATS), None)
        if config.task == "causal_lm" and kwargs.get("generation_config") is None:
            try:
                with contextlib.suppress(OSError):  # a checkpoint need not hold one
                    kwargs["generation_config"] = GenerationConfig.from_pretrained(source, **reaching)
            except ValueError as error:
                raise CheckpointError(
                    f"generation_config.json of {source} holds what is not allowed: {error}"
                ) from error
        return {**kwargs, "config": config, "state_dict": tensors}

    @torch.no_grad()
    def _own_what_was_loaded(self, stored: Mapping[str, Any]) -> None:
        """Lets go of the files, and gives a backbone that was handed in its own tensors back.

        Each of the ``stored`` tensors keeps its own floating-point type: transformers gives all the same, or that of
        the backbone that was handed in.

        Loaded tensors are views of the mapped file, at unaligned addresses: outputs would differ in the last bits from
        those of the model that was saved, and rewriting the file would change this one.
        """
        given = self.__dict__.pop("_given", {})
        own = {id(tensor) for tensor in load_into(self.backbone, given)}
        floats = {name: t for name, t in stored.items() if hasattr(t, "get_dtype") and t.get_dtype() in _FLOATS}
        several = len({t.get_dtype() for t in floats.values()}) > 1
        cast = self._cast_names(floats) if given or several else set()
        types = {p.dtype for p in self.backbone.parameters() if p.is_floating_point()}
        if given and types and self.config.dtype not in (None, *types):  # transformers leaves it as it was given
            self.backbone.to(self.config.dtype)
            cast |= self._cast_names(floats)
        tensors = self._tensors_as_stored() if cast else {}
        for name in cast:
            tensors[name].data = floats[name][:].to(tensors[name].device)
            own.discard(id(tensors[name]))
        if self.config.rotary_dtype == str(self.dtype).removeprefix("torch."):
            for buffer in _rotary_frequencies(self.backbone):
                buffer.data = buffer.data.to(self.dtype)
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.device.type == "cpu" and id(tensor) not in own:
                tensor.data = tensor.data.clone(memory_format=torch.preserve_format)

    def _tensors_as_stored(self) -> dict[str, Tensor]:
        """Parameters and buffers by the names that a file has for them."""
        tensors: dict[str, Tensor] = revert_weight_conversion(self, self.state_dict(keep_vars=True))
        return tensors

    def _cast_names(self, stored: Mapping[str, Any]) -> set[str]:
        """Names of the tensors that have another type than the file's."""
        tensors = self._tensors_as_stored()
        there = (name for name in tensors.keys() & stored.keys() if not tensors[name].is_meta)
        return {name for name in there if tensors[name].dtype != _FLOATS[stored[name].get_dtype()]}


def check_layouts(network: nn.Module) -> None:
    """Raises :class:`RebuildError` for sparse tensors, which are neither copied nor stored."""
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if "sparse" in str(tensor.layout):
            raise RebuildError(f"{name!r} is a sparse tensor, {tensor.layout}: keep it dense, tensor.to_dense()")


def _rotary_frequencies(backbone: nn.Module) -> list[Tensor]:
    """Buffers that transformers computes in float32 whatever the type of the weights is."""
    if not isinstance(backbone, PreTrainedModel):
        return []
    return [buffer for name, buffer in backbone.named_buffers() if name.endswith("inv_freq")]


def _check_all_fits(source: Any, info: dict[str, Any], may_differ: bool) -> None:
    """Raises :class:`CheckpointError` for weights that are missing, left over or, unless allowed, of other shapes."""
    kinds = ["missing_keys", "unexpected_keys", "error_msgs", *([] if may_differ else ["mismatched_keys"])]
    wrong = {kind: sorted(map(str, info[kind])) for kind in kinds if info.get(kind)}
    if wrong:
        what = "; ".join(f"{k.replace('_', ' ')}: {len(v)}, first {v[0]!r}" for k, v in wrong.items())
        raise CheckpointError(
            f"the weights of {source} do not match its config ({what}): the file belongs to another model, or the"
            " config was edited"
        )


def _check_floats(source: Any, stored: Mapping[str, Any], model: nn.Module) -> None:
    """Raises :class:`CheckpointError` for integers in the place of weights: they would be taken as they are."""
    floats = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    types = {name: t.get_dtype() for name, t in stored.items() if name in floats and hasattr(t, "get_dtype")}
    wrong = sorted(name for name, dtype in types.items() if not dtype.startswith(("F", "BF")))
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} weights of {source} are stored as {types[wrong[0]]}, first {wrong[0]!r}, where the model has"
            " floats: they were quantised or damaged; save the model before it is quantised"
        )


def _check_dtype(dtype: Any) -> None:
    """Raises :class:`ConfigError` for what is no type of weights."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in (None, "auto") and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ConfigError(f"dtype={dtype!r} is no floating-point type: pass torch.bfloat16, 'float16' or 'auto', say")


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
