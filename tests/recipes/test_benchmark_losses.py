"""The benchmark of losses, and the page that lists them."""

import json
import re

import make_tables
import pytest
from benchmarks import losses as benchmark
from pages import methods

from erde_hub.errors import ConfigError
from erde_hub.losses import get_loss, list_additions, list_losses

TINY = ["--widths", "4", "--batch_size", "4", "--rounds", "2", "--repeats", "1"]


def test_every_loss_is_timed_beside_a_step(tmp_path, call, capsys):
    call(benchmark, *TINY, "--output", str(tmp_path / "b.json"))
    results = json.loads((tmp_path / "b.json").read_text())
    (student,) = results["students"]
    assert [row["loss"] for row in student["losses"]] == list_losses()
    assert student["exits"] > 1
    for row in student["losses"]:
        assert 0 < row["seconds"] < student["step_seconds"] * 20
        assert row["share"] > 0
    assert "egad" in capsys.readouterr().out


def test_shares_are_medians_of_rounds(monkeypatch):
    times = iter([4.0, 1.0, 2.0, 1.0])  # step, loss; step, loss
    monkeypatch.setattr(benchmark, "timed", lambda _: next(times))
    settings = benchmark.LossBenchmark(batch_size=4, losses=["ce"], rounds=2, repeats=1)
    measured = benchmark.measure(settings, 4)
    assert measured["step_seconds"] == 3.0
    assert measured["losses"] == [{"loss": "ce", "seconds": 1.0, "share": (0.25 + 0.5) / 2}]


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--losses", "kdd"], "unknown loss 'kdd'; did you mean 'kd'"), (["--rounds", "0"], "rounds must be at least 1")],
)
def test_what_it_refuses(call, flags, message):
    with pytest.raises(ConfigError, match=message):
        call(benchmark, *flags)


def test_the_page_lists_every_loss_with_its_formula():
    page = (make_tables.ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    for name in list_losses():
        formula = methods.formula(get_loss(name).cls)
        assert formula.startswith("L = ")
        assert re.search(rf"\*\*`{name}`\*\*.*\n\n```text\n{re.escape(formula)}\n```", page)
    for name in list_additions():
        assert re.search(rf"\*\*`{name}`\*\*: .* Flag: `--", page)
    assert "a weight per training sample" in page


def test_the_figures_keep_within_the_limit():
    """At full width; for a student a quarter as wide the page says that `feature_kd` takes more."""
    results = json.loads((make_tables.ROOT / "recipes" / "results" / "benchmark_losses.json").read_text())
    (student,) = [student for student in results["students"] if student["width"] == 64]
    assert [row["loss"] for row in student["losses"]] == list_losses()
    assert results["limit"] == benchmark.LIMIT == 0.03
    for row in student["losses"]:
        assert row["share"] <= results["limit"], row["loss"]
