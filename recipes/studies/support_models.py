"""One small network of every family, for the support matrix and for the tests.

timm's families are the files of its ``models`` folder. For those in :data:`TIMM` the network and its size are given, so
that a check takes a second; for every other one, also for families of a later timm, the smallest member is found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import timm
import torch
import transformers
from timm.models import _registry
from torch import nn

from erde_hub.backbones.tracing import trace
from erde_hub.errors import ErdeError

CLASSES = 5

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
_STAGES = {"depths": [1, 1, 1, 1]}

#: Family to network, height and width of its inputs, creation arguments.
TIMM: dict[str, tuple[str, int, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", 32, _VIT),
    "cait": ("cait_xxs24_224", 32, {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}),
    "coat": (
        "coat_tiny",
        64,
        {"img_size": 64, "embed_dims": [16] * 4, "serial_depths": [1] * 4, "parallel_depth": 3},
    ),
    "convnext": ("convnext_atto", 64, {**_STAGES, "dims": [8, 16, 24, 32]}),
    "crossvit": ("crossvit_tiny_240", 240, {"embed_dim": [24, 24], "depth": [[1, 2, 0]] * 3}),
    "deepseek_vit": ("deepseek_vit_412m", 56, {"depth": 3, "embed_dim": 96, "num_heads": 3}),
    "deit": ("deit_tiny_distilled_patch16_224", 32, _VIT),
    "efficientnet": ("mnasnet_small", 64, {}),
    "efficientvim": ("efficientvim_m1", 64, {"embed_dim": [16, 24, 32], "depths": [1, 1, 1]}),
    "efficientvit_mit": ("efficientvit_b0", 64, {}),
    "eva": ("eva02_tiny_patch14_224", 32, {**_VIT, "patch_size": 8}),
    "fastvit": ("fastvit_t8", 64, {}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "hiera": ("hiera_tiny_224", 64, {"img_size": [64, 64], "embed_dim": 16, "stages": [1, 1, 1, 1]}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "levit": ("levit_128s", 64, {"img_size": 64, "depth": [1, 1, 1]}),
    "maxxvit": ("coatnet_nano_rw_224", 64, {"img_size": 64}),
    "metaformer": ("poolformer_s12", 64, {}),
    "mlp_mixer": ("mixer_s32_224", 64, {"img_size": 64}),
    "mobilenetv3": ("lcnet_035", 64, {}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "mvitv2": ("mvitv2_tiny", 64, {"img_size": 64}),
    "pit": ("pit_ti_224", 64, {"img_size": 64, "depth": [1, 2, 1]}),
    "pvt_v2": ("pvt_v2_b0", 64, {}),
    "qwen3_vit": ("qwen3_vit_88m", 64, {"depth": 3, "embed_dim": 96, "num_heads": 3}),
    "regnet": ("regnetx_002", 64, {}),
    "repvit": ("repvit_m0_9", 64, {}),
    "resnet": ("resnet10t", 64, {}),
    "rexnet": ("rexnet_100", 64, {}),
    "sequencer": ("sequencer2d_s", 64, {"layers": [1] * 4, "embed_dims": [24] * 4, "hidden_sizes": [6] * 4}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 56, {"img_size": 56, "embed_dim": 24, "depths": [1, 1, 1]}),
    "tnt": ("tnt_s_legacy_patch16_224", 64, {"img_size": 64, "embed_dim": 24, "depth": 3}),
    "twins": ("twins_svt_small", 64, {"img_size": 64, "embed_dims": [16, 16, 32, 32], "depths": [1, 1, 2, 1]}),
    "vision_transformer": ("vit_tiny_patch16_224", 32, _VIT),
    "volo": ("volo_d1_224", 64, {"img_size": 64}),
    "xcit": ("xcit_nano_12_p16_224", 64, {"embed_dim": 32, "depth": 3}),
}

#: Inputs that are tried where none is given.
_SIZES = (64, 96, 128, 160, 192, 224, 256)
_SMALL = (
    "atto",
    "femto",
    "pico",
    "nano",
    "xxs",
    "_xs",
    "tiny",
    "small",
    "_s",
    "b0",
    "050",
    "18",
    "_t",
    "m0",
    "lite",
    "11",
)

_TOKENS = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
_PATCHES = {"image_size": 32, "patch_size": 8}
_MAPS = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_PYRAMID = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]}
_TEXT = {**_TOKENS, "vocab_size": 99, "max_position_embeddings": 40}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_TEXT, **_SPECIAL, "num_key_value_heads": 1}

#: Name of a class without its ending, arguments of its config, and for images height and width of its inputs.
TRANSFORMERS_VISION: dict[str, tuple[dict[str, Any], int]] = {
    "ResNet": ({"embedding_size": 8, "layer_type": "basic", **_MAPS}, 32),
    "RegNet": ({"embedding_size": 8, "groups_width": 8, **_MAPS}, 32),
    "Bit": ({"embedding_size": 8, "hidden_sizes": [32, 32, 64, 64], "depths": [1] * 4, "num_groups": 8}, 32),
    "ConvNext": (_MAPS, 32),
    "ConvNextV2": (_MAPS, 32),
    "MobileNetV1": ({"depth_multiplier": 0.25, "image_size": 64}, 64),
    "MobileNetV2": ({"depth_multiplier": 0.35, "image_size": 64}, 64),
    "MobileViT": (
        {"image_size": 64, "hidden_sizes": [8] * 3, "neck_hidden_sizes": [8] * 6 + [16], "num_attention_heads": 2},
        64,
    ),
    "MobileViTV2": ({"image_size": 64, "width_multiplier": 0.5}, 64),
    "EfficientNet": (
        {"width_coefficient": 0.25, "depth_coefficient": 0.5, "image_size": 64, "hidden_dim": 320},
        64,
    ),
    "ViT": ({**_TOKENS, **_PATCHES}, 32),
    "DeiT": ({**_TOKENS, **_PATCHES}, 32),
    "Beit": ({**_TOKENS, **_PATCHES}, 32),
    "Data2VecVision": ({**_TOKENS, **_PATCHES}, 32),
    "ViTMSN": ({**_TOKENS, **_PATCHES}, 32),
    "IJepa": ({**_TOKENS, **_PATCHES}, 32),
    "Dinov2": ({**{k: v for k, v in _TOKENS.items() if k != "intermediate_size"}, **_PATCHES}, 32),
    "Dinov2WithRegisters": ({**{k: v for k, v in _TOKENS.items() if k != "intermediate_size"}, **_PATCHES}, 32),
    "Swin": ({**_SWIN, "window_size": 2}, 32),
    "Swinv2": ({**_SWIN, "window_size": 2}, 32),
    "Hiera": ({"image_size": [64, 64], "embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]}, 64),
    "Pvt": ({"image_size": 64, "mlp_ratios": [2] * 4, **_PYRAMID}, 64),
    "PvtV2": ({"image_size": 64, "mlp_ratios": [2] * 4, **_PYRAMID}, 64),
    "Segformer": ({"mlp_ratios": [2] * 4, **_PYRAMID}, 64),
    "PoolFormer": ({"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4}, 64),
    "FocalNet": ({"image_size": 32, "embed_dim": 8, "depths": [1] * 4}, 32),
    "Levit": (
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2] * 3, "depths": [1] * 3}
        | {"key_dim": [8] * 3},
        64,
    ),
    "SwiftFormer": ({"image_size": 64, "embed_dims": [16, 24, 32, 48], "depths": [1] * 4}, 64),
    "TextNet": ({}, 64),
    "TimmWrapper": ({"architecture": "convnext_atto", "model_args": {**_STAGES, "dims": [8, 16, 24, 32]}}, 32),
}
TRANSFORMERS_TEXT: dict[str, dict[str, Any]] = {
    "Bert": _TEXT,
    "DistilBert": {
        "vocab_size": 99, "dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 40
    },
    "Roberta": _TEXT,
    "XLMRoberta": _TEXT,
    "Camembert": _TEXT,
    "Albert": {**_TEXT, "embedding_size": 8},
    "DebertaV2": {
        **_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
        "share_att_key": True, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3, "conv_act": "gelu",
    },
    "Electra": {**_TEXT, "embedding_size": 8},
    "MPNet": _TEXT,
    "ModernBert": {
        **_TEXT, **_SPECIAL, "cls_token_id": 1, "sep_token_id": 2, "classifier_pooling": "mean", "local_attention": 4
    },
    "Llama": _DECODER,
    "Mistral": _DECODER,
    "Qwen2": _DECODER,
    "Qwen3": {**_DECODER, "head_dim": 8},
    "Gemma2": {**_DECODER, "head_dim": 8},
    "Phi3": _DECODER,
    "SmolLM3": _DECODER,
    "GPTNeoX": {**_TEXT, **_SPECIAL},
    "GPT2": {"vocab_size": 99, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 40, **_SPECIAL},
    "OPT": {
        **{k: v for k, v in _TEXT.items() if k != "intermediate_size"}, **_SPECIAL, "ffn_dim": 32,
        "word_embed_proj_dim": 16,
    },
}  # fmt: skip


def transformers_model(name: str) -> nn.Module:
    """A fresh classifier; images where ``name`` is one of those, else texts."""
    vision = name in TRANSFORMERS_VISION
    arguments = TRANSFORMERS_VISION[name][0] if vision else TRANSFORMERS_TEXT[name]
    cls: Any = getattr(transformers, f"{name}For{'Image' if vision else 'Sequence'}Classification")
    config = cls.config_class(**arguments)
    config.num_labels = CLASSES
    return cls(config)


def timm_families() -> dict[str, list[str]]:
    """The installed timm's files of models, each with the names of its networks."""
    families: dict[str, list[str]] = defaultdict(list)
    for name in timm.list_models():
        module = str(_registry._model_to_module[name])
        if timm.model_entrypoint(name).__module__.startswith("timm."):
            families[module].append(name)
    return dict(sorted(families.items()))


