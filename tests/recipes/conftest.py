"""What tests of recipes share."""

import sys

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs a recipe in this process, as if from a shell in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def _call(recipe, *flags: object) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # what an earlier call of the same test has set
        monkeypatch.setattr(sys, "argv", [f"{recipe.__name__}.py", *map(str, flags)])
        recipe.main()

    return _call
