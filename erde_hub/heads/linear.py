"""The smallest head: pool, then one linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from .base import ExitHead, FeatureSpec, TokenPool, vector_pool


class LinearHead(ExitHead):
    """Global pooling and one linear layer, for frozen backbones and tight budgets.

    Args:
        spec: What the exit reads.
        num_labels: Number of classes.
    """

    def __init__(self, spec: FeatureSpec, num_labels: int) -> None:
        super().__init__(spec, num_labels)
        self.pool = vector_pool(spec)
        self.fc = nn.Linear(spec.width, num_labels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Feature in the format of ``spec`` to (N, num_labels)."""
        return self.fc(self.pool(x, mask) if isinstance(self.pool, TokenPool) else self.pool(x))