def timm_choice(family: str, members: Sequence[str]) -> tuple[str, int, dict[str, Any]]:
    """The network of a family that is tried: the one in :data:`TIMM`, else the smallest that classifies.

    Raises:
        ErdeError: None runs on any of the usual sizes of images.
    """
    if family in TIMM:
        return TIMM[family]
    small_first = sorted(members, key=lambda name: (not any(mark in name for mark in _SMALL), len(name)))
    sizes: list[tuple[int, str]] = []
    for name in small_first[:8]:
        with torch.device("meta"):
            module = timm.create_model(name, num_classes=CLASSES)
        sizes.append((sum(p.numel() for p in module.parameters()), name))
    name = min(sizes)[1]
    own = timm.get_pretrained_cfg(name, allow_unregistered=False)
    error: Exception | None = None
    for side in (*_SIZES, *((own.input_size[1],) if own is not None else ())):
        for kwargs in ({}, {"img_size": side}):
            try:
                with torch.device("meta"):
                    module = timm.create_model(name, num_classes=CLASSES, **kwargs)
                trace(module, (torch.empty(1, 3, side, side, device="meta"),), batch=2)
            except (ErdeError, TypeError, ValueError, RuntimeError, AssertionError) as found:
                error = found
            else:
                return name, side, kwargs
    raise error if isinstance(error, ErdeError) else ErdeError(f"{name} runs on none of {_SIZES}: {error}")
