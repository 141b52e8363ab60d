"""Curves of prediction sets over their error rate, and their picture."""

import pytest
from PIL import Image

from erde_hub.errors import ConfigError, RecordsError
from erde_hub.evaluation import plot_sets, set_curves
from tests.fakes.records import make_records


def test_larger_error_rates_give_smaller_sets_and_coverage_is_kept(tmp_path):
    held_out, test = make_records(2000, seed=0), make_records(4000, seed=1, split="test")
    rows = set_curves(held_out, test, [0.05, 0.2])
    assert len(rows) == 2 * 2 * 3
    for method in ("conformal", "avcs"):
        for e in range(3):
            few, many = (row for row in rows[e::3] if row["method"] == method)
            assert (few["exit"], few["alpha"], many["alpha"]) == (test.exit_names[e], 0.05, 0.2)
            assert few["size"] > many["size"]
            for row in (few, many):
                if method == "conformal":  # the logits are of too small a scale for AVCS
                    assert row["coverage"] > 1 - row["alpha"] - 0.03
                nested = method == "avcs" or e == 0
                assert (row["consistency"] == 1) == (row["coverage"] == row["coverage_so_far"]) == nested
    plot_sets(rows, tmp_path / "sets.png")
    plot_sets(rows, tmp_path / "again.png")
    assert (tmp_path / "sets.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    with Image.open(tmp_path / "sets.png") as picture:
        assert picture.width > 1000


def test_what_is_refused():
    held_out, test = make_records(100), make_records(100, split="test")
    with pytest.raises(RecordsError, match="'validation'"):
        set_curves(held_out, held_out)
    with pytest.raises(ConfigError, match="alpha"):
        set_curves(held_out, test, [1.0])
    with pytest.raises(ConfigError, match="avcs"):
        set_curves(held_out, test, methods=["avc"])
