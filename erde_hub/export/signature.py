"""What a model's file takes and says of itself, whatever its format; and which models can be written."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from erde_hub._version import __version__
from erde_hub.backbones.transformers import longest_text
from erde_hub.calibration import get_calibrator, list_calibrators
from erde_hub.errors import ConfigError, ExportError
from erde_hub.modeling.wrapper import EarlyExitWrapper
from erde_hub.policies import get_policy, list_policies
from erde_hub.tasks import REGRESSION

from ._texts import tokenizer_json
from .metadata import FileInfo


def reads_texts(model: EarlyExitWrapper) -> bool:
    """Tells whether the model takes token ids."""
    return model.main_input_name == "input_ids"


def input_names(model: EarlyExitWrapper) -> list[str]:
    """Returns the inputs in the order of the file, thresholds aside; token types where the model has several."""
    if not reads_texts(model):
        return ["pixel_values"]
    config: Any = model.backbone.config
    types = getattr(config, "type_vocab_size", None) or 0
    takes_types = "token_type_ids" in inspect.signature(type(model.backbone).forward).parameters
    return ["input_ids", "attention_mask", *(["token_type_ids"] if takes_types and types > 1 else [])]


def vocabulary(model: EarlyExitWrapper) -> int:
    """Returns the number of tokens that the model knows."""
    return int(model.backbone.get_input_embeddings().num_embeddings)  # type: ignore[operator]


def padding_token(model: EarlyExitWrapper) -> int:
    """Returns the token that the model takes for padding; 0 where it names none, and masks alone tell."""
    token = model.backbone.config.get_text_config().pad_token_id  # type: ignore[union-attr,operator]
    return int(token or 0)


def check_exportable(model: EarlyExitWrapper) -> None:
    """Checks task, policy, calibrator and preprocessing.

    Raises:
        ExportError: A task, policy or calibrator that a file cannot hold.
        ConfigError: Preprocessing that makes images of another size than the file takes.
    """
    if model.config.task != "classification":
        raise ExportError(
            f"{type(model.backbone).__name__} is a language model, whose keys and values from token to token the file"
            " does not hold: classifiers can be written"
        )
    if model.config.problem_type == REGRESSION:
        raise ExportError(
            "a regression has no class probabilities, which the policies of an exported file (entropy and its like)"
            " read: export the static network of an exit, torch.onnx.export(model.truncate(exit), ...)"
        )
    if not model.policy.exportable:
        possible = [name for name in list_policies() if get_policy(name).cls.exportable]
        raise ExportError(
            f"policy {model.config.policy!r} cannot be written into an exported file (those that can:"
            f" {', '.join(possible)}): wrap the model with one of them"
        )
    _check_calibrator(model)
    _check_preprocessing(model)


def _check_calibrator(model: EarlyExitWrapper) -> None:
    if model.calibrator is not None and not model.calibrator.affine:
        possible = [name for name in list_calibrators() if get_calibrator(name).cls.affine]
        raise ExportError(
            f"calibrator {model.config.calibrator!r} cannot be written into an exported file (those that can:"
            f" {', '.join(possible)}): fit one of them, or take it off with model.set_calibrator(None)"
        )


def _check_preprocessing(model: EarlyExitWrapper) -> None:
    """A file answers one size only, and must get it from the images that its own metadata prepare."""
    preprocessing = model.config.preprocessing
    if preprocessing is None:
        return
    made, taken = [len(preprocessing["mean"]), *preprocessing["size"]], list(model.config.input_size or [])
    if made != taken:
        raise ConfigError(
            f"the preprocessing makes images of shape {tuple(made)}, the model was wrapped for {tuple(taken)}, which is"
            " what the file would take: call model.set_preprocessing(...) with that size, or wrap the model with"
            f" input_size={tuple(made)}"
        )


def file_info(model: EarlyExitWrapper, batch_size: int | None, tokenizer: Any, quantization: str | None) -> FileInfo:
    """Returns what the file says of itself.

    Args:
        model: A model that :func:`check_exportable` takes.
        batch_size: 1 or None.
        tokenizer: See :func:`~erde_hub.export.export_onnx`.
        quantization: ``"int8"`` or None.

    Raises:
        ConfigError: A tokenizer of another model, or for images.
    """
    config, texts = model.config, reads_texts(model)
    info = FileInfo(
        erde_hub_version=__version__,
        policy=str(config.policy),
        threshold=model.routing_plan().thresholds,
        threshold_range=list(model.policy.threshold_range),
        exit_names=model.exit_names,
        cumulative_macs=model.exit_table().cumulative_macs,
        id2label={int(i): str(label) for i, label in (config.id2label or {}).items()},
        input_size=list(config.input_size or []),
        preprocessing=config.preprocessing,
        prediction_sets=model.prediction_sets,
        quantization=quantization,
        input_names=tuple(input_names(model)),
        batch_size=batch_size,
        max_length=longest_text(model.backbone) if texts else None,
        vocab_size=vocabulary(model) if texts else None,
        pad_token_id=padding_token(model) if texts else None,
    )
    if tokenizer is None:
        return info
    if not texts:
        raise ConfigError(f"{type(model.backbone).__name__} reads images: leave tokenizer out")
    return dataclasses.replace(info, tokenizer=tokenizer_json(tokenizer, info))
