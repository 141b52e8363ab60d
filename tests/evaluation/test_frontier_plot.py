"""The picture: that it is drawn from results alone, says what it should, and leaves no traces."""

import copy
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from erde_hub.errors import CheckpointWriteError, ConfigError, MissingDependencyError, ResultsError
from erde_hub.evaluation import plot_frontier
from erde_hub.evaluation.plots import draw_frontier


def make_results(teacher_macs=20_000_000, exits=3, static=False):
    costs = [1_000_000, 2_000_000, 3_500_000, 5_000_000][-exits:]
    accuracies = [0.7, 0.85, 0.91, 0.92][-exits:]
    thresholds = [step / 5 for step in range(11)]
    sweep = []
    for i, threshold in enumerate(thresholds):
        share = i / 10
        sweep.append(
            {
                "threshold": threshold,
                "accuracy": accuracies[-1] - share**3 * (accuracies[-1] - accuracies[0]),
                "mean_macs": costs[-1] - share * (costs[-1] - costs[0]),
                "exit_share": [share, *[0.0] * (exits - 2), 1 - share] if exits > 1 else [1.0],
            }
        )
    results = {
        "erde_hub": "0.1.0",
        "args": {},
        "teacher": {"architecture": "big", "macs": teacher_macs, "accuracy": 0.94} if teacher_macs else None,
        "student": {"architecture": "small", "exits": ["a", "b"], "macs": costs[-1], "accuracy": accuracies[-1]},
        "dataset": {"name": "digits", "num_classes": 10},
        "per_exit": [
            {"exit": f"layer{e}", "accuracy": accuracy, "macs": macs}
            for e, (accuracy, macs) in enumerate(zip(accuracies, costs, strict=True))
        ],
        "sweep": sweep,
    }
    if static:
        results["static_student"] = {"architecture": "small", "macs": 4_800_000, "accuracy": 0.9}
    return results


def draw(results):
    figure = Figure(figsize=(6.4, 4.4), dpi=100, layout="constrained")
    draw_frontier(figure, results)
    return figure, figure.axes[0]


def words(axes):
    return [text.get_text() for text in axes.texts]


def legend(axes):
    return [text.get_text() for text in axes.figure.legends[0].get_texts()]


def test_the_cost_of_a_text_is_no_images():
    results = make_results()
    _, axes = draw(results | {"dataset": {**results["dataset"], "kind": "text"}})
    assert axes.get_xlabel() == "mean cost per text (MMACs)"


def test_costs_are_drawn_in_milliseconds(tmp_path):
    with pytest.raises(ConfigError, match="hold no times: `erde-hub latency"):
        plot_frontier(make_results(), tmp_path / "a.png", in_time=True)
    settings = [{"runtime": "torch", "threads": 1, "exit_milliseconds": [1.0, 2.0, 4.0]}]
    results = {**make_results(static=True), "latency": {"settings": settings}}
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    draw_frontier(figure, {**results, "operating_point": results["sweep"][5]}, in_time=True)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "mean time per image (ms; torch, 1 thread)"
    lines = {line.get_label(): line.get_xdata().tolist() for line in axes.lines}
    assert lines["all samples take one exit"] == [1, 2]
    assert lines["student run to its last exit"] == [4]
    assert lines["stored threshold, θ=1"] == [2.5], "half of the samples at the first exit"
    assert not any("teacher" in label or "without exits" in label for label in lines), "they were not timed"


def test_shows_everything_that_was_run():
    _, axes = draw(make_results(static=True))
    assert legend(axes) == [
        "θ = 2 … 0 (entropy)",
        "all samples take one exit",
        "student run to its last exit",
        "student trained without exits",
        "teacher: 94.0 % at 20.0 MMACs,\n4.0 times the student",
    ]
    assert axes.get_xlabel() == "mean cost per image (MMACs)"
    assert axes.get_ylabel() == "accuracy (%)"
    assert {"layer0", "layer1"} <= set(words(axes))
    assert axes.get_xlim()[1] < 6  # the teacher's cost does not squeeze the student's curve


