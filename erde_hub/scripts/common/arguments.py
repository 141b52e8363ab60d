"""Arguments of the scripts other than those of training: data, networks, teacher, loss.

Each class is a dataclass whose fields are flags and keys of a recipe's YAML file.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers.hf_argparser import HfArg

from erde_hub.errors import ConfigError, unknown_argument, unknown_name
from erde_hub.heads import list_heads
from erde_hub.losses import (
    ExitLoss,
    ExtraTerm,
    SampleWeight,
    create_addition,
    create_loss,
    get_addition,
    get_loss,
    list_additions,
    list_losses,
)
from erde_hub.policies import list_policies
from erde_hub.training.arguments import DistillationArguments, nearest_argument


@dataclass
class DataArguments:
    """Which data, and which part of them."""

    dataset: str = HfArg(
        default="digits",
        help="'digits' (comes with scikit-learn), a Hub name such as uoft-cs/cifar10, or a local folder that"
        " datasets.load_dataset reads (parquet, or one folder of images per class)",
    )
    dataset_config: str | None = HfArg(default=None, help="configuration of a Hub data set that has several")
    image_column: str | None = HfArg(default=None, help="column with the images; default: found by its feature type")
    text_column: str | None = HfArg(default=None, help="column with the texts; default: found by its feature type")
    label_column: str | None = HfArg(default=None, help="column with the classes; default: found by its feature type")
    image_size: int | None = HfArg(
        default=None,
        help="height and width of the network's input (pixels); default: the teacher's, or the data's",
    )
    max_length: int | None = HfArg(
        default=None,
        help="longest text (tokens), longer ones are cut; default: the teacher's, or 128",
    )
    block_size: int | None = HfArg(
        default=None, help="language models: tokens of a block; default: the teacher's, or 256"
    )
    tokenizer_size: int | None = HfArg(
        default=None,
        help="language models built from a name: tokens of the tokenizer that is trained on the text; default: 257,"
        " the bytes",
    )
    streaming: bool = HfArg(default=False, help="read rows one after another, for sets larger than the disk")
    check_images: Literal["all", "headers", "none"] = HfArg(
        default="all",
        help="large images that cannot be read are found before training: all decodes each one once and"
        " remembers that in cache_dir, headers opens up to 20,000 of a split, none looks at nothing; streamed ones"
        " are found when they come",
    )
    cache_dir: str | None = HfArg(
        default=None, help="folder for downloads and decoded images; default: that of datasets"
    )
    max_train_samples: int | None = HfArg(
        default=None, help="train on a stratified part of so many samples; default: all"
    )
    max_eval_samples: int | None = HfArg(
        default=None, help="validate and test on stratified parts of so many samples; default: all"
    )


@dataclass
class TrainedDataArguments(DataArguments):
    """Which data, and which part of them, for a checkpoint whose run says what it was trained on."""

    dataset: str | None = HfArg(  # type: ignore[assignment]
        default=None,
        help="'digits' (comes with scikit-learn), a Hub name such as uoft-cs/cifar10, or a local folder that"
        " datasets.load_dataset reads (parquet, or one folder of images per class); default: what the checkpoint"
        " was trained on, where its results.json names something that can be found again",
    )


@dataclass
class ExitArguments:
    """Positions and heads of the exits, and the policy."""

    exits: list[str] | None = HfArg(
        default=None,
        help="stage names from shallow to deep, a number of exits evenly spaced in MACs, or auto; default: auto",
    )
    head: str = HfArg(default="fc", help=f"head of every early exit: {', '.join(list_heads())}")
    head_kwargs: dict[str, Any] = HfArg(
        default_factory=dict, help="arguments of the head, e.g. pool=kernel dropout=0.2"
    )
    policy: str = HfArg(default="entropy", help=f"decides where a sample exits: {', '.join(list_policies())}")
    policy_kwargs: dict[str, Any] = HfArg(default_factory=dict, help="arguments of the policy")
    threshold: list[float] | None = HfArg(
        default=None,
        help="threshold stored in the checkpoint, one number or one per early exit (entropy: nats); default:"
        " chosen on the validation split so that one point of accuracy is lost at most, see recipes/calibrate.py",
    )

    def stored_threshold(self) -> float | list[float] | None:
        """Returns ``threshold`` as the wrapper takes it, None where it is to be chosen."""
        if self.threshold is None or len(self.threshold) != 1:
            return self.threshold
        return self.threshold[0]


def exit_places(names: list[str] | None) -> list[str] | int | str:
    """Returns exits from the command line as the wrapper takes them: names, a number, or "auto"."""
    if not names:
        return "auto"
    if len(names) == 1 and (names[0] == "auto" or names[0].isdigit()):
        return int(names[0]) if names[0].isdigit() else "auto"
    return list(names)


@dataclass
class TeacherArguments:
    """The network of the teacher; also what ``train_teacher.py`` trains."""

    teacher_architecture: str = HfArg(
        default="resnet18_cifar",
        help="timm name of the teacher that is trained; for texts a folder or Hub repository with a transformers"
        " encoder, or with a causal language model, whose tokenizer is used, or the type of one, such as llama",
    )
    teacher_kwargs: dict[str, Any] = HfArg(
        default_factory=dict,
        help="creation arguments of that network, e.g. width=32, or num_hidden_layers=4 of an encoder; none"
        " clears those of the file",
    )
    teacher_pretrained: bool = HfArg(
        default=False, help="start from the weights that timm, the folder or the repository has for it"
    )
    teacher_exit_points: list[str] | None = HfArg(
        default=None, help="exits of the teacher that is trained; default: as --exits"
    )
    teacher_exit_weights: list[str] | None = HfArg(
        default=None,
        help="weight of each exit's cross-entropy in the teacher's training, or a preset; default: uniform",
    )
    teacher_training: dict[str, Any] = HfArg(
        default_factory=dict,
        help="training arguments that are different for the teacher, e.g. epochs=20 lr=0.1",
    )


def weights_of_samples(*, readout: bool) -> list[str]:
    """Returns the names of weights per sample that are looked up from read-outs, or of those that are not."""
    return [name for name in list_additions(SampleWeight) if get_addition(name).cls.needs_index is readout]


@dataclass
class StudentNetworkArguments:
    """The network of the student."""

    student_architecture: str = HfArg(
        default="resnet10_cifar", help="timm name of the student; for texts as --teacher_architecture"
    )
    student_kwargs: dict[str, Any] = HfArg(
        default_factory=dict,
        help="creation arguments of that network, e.g. width=16, or num_hidden_layers=3 of an encoder; none"
        " clears those of the file",
    )
    student_pretrained: bool = HfArg(
        default=False, help="start from the weights that timm, the folder or the repository has for it"
    )


@dataclass
class StudentArguments(StudentNetworkArguments):
    """The network of the student, what it learns from and how."""

    teacher: str | None = HfArg(
        default=None,
        help="folder or Hub repository of a trained teacher; default: one is trained into OUTPUT_DIR/teacher",
    )
    loss: str = HfArg(default="erde", help=f"what the student learns from: {', '.join(list_losses())}")
    sample_weight: str | None = HfArg(
        default=None,
        help="weighs the samples of the loss's distillation term by the logits of teacher and student:"
        f" {', '.join(weights_of_samples(readout=False))}; default: no weights",
    )
    readout: str | None = HfArg(
        default=None,
        help="weighs them by what an early read-out of the student gets wrong:"
        f" {', '.join(weights_of_samples(readout=True)) or 'none yet'}; default: no weights",
    )
    extra_terms: list[str] | None = HfArg(
        default=None, help=f"further terms of the loss: {', '.join(list_additions(ExtraTerm))}"
    )
    train_static: bool = HfArg(
        default=False,
        help="also train the student's network without exits, with cross-entropy alone, for comparison",
    )

    def additions(self) -> list[str]:
        """Returns the names of everything that joins the loss.

        Raises:
            ConfigError: ``sample_weight``, ``readout`` or ``extra_terms`` names something else.
        """
        allowed = {
            "sample_weight": weights_of_samples(readout=False),
            "readout": weights_of_samples(readout=True),
            "extra_terms": list_additions(ExtraTerm),
        }
        given = [("sample_weight", self.sample_weight), ("readout", self.readout)]
        for flag, name in (*given, *(("extra_terms", name) for name in self.extra_terms or [])):
            if name is None or name in allowed[flag]:
                continue
            meant = next((other for other, names in allowed.items() if name in names), None)
            if meant is not None:
                raise ConfigError(f"{flag} does not take {name!r}: give it as {meant}")
            raise unknown_name(flag, name, allowed[flag])
        return [name for name in (*(self.extra_terms or []), self.sample_weight, self.readout) if name is not None]


#: Arguments of losses that are flags already, or are set by one.
_ELSEWHERE = {f.name for f in dataclasses.fields(DistillationArguments)}


def loss_arguments_class(*names: str) -> type:
    """Builds a dataclass with every argument of the given losses (default: of all), for the command line.

    A loss that is added to the table brings its flags along. Each field is None unless the user sets it, and the loss
    then takes its own default.
    """
    fields: dict[str, tuple[Any, list[str], str]] = {}
    for name in names or list_losses():
        cls = get_loss(name).cls
        described, hints = _described_arguments(cls), get_type_hints(cls.__init__)
        for key, parameter in inspect.signature(cls).parameters.items():
            if key in _ELSEWHERE or parameter.kind is parameter.VAR_KEYWORD:
                continue
            kind, defaults, text = fields.get(key, (_flag_type(hints.get(key, str)), [], described.get(key, "")))
            default = parameter.default
            defaults.append(name if default in (None, inspect.Parameter.empty) else f"{name}: {plain_text(default)}")
            fields[key] = (kind, defaults, text)
    specs = [
        (key, kind, HfArg(default=None, help=f"{text} [{', '.join(defaults)}]".replace("%", "%%")))
        for key, (kind, defaults, text) in fields.items()
    ]
    return dataclasses.make_dataclass("LossArguments", specs, namespace={"__doc__": "Arguments of the loss."})


def build_loss(name: str, arguments: Any, additions: Sequence[str] = ()) -> ExitLoss:
    """Builds a loss from the fields of a :func:`loss_arguments_class` that were set, and what joins it.

    An argument goes to the loss if it takes it, and otherwise to the addition that does.

    Raises:
        ConfigError: No such loss or addition, neither takes an argument that was set, one of them refuses a value, or
            they do not go together; the message says why.
    """
    kwargs = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments)}
    kwargs = {key: plain_weights(value) for key, value in kwargs.items() if value is not None}
    own = inspect.signature(get_loss(name).cls).parameters
    joining = []
    for addition in additions:
        takes = inspect.signature(get_addition(addition).cls).parameters
        given = {key: kwargs.pop(key) for key in list(kwargs) if key in takes and key not in own}
        joining.append(create_addition(addition, **given))
    return create_loss(name, **kwargs).add(*joining)


def changed_arguments(name: str, args: DistillationArguments, overrides: dict[str, Any]) -> DistillationArguments:
    """Returns the training arguments of one of several trainings of a run.

    Args:
        name: Of the flag, for errors.
        args: Of the run.
        overrides: What is different.

    Raises:
        ConfigError: An override that is no training argument, or one that belongs to the whole run.
    """
    allowed = [f.name for f in dataclasses.fields(args) if f.name not in _RUN_WIDE]
    for key in overrides:
        if key not in allowed:
            raise unknown_argument(name, key, allowed, nearest_argument(key, allowed))
    return dataclasses.replace(args, **overrides)


#: Teacher and student share one process, one precision and one folder.
_RUN_WIDE = frozenset(
    {"output_dir", "resume", "overwrite_output_dir", "mixed_precision", "cpu_threads", "report_to", "progress_bar"}
)


#: Help of arguments whose docstrings speak of Python.
_FLAG_HELP = {
    "teacher_exits": "for each student exit the index of the teacher exit that it learns from, -1 for the last, where"
    " it is not the one at the same share of the depth",
}


def _described_arguments(cls: type) -> dict[str, str]:
    """Reads the first sentence of each argument out of a Google docstring, without the names of functions."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(cls.__doc__ or ""), re.DOTALL | re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section[1], re.DOTALL | re.MULTILINE) if section else []
    sentences = {key: re.split(r"(?<=[^ .])\.(?:\s|$)", " ".join(text.split()))[0] for key, text in entries}
    without = {key: re.sub(r" \(:\w+:`[^`]*`\)", "", text) for key, text in sentences.items()}
    plain = {key: re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", text) for key, text in without.items()}
    plain = {key: re.sub(r"\bNone is\b", "unset it is", text).replace("``", "") for key, text in plain.items()}
    return {key: text[:1].lower() + text[1:] for key, text in plain.items()} | _FLAG_HELP


def plain_text(value: Any) -> str:
    """Writes a value as it is written on the command line: ``width=8``, ``0.5 0.75``, ``true``."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return " ".join(f"{key}={plain_text(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(plain_text, value))
    return str(value)


def _flag_type(annotation: Any) -> Any:
    """Maps an argument's annotation to what the command line can read; all are optional."""
    kinds = [k for k in (get_args(annotation) or (annotation,)) if k is not type(None)]
    if get_origin(annotation) is Sequence or get_origin(annotation) in (list, tuple):
        kinds = [annotation]
    for kind in kinds:
        if get_origin(kind) in (Sequence, list, tuple):  # `str | Sequence[float]` is a preset's name or numbers
            return list[str] | None if str in kinds else list[get_args(kind)[0]] | None  # type: ignore[misc]
    kind = kinds[0]
    return (kind if kind in (int, float, bool, str) else str) | None


def plain_weights(value: Any) -> Any:
    """``["sdn"]`` is a preset's name, ``["1", "0.5"]`` are numbers."""
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        return value
    try:
        return [float(v) for v in value]
    except ValueError:
        return value[0] if len(value) == 1 else value
