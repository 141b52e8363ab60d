"""A head with one hidden layer."""

from __future__ import annotations

from torch import Tensor, nn

from erde_hub.errors import ConfigError

from .base import ExitHead, FeatureSpec, check_dropout, run_layers, vector_pool


class MLPHead(ExitHead):
    """Global pooling, layer norm, one hidden layer with ReLU and dropout, one linear layer.

    Args:
        spec: What the exit reads.
        num_labels: Number of classes.
        hidden: Width of the hidden layer; None takes the width of the feature.
        dropout: Probability of zeroing a hidden unit in training.

    Raises:
        ConfigError: A hidden width below 1 or a dropout outside [0, 1).
    """

    def __init__(self, spec: FeatureSpec, num_labels: int, *, hidden: int | None = None, dropout: float = 0.1) -> None:
        super().__init__(spec, num_labels)
        hidden = spec.width if hidden is None else hidden
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
            raise ConfigError(f"hidden must be an integer of at least 1, got {hidden!r}")
        self.layers = nn.Sequential(
            vector_pool(spec),
            nn.LayerNorm(spec.width),
            nn.Linear(spec.width, hidden),
            nn.ReLU(),
            nn.Dropout(check_dropout(dropout)),
        )
        self.fc = nn.Linear(hidden, num_labels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Feature in the format of ``spec`` to (N, num_labels)."""
        return self.fc(run_layers(self.layers, x, mask))
