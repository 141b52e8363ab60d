"""A head that reads the mean and the maximum of every channel."""

from __future__ import annotations

from torch import Tensor, nn

from erde_hub.errors import ConfigError

from .base import ExitHead, FeatureSpec, GlobalPool, check_dropout, run_layers, vector_pool


class AvgMaxHead(ExitHead):
    """Mean and maximum of every channel, batch norm, one hidden layer with batch norm and dropout, one linear layer.

    This is for feature maps: tokens are pooled as the backbone itself does it, of signals (N, C, L) the mean is read,
    and vectors are read as they are.

    Args:
        spec: What the exit reads.
        num_labels: Number of classes.
        hidden: Width of the hidden layer.
        dropout: Probability of zeroing a hidden unit in training.

    Raises:
        ConfigError: A hidden width below 1, a dropout outside [0, 1), or tokens that the backbone does not pool.

    References:
        The pooling is timm's ``catavgmax``.
    """

    def __init__(self, spec: FeatureSpec, num_labels: int, *, hidden: int = 512, dropout: float = 0.3) -> None:
        super().__init__(spec, num_labels)
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
            raise ConfigError(f"hidden must be an integer of at least 1, got {hidden!r}")
        pool = vector_pool(spec)
        inputs = spec.width
        if isinstance(pool, GlobalPool) and spec.format != "NCL":
            pool, inputs = GlobalPool(pool.axes, with_max=True), 2 * spec.width
        elif spec.pool == "none":
            raise ConfigError("the head 'avg_max' gives one answer per sample, and this exit answers for every token")
        self.layers = nn.Sequential(
            pool,
            nn.BatchNorm1d(inputs),
            nn.Linear(inputs, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(check_dropout(dropout)),
        )
        self.fc = nn.Linear(hidden, num_labels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Feature in the format of ``spec`` to (N, num_labels)."""
        return self.fc(run_layers(self.layers, x, mask))
