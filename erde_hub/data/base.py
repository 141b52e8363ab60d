"""What all data sets have in common, be they images or texts: three splits, class names, and how they were made."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from erde_hub.errors import ConfigError, DataError

from .loader import Split
from .splits import SplitPlan
from .streaming import StreamSplit


@dataclass(kw_only=True)
class LabelledData(ABC):
    """Three splits of labelled samples and everything that a report or a checkpoint says about them.

    Attributes:
        name: "digits", a Hub name, or the last component of a folder.
        fingerprint: Hash of labels and contents; the same wherever the data lie, and whatever part of them is used.
        class_names: Names of the classes in the order of their labels.
        train: Rows to learn from.
        validation: Rows for choosing thresholds, temperatures and the like.
        test: Rows to report on.
        split_info: How each split was made, as JSON types.
        augment: The augmentation that suits these data where none is chosen.
        plan: The whole splits, of which ``max_train_samples`` and the like use a part; see :meth:`save_split`.
        prefix_hash: Hash of the first training rows, by which loaded data and a stream know each other.
        files: Of a folder of images, how many files were seen, used and left out, by reason.
    """

    #: What one sample is called.
    kind: ClassVar[str]

    name: str
    fingerprint: str
    class_names: list[str]
    train: Split | StreamSplit
    validation: Split | StreamSplit
    test: Split | StreamSplit
    split_info: dict[str, dict[str, Any]]
    augment: str = "none"
    plan: SplitPlan | None = field(default=None, repr=False)
    prefix_hash: str | None = field(default=None, repr=False)
    files: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    @abstractmethod
    def input_size(self) -> tuple[int, ...]:
        """Shape of one input: (3, H, W), or the number of tokens that the longest text may have."""

    @property
    @abstractmethod
    def preprocessing(self) -> dict[str, Any]:
        """How a sample becomes the network's input, as JSON types; of images the arguments of ``set_preprocessing``."""

    @property
    def streamed(self) -> bool:
        """Whether rows are read one after another."""
        return isinstance(self.train, StreamSplit)

    def save_split(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows that were held out as JSON, for ``load_image_data(..., split_file=path)`` and its like.

        Of streamed data it is the rule that tells the rows apart, which loading them without streaming follows too.

        Raises:
            DataError: The data were put together by hand, without a plan.
        """
        if self.plan is None:
            raise DataError(f"{self.name!r} has no plan of its splits: only data that were loaded have one")
        self.plan.save(path, self.name, self.fingerprint, self.prefix_hash)

    def summary(self) -> dict[str, Any]:
        """Returns what a report says about the data, as JSON types and without paths."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "num_classes": self.num_classes,
            "preprocessing": self.preprocessing,
            "splits": self.split_info,
            **({"files": self.files} if self.files else {}),
        }


def check_limits(limits: Mapping[str, Any]) -> None:
    """Raises :class:`~erde_hub.errors.ConfigError` for a number of rows that is none."""
    for name, limit in limits.items():
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ConfigError(f"{name}={limit!r} is not allowed: give an integer of 1 or more, or None for all rows")
