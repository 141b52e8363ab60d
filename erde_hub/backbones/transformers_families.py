"""The families of the transformers library: where their stages are, how their features lie, how they pool tokens.

Names, layouts and pooling are those of each family's own forward; nothing is concluded from the sizes of axes. Every
row is tried by ``recipes/studies/support_matrix.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Pooling and the number of tokens in front of the patches, from the backbone's config and the name of a stage.
TokenPooling = Callable[[Any, str], tuple[str, int]]


def _mean(config: Any, name: str) -> tuple[str, int]:
    return "avg", 0


def _class_token(config: Any, name: str) -> tuple[str, int]:
    return "token", 1


def _last_token(config: Any, name: str) -> tuple[str, int]:
    return "last", 0


def _deit(config: Any, name: str) -> tuple[str, int]:
    return "token", 2  # class and distillation token


def _beit(config: Any, name: str) -> tuple[str, int]:
    return ("avg", 1) if config.use_mean_pooling else ("token", 1)


def _registers(config: Any, name: str) -> tuple[str, int]:
    return "token", 1 + int(getattr(config, "num_register_tokens", 0) or 0)


def _pvt(config: Any, name: str) -> tuple[str, int]:
    last = re.search(rf"\.block\.{len(config.depths) - 1}(\.|$)", name)
    return ("token", 1) if last else ("avg", 0)  # the class token joins in the last stage


def _modernbert(config: Any, name: str) -> tuple[str, int]:
    return ("avg", 0) if config.classifier_pooling == "mean" else ("token", 1)


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        stages: Pattern of the names of its stages, below the body of the model.
        format: How the features of a stage lie: ``NCHW``, or ``NLC`` for tokens.
        pooling: How the model itself pools tokens.
        widths: Attribute of its config that holds the widths: one number for all stages, or a list of one per stage.
        decoder: It also comes as a causal language model.
    """

    stages: str
    format: str = "NLC"
    pooling: TokenPooling = _mean
    widths: str | None = None
    decoder: bool = False

    def stage(self, body: str, name: str) -> re.Match[str] | None:
        """Matches the name of a stage, its call aside."""
        return re.fullmatch(rf"{re.escape(body)}\.{self.stages}", name)


_STAGES = r"encoder\.stages\.(\d+)"
_LAYERS = r"(?:encoder\.)?layers?\.(\d+)"


def _maps(stages: str, widths: str | None = None) -> Family:
    return Family(stages, "NCHW", widths=widths)


def _encoder(pooling: TokenPooling = _class_token) -> Family:
    return Family(_LAYERS, pooling=pooling, widths="hidden_size")


def decoder_family(stages: str = r"layers\.(\d+)") -> Family:
    """Returns what is common to causal language models, and to the classifiers on them."""
    return Family(stages, pooling=_last_token, widths="hidden_size", decoder=True)


#: By ``config.model_type``.
VISION: dict[str, Family] = {
    "resnet": _maps(_STAGES, "hidden_sizes"),
    "regnet": _maps(_STAGES, "hidden_sizes"),
    "bit": _maps(_STAGES),
    "textnet": _maps(_STAGES),
    "convnext": _maps(_STAGES, "hidden_sizes"),
    "convnextv2": _maps(_STAGES, "hidden_sizes"),
    "mobilenet_v1": _maps(r"layer\.(\d+)"),
    "mobilenet_v2": _maps(r"layer\.(\d+)"),
    "mobilevit": _maps(r"encoder\.layer\.(\d+)"),
    "mobilevitv2": _maps(r"encoder\.layer\.(\d+)"),
    "efficientnet": _maps(r"encoder\.blocks\.(\d+)"),
    "poolformer": _maps(r"encoder\.block\.(\d+)\.\d+"),
    "swiftformer": _maps(r"encoder\.network\.(\d+)"),
    "segformer": _maps(r"(?:encoder\.)?stages\.(\d+)"),
    "vit": _encoder(),
    "vit_msn": _encoder(),
    "deit": _encoder(_deit),
    "beit": _encoder(_beit),
    "data2vec-vision": _encoder(_beit),
    "dinov2": _encoder(_registers),
    "dinov2_with_registers": _encoder(_registers),
    "ijepa": _encoder(_mean),
    "swin": Family(r"encoder\.layers\.(\d+)"),
    "swinv2": Family(r"encoder\.layers\.(\d+)"),
    "donut-swin": Family(r"encoder\.layers\.(\d+)"),
    "focalnet": Family(_STAGES),
    "hiera": Family(_STAGES),
    "levit": Family(_STAGES),
    "pvt": Family(r"encoder\.block\.(\d+)\.\d+", pooling=_pvt),
    "pvt_v2": Family(r"encoder\.layers\.(\d+)"),
}

#: By ``config.model_type``.
TEXT: dict[str, Family] = {
    "bert": _encoder(),
    "roberta": _encoder(),
    "xlm-roberta": _encoder(),
    "camembert": _encoder(),
    "electra": _encoder(),
    "deberta-v2": _encoder(),
    "mpnet": _encoder(),
    "albert": Family(r"encoder\.albert_layer_groups\.(\d+)", pooling=_class_token, widths="hidden_size"),
    "distilbert": Family(r"transformer\.layer\.(\d+)", pooling=_class_token, widths="hidden_size"),
    "modernbert": _encoder(_modernbert),
    "llama": decoder_family(),
    "mistral": decoder_family(),
    "qwen2": decoder_family(),
    "qwen3": decoder_family(),
    "phi3": decoder_family(),
    "gemma2": decoder_family(),
    "smollm3": decoder_family(),
    "gpt_neox": decoder_family(),
    "gpt2": decoder_family(r"h\.(\d+)"),
    "opt": decoder_family(r"decoder\.layers\.(\d+)"),
}

#: What models read from their configs beside the fields that the config's class declares.
EXTRA_KEYS: dict[str, frozenset[str]] = {
    "deberta-v2": frozenset(
        {"position_buckets", "norm_rel_ebd", "share_att_key", "attention_head_size", "embedding_size"}
        | {"conv_kernel_size", "conv_act", "conv_groups", "cls_dropout"}
    ),
}
