"""Everything that is needed to rebuild an early-exit model, as a transformers config."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.utils import logging

from ._files import parse_json, read_json, write_text
from ._published_weights import check_backbone_weights
from ._registry import Entry
from .calibration import ThresholdChoice, get_calibrator
from .errors import CheckpointError, ConfigError, ErdeError, ExitPointError, InputTypeError, UnknownNameError, nearest
from .heads import FeatureSpec, get_head
from .losses.exit_weights import check_exit_weights, weights_per_exit
from .policies import check_no_early_exit, get_policy, get_regression_policy, plain_threshold, policy_for
from .preprocessing import check_preprocessing
from .stored_sets import StoredSets
from .tasks import REGRESSION, refuse_regression

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
TASKS = ("classification", "causal_lm")
#: Implementations of attention that a stored config may name: they come with torch and transformers, or with a package
#: of that name; any other name would be fetched from the Hub.
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
PROBLEM_TYPES = (None, "single_label_classification", REGRESSION)

#: Keys that transformers itself passes or stores and that are not fields of a config.
_TRANSFORMERS_KEYS = frozenset(
    {
        "name_or_path",
        "_name_or_path",
        "_commit_hash",
        "num_labels",
        "torch_dtype",
        "model_type",
        "transformers_version",
        "output_attentions",
        "attn_implementation",
        "_attn_implementation",
        "experts_implementation",
        "_attn_implementation_internal",
        "_experts_implementation_internal",
        "_attn_implementation_autoset",
        "per_layer_config",
        "auto_map",
        "quantization_config",
        # of training arguments and tokenizer, written by the Trainer
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    }
)

#: Reads a config's field past transformers' renaming of fields, which takes a visible part of a call with one image.
read_field = object.__getattribute__

_reading_file: contextvars.ContextVar[bool] = contextvars.ContextVar("erde_hub_reading_config", default=False)


@contextlib.contextmanager
def _file_being_read() -> Iterator[None]:
    token = _reading_file.set(True)
    try:
        yield
    finally:
        _reading_file.reset(token)


class EarlyExitConfig(PreTrainedConfig):
    """Configuration of an :class:`~erde_hub.EarlyExitWrapper`.

    A wrapped model writes its own; by hand, ``architecture``, ``num_labels`` and ``exits`` (names) are enough for the
    common families.

    Args:
        format_version: Version of this format; a newer one than the library knows is refused.
        library: Where the backbone comes from: ``"timm"``, or ``"torch"`` for any other module (which loads only with
            ``from_pretrained(path, backbone=module)``).
        architecture: Registered timm name; for ``"torch"`` the class name, for the reader.
        backbone_kwargs: Creation arguments of the backbone other than the number of classes.
        task: ``classification``, or ``causal_lm``: logits for every token, never routed.
        problem_type: ``regression`` for real numbers, ``num_labels`` of them, in place of classes.
        exits: Names of the modules behind which an early exit sits, shallow to deep.
        exit_features: What each early exit reads: ``{"width", "format", "size"}``. Written when a living model is
            wrapped; optional for families whose ``feature_info`` says it.
        exit_hooks: The exits sit on forward hooks although the order of the stages is known for this kind of network:
            run one by one, they gave another answer than its own forward when it was wrapped.
        head: Key of the heads table.
        head_kwargs: Arguments of the head.
        policy: Key of the policies table; None is ``entropy``, and ``never`` for a regression.
        policy_kwargs: Arguments of the policy.
        threshold: One number, or one per early exit; None takes the policy's default.
        threshold_profile: How the threshold was chosen, a :class:`~erde_hub.calibration.ThresholdChoice` as a dict;
            dropped where the threshold is another one.
        calibrator: Key of the calibrators table; None for raw logits.
        calibrator_kwargs: Arguments of the calibrator.
        prediction_sets: Fitted sets of classes, see :meth:`~erde_hub.EarlyExitWrapper.set_prediction_sets`.
        exit_weights: Weight of each exit's cross-entropy in ``loss``, classifier last; None is all 1. A preset's name
            (:func:`erde_hub.losses.exit_weights_preset`) is stored as its numbers.
        input_size: Shape of one input without the batch, (C, H, W) for images.
        preprocessing: ``{"mean", "std", "interpolation", "crop_pct", "size"}`` of the images the model was trained on.
        backbone_weights: Where the backbone's weights are published, in a checkpoint of the heads alone; see
            :func:`~erde_hub._published_weights.check_backbone_weights`.
        plugins: Module of each head, policy or calibrator that is not of this package, by its key. Where the key is
            unknown the error names the module; nothing imports it. Written when the config is.
        rotary_dtype: Type of a transformers backbone's rotary frequencies, which ``.to(torch.bfloat16)`` rounds and
            loading computes in float32; None where they are in float32.
        save_id: Hash of the tensors that the config was saved with, and their variant; the weights' files hold it too.
        erde_hub_version: Version that wrote the file.

    Raises:
        ConfigError: A key that does not exist (from a stored file: a warning), or a value that is not allowed.
        ThresholdError: A threshold that the policy does not take.
        ExitPointError: No exit, or the same exit twice.
    """

    model_type: ClassVar[str] = "early_exit"
    #: What transformers' Trainer leaves out of its predictions, which are then the logits.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["exit_index", "exit_logits", "sets"]

    format_version: int = FORMAT_VERSION
    library: str = "timm"
    architecture: str | None = None
    backbone_kwargs: dict[str, Any] | None = None
    task: str = "classification"
    exits: list[str] | tuple[str, ...] | None = None
    exit_features: list[dict[str, Any]] | None = None
    exit_hooks: bool = False
    head: str = "fc"
    head_kwargs: dict[str, Any] | None = None
    policy: str | None = None
    policy_kwargs: dict[str, Any] | None = None
    threshold: float | int | list[float] | tuple[float, ...] | None = None
    threshold_profile: dict[str, Any] | None = None
    calibrator: str | None = None
    calibrator_kwargs: dict[str, Any] | None = None
    prediction_sets: dict[str, Any] | None = None
    exit_weights: str | list[float] | tuple[float, ...] | None = None
    input_size: list[int] | tuple[int, ...] | None = None
    preprocessing: dict[str, Any] | None = None
    backbone_weights: dict[str, Any] | None = None
    plugins: dict[str, str] | None = None
    rotary_dtype: str | None = None
    save_id: str | None = None
    erde_hub_version: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Checks keys and values; see the class for what is raised."""
        reading = _reading_file.get()
        for key in [k for k in kwargs if k not in _TRANSFORMERS_KEYS]:
            hint = nearest(key, _FIELDS)
            if not reading:
                raise ConfigError(f"EarlyExitConfig has no field {key!r}{hint} (fields: {', '.join(_FIELDS)})")
            writer = self.erde_hub_version or "an unknown version"
            logger.warning(f"ignoring the unknown config key {key!r}{hint}; the file was written by erde_hub {writer}")
            kwargs.pop(key)
        for name in ("backbone_kwargs", "head_kwargs", "policy_kwargs", "calibrator_kwargs"):
            value = getattr(self, name) or {}
            if not isinstance(value, dict):
                raise ConfigError(f"{name} must be a dict of arguments, got {value!r}")
            setattr(self, name, dict(value))
        if self.policy is None:
            self.policy = "never" if self.problem_type == REGRESSION else "entropy"
        self.exits = list(self.exits) if isinstance(self.exits, (list, tuple)) else self.exits
        if self.exits is not None and not reading:  # transformers leaves the id2label of two classes out of its files
            self._check_labels(kwargs.get("num_labels"))
        if kwargs.get("num_labels") is None:
            kwargs.pop("num_labels", None)
        super().__post_init__(**kwargs)
        self.check()

    def _check_labels(self, num_labels: Any) -> None:
        """Refuses what transformers replaces: two classes where nothing is said, 10 where 3 are named."""
        least = 1 if self.problem_type == REGRESSION else 2
        if self.id2label is None and num_labels is None:
            raise ConfigError("the config does not say how many classes there are: set num_labels or id2label")
        if self.id2label is None:
            if isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < least:
                raise ConfigError(f"num_labels must be an integer of at least {least}, got {num_labels!r}")
        elif num_labels is not None and num_labels != len(self.id2label):
            raise ConfigError(f"num_labels={num_labels} contradicts id2label, which names {len(self.id2label)} classes")
        elif getattr(self, "label2id", None) is None:
            self.label2id = {label: int(i) for i, label in self.id2label.items()}

    def check(self) -> None:
        """Checks the values against each other; called again where a model is built, since fields can be set."""
        if not isinstance(self.format_version, int):
            raise ConfigError(f"format_version must be an integer, got {self.format_version!r}")
        if self.format_version > FORMAT_VERSION:
            raise ConfigError(
                f"format_version is {self.format_version}, this erde_hub reads up to {FORMAT_VERSION}: upgrade it with"
                " `pip install -U erde-hub`"
            )
        if self.exits is None:  # an empty config, which transformers builds to find defaults
            return
        if isinstance(self.exits, (int, str)):
            raise ExitPointError(
                f"exits={self.exits!r} needs the living model, since a config runs nothing: wrap it once with"
                " EarlyExitWrapper(model, exits=...) and use its config, or name the exits"
            )
        if not self.exits or not all(isinstance(name, str) for name in self.exits):
            raise ExitPointError(f"exits must be a list of module names, got {self.exits!r}")
        if self.task not in TASKS:
            raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if self.problem_type not in PROBLEM_TYPES:
            raise ConfigError(
                f"problem_type={self.problem_type!r} is not supported: each sample gets one label of several, or, with"
                " 'regression', real numbers"
            )
        regression = self.problem_type == REGRESSION
        if regression and self.task != "classification":
            raise ConfigError(f"problem_type='regression' does not go with task={self.task!r}: tokens are classes")
        twice = sorted(name for name, count in Counter(self.exits).items() if count > 1)
        if twice:
            raise ExitPointError(f"exits names {twice[0]!r} twice: {self.exits}")
        self._index_labels()
        if sorted(self.id2label or {}) != list(range(max(self.num_labels or 0, 1 if regression else 2))):
            what = "targets 0 to n - 1" if regression else "classes 0 to n - 1 of at least two"
            raise ConfigError(f"id2label must name the {what}, got {self.id2label}")
        names = (self.id2label or {}).values()
        if not any(all(isinstance(name, kind) for name in names) for kind in (str, int)):  # as JSON can sort them
            raise ConfigError(f"the names in id2label must be texts, got {self.id2label}")
        if "num_classes" in (self.backbone_kwargs or {}):
            raise ConfigError("backbone_kwargs must not hold 'num_classes': the number of classes is num_labels")
        if self.exit_features is not None:
            if len(self.exit_features) != len(self.exits):
                raise ConfigError(f"exit_features has {len(self.exit_features)} entries for {len(self.exits)} exits")
            for values in self.exit_features:
                FeatureSpec.from_dict(values)
        if self.input_size is not None:
            self.input_size = list(check_input_size(self.input_size))
        if self.backbone_weights is not None:
            self.backbone_weights = dict(check_backbone_weights(self.backbone_weights))
        if not isinstance(self.exit_hooks, bool):
            raise ConfigError(f"exit_hooks must be true or false, got {self.exit_hooks!r}")
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(self, name, None):
                raise ConfigError(f"{name} must be false: a model with exits answers with logits")
        if self.rotary_dtype not in (None, "bfloat16", "float16"):
            raise ConfigError(f"rotary_dtype must be 'bfloat16', 'float16' or None, got {self.rotary_dtype!r}")
        if self.preprocessing is not None:
            self.preprocessing = check_preprocessing(self.preprocessing)
        with self._plugin_named(self.head):
            get_head(self.head)
        if self.calibrator is not None:
            refuse_regression(self.problem_type, f"calibrator {self.calibrator!r}", "take it off, calibrator=None")
            with self._plugin_named(self.calibrator):
                get_calibrator(self.calibrator)
        if self.prediction_sets is not None:
            refuse_regression(self.problem_type, "prediction_sets", "take them off, prediction_sets=None")
            if self.task != "classification":
                raise ConfigError(f"prediction_sets are for classification, this model's task is {self.task!r}")
            try:
                self.prediction_sets = StoredSets.from_dict(self.prediction_sets, self.num_exits).to_dict()
            except (InputTypeError, OverflowError) as error:  # whatever is wrong with a config is a ValueError
                raise ConfigError(str(error)) from error
        if self.exit_weights is not None:
            try:
                self.exit_weights = weights_per_exit(check_exit_weights(self.exit_weights), self.num_exits)
            except InputTypeError as error:  # whatever is wrong with a config is a ValueError
                raise ConfigError(str(error)) from error
        with torch.device("meta"), self._plugin_named(str(self.policy)):  # it may be as large as a file says
            policy = policy_for(self.problem_type, str(self.policy), **(self.policy_kwargs or {}))
        if getattr(policy, "num_exits", self.num_exits) != self.num_exits:
            raise ConfigError(
                f"policy {self.policy!r} was fitted for {policy.num_exits} exits, here are {self.num_exits}"
            )
        default = 0.0 if self.task == "causal_lm" else policy.default_threshold
        self.threshold = default if self.threshold is None else plain_threshold(self.threshold)
        thresholds = policy.check_threshold(self.threshold, len(self.exits))
        if self.task == "causal_lm":
            check_no_early_exit(policy, thresholds)
        profile = self.threshold_profile
        if isinstance(profile, dict) and (profile.get("threshold"), profile.get("policy")) != (
            self.threshold,
            self.policy,
        ):
            self.threshold_profile = None  # it speaks of another threshold
        elif profile is not None:
            ThresholdChoice.from_dict(profile)

    @contextlib.contextmanager
    def _plugin_named(self, key: str) -> Iterator[None]:
        """Names the module that registers a key, if the key is unknown and a stored config says it."""
        try:
            yield
        except UnknownNameError as error:
            module = self.plugins.get(key) if isinstance(self.plugins, dict) else None
            if module is None:
                raise
            shown = repr(str(module)[:80])  # it may hold anything: line ends and codes for terminals are escaped
            raise UnknownNameError(
                f"{error}; the config says that {key!r} comes from the module {shown}, which is not imported for you:"
                f" if you trust it, import it first (commands: --import {shown})"
            ) from error

    def _index_labels(self) -> None:
        """Makes class indices integers: transformers does so for those of its files and not for arguments."""
        names, indices = getattr(self, "id2label", None), getattr(self, "label2id", None)
        if isinstance(names, dict):
            self.id2label = {as_index(key): label for key, label in names.items()}
        if isinstance(indices, dict):
            self.label2id = {label: as_index(index) for label, index in indices.items()}

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, with the modules of methods that are not of this package."""
        values: dict[str, Any] = super().to_dict()
        values["plugins"] = {}
        tables: Sequence[Callable[[str], Entry[Any]]] = (get_head, get_policy, get_regression_policy, get_calibrator)
        for get, key in zip(tables, (self.head, self.policy, self.policy, self.calibrator), strict=True):
            with contextlib.suppress(UnknownNameError):  # no calibrator, or a policy of the other table
                module = get(str(key)).cls.__module__
                if module.split(".")[0] != __package__:
                    values["plugins"][key] = module
        values["plugins"] = values["plugins"] or None
        return values

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Writes the file whole or not at all: a config that is rewritten next to its weights survives a kill.

        Raises:
            CheckpointWriteError: The file cannot be written.
        """
        write_text(json_file_path, self.to_json_string(use_diff=use_diff))

    @classmethod
    def parse(cls, text: str | bytes, name: str) -> dict[str, Any]:
        """Reads a stored config without checking its values; see :func:`erde_hub._files.parse_json`."""
        values: dict[str, Any] = cls._decode_special_floats(parse_json(text, name))
        return values

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Reads a file as :meth:`parse` reads a text."""
        values: dict[str, Any] = cls._decode_special_floats(read_json(Path(path)))
        return values

    _dict_from_json_file = read  # what transformers reads files with

    @property
    def num_outputs(self) -> int:
        """Number of logits of an exit: classes, targets of a regression, or tokens of a language model."""
        if self.task == "classification":
            return int(self.num_labels)
        size = (self.backbone_kwargs or {}).get("vocab_size")
        if not isinstance(size, int) or isinstance(size, bool) or size < 2:
            raise ConfigError(f"backbone_kwargs of a language model must hold its vocab_size, got {size!r}")
        return size

    @property
    def num_exits(self) -> int:
        """Number of exits, the backbone's own classifier included."""
        return len(self.exits or []) + 1

    @classmethod
    def overridable(cls) -> set[str]:
        """Names of the fields that ``from_pretrained`` takes as arguments."""
        fields = {field.name for field in dataclasses.fields(cls)}
        return (fields | {"num_labels", "output_attentions"}) - {"dtype", "transformers_version"}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads a stored config; unknown keys in it warn, unknown keyword arguments are handed back by transformers.

        Raises:
            ConfigError: A value that is not allowed, of any field, transformers' own included.
        """
        _check_stored(config_dict)
        try:
            with _file_being_read():
                return super().from_dict(config_dict, **kwargs)
        except ErdeError:
            raise
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, StrictDataclassError) as error:
            raise ConfigError(f"the stored config is not one of erde_hub, or was edited: {error}") from error


#: More values than any input has: an image of 8192 x 8192 pixels has fewer.
_MAX_INPUT = 2**28
#: Classes without names that a file may ask for: transformers makes a name for each, before a weight is looked at.
_MAX_CLASSES = 100_000


def _check_stored(values: Any) -> None:
    """Refuses what transformers would act on before the fields are checked."""
    if not isinstance(values, dict):
        raise ConfigError(f"a stored config must be a mapping, got {type(values).__name__}")
    kind = values.get("model_type")
    if kind is not None and not str(kind).startswith(EarlyExitConfig.model_type):  # truncated models have one as well
        raise CheckpointError(
            f"a {kind!r} model without exits cannot be loaded as one with exits: load it with its own class and give it"
            " exits, EarlyExitWrapper(model, exits=...)"
        )
    number = values.get("num_labels")
    if number is not None and (
        isinstance(number, bool) or not isinstance(number, int) or not 0 < number <= _MAX_CLASSES
    ):
        raise ConfigError(
            f"num_labels={number!r} is no number of classes, 1 to {_MAX_CLASSES}; a file with more names them in"
            " id2label"
        )
    for key, value in values.items():
        if key.endswith(("attn_implementation", "experts_implementation")) and value not in (None, *ATTENTION):
            raise ConfigError(f"{key}={value!r} is not allowed in a stored config: one of {', '.join(ATTENTION)}")
        if key in ("auto_map", "quantization_config", "custom_pipelines") and value is not None:
            raise ConfigError(f"a stored config must not hold {key!r}: loading runs no code from it")


#: What a person sets: the fields of this class and those of transformers that say something about a classifier.
_FIELDS = sorted([*EarlyExitConfig.__annotations__, "num_labels", "id2label", "label2id", "problem_type", "dtype"])
_FIELDS.remove("model_type")


def as_index(key: Any) -> Any:
    """Returns a class index, which JSON and people write as text too, as an integer."""
    if isinstance(key, Integral):  # of NumPy too
        return int(key)
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 10 else key


def check_input_size(size: Any) -> tuple[int, ...]:
    """Returns the shape of one input, or raises :class:`ConfigError` where it is none."""
    if not isinstance(size, (list, tuple)) or not size or any(type(side) is not int or side < 1 for side in size):
        raise ConfigError(f"input_size must be a tuple of positive integers, such as (3, 224, 224), got {size!r}")
    if len(size) > 8 or math.prod(size) > _MAX_INPUT:
        raise ConfigError(f"input_size={size!r:.100} is absurd: inputs have up to {_MAX_INPUT} values")
    return tuple(size)
