"""Prediction sets of a served model, as checkpoints and ONNX files store them. Needs NumPy only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arguments import check_number, check_whole
from .errors import ConfigError, ShapeError

#: Exits of a model: far more than any has.
_MAX_EXITS = 10_000
_MAX_FREE = 1_000_000


@dataclass(frozen=True)
class StoredSets:
    """Adaptive prediction sets (APS, RAPS) without a random part: the same input gives the same set.

    A class is in the set of a sample while the probability of all better classes, plus a penalty per class beyond the
    first ones, is at most the quantile of the exit that the sample took. The best class is always in.

    Attributes:
        alpha: Error rate that the quantiles were fitted for.
        quantiles: One per exit, classifier last; infinity where there were too few samples, all classes then.
        penalty: Per class beyond ``free``.
        free: Number of classes without penalty.
        routed: Each quantile is of the samples that took its exit, and the sets hold for routed answers at the
            threshold that was stored then; otherwise of all samples, and each exit's sets hold by themselves.
    """

    alpha: float
    quantiles: list[float]
    penalty: float = 0.0
    free: int = 0
    routed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns what a config stores."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any, num_exits: int) -> StoredSets:
        """Reads what a config or a file stores.

        Args:
            values: A dict, from a source that is not trusted.
            num_exits: Of the model.

        Raises:
            ConfigError: Another key, or a value that no fit gives.
            ShapeError: Not one quantile per exit.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping) or {*values} != {*names}:
            raise ConfigError(f"prediction_sets must be a dict of {', '.join(names)}, got {values!r:.200}")
        quantiles = values["quantiles"]
        if not isinstance(quantiles, list) or len(quantiles) > _MAX_EXITS:
            raise ConfigError(f"prediction_sets: quantiles must be a list of numbers, got {quantiles!r:.200}")
        if len(quantiles) != num_exits:
            raise ShapeError(f"prediction_sets has {len(quantiles)} quantiles for {num_exits} exits: fit the sets anew")
        alpha = check_number("alpha of prediction_sets", values["alpha"], zero=False, below=1.0)
        penalty = check_number("penalty of prediction_sets", values["penalty"], zero=True)
        free = check_whole("free of prediction_sets", values["free"], 0)
        if free > _MAX_FREE or not isinstance(values["routed"], bool):
            raise ConfigError(f"prediction_sets: free={free} and routed={values['routed']!r:.50} are not allowed")
        found = [math.inf if q == "inf" else q for q in quantiles]  # files have no infinity
        for q in found:
            if isinstance(q, bool) or not isinstance(q, (int, float)) or not q >= 0:
                raise ConfigError(f"prediction_sets: a quantile must be a number of at least 0, got {q!r:.50}")
        return cls(alpha, [float(q) for q in found], penalty, free, values["routed"])

    def sets(self, logits: NDArray[Any], exit_index: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Returns the sets of samples; all classes where logits are not finite.

        Shape:
            logits: (N, K), of the exit that each sample took. exit_index: (N,). Returns (N, K) bool.
        """
        z = np.asarray(logits, np.float64)
        broken = np.any(~np.isfinite(z), axis=-1, keepdims=True)
        z = np.where(broken, 0.0, z)
        probs = np.exp(z - z.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        order = np.argsort(-probs, axis=-1, kind="stable")
        ranked = np.take_along_axis(probs, order, -1)
        beyond = np.maximum(np.arange(1, z.shape[1] + 1) - self.free, 0)
        taken = ranked.cumsum(-1) - ranked + self.penalty * beyond
        limits = np.asarray(self.quantiles, np.float64)[exit_index]
        inside: NDArray[np.bool_] = np.less_equal(taken, limits[:, None])
        inside[:, 0] = True
        found = np.empty_like(inside)
        np.put_along_axis(found, order, inside, -1)
        return np.logical_or(found, broken)
