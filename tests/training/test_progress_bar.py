"""The bar fits the terminal: numbers that do not fit are left out from the end, never cut in the middle."""

import io

import pytest

from erde_hub._progress import passing_bar
from erde_hub.training import _progress
from erde_hub.training.state import Position

VALUES = {
    "loss": 1.23456,
    "terms": {"kl": 0.00123, "ce": 1.2345, "entropy": 5.678, "teacher_right": 0.987},
    "accuracy": [0.123, 0.456, 0.789, 0.999],
}


@pytest.fixture
def draw(monkeypatch):
    """What a terminal of so many columns shows in the middle of an epoch."""

    def _draw(columns, values=VALUES, total=5860):
        monkeypatch.setattr(_progress, "_columns", lambda: columns - 1)
        monkeypatch.setattr("sys.stderr", io.StringIO())
        with _progress.progress_bar(Position(step=2000, epoch=6), total, epochs=20, shown=True) as bar:
            bar.start_t -= 4000  # more than an hour: the widest times
            _progress.show(bar, "epoch 7/20", values)
            return str(bar)

    return _draw


@pytest.mark.parametrize("columns", [60, 80, 100, 120, 200])
def test_it_fits(draw, columns):
    line = draw(columns)
    assert len(line) == columns - 1
    assert line.startswith(" 34%|")
    assert ":" in line[line.index("| step 2000/5860, epoch 7/20 [") :]
    known = [f"{name} " for name in ("loss", *VALUES["terms"])]
    for part in line[line.index("]") + 1 :].split(", ")[1:]:
        assert part == "12/46/79/100% correct" or part.startswith(tuple(known))
    assert ("% correct" in line) == (columns >= 80)
    assert ("teacher_right 0.99" in line) == (columns >= 200)


def test_one_term_is_the_loss(draw):
    line = draw(200, {**VALUES, "terms": {"ce": 1.23456}})
    assert line.endswith("12/46/79/100% correct, loss 1.23")


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_passing_bar_leaves_behind(monkeypatch, terminal):
    """In a log file it would stand in front of the next line, which is printed behind it."""
    seen = io.StringIO()
    seen.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", seen)
    assert list(passing_bar(range(3), "hashing images")) == [0, 1, 2]
    written = seen.getvalue()
    assert ("hashing images" in written) == terminal
    assert written.split("\r")[-2:] == (["".ljust(len(written.split("\r")[-2])), ""] if terminal else [""])
    with passing_bar(None, "checking images", 3, shown=False) as bar:
        bar.update(3)
    assert seen.getvalue() == written
