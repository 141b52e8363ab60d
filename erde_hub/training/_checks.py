"""Checks before the first step: do student, teacher, loss and data go together."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from erde_hub.data.base import LabelledData
from erde_hub.data.tokens import TokenData
from erde_hub.errors import ConfigError, InputTypeError, NonFiniteLossError
from erde_hub.losses import ExitLoss
from erde_hub.losses._checks import without_teacher
from erde_hub.modeling.pretrained import EarlyExitPreTrainedModel
from erde_hub.tasks import REGRESSION, check_class_labels, check_targets

from .arguments import DistillationArguments

logger = logging.getLogger(__name__)


def exit_names(model: nn.Module) -> list[str]:
    """Returns the names of a model's exits; a module without exits has one, its classifier."""
    return list(getattr(model, "exit_names", ["classifier"]))


def all_exits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """Returns the logits of every exit, shallow to deep; one for a module that just returns logits.

    Args:
        model: Images alone are its first argument; everything else is passed by name.
        inputs: See :func:`~erde_hub.data.loader.network_inputs`.
    """
    images = tuple(inputs.values()) if set(inputs) == {"pixel_values"} else ()
    named = {} if images else dict(inputs)
    # a student inside DDP shows no exit_names, but it is in train mode then, where every exit runs anyway
    output = model(*images, output_all_exits=True, **named) if hasattr(model, "exit_names") else model(*images, **named)
    if isinstance(output, Tensor):
        return (output,)
    every = getattr(output, "exit_logits", None)
    return (output.logits,) if every is None else every


def check_kinds(data: object, args: object, loss: object) -> None:
    """Raises :class:`InputTypeError` if data, arguments or loss are no such thing."""
    if not isinstance(data, LabelledData):
        raise InputTypeError(
            f"data must come from load_image_data(...), load_text_data(...) or another LabelledData, got"
            f" {type(data).__name__}: a saved datasets.Dataset is loaded by load_image_data(folder)"
        )
    if not isinstance(args, DistillationArguments):
        raise InputTypeError(f"args must be DistillationArguments(...), got {type(args).__name__}")
    if not isinstance(loss, (str, ExitLoss)):
        made = f"; write {loss.__name__}()" if isinstance(loss, type) else ""
        raise InputTypeError(f"loss must be a key such as 'erde' or an ExitLoss, got {loss!r:.80}{made}")


def check_models(student: nn.Module, teacher: nn.Module | None, data: LabelledData) -> None:
    """Compares kind of inputs, classes and input sizes of student, teacher and data.

    Raises:
        InputTypeError: Student or teacher is no module, a name for example.
        ConfigError: They differ, or teacher and student are one object.
    """
    models = [("student", student)] + ([("teacher", teacher)] if teacher is not None else [])
    for name, model in models:
        if not isinstance(model, nn.Module):
            named = isinstance(model, (str, os.PathLike))
            how = f": load it first, EarlyExitWrapper.from_pretrained({os.fspath(model)!r})" if named else ""
            raise InputTypeError(
                f"{name} must be a model (an EarlyExitWrapper or another torch.nn.Module), got {model!r:.80}{how}"
            )
    if teacher is student:
        raise ConfigError("teacher and student are the same object: hand in a copy, since the student's weights change")
    for name, model in models:
        causal = getattr(getattr(model, "config", None), "task", None) == "causal_lm"
        if isinstance(model, EarlyExitPreTrainedModel) and causal != isinstance(data, TokenData):
            kinds = ("a language model", "no blocks of tokens", "load_token_data") if causal else (
                "a classifier", "blocks of tokens", "load_text_data or load_image_data"
            )  # fmt: skip
            raise ConfigError(f"the {name} is {kinds[0]}, and {data.name!r} holds {kinds[1]}: load it by {kinds[2]}")
    if isinstance(data, TokenData):
        _check_language_models(models, data)
        return
    for name, model in models:
        if is_regression(model) not in (None, has_targets(data)):
            labels, build = ("real numbers", "with") if has_targets(data) else ("classes", "without")
            raise ConfigError(
                f"the labels of {data.name!r} are {labels}, and the {name} predicts something else: wrap it {build}"
                " problem_type='regression'"
            )
        classes = num_classes(model)
        if classes is not None and classes != data.num_classes:
            raise ConfigError(
                f"the {name} has {classes} classes, {data.name!r} has {data.num_classes}: build it with"
                f" num_classes={data.num_classes}"
            )
        reads = "text" if getattr(model, "main_input_name", "pixel_values") == "input_ids" else "image"
        if isinstance(model, EarlyExitPreTrainedModel) and reads != data.kind:
            raise ConfigError(f"the {name} reads {reads}s, {data.name!r} holds {data.kind}s: they do not go together")
        config = getattr(model, "config", None)
        size = getattr(config, "input_size", None)
        if size is not None and tuple(size) != tuple(data.input_size):
            raise ConfigError(
                f"the {name} was built for inputs {tuple(size)}, {data.name!r} gives {tuple(data.input_size)}: build it"
                f" with input_size={tuple(data.input_size)}, or load the data with that size"
            )
        names = class_names(config)
        if names is not None and data.class_names and names != list(data.class_names):
            first = next((i for i, (a, b) in enumerate(zip(names, data.class_names, strict=False)) if a != b), 0)
            raise ConfigError(
                f"the {name} and {data.name!r} disagree about the classes: class {first} is {names[first]!r} for the"
                f" {name} and {data.class_names[first]!r} in the data"
            )
    if (
        teacher is not None
        and num_classes(student) != num_classes(teacher)
        and None not in map(num_classes, (student, teacher))
    ):
        raise ConfigError(
            f"the student has {num_classes(student)} classes, the teacher {num_classes(teacher)}: both need the same"
        )


