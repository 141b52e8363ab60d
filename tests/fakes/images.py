"""Small image data sets on disk, for tests of the data code."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image


def picture(label, seed, size=(8, 8), mode="RGB"):
    """A random picture whose red level tells its label, encoded as PNG."""
    rng = np.random.default_rng((label, seed))
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[..., 0] = 20 * label
    image = Image.fromarray(pixels)
    if mode != "RGB":
        image = image.convert(mode)
    return encode(image)


def encode(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_parquet(folder, splits, features=None, classes=3, shards=1):
    """Writes ``{"train": {"img": [bytes or None], "label": [...]}}`` with Hugging Face metadata; returns the folder."""
    features = features or {
        "img": datasets.Image(),
        "label": datasets.ClassLabel(names=[f"class {i}" for i in range(classes)]),
    }
    (Path(folder) / "data").mkdir(parents=True, exist_ok=True)
    for split, columns in splits.items():
        columns = {
            name: [v if v is None else {"bytes": v, "path": None} for v in values]
            if _is_image(features[name])
            else values
            for name, values in columns.items()
        }
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        for shard in range(shards):
            part = table.shard(shards, shard, contiguous=True)
            part.to_parquet(str(Path(folder) / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet"))
    return str(folder)


def _is_image(feature):
    return isinstance(feature, datasets.Image)


def rows(count, classes=3, size=(8, 8), first_seed=0):
    """Columns of ``count`` rows whose labels go round the classes."""
    labels = [i % classes for i in range(count)]
    return {"img": [picture(label, first_seed + i, size) for i, label in enumerate(labels)], "label": labels}


KEYS = ("pixel_values", "labels", "index")


def same(first, second):
    return all(torch.equal(first[key], second[key]) for key in KEYS)


def joined(batches):
    return {key: torch.cat([batch[key] for batch in batches]) for key in KEYS}
