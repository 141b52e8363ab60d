"""Reference vectors for losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def precision(request: pytest.FixtureRequest) -> torch.dtype:
    """Both precisions that losses compute in."""
    return request.param


@pytest.fixture
def assert_matches(precision: torch.dtype) -> Callable[..., None]:
    """Compares with expected numbers at the tolerance that their file gives for the precision."""

    def check(actual: Tensor, expected: object, tolerance: dict[str, float], message: str) -> None:
        assert actual.dtype == precision, message
        kind = str(precision).removeprefix("torch.")
        torch.testing.assert_close(
            actual.detach(),
            torch.tensor(expected, dtype=precision),
            rtol=tolerance[f"{kind}_rtol"],
            atol=tolerance[f"{kind}_atol"],
            msg=lambda text: f"{message}: {text}",
        )

    return check
