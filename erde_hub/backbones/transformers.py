"""Classifiers of the transformers library."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel, TimmWrapperForImageClassification
from transformers.modeling_utils import local_torch_dtype
from transformers.models.auto import modeling_auto

from erde_hub.config import ATTENTION
from erde_hub.engine.hooks import ExitHook, HookRunner, parse_exit
from erde_hub.engine.stages import Stage
from erde_hub.errors import ConfigError, ErdeError, ExitPointError, InputTypeError, ShapeError, nearest, unknown_name
from erde_hub.heads import FeatureSpec
from erde_hub.tasks import REGRESSION

from .base import BackboneAdapter, find_feature
from .decoders import read_decoder
from .layouts import FeatureFormats
from .rebuild import check_same_network
from .sequences import SequenceRunner, add_sync_hooks
from .timm import TimmAdapter, check_backbone_kwargs, check_storable
from .tracing import StageCall, Trace
from .transformers_families import EXTRA_KEYS, TEXT, VISION, Family, decoder_family
from .transformers_preprocessing import known_preprocessing
from .transformers_staged import pvt_stages

if TYPE_CHECKING:
    from erde_hub.config import EarlyExitConfig

#: Keys of a backbone's config that the early-exit config holds itself, or that say nothing about the network.
_ELSEWHERE = frozenset(
    {"transformers_version", "architectures", "model_type", "_name_or_path", "dtype", "torch_dtype", "return_dict"}
    | {"output_hidden_states", "output_attentions", "id2label", "label2id", "num_labels", "problem_type"}
    | {"num_classes", "label_names", "use_cache", "pretrained_cfg"}
    | {"stage_names", "out_features", "out_indices"}  # of feature extractors
)
#: Keys that would fetch or run something.
_REFUSED = frozenset({"auto_map", "quantization_config", "custom_pipelines", "base_model_name_or_path"})
_TEXT_LENGTH = 128
#: What constructors raise where values of a config contradict each other.
_UNFIT = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError)


def _class_names(table: dict[str, Any]) -> dict[str, str]:
    """Class name to model type, for one of transformers' tables of heads."""
    found = {}
    for model_type, names in table.items():
        for name in (names,) if isinstance(names, str) else names:
            found[name] = model_type
    return found


