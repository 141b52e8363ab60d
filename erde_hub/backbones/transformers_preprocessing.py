"""What is known of the preprocessing of a transformers vision model, from its image processor."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from erde_hub.errors import ConfigError
from erde_hub.preprocessing import check_preprocessing

logger = logging.getLogger(__name__)

#: What values of another kind than expected raise.
_DAMAGED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
#: Pillow's numbers to the names that configs use.
_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def known_preprocessing(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Returns the preprocessing of a model, or None where it is not known or is none that a config can hold.

    A model that was loaded has its processor beside it, in its folder or in the cache; nothing is fetched. For a fresh
    one the library's own processor of its kind is taken, at the size that the model was built for.
    """
    source = str(getattr(config, "_name_or_path", "") or "")
    processor = _stored_processor(source) if source else _default_processor(str(config.model_type))
    if processor is None:
        return None
    size = getattr(config, "image_size", None)
    if not source and size is not None:
        size = [size, size] if isinstance(size, int) else list(size)
    return as_preprocessing(processor, None if source else size)


def _stored_processor(source: str) -> Any | None:
    if Path(source).is_dir() and not (Path(source) / "preprocessor_config.json").is_file():
        return None
    try:
        return AutoImageProcessor.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except ImportError:
        return None
    except (*_DAMAGED, OSError, StrictDataclassError) as error:
        if Path(source).is_dir():
            logger.warning(
                "preprocessor_config.json of %s cannot be used: %s", source, " ".join(str(error).split())[:200]
            )
        return None


def _default_processor(model_type: str) -> Any | None:
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    names = names if isinstance(names, dict) else dict(enumerate(filter(None, names)))
    classes = [cls for name in names.values() if (cls := getattr(transformers, name, None)) is not None]
    try:
        return classes[0]() if classes else None
    except ImportError:  # a processor without its library
        return None


def as_preprocessing(processor: Any, size: list[int] | None = None) -> dict[str, Any] | None:
    """Returns what an image processor does in the words of a config, None where they have none for it.

    Args:
        processor: Of transformers; its values are those of a file, and may be anything.
        size: Replaces that of its output.
    """
    try:
        values = _read(processor, size)
        return None if values is None else check_preprocessing(values)
    except (*_DAMAGED, ConfigError):
        return None


def _read(processor: Any, size: list[int] | None) -> dict[str, Any] | None:
    p = processor.to_dict()
    if p.get("do_flip_channel_order") or not p.get("do_resize", True) or not p.get("do_rescale", True):
        return None
    if abs(float(p.get("rescale_factor") or 0) * 255 - 1) > 1e-6 or p.get("rescale_offset"):
        return None
    interpolation = _INTERPOLATION.get(int(p.get("resample") or 0))
    mean, std = ((0.0,) * 3, (1.0,) * 3) if not p.get("do_normalize", True) else (p["image_mean"], p["image_std"])
    if p.get("include_top"):  # EfficientNet's divides twice
        std = tuple(float(v) ** 2 for v in std)
    shown, crop = p.get("size") or {}, p.get("crop_size") or {}
    crops = bool(p.get("do_center_crop"))
    if "shortest_edge" in shown and "crop_pct" in p and not crops:  # ConvNeXt's: it crops below 384 pixels only
        side = int(shown["shortest_edge"])
        target, mode, share = [side, side], "squash", 1.0
        if (size or target)[0] < 384:
            mode, share = "center", float(p["crop_pct"])
    elif "shortest_edge" in shown and crops:
        target, shortest = [int(crop["height"]), int(crop["width"])], int(shown["shortest_edge"])
        if type(processor).__name__.startswith("Levit"):
            shortest = int(256 / 224 * shortest)
        elif p.get("crop_pct"):  # PoolFormer's
            shortest = int(shortest / float(p["crop_pct"]))
        mode, share = "center", min(target) / shortest
    elif "height" in shown:
        resized = [int(shown["height"]), int(shown["width"])]
        target = [int(crop["height"]), int(crop["width"])] if crops else resized
        mode, share = "squash", target[0] / resized[0]
    else:
        return None
    if share > 1:  # padding around a smaller image
        return None
    return {
        "mean": mean,
        "std": std,
        "size": size or target,
        "interpolation": interpolation,
        "crop_pct": share,
        "crop_mode": mode,
    }
