"""Samples on the page, and what every exit says to them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from erde_hub._image_files import decode
from erde_hub.errors import ConfigError

from .networks import Answers, Network

#: A checkpoint of `make demo`, its report, and images of its test set; recipes/ship_digits.py makes it.
SHIPPED = Path(__file__).parent / "digits"
#: Images to begin with, at most, and the side of a picture in pixels.
MOST_IMAGES, PICTURE = 60, 96
TEXTS = ("What a lovely film, I laughed and cried.", "The plot is thin, but the actors are good.")


@dataclass
class Item:
    """A sample on the page.

    Attributes:
        name: File name, or the text.
        picture: A small picture, as an address that holds its data; None for a text.
        label: The right class, where it is known.
    """

    name: str
    picture: str | None = None
    label: str | None = None


@dataclass
class Shown:
    """All samples so far, with what every exit of each network says to them."""

    items: list[Item]
    answers: list[Answers]

    def add(self, networks: Sequence[Network], items: Sequence[Item], samples: Sequence[Any]) -> Shown:
        """Returns these samples and more: images of PIL, or texts; every exit of each network answers to these."""
        new = [network.answer(samples) for network in networks]
        answers = [old + more for old, more in zip(self.answers, new, strict=True)] if self.answers else new
        return Shown([*self.items, *items], answers)

    def add_text(self, networks: Sequence[Network], text: str) -> Shown:
        """Returns these texts and one more."""
        return self.add(networks, [Item(text)], [text])

    def add_files(self, networks: Sequence[Network], paths: Sequence[str | Path]) -> Shown:
        """Returns these images and more; raises :class:`DataError` for a file that is none."""
        images = [decode(Path(path).read_bytes(), Path(path).name) for path in paths]
        items = [Item(Path(path).name, _picture(image)) for path, image in zip(paths, images, strict=True)]
        return self.add(networks, items, images) if items else self


def first_samples(networks: Sequence[Network], folder: str | None = None) -> Shown:
    """Returns the samples to begin with: a folder's images, test images for networks of digits, or two texts.

    Raises:
        ConfigError: The folder holds no images.
    """
    empty, dataset = Shown([], []), (networks[0].results or {}).get("dataset", {}).get("name")
    if networks[0].kind == "text":
        return empty.add(networks, [Item(text) for text in TEXTS], TEXTS)
    if folder is not None:
        endings = Image.registered_extensions()
        paths = [path for path in sorted(Path(folder).expanduser().rglob("*")) if path.suffix.lower() in endings]
        if not paths:
            raise ConfigError(f"--images {folder!r} holds no images: give a folder with some")
        return empty.add_files(networks, paths[:MOST_IMAGES])
    if dataset != "digits":
        return empty
    with np.load(SHIPPED / "samples.npz") as stored:
        images, labels = (
            [Image.fromarray(pixels).convert("RGB") for pixels in stored["images"]],
            stored["labels"].tolist(),
        )
    pairs = enumerate(zip(images, labels, strict=True))
    return empty.add(
        networks, [Item(f"test image {n + 1}", _picture(i), str(label)) for n, (i, label) in pairs], images
    )


def _picture(image: Image.Image) -> str:
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((PICTURE, PICTURE))
    small.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
