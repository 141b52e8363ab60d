"""How images become ``pixel_values``: stored in the config, handed out as a transformers image processor."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, nearest

if TYPE_CHECKING:
    from transformers import BitImageProcessor

#: Names that timm uses, to Pillow's numbers.
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
#: How images are resized, as timm names it.
INTERPOLATIONS = tuple(_RESAMPLE)
#: Pixels of a side that nothing exceeds.
_MAX_SIDE = 2**15
_KEYS = ("mean", "std", "size", "interpolation", "crop_pct")
#: As timm names them: resize the shorter side and cut out the centre, or resize both sides without keeping their ratio.
CROP_MODES = ("center", "squash")


def check_preprocessing(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values as JSON types.

    Args:
        values: ``mean`` and ``std`` per channel, of pixels in [0, 1]; ``size`` (H, W); ``interpolation``; ``crop_pct``:
            the shorter side is resized to size / crop_pct, then the centre is cropped. ``crop_mode``, optional:
            ``squash`` resizes both sides instead.

    Raises:
        ConfigError: A key that is missing or does not exist, or a value that is not allowed.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"preprocessing must be a dict with {', '.join(_KEYS)}, got {values!r}")
    for key in values:
        if key not in (*_KEYS, "crop_mode"):
            raise ConfigError(f"preprocessing has no {key!r}{nearest(str(key), _KEYS)} (it has: {', '.join(_KEYS)})")
    crop_mode = values.get("crop_mode", "center")
    if crop_mode not in CROP_MODES:
        raise ConfigError(f"crop_mode must be one of {', '.join(CROP_MODES)}, got {crop_mode!r}")
    missing = [key for key in _KEYS if key not in values]
    if missing:
        raise ConfigError(f"preprocessing lacks {', '.join(missing)}")
    try:
        mean, std, size = ([float(v) for v in values[key]] for key in ("mean", "std", "size"))
        crop_pct = float(values["crop_pct"])
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"mean, std, size and crop_pct of the preprocessing must be numbers: {error}") from error
    if values["interpolation"] not in _RESAMPLE:
        raise ConfigError(f"interpolation must be one of {', '.join(_RESAMPLE)}, got {values['interpolation']!r}")
    if (
        not 0 < len(mean) == len(std) <= _MAX_SIDE
        or not all(map(math.isfinite, (*mean, *std)))
        or not all(value > 0 for value in std)
        or len(size) != 2
        or not 0 < crop_pct <= 1
        or not all(1 <= side <= side / crop_pct <= _MAX_SIDE for side in size)
    ):
        raise ConfigError(
            f"mean={mean!r:.200}, std={std!r:.200}, size={size!r:.200}, crop_pct={crop_pct} is not allowed: mean and"
            " std per channel, finite, std above 0; size (H, W) in pixels; crop_pct in (0, 1]; and size / crop_pct up"
            f" to {_MAX_SIDE}"
        )
    return {
        "mean": mean,
        "std": std,
        "size": [int(s) for s in size],
        "interpolation": values["interpolation"],
        "crop_pct": crop_pct,
        **({"crop_mode": crop_mode} if crop_mode != "center" else {}),
    }


def build_image_processor(preprocessing: dict[str, Any]) -> BitImageProcessor:
    """Returns the processor that resizes, crops, scales and normalises as ``preprocessing`` says."""
    from transformers import BitImageProcessor  # noqa: PLC0415 - an EarlyExitSession checks values without transformers

    p = check_preprocessing(preprocessing)
    height, width = p["size"]
    resize = [int(s / p["crop_pct"]) for s in (height, width)]
    keeps_ratio = height == width and p.get("crop_mode") != "squash"
    return BitImageProcessor(
        do_convert_rgb=len(p["mean"]) == 3,
        size={"shortest_edge": resize[0]} if keeps_ratio else {"height": resize[0], "width": resize[1]},
        resample=_RESAMPLE[p["interpolation"]],
        crop_size={"height": height, "width": width},
        image_mean=p["mean"],
        image_std=p["std"],
    )