def test_the_stored_threshold_is_marked():
    results = make_results()
    point = {**results["sweep"][1], "threshold": 0.25}
    _, axes = draw({**results, "operating_point": point})
    assert "stored threshold, θ=0.25" in legend(axes)
    ring = axes.lines[[line.get_label() for line in axes.lines].index("stored threshold, θ=0.25")]
    assert ring.get_xydata().tolist() == [[point["mean_macs"] / 1e6, 100 * point["accuracy"]]]
    assert ring.get_markerfacecolor() == "none"


def test_exits_have_their_names_where_everything_is_close():
    results = make_results(exits=4)
    for i, row in enumerate(results["per_exit"]):
        row.update(macs=1_000_000 + 20_000 * i if i < 3 else 5_000_000, accuracy=0.7 + 0.001 * i)
    figure, axes = draw({**results, "operating_point": results["sweep"][-1]})
    assert {"layer0", "layer1", "layer2"} == set(words(axes))
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[i + 1 :])
    centre = axes.transData.transform((results["sweep"][-1]["mean_macs"] / 1e6, 70))
    turns = np.linspace(0, 2 * np.pi, 60)
    ring = centre + 7.5 * 100 / 72 * np.stack([np.cos(turns), np.sin(turns)], 1)
    assert not any(box.contains(x, y) for box in boxes for x, y in ring), "words on the ring of the stored threshold"


def test_a_teacher_of_similar_cost_is_a_point_and_none_is_nothing():
    _, axes = draw(make_results(teacher_macs=6_000_000))
    assert axes.get_xlim()[1] > 6
    assert not any("times the student" in text for text in legend(axes))
    assert "teacher" in legend(axes)
    _, axes = draw(make_results(teacher_macs=None))
    assert "teacher" not in legend(axes)


@pytest.mark.parametrize("exits", [1, 2, 4])
@pytest.mark.parametrize("teacher_macs", [None, 6_000_000, 500_000_000])
def test_words_cover_neither_each_other_nor_the_data(exits, teacher_macs):
    figure, axes = draw(make_results(teacher_macs=teacher_macs, exits=exits, static=True))
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines that lead to them
    assert figure.legends[0].get_window_extent().y1 < axes.bbox.y0
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :]), words(axes)
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        for line in axes.lines[:-1]:  # the last is the teacher's, which its words sit on
            points = axes.transData.transform(np.stack(line.get_data(), 1).astype(float))
            assert not any(box.contains(x, y) for x, y in points), words(axes)


def test_same_results_same_bytes_and_no_traces(tmp_path):
    results = make_results()
    before = copy.deepcopy(results)
    settings = dict(mpl.rcParams)
    plot_frontier(results, tmp_path / "a.png")
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red"}):  # a user's own style does not show
        plot_frontier(results, tmp_path / "b.png")
    assert dict(mpl.rcParams) == settings
    assert results == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.png", "b.png"]
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1280, 880)
        assert "Software" not in image.info
        assert str(tmp_path) not in str(image.info)
    for suffix in ("svg", "pdf"):
        plot_frontier(results, tmp_path / f"a.{suffix}")
        first = (tmp_path / f"a.{suffix}").read_bytes()
        plot_frontier(results, tmp_path / f"a.{suffix}")
        assert first == (tmp_path / f"a.{suffix}").read_bytes()


def test_bad_results_and_places(tmp_path):
    with pytest.raises(ResultsError, match="sweep"):
        plot_frontier({**make_results(), "sweep": []}, tmp_path / "a.png")
    with pytest.raises(CheckpointWriteError):
        plot_frontier(make_results(), tmp_path / "missing" / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(MissingDependencyError, match=r"pip install \"erde-hub\[train\]\""):
        plot_frontier(make_results(), tmp_path / "a.png")
