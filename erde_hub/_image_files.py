"""Image files, and images of Pillow, as 8-bit RGB: without torch, since a session reads them too."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import DataError

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Image.init()
# Formats of Pillow without pixels of their own: page descriptions, vector graphics, stubs for other programs.
_NO_RASTER = {"BUFR", "EMF", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
# Formats without a signature, for which other files are mistaken.
_UNSIGNED = {"IM", "IMT", "IPTC", "MCIDAS", "PCD", "SPIDER", "TGA", "XVTHUMB"}
#: Longest image in units of its shorter side, which is resized to the network's input before the centre is cut out.
_MOST_SIDES = 1000
_ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")


def raster_formats() -> list[str]:
    """Returns Pillow's names of the formats that are read, those that other packages register included."""
    return [name for name in Image.ID if name not in _NO_RASTER]


def is_image(path: str | Path) -> bool:
    """Tells by its content whether a file is a raster image."""
    try:
        with Image.open(path, formats=[name for name in raster_formats() if name not in _UNSIGNED]):
            return True
    except Exception:  # noqa: BLE001 (Pillow's formats raise anything for files that are not theirs)
        return False


def decode(content: bytes, where: object) -> Image.Image:
    """Decodes an image of any mode to 8-bit RGB, upright.

    Transparency means what it does in transformers' pipelines (``load_image``, then the image processor): an alpha
    channel, or one value per colour of a palette, is dropped; pixels of a single transparent colour are white.

    Grey of 16 or 32 bits is taken as it is up to 255. What lies above would be white in transformers' pipelines, and no
    number in :class:`~erde_hub.export.EarlyExitSession`, so it is refused here too.

    Raises:
        DataError: The bytes are no image, a damaged one, one side is more than 1,000 times the other, or they hold grey
            values beyond 8 bits; the message names ``where``.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=raster_formats())
    except Exception as error:
        raise _unreadable(error, where) from error
    return upright_rgb(image, where)


def upright_rgb(image: Image.Image, where: object) -> Image.Image:
    """Turns an image of Pillow, of any mode, upright and to 8-bit RGB; raises what :func:`decode` raises."""
    try:
        if max(image.size) > _MOST_SIDES * min(image.size):
            raise ValueError(
                f"{image.width} x {image.height} pixels, one side more than {_MOST_SIDES} times the other: resized"
                " for a network it would take gigabytes; crop it"
            )
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        if image.mode in ("F", "I") or image.mode.startswith("I;"):
            image = _grey_of_8_bits(image)
        return _white_where_clear((image if turn is None else image.transpose(turn)).convert("RGB"))
    except Exception as error:
        raise _unreadable(error, where) from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 (whatever is wrong with the metadata, the pixels are there)
        return 1


def _white_where_clear(image: Image.Image) -> Image.Image:
    """Paints the transparent colour that Pillow keeps with an RGB image white, as transformers' processors do."""
    if image.info.get("transparency") is None:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _grey_of_8_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no stated range; store 8-bit images")
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 255:
        raise ValueError(
            f"grey of mode {image.mode} with values from {values.min()} to {values.max()}, which pipelines of"
            " transformers would clip at 255: scale the images and store them with 8 bits"
        )
    grey = Image.fromarray(values.astype(np.uint8)).convert("RGB")
    grey.info = image.info  # the transparent level, which Pillow does not convert: only 0 has an effect
    return grey


def header_size(content: bytes, where: object) -> tuple[int, int]:
    """Returns (H, W) without decoding the pixels.

    Raises:
        DataError: The bytes are no image; the message names ``where``.
    """
    try:
        with Image.open(io.BytesIO(content), formats=raster_formats()) as image:
            return image.height, image.width
    except Exception as error:
        raise _unreadable(error, where) from error


def _unreadable(error: Exception, where: object) -> DataError:
    """Says what is wrong with an image; Pillow names the buffer in memory, which tells nobody anything."""
    text = " ".join(_ADDRESS.sub("", str(error)).split())
    reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return DataError(f"the image in {where} cannot be read ({reason}): repair or remove it")