def _check_language_models(models: Sequence[tuple[str, nn.Module]], data: TokenData) -> None:
    """Compares vocabularies, and positions with the length of a block."""
    words = {}
    for name, model in models:
        config: Any = getattr(getattr(model, "backbone", model), "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        size, longest = getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None)
        if size is not None and size < data.vocab_size:
            raise ConfigError(
                f"the {name} knows {size} tokens, the tokenizer of {data.name!r} has {data.vocab_size}: load the data"
                " with the tokenizer of the model"
            )
        if longest is not None and longest < data.block_size:
            raise ConfigError(
                f"the {name} has {longest} positions, a block of {data.name!r} has {data.block_size} tokens: load the"
                f" data with block_size={longest} or less"
            )
        words[name] = size
    if len(set(words.values()) - {None}) > 1:
        raise ConfigError(
            f"the student has {words['student']} tokens and the teacher {words['teacher']}: a student learns from a"
            " teacher with the same tokenizer"
        )


def is_regression(model: nn.Module) -> bool | None:
    """Tells whether a model predicts real numbers; None for a module that does not say."""
    if not isinstance(model, EarlyExitPreTrainedModel):
        return None
    return model.config.problem_type == REGRESSION


def has_targets(data: LabelledData) -> bool:
    """Tells whether the labels of data are real numbers; those of a stream are classes."""
    labels = None if data.streamed else getattr(data.train, "labels", None)
    return isinstance(labels, Tensor) and labels.is_floating_point()


def num_classes(model: nn.Module) -> int | None:
    """Returns how many classes a model has, None if it does not say."""
    value = getattr(getattr(model, "config", None), "num_labels", None)
    return value if value is not None else getattr(model, "num_classes", None)


def class_names(config: Any) -> list[str] | None:
    """Returns a model's class names, None where they are transformers' placeholders."""
    names = getattr(config, "id2label", None)
    if not names or all(str(name) == f"LABEL_{index}" for index, name in names.items()):
        return None
    return [str(names[index]) for index in sorted(names, key=int)]


def check_loss(
    loss: ExitLoss,
    student: nn.Module,
    teacher: nn.Module | None,
    label_smoothing: float = 0.0,
    regression: bool = False,
    tokens: bool = False,
) -> list[int] | None:
    """Checks that loss, teacher and exits go together, hands label smoothing to the loss, returns the map of exits.

    Args:
        loss: What trains.
        student: The student.
        teacher: The teacher, if there is one.
        label_smoothing: For the cross-entropy of the loss.
        regression: The labels are real numbers.
        tokens: A causal language model is trained.

    Raises:
        ConfigError: A teacher is missing or useless, weights or map do not fit the exits, or the loss has no
            cross-entropy to smooth.
    """
    name = type(loss).__name__
    if tokens:
        loss.check_tokens()
    elif loss.task != (REGRESSION if regression else "classification"):
        instead = "regression: choose 'mse'" if regression else "classification: choose 'erde' or 'kd', say"
        raise ConfigError(f"{name} is for {loss.task}, not for {instead}")
    if loss.reads_teacher and teacher is None:
        raise ConfigError(f"{name} learns from a teacher and there is none: pass teacher=, or {without_teacher(loss)}")
    if not loss.reads_teacher and teacher is not None:
        raise ConfigError(f"{name} does not use a teacher: leave teacher out, or choose a loss such as 'erde' or 'kd'")
    if label_smoothing:
        if not hasattr(loss, "label_smoothing"):
            raise ConfigError(f"label_smoothing is {label_smoothing}, but {name} has none: set it to 0")
        loss.label_smoothing = label_smoothing  # type: ignore[assignment]
    students = len(exit_names(student))
    loss.weights_for(students)
    for addition in loss.additions():
        addition.check_exits(students)
    if teacher is None:
        return None
    teachers = exit_names(teacher)
    pairs = loss.teacher_exit_map(students, len(teachers))
    logger.info("student exit <- teacher exit: %s", describe_exit_map(student, teacher, pairs))
    return pairs


def describe_exit_map(student: nn.Module, teacher: nn.Module, pairs: Sequence[int]) -> str:
    """Writes which exit of the teacher each exit of the student learns from: ``layer1 <- layer2, ...``."""
    teachers = exit_names(teacher)
    return ", ".join(f"{name} <- {teachers[index]}" for name, index in zip(exit_names(student), pairs, strict=True))


def check_data(data: LabelledData) -> None:
    """Raises :class:`LabelError` where a split holds a label outside the classes, or not finite, naming its row."""
    for name in ("train", "validation"):
        split = getattr(data, name)
        if split.num_samples is None:  # a stream knows its labels only as they come; the loss checks those
            continue
        labels = split.labels
        if isinstance(data, TokenData):  # checked where they were loaded
            continue
        if has_targets(data):
            check_targets(labels, len(labels), data.num_classes)
            continue
        check_class_labels(labels, len(labels), data.num_classes, where=f" in the {name} split of {data.name!r}")


def check_finite(model: nn.Module, step: int) -> None:
    """Raises :class:`NonFiniteLossError` where a weight is NaN or infinite after that update."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteLossError(
                f"{name} is no longer finite after step {step}, although the loss was: no checkpoint is written. Try a"
                " lower lr, max_grad_norm, or mixed_precision 'no'"
            )