_IMAGE_CLASSES = _class_names(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
_TEXT_CLASSES = _class_names(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
_CAUSAL_CLASSES = _class_names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


class TransformersAdapter(BackboneAdapter):
    """Knows the families of :mod:`~erde_hub.backbones.transformers_families`; their config rebuilds them."""

    library: ClassVar[str] = "transformers"
    classes_attribute: ClassVar[str] = "config.num_labels"
    _timm: ClassVar[TimmAdapter] = TimmAdapter()

    def matches(self, module: nn.Module) -> bool:
        """Takes every transformers model, to say which of them can have exits."""
        return isinstance(module, PreTrainedModel)

    def describe(self, module: nn.Module) -> dict[str, Any]:
        """Class name, input size, labels and preprocessing.

        Raises:
            InputTypeError: Not a classifier of a known family; a quantised one; several labels per sample; no padding
                token where batches need one.
        """
        name = type(module).__name__
        config: Any = module.config
        if name not in _known_classes() or getattr(transformers, name, None) is not type(module):
            same_body = [c for c in _known_classes() if c.startswith(name.removesuffix("Model") + "For")]
            hint = f": load it as {same_body[0]}" if same_body else nearest(name, _known_classes())
            raise InputTypeError(
                f"{name} is no classifier or language model of transformers whose stages are known{hint} (families:"
                f" {', '.join([*VISION, *TEXT, 'timm_wrapper'])}); any other model can be wrapped in an nn.Module of"
                " your own that takes one tensor and returns logits"
            )
        if getattr(config, "quantization_config", None) is not None:
            raise InputTypeError(f"this {name} is quantised: wrap the float model, and quantise what you deploy")
        causal = self.task(module) == "causal_lm"
        if not causal and config.problem_type not in (None, "single_label_classification", REGRESSION):
            raise InputTypeError(
                f"{name} has problem_type={config.problem_type!r}: exits give each sample one label of several, so wrap"
                " a model with problem_type='single_label_classification', or real numbers, 'regression'"
            )
        if self.is_text(module):
            last = self._family(module).pooling(config, "")[0] == "last"
            if last and not causal and config.get_text_config().pad_token_id is None:
                raise InputTypeError(
                    f"{name} has no padding token, so it takes no batch of several texts: set model.config.pad_token_id"
                )
            longest = getattr(config, "max_position_embeddings", None) or _TEXT_LENGTH
            size, preprocessing = [min(_TEXT_LENGTH, int(longest))], None
        elif isinstance(module, TimmWrapperForImageClassification):
            facts = self._timm.describe(module.timm_model)
            size, preprocessing = facts["input_size"], facts["preprocessing"]
        else:
            preprocessing = known_preprocessing(config)
            side = getattr(config, "image_size", None) or (preprocessing or {}).get("size") or 224
            size = [int(getattr(config, "num_channels", 3)), *([side, side] if isinstance(side, int) else side)]
        labels = None if causal else _labels(config)
        return {
            "architecture": name,
            "input_size": size,
            "preprocessing": preprocessing,
            "id2label": labels,
            "problem_type": REGRESSION if config.problem_type == REGRESSION and not causal else None,
        }

    def creation_arguments(self, module: nn.Module, given: dict[str, Any] | None) -> dict[str, Any]:
        """The backbone's own config, without what the early-exit config holds.

        Raises:
            ConfigError: ``backbone_kwargs`` was given, or the config holds what JSON cannot store.
        """
        if given:
            raise ConfigError(
                f"backbone_kwargs={given!r}: a transformers model carries its own config, which is stored; leave it out"
            )
        config: Any = module.config
        known = _config_keys(type(config))  # type: ignore[arg-type]
        values = {k: v for k, v in config.to_dict().items() if k in known}
        attention = getattr(config, "_attn_implementation", None)
        if attention not in (None, "sdpa", self._default_attention(type(module))):
            values["attn_implementation"] = attention
        self._check_arguments(values, type(module))
        return values

    def notable_arguments(self, config: EarlyExitConfig) -> dict[str, Any]:
        """Leaves out what the class of the network's config has by default."""
        cls: Any = getattr(transformers, str(config.architecture), None)
        defaults = {} if cls is None else cls.config_class().to_dict()
        given = (config.backbone_kwargs or {}).items()
        return {key: value for key, value in given if key not in defaults or defaults[key] != value}

    def with_attention(self, config: EarlyExitConfig, attention: str) -> dict[str, Any]:
        """What is built with: the config of a transformers model names it."""
        values = dict(config.backbone_kwargs or {})
        values.pop("attn_implementation", None)
        usual = self._default_attention(getattr(transformers, str(config.architecture), nn.Module))
        return values if attention == usual else {**values, "attn_implementation": attention}

    def build(self, config: EarlyExitConfig) -> nn.Module:
        """Builds a class that transformers itself registers, from the stored config; no remote code, nothing fetched.

        Raises:
            ConfigError: ``architecture`` is no such class, or ``backbone_kwargs`` holds what its config does not take.
        """
        name = config.architecture
        if not isinstance(name, str) or name not in _known_classes():
            raise unknown_name("architecture (transformers class)", name, _known_classes())
        cls: Any = getattr(transformers, name)
        values = dict(config.backbone_kwargs or {})
        self._check_arguments(values, cls)
        attention = values.pop("attn_implementation", None)
        try:
            own = cls.config_class(**values)
            if config.task == "classification":
                own.num_labels, own.problem_type = config.num_labels, config.problem_type
                own.id2label, own.label2id = dict(config.id2label), dict(config.label2id)
            return cls._from_config(own, **({"attn_implementation": attention} if attention else {}))
        except (*_UNFIT, StrictDataclassError) as error:
            raise ConfigError(f"backbone_kwargs do not fit {name}: {error}") from error

    def check_rebuild(self, module: nn.Module, config: EarlyExitConfig) -> nn.Module:
        """Rebuilds from the config and compares; see :func:`~erde_hub.backbones.rebuild.check_same_network`.

        Raises:
            RebuildError: Other weights or another answer: the module was changed after it was built.
        """
        size = (1, *(config.input_size or ()))

        def make_input(generator: torch.Generator) -> Tensor:
            if self.is_text(module):
                vocabulary = int(module.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
                return torch.randint(0, vocabulary, (1, min(size[1], 16)), generator=generator)
            return torch.randn(size, generator=generator)

        # Language models are large: a copy in float32 would take twice the memory of one in bfloat16.
        own = next(module.parameters()).dtype if self.task(module) == "causal_lm" else torch.get_default_dtype()
        with local_torch_dtype(own):
            rebuilt = self.build(config)
        return check_same_network(
            module,
            rebuilt,
            make_input,
            self.logits,
            str(config.architecture),
            "; its layers were changed after it was built: change its config instead, and build it from that",
            self.classifier_names(module),
        )

    def candidates(self, module: nn.Module, traced: Trace) -> list[str]:
        """The stages of the family; a layer that is called several times is named with each call."""
        if isinstance(module, TimmWrapperForImageClassification):
            return [_INSIDE + n for n in self._timm.candidates(module.timm_model, _inside(traced))]
        family, body = self._family(module), self._body(module)
        names = []
        for name, calls in traced.calls.items():
            if family.stage(body, name):
                names += [name] if len(calls) == 1 else [f"{name}@{i}" for i in range(len(calls))]
        return names[:-1] if self.task(module) == "causal_lm" else names  # after the last layer the model answers

    def feature_spec(
        self, module: nn.Module, name: str, call: StageCall, traced: Trace, formats: FeatureFormats
    ) -> FeatureSpec:
        """Layout of the family; an output that does not have it is an error, not a guess.

        Raises:
            ExitPointError: An output of other axes, or of another width than the config says.
            ConfigError: The user says another layout.
        """
        if isinstance(module, TimmWrapperForImageClassification):
            inner = name.removeprefix(_INSIDE)
            return self._timm.feature_spec(module.timm_model, inner, call, _inside(traced), formats)
        family, path = self._family(module), parse_exit(name)[0]
        feature, leaf, batched = find_feature(call.output, traced.batch)
        shape = tuple(int(s) for s in feature.shape)
        layout = {2: "NC", 3: "NLC", 4: "NCHW" if family.format == "NCHW" else None}.get(feature.ndim)
        if layout is None or shape[0] != traced.batch:
            raise ExitPointError(
                f"exit {name!r}: it is not known how the axes of an output of shape {shape} lie; exit points are"
                f" {', '.join(self.candidates(module, traced))}"
            )
        if formats.of(name, feature.ndim) not in (None, layout):
            raise ConfigError(f"feature_format of exit {name!r}: features of {type(module).__name__} are {layout}")
        width = shape[1] if layout in ("NCHW", "NC") else shape[2]
        declared = self._declared_width(module, path)
        if declared not in (None, width) and layout == family.format:
            raise ExitPointError(
                f"exit {name!r}: the config declares width {declared}, but the output has shape {shape} in layout"
                f" {layout}"
            )
        size = {"NC": (), "NLC": shape[1:2], "NCHW": shape[2:]}[layout]
        return self._spec(module, path, width, layout, size, leaf, batched)

    def declared_spec(self, module: nn.Module, name: str) -> FeatureSpec:
        """From the config, for the families that state the width of a stage there."""
        path = parse_exit(name)[0]
        if not isinstance(module, TimmWrapperForImageClassification):
            width = self._declared_width(module, path)
            if width is not None:
                return self._spec(module, path, width, self._family(module).format, (), None, ())
        return super().declared_spec(module, name)

    def classifier_names(self, module: nn.Module) -> list[str]:
        """What the heads of the library are called; the TimmWrapper's classifier is timm's."""
        if isinstance(module, TimmWrapperForImageClassification):
            return [_INSIDE + n for n in self._timm.classifier_names(module.timm_model)]
        return [name for name in _CLASSIFIERS if isinstance(getattr(module, name, None), nn.Module)]

    def stages(self, module: nn.Module, exits: Sequence[str], checkpointed: bool) -> list[Stage] | None:
        """PVT reshapes between its stages with the number of samples that it began with, so it runs step by step."""
        return pvt_stages(module, exits)

    def needs_stages(self, module: nn.Module) -> bool:
        """PVT does, see :meth:`stages`."""
        return pvt_stages(module, ()) is not None

    def logits(self, output: Any) -> Tensor:
        """``logits`` of the output, whose first element they are in tuple form."""
        found = getattr(output, "logits", None)
        if found is None and isinstance(output, tuple) and output:
            found = output[0]
        return super().logits(output if found is None else found)

    def declared_classes(self, module: nn.Module) -> int | None:
        """``config.num_labels``; a language model's is its vocabulary."""
        if self.task(module) == "causal_lm":
            return int(module.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
        return int(module.config.num_labels)  # type: ignore[union-attr,arg-type]

    def set_gradient_checkpointing(self, module: nn.Module, enable: bool) -> bool:
        """Switches it in the backbone, in the form that does not re-enter autograd: exits inside a region need that."""
        if not getattr(module, "supports_gradient_checkpointing", False):
            return False
        switch: Any = module._set_gradient_checkpointing
        if isinstance(module, TimmWrapperForImageClassification):
            switch(enable)
        else:
            switch(enable, gradient_checkpointing_func=_checkpoint)
        return True

    # Text

    def is_text(self, module: nn.Module) -> bool:
        """Tells whether the model takes token ids."""
        return type(module).__name__ in {**_TEXT_CLASSES, **_CAUSAL_CLASSES}

    def task(self, module: nn.Module) -> str:
        """Language models are told by their class."""
        return "causal_lm" if type(module).__name__ in _CAUSAL_CLASSES else "classification"

    def add_sync_hooks(self, module: nn.Module, exits: Sequence[str]) -> list[Any]:
        """Hooks for masks and positions, for text models."""
        if not self.is_text(module) or self.task(module) == "causal_lm":
            return []
        return add_sync_hooks(module, self._body(module), [parse_exit(name)[0] for name in exits])

    def hook_runner(self, module: nn.Module, exit_hooks: Sequence[ExitHook], sync_hooks: Sequence[Any]) -> HookRunner:
        """Text models need masks in step with the batch."""
        return (SequenceRunner if sync_hooks else HookRunner)(module, exit_hooks, sync_hooks)

    def token_mask(self, module: nn.Module, kwargs: dict[str, Any]) -> Tensor | None:
        """Tokens that the model's own pooling counts: unmasked ones, or those up to the last that is no padding."""
        if self.task(module) == "causal_lm":
            return None
        if self._family(module).pooling(module.config, "")[0] != "last":
            return kwargs.get("attention_mask")
        ids = kwargs.get("input_ids")
        return None if ids is None else ids != module.config.get_text_config().pad_token_id  # type: ignore[union-attr,operator]

    def explain_failure(self, module: nn.Module, inputs: dict[str, Any]) -> ErdeError | None:
        """Token ids, types or positions outside their tables, or more tokens than the model has positions."""
        ids, embeds, name = inputs.get("input_ids"), inputs.get("inputs_embeds"), type(module).__name__
        main = embeds if ids is None else ids
        if main is None or main.is_meta or not hasattr(module, "get_input_embeddings"):
            return None
        positions, types = _table(module, _POSITIONS), _table(module, ("token_type_embeddings",))
        rows, first = (0, 0) if positions is None else _places(positions)
        words = module.get_input_embeddings().num_embeddings  # type: ignore[operator]
        own_tokenizer = "use its own tokenizer, or model.resize_token_embeddings(len(tokenizer))"
        held = [
            ("input_ids", words, own_tokenizer),
            ("token_type_ids", 0 if types is None else types.num_embeddings, "leave them out"),
            ("position_ids", rows, "cut the texts, or leave them out"),
        ]
        for key, count, advice in held:
            value = inputs.get(key)
            if value is not None and count and value.numel():
                low, high = int(value.min()), int(value.max())
                if low < 0 or high >= count:
                    what = f"the vocabulary of {name} is" if key == "input_ids" else f"{name} takes"
                    return InputTypeError(
                        f"{key} hold {low if low < 0 else high}, and {what} 0 to {count - 1}: {advice}"
                    )
        if positions is None or inputs.get("position_ids") is not None:
            return None
        tokens = main.shape[1]
        if first and ids is not None and tokens <= rows:
            tokens = int((ids != positions.padding_idx).sum(1).max())
        if tokens > rows - first:
            return ShapeError(
                f"texts of {tokens} tokens are longer than {name} takes ({rows - first} positions): cut them,"
                " tokenizer(texts, truncation=True, max_length=...)"
            )
        return None

    # The family's facts

    def _family(self, module: nn.Module) -> Family:
        model_type = str(module.config.model_type)  # type: ignore[union-attr]
        if not self.is_text(module):
            return VISION[model_type]
        if model_type in TEXT:
            return TEXT[model_type]
        layers = read_decoder(module).layers.removeprefix(f"{self._body(module)}.")
        return decoder_family(rf"{re.escape(layers)}\.(\d+)")

    def _body(self, module: nn.Module) -> str:
        return str(module.base_model_prefix)

    def _declared_width(self, module: nn.Module, path: str) -> int | None:
        family = self._family(module)
        stage = family.stage(self._body(module), path)
        if stage is None or family.widths is None:
            return None
        widths = getattr(module.config, family.widths, None)
        if isinstance(widths, (list, tuple)):
            return int(widths[int(stage[1])]) if int(stage[1]) < len(widths) else None
        return int(widths) if isinstance(widths, int) else None

    def _spec(
        self,
        module: nn.Module,
        path: str,
        width: int,
        layout: str,
        size: tuple[int, ...],
        leaf: int | None,
        batched: tuple[int, ...],
    ) -> FeatureSpec:
        if layout != "NLC":
            return FeatureSpec(width, layout, size, output_index=leaf, batch_outputs=batched)
        pool, prefix = self._family(module).pooling(module.config, path)
        if self.task(module) == "causal_lm":
            return FeatureSpec(width, layout, (), "none", 0, leaf, batched)
        if self.is_text(module):  # texts differ in length
            return FeatureSpec(width, layout, (), pool, prefix, leaf, batched, masked=True)
        return FeatureSpec(width, layout, size, pool, prefix, leaf, batched)

    def _check_arguments(self, values: dict[str, Any], cls: Any) -> None:
        for key, value in values.items():
            if key in _REFUSED:
                raise ConfigError(f"backbone_kwargs must not hold {key!r}: a config fetches nothing and runs no code")
            if key == "attn_implementation" and value not in ATTENTION:
                raise ConfigError(f"attn_implementation must be one of {', '.join(ATTENTION)}, got {value!r}")
        check_storable(values)
        known = _config_keys(cls.config_class)
        for key in values:
            if key not in known and key != "attn_implementation":
                raise ConfigError(f"backbone_kwargs: {cls.config_class.__name__} has no {key!r}{nearest(key, known)}")
        if cls is TimmWrapperForImageClassification:
            self._timm.check_architecture(values.get("architecture"))
            arguments = values.get("model_args") or {}
            if not isinstance(arguments, dict):
                raise ConfigError(f"backbone_kwargs['model_args'] must be a dict, got {arguments!r}")
            check_backbone_kwargs(arguments)

    @staticmethod
    def _default_attention(cls: type[nn.Module]) -> str:
        return "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"


#: Names of the first layers behind the body, as the classes of the library call them.
_CLASSIFIERS = ("classifier", "cls_classifier", "score", "head", "pre_classifier", "lm_head", "embed_out")

#: What tables of positions are called.
_POSITIONS = ("position_embeddings", "wpe", "embed_positions")

#: Where the wrapper of timm's models in transformers keeps them.
_INSIDE = "timm_model."


def _table(module: nn.Module, names: Sequence[str]) -> nn.Embedding | None:
    """Returns the first table of vectors that has one of these names."""
    tables = (m for n, m in module.named_modules() if n.rpartition(".")[2] in names and isinstance(m, nn.Embedding))
    return next(tables, None)


def _places(positions: nn.Embedding) -> tuple[int, int]:
    """Returns how many positions a table has, and the first that a token gets: RoBERTa's is behind that of padding."""
    first = 0 if positions.padding_idx is None else positions.padding_idx + 1
    return positions.num_embeddings - getattr(positions, "offset", 0), first


def longest_text(module: nn.Module) -> int | None:
    """Returns how many tokens a text may have: by the table of positions, else by the config; None where any number."""
    positions = _table(module, _POSITIONS)
    if positions is None:
        return getattr(module.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr,operator]
    rows, first = _places(positions)
    return rows - first


def _known_classes() -> list[str]:
    """Names of the classes whose stages are known, and which this transformers has; of language models all."""
    vision = [n for n, t in _IMAGE_CLASSES.items() if t in VISION or t == "timm_wrapper"]
    text = [n for n, t in _TEXT_CLASSES.items() if t in TEXT]
    causal = [n for n, t in _CAUSAL_CLASSES.items() if t not in TEXT or TEXT[t].decoder]
    return [n for n in (*vision, *text, *causal) if hasattr(transformers, n)]


@functools.cache
def _config_keys(cls: type[PreTrainedConfig]) -> frozenset[str]:
    """What says something about the network among the keys that a config of that class holds."""
    fields = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    extra = EXTRA_KEYS.get(cls.model_type, frozenset())
    return frozenset((fields | set(cls().to_dict()) | extra) - _ELSEWHERE)


def _inside(traced: Trace) -> Trace:
    """The trace of the timm model inside transformers' wrapper."""
    calls = {n.removeprefix(_INSIDE): c for n, c in traced.calls.items() if n.startswith(_INSIDE)}
    return dataclasses.replace(traced, calls=calls)


def _labels(config: PreTrainedConfig) -> dict[int, str] | None:
    """Class names, where the config has other ones than those made up from their numbers."""
    labels = {int(i): str(label) for i, label in (config.id2label or {}).items()}
    return None if all(label == f"LABEL_{i}" for i, label in labels.items()) else labels


def _checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, **kwargs)
