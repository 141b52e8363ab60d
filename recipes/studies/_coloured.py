"""Coloured digits: a set with a misleading cue, made from a real one, with the group of every image.

scikit-learn's handwritten digits, each painted red or green. The class is whether the digit is below five. In training
the colour agrees with the class for a stated share of the images, so a network can get that share right without looking
at a shape; in validation and test every image occurs in both colours, so that the colour says nothing and the four
groups (class and colour) are of one size per class.

    python recipes/studies/_coloured.py coloured   # writes them into a folder, with a column for the colour

Any command takes that folder as a data set; `erde-hub evaluate --dataset coloured --group_column label colour` measures
each group.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from erde_hub.data.augment import counter_hash
from erde_hub.data.images import ImageData, image_data_from_arrays, read_digits
from erde_hub.data.splits import TEST_FRACTION, VALIDATION_FRACTION, hold_out
from erde_hub.errors import ConfigError

#: What ``recipes/studies/compare_losses.py`` calls them.
DATASET = "coloured_digits"

CLASS_NAMES = ("below five", "five or more")
COLOURS = {"red": (255, 60, 60), "green": (60, 255, 60)}

#: Keeps the choice of colours apart from other uses of the same hash.
_COLOUR_STREAM = 71


@dataclass
class GroupedImages:
    """Images with a group each.

    Attributes:
        data: The images, as for any data set; labels are the classes.
        groups: Per split the group of every sample, addressed by its stable index (``batch["index"]``,
            ``records.index``).
        group_names: In the order of their numbers.
    """

    data: ImageData
    groups: dict[str, Tensor]
    group_names: list[str]


def coloured_digits(correlation: float = 0.95, seed: int = 0) -> GroupedImages:
    """Builds coloured digits.

    Args:
        correlation: Share of training images, within each class, whose colour is that of their class; 0.5 makes the
            colour say nothing, 1 leaves no exception to learn from.
        seed: Which images are the exceptions. The splits are the same for every seed.

    Raises:
        ConfigError: A correlation outside [0, 1].
        MissingDependencyError: scikit-learn is not installed.

    Example:
        >>> grouped = coloured_digits(correlation=0.9)  # doctest: +SKIP
        >>> grouped.group_names  # doctest: +SKIP
        ['below five, red', 'below five, green', 'five or more, red', 'five or more, green']
    """
    if isinstance(correlation, bool) or not isinstance(correlation, (int, float)) or not 0 <= correlation <= 1:
        raise ConfigError(f"correlation must be a share from 0 to 1, got {correlation!r}")
    source, stored = read_digits((32, 32))
    digits, grey = source.labels["train"], stored["train"][..., 0]
    rest, test = hold_out(digits, TEST_FRACTION)
    kept, held = hold_out(digits[rest], VALIDATION_FRACTION)
    rows = {"train": rest[kept], "validation": rest[held], "test": test}
    arrays, groups = {}, {}
    for split, chosen in rows.items():
        classes = (digits[chosen] >= 5).astype(np.int64)
        if split == "train":
            images, colours = grey[chosen], _mostly(classes, correlation, chosen, seed)
        else:  # every image in both colours
            images, classes = np.repeat(grey[chosen], 2, axis=0), np.repeat(classes, 2)
            colours = np.tile(np.arange(2), len(chosen))
        arrays[split] = (_paint(images, colours), classes)
        groups[split] = torch.from_numpy(2 * classes + colours)
    name = f"coloured digits ({correlation:g})"
    data = image_data_from_arrays(name, arrays, CLASS_NAMES, seed)
    data.augment = "shift"
    names = [f"{class_}, {colour}" for class_ in CLASS_NAMES for colour in COLOURS]
    return GroupedImages(data, groups, names)


def save_coloured_digits(folder: Path, correlation: float = 0.95) -> None:
    """Writes a parquet file per split with columns ``image``, ``label`` and ``colour``."""
    folder.mkdir(parents=True, exist_ok=True)
    grouped = coloured_digits(correlation)
    columns = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=list(CLASS_NAMES)),
        "colour": datasets.Value("string"),
    }
    for split, groups in grouped.groups.items():
        rows = getattr(grouped.data, split)
        table = {
            "image": list(rows.pixels(np.arange(len(rows)))),
            "label": rows.labels.tolist(),
            "colour": [list(COLOURS)[group % 2] for group in groups[rows.indices].tolist()],
        }
        datasets.Dataset.from_dict(table, datasets.Features(columns)).to_parquet(folder / f"{split}.parquet")


def _mostly(classes: NDArray[np.int64], correlation: float, rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Colours that are those of the class but for an exact share of each class, chosen by a hash of the row."""
    colours = classes.copy()
    keys = counter_hash(seed, 0, rows, _COLOUR_STREAM)
    for class_ in np.unique(classes):
        members = np.flatnonzero(classes == class_)
        exceptions = round((1 - correlation) * len(members))
        colours[members[np.argsort(keys[members], kind="stable")[:exceptions]]] = 1 - class_
    return colours


def _paint(grey: NDArray[np.uint8], colours: NDArray[np.int64]) -> NDArray[np.uint8]:
    palette = np.array(list(COLOURS.values()), dtype=np.float64) / 255
    return np.rint(grey[..., None] * palette[colours][:, None, None, :]).astype(np.uint8)


if __name__ == "__main__":
    save_coloured_digits(Path(sys.argv[1]))
