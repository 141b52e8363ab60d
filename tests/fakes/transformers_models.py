"""Small classifiers of the transformers library, one of each kind that its adapter tells apart."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from support_models import CLASSES, TRANSFORMERS_VISION, transformers_model
from torch import Tensor, nn

from erde_hub import EarlyExitWrapper
from tests.fakes.copies import copied

__all__ = ["CAUSAL", "CLASSES", "TEXT", "VISION", "causal", "inputs", "side", "text", "vision", "wrap"]

#: Class without its ending, and exits.
VISION: dict[str, tuple[str, tuple[str, ...]]] = {
    "resnet": ("ResNet", tuple(f"resnet.encoder.stages.{i}" for i in range(3))),
    "convnext": ("ConvNext", tuple(f"convnext.encoder.stages.{i}" for i in range(3))),
    "mobilevit": ("MobileViT", ("mobilevit.encoder.layer.1", "mobilevit.encoder.layer.3")),
    "vit": ("ViT", ("vit.layers.0", "vit.layers.1")),
    "deit": ("DeiT", ("deit.layers.0", "deit.layers.1")),
    "beit": ("Beit", ("beit.layers.0", "beit.layers.1")),
    "dinov2": (
        "Dinov2WithRegisters",
        ("dinov2_with_registers.encoder.layer.0", "dinov2_with_registers.encoder.layer.1"),
    ),
    "swin": ("Swin", ("swin.encoder.layers.0", "swin.encoder.layers.1")),
    "hiera": ("Hiera", tuple(f"hiera.encoder.stages.{i}" for i in range(3))),
    "pvt": ("Pvt", ("pvt.encoder.block.0.0", "pvt.encoder.block.1.0", "pvt.encoder.block.3.0")),
    "pvt_v2": ("PvtV2", ("pvt_v2.encoder.layers.0", "pvt_v2.encoder.layers.1")),
    "timm_wrapper": ("TimmWrapper", ("timm_model.stages.0", "timm_model.stages.1")),
}
TEXT: dict[str, tuple[str, tuple[str, ...]]] = {
    "bert": ("Bert", ("bert.encoder.layer.0", "bert.encoder.layer.1")),
    "distilbert": ("DistilBert", ("distilbert.transformer.layer.0", "distilbert.transformer.layer.1")),
    "roberta": ("Roberta", ("roberta.encoder.layer.0", "roberta.encoder.layer.1")),
    "albert": ("Albert", tuple(f"albert.encoder.albert_layer_groups.0@{i}" for i in (0, 2))),
    "deberta": ("DebertaV2", ("deberta.encoder.layer.0", "deberta.encoder.layer.1")),
    "electra": ("Electra", ("electra.encoder.layer.0", "electra.encoder.layer.1")),
    "modernbert": ("ModernBert", ("model.layers.0", "model.layers.1")),
    "llama": ("Llama", ("model.layers.0", "model.layers.1")),
    "qwen2": ("Qwen2", ("model.layers.0", "model.layers.1")),
    "gpt2": ("GPT2", ("transformer.h.0", "transformer.h.1")),
}
#: Class, and what a tiny one needs beside the usual sizes. Windows are short, so that texts are longer.
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 1}),
    "llama3": (
        "Llama",
        {
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen2": ("Qwen2", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 8}),
    "mistral": ("Mistral", {"num_key_value_heads": 1, "sliding_window": 8}),
    "gemma2": ("Gemma2", {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8}),
    "smollm3": ("SmolLM3", {"num_key_value_heads": 1}),
    "phi3": ("Phi3", {"num_key_value_heads": 1}),
    "gpt2": ("GPT2", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "opt": ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 16}),
}


@copied
def causal(name: str, **kwargs: Any) -> nn.Module:
    """A tiny causal language model of 50 tokens and five layers, in eval mode, whose layers disagree."""
    class_name, more = CAUSAL[name]
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 50,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{class_name}Config")(**{**sizes, **more, **kwargs})
    cls = "GPT2LMHeadModel" if class_name == "GPT2" else f"{class_name}ForCausalLM"
    torch.manual_seed(0)
    return getattr(transformers, cls)(config).eval()


def side(name: str) -> int:
    """Height and width of a vision model's images."""
    return TRANSFORMERS_VISION[VISION[name][0]][1]


@torch.no_grad()
def _lively(module: nn.Module) -> nn.Module:
    """Fresh weights are so small that every sample gets the same answer; layers of statistics get some."""
    generator = torch.Generator().manual_seed(1)
    for key, tensor in module.state_dict().items():
        if "running_var" in key:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.is_floating_point() and tensor.ndim < 2:
            tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
        elif tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (1.5 / tensor[0].numel() ** 0.5))
    return module.eval()


def vision(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = _lively(transformers_model(VISION[name][0]))
    if name in ("resnet", "mobilevit"):  # random statistics make deep ones explode
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            module.train()(torch.randn(32, 3, side(name), side(name)))
        for norm in norms:
            norm.momentum = 0.1
    return module.eval()


def text(name: str) -> nn.Module:
    torch.manual_seed(0)
    return _lively(transformers_model(TEXT[name][0]))


@copied
def tiny_bert(**kwargs: Any) -> EarlyExitWrapper:
    """Two layers, one early exit, and the words of the tests' tokenizer."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=14, max_position_embeddings=40, initializer_range=0.5, **sizes)
    torch.manual_seed(0)
    model = EarlyExitWrapper(
        transformers.BertForSequenceClassification(config), exits=["bert.encoder.layer.0"], **kwargs
    )
    torch.nn.init.normal_(model.heads[0].fc.weight)
    return model.eval()


@copied
def wrap(name: str, **kwargs: Any) -> EarlyExitWrapper:
    """A wrapped model in eval mode whose exits disagree."""
    torch.manual_seed(2)
    if name in VISION:
        given: dict[str, Any] = {"exits": VISION[name][1], "input_size": (3, side(name), side(name)), **kwargs}
        model = EarlyExitWrapper(vision(name), **given).eval()
    else:
        model = EarlyExitWrapper(text(name), **{"exits": TEXT[name][1], **kwargs}).eval()
    return _disagreeing(model)


@torch.no_grad()
def _disagreeing(model: EarlyExitWrapper) -> EarlyExitWrapper:
    for layer in model.heads.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(torch.randn(layer.weight.shape) * 2 / layer.in_features**0.5)
    return model


def lively_texts(model: EarlyExitWrapper) -> EarlyExitWrapper:
    """A wrapped model made one whose texts get different answers, and whose exits disagree."""
    _lively(model.backbone)
    return _disagreeing(model)


def inputs(name: str, count: int = 8) -> dict[str, Tensor]:
    """Images, or padded texts of different lengths."""
    generator = torch.Generator().manual_seed(4)
    if name in VISION:
        return {"pixel_values": torch.randn(count, 3, side(name), side(name), generator=generator)}
    ids = torch.randint(5, 99, (count, 11), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(count):
        mask[row, 11 - row % 6 :] = 0
    ids[mask == 0] = {"roberta": 1}.get(name, 0)
    return {"input_ids": ids, "attention_mask": mask}
