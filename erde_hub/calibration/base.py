"""What a calibrator is: better probabilities from an exit's logits, by a few numbers fitted on held-out records."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from erde_hub.errors import ConfigError, RecordsError, ShapeError
from erde_hub.records import ExitRecords, row_chunks


class Calibrator(nn.Module):
    """Turns an exit's logits into calibrated logits or log-probabilities, live and on records alike.

    It is fitted once on held-out records, keeps what it learned in buffers, and is stored with the checkpoint. Policies
    then see calibrated probabilities and ``logits`` of a routed pass are calibrated; ``exit_logits`` stay raw.

    Args:
        num_exits: Number of exits, the last one included.

    Raises:
        ConfigError: ``num_exits`` is no positive integer.
    """

    #: :meth:`forward` reads the input of the exit's last linear layer.
    uses_features: ClassVar[bool] = False
    #: :meth:`forward` reads earlier exits, so that every exit's head has to run.
    uses_history: ClassVar[bool] = False
    #: It is a product with one number per exit, which an ONNX file can hold.
    affine: ClassVar[bool] = False
    #: How the latest fit found what it found, where there is something to say.
    report: str = ""

    def __init__(self, num_exits: int) -> None:
        super().__init__()
        if isinstance(num_exits, bool) or not isinstance(num_exits, int) or num_exits < 1:
            raise ConfigError(f"num_exits must be a positive integer, got {num_exits!r}")
        self.num_exits = num_exits

    @classmethod
    def fit(cls, records: ExitRecords, **options: Any) -> Calibrator:
        """Fits on held-out records."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for the config of a checkpoint."""
        return {"num_exits": self.num_exits}

    def macs(self, exit_index: int) -> int:
        """Returns the multiply-accumulates that one sample costs at an exit; sums of products alone are counted."""
        return 0

    @property
    def cumulative_macs(self) -> list[int]:
        """:meth:`macs` up to each exit."""
        return list(itertools.accumulate(map(self.macs, range(self.num_exits))))

    def forward(self, exit_index: int, logits: Tensor, feature: Tensor | None, state: list[Tensor]) -> Tensor:
        """Calibrates one exit of a pass; exits come in order, shallow to deep.

        Args:
            exit_index: Index of the exit.
            logits: Raw logits of the samples that have not exited.
            feature: What the exit's last linear layer reads, where :attr:`uses_features`.
            state: What the calibrator keeps between the exits of a pass, tensors with one row per sample; the caller
                removes the rows of samples that exit. Empty at the first exit.

        Shape:
            logits: (N, K). feature: (N, D). Returns (N, K).
        """
        raise NotImplementedError

    @torch.no_grad()
    def calibrate(self, logits: Tensor, features: list[Tensor] | None = None) -> Tensor:
        """Calibrates recorded logits of all exits.

        Shape:
            logits: (E, N, K). features: E tensors (N, D_e). Returns (E, N, K) float32.

        Raises:
            ShapeError: Another number of exits than it was fitted for.
            RecordsError: Features are needed and not there.
        """
        self.check_exits(len(logits))
        if self.uses_features and features is None:
            raise RecordsError(
                f"{type(self).__name__} needs features: collect the records with collect_exit_records(...,"
                " features=True)"
            )
        parts = []
        for rows in row_chunks(logits.shape[1], len(logits) * logits.shape[2]):
            state: list[Tensor] = []
            exits = [
                self(e, logits[e, rows].float(), None if features is None else features[e][rows], state)
                for e in range(len(logits))
            ]
            parts.append(torch.stack(exits))
        return torch.cat(parts, 1)

    def check_exits(self, num_exits: int) -> None:
        """Raises :class:`ShapeError` where a model or records have another number of exits."""
        if num_exits != self.num_exits:
            raise ShapeError(
                f"{type(self).__name__} was fitted for {self.num_exits} exits, got {num_exits}: fit it anew"
            )


def log_of(probs: Tensor) -> Tensor:
    """Logarithms of probabilities; 0 becomes the smallest float instead of minus infinity."""
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
