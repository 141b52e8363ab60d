"""Photographs that come inside Python packages, and how a network with exits answers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from erde_hub import EarlyExitWrapper
from erde_hub.errors import DataError, MissingDependencyError
from erde_hub.evaluation import ExitRecords, collect_exit_records, per_exit_metrics, sweep_thresholds

#: Package and place of each photograph.
_PLACES = {
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "skimage": tuple(f"data/{name}" for name in ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png",
                                                 "rocket.jpg")),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
}  # fmt: skip
_BATCH = 32


def packaged_photographs() -> list[Path]:
    """Returns the photographs of the packages that are installed (scikit-learn, scikit-image, matplotlib).

    Raises:
        MissingDependencyError: None of them is.
    """
    found = []
    for package, places in _PLACES.items():
        spec = find_spec(package)
        folders = list(spec.submodule_search_locations or []) if spec is not None else []
        found += [Path(folder) / place for folder in folders for place in places if (Path(folder) / place).is_file()]
    if not found:
        raise MissingDependencyError(
            "no photographs: pip install scikit-learn scikit-image, or name files with --photographs"
        )
    return found


def open_photographs(paths: Sequence[Path]) -> dict[str, Image.Image]:
    """Returns RGB images by the names of their files.

    Raises:
        DataError: One of them is no image.
    """
    images = {}
    for path in paths:
        try:
            images[path.name] = Image.open(path).convert("RGB")
        except OSError as error:
            raise DataError(f"photograph {path.name!r} cannot be read: {error}") from error
    return images


def random_crops(image: Image.Image, number: int, seed: int) -> list[Image.Image]:
    """Returns square parts of an image, half to all of its shorter side long, some of them mirrored."""
    generator = np.random.default_rng(seed)
    crops = []
    for _ in range(number):
        side = int(min(image.size) * generator.uniform(0.5, 1.0))
        left, top = (int(generator.integers(0, length - side + 1)) for length in image.size)
        crop = image.crop((left, top, left + side, top + side))
        crops.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else crop)
    return crops


@torch.no_grad()
def answers_of(model: EarlyExitWrapper, images: Sequence[Image.Image]) -> ExitRecords:
    """Runs every exit over images; the labels are the answers of the whole network."""
    processor = model.image_processor()

    def batches() -> Any:
        for start in range(0, len(images), _BATCH):
            pixels = processor(list(images[start : start + _BATCH]), return_tensors="pt")["pixel_values"]
            pixels = pixels.to(model.device)
            yield {
                "pixel_values": pixels,
                "labels": model.eval()(pixels, threshold=model.policy.never_threshold).logits.argmax(-1),
            }

    return collect_exit_records(model, batches(), progress=False)


def describe_photographs(model: EarlyExitWrapper, photographs: Mapping[str, Image.Image]) -> list[dict[str, Any]]:
    """Says of each photograph what the whole network answers, and what the exit answers by which it leaves."""
    records = answers_of(model, list(photographs.values()))
    probabilities = records.logits.double().softmax(-1)
    pixels = model.image_processor()(list(photographs.values()), return_tensors="pt")["pixel_values"].to(model.device)
    with torch.no_grad():
        left = model.eval()(pixels).exit_index.tolist()
    rows = []
    for number, name in enumerate(photographs):
        full, own = probabilities[-1, number], probabilities[left[number], number]
        rows.append(
            {
                "photograph": name,
                "whole_network": records.class_names[int(full.argmax())],
                "probability": float(full.max()),
                "exit": records.exit_names[left[number]],
                "answer": records.class_names[int(own.argmax())],
                "macs": records.cumulative_macs[left[number]],
                "agrees": [bool(exit_.argmax() == full.argmax()) for exit_ in probabilities[:, number]],
            }
        )
    return rows


def agreement_on_crops(model: EarlyExitWrapper, photographs: Mapping[str, Image.Image], number: int) -> dict[str, Any]:
    """Measures on crops of photographs how often each exit, and the stored threshold, answers as the whole network."""
    crops = [crop for i, image in enumerate(photographs.values()) for crop in random_crops(image, number, seed=i)]
    records = answers_of(model, crops)
    return {
        "crops": len(crops),
        "per_exit": [{key: row[key] for key in ("exit", "accuracy", "macs")} for row in per_exit_metrics(records)],
        "operating_point": sweep_thresholds(records, [model.threshold], model.policy)[0],
    }
