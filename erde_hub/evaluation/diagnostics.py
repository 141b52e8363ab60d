"""Pictures of how far scores can be trusted: reliability of exits, scores of right and wrong samples, who leaves where.

Drawn from records; legible at half size, and told apart without colour.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from erde_hub._files import replacing
from erde_hub.errors import MissingDependencyError
from erde_hub.policies import ExitPolicy, as_policy, policy_name
from erde_hub.policies.recorded import exit_indices
from erde_hub.records import ExitRecords

from .formatting import threshold_label
from .metrics import ECE_BINS, calibration_error
from .sweep import default_thresholds, exit_scores, fine_thresholds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY, _PALE = "#0072B2", "#E69F00", "#555555", "#B3D4E8"
#: Samples in a bin of a reliability diagram below which its bar is pale: its height says little.
_FEW = 10
#: Fills of exits, shallow to deep: light to dark, so that a grey copy keeps their order.
_SHADES = ("#F0E442", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#3B2A6B")
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 13,
    "axes.labelsize": 14,
    "axes.titlesize": 14,
    "legend.fontsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.8,
    "svg.hashsalt": "erde_hub",
}


def plot_reliability(records: ExitRecords, path: str | os.PathLike[str], bins: int = 10) -> None:
    """Draws accuracy against confidence for each exit, with the share of samples in each bin below.

    On the diagonal an exit is as sure as it is right; below it is too sure. Bars of fewer than ten samples are pale.
    The number is the calibration error with 15 bins, as in tables.

    Args:
        records: Of test data; calibrated if the model is.
        path: The picture; the ending gives the format.
        bins: Equal, right-closed bins of the picture.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        CheckpointWriteError: The file cannot be written.
    """
    records.require_classes("plot_reliability")

    def draw(figure: Figure) -> None:
        right = records.logits.argmax(-1) == records.labels
        confidence = records.logits.double().softmax(-1).amax(-1)
        axes = figure.subplots(
            2, records.num_exits, sharex=True, sharey="row", squeeze=False, gridspec_kw={"height_ratios": [4, 1]}
        )
        for e, name in enumerate(records.exit_names):
            edges = torch.arange(1, bins, dtype=torch.float64) / bins
            place = torch.bucketize(confidence[e], edges)
            count = torch.bincount(place, minlength=bins).double()
            hits = torch.bincount(place, weights=right[e].double(), minlength=bins)
            middle = ((torch.arange(bins, dtype=torch.float64) + 0.5) / bins).tolist()
            top, low = axes[0, e], axes[1, e]
            top.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1.5)
            filled = count > 0
            heights = torch.where(filled, hits / count.clamp_min(1), 0.0)
            colors = [_BLUE if n >= _FEW else _PALE for n in count.tolist()]
            top.bar(middle, heights.tolist(), width=0.9 / bins, color=colors, edgecolor="white", linewidth=0.8)
            error = calibration_error(confidence[e], right[e], ECE_BINS)
            top.set_title(f"{name}\nECE {error:.3f}")
            low.bar(middle, (100 * count / count.sum()).tolist(), width=0.9 / bins, color=_GREY)
            top.set_xlim(0, 1)
            top.set_ylim(0, 1)
            low.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes[0, 0].set_ylabel("accuracy")
        axes[1, 0].set_ylabel("share %")
        figure.supxlabel("confidence")

    _save(draw, path, (2.4 * records.num_exits + 0.8, 4.6))


def plot_scores(
    records: ExitRecords,
    policy: str | ExitPolicy,
    threshold: float | Sequence[float],
    path: str | os.PathLike[str],
    bins: int = 30,
) -> None:
    """Draws the policy's score of right and wrong samples at each early exit, with the threshold.

    Only the samples that reach an exit are counted. A good score has wrong samples on the side that stays.

    Args:
        records: Of test data; calibrated if the model is.
        policy: A key of the policies table, or a policy.
        threshold: One number, or one per early exit.
        path: The picture; the ending gives the format.
        bins: Of the histograms.

    Raises:
        ThresholdError: A threshold that the policy does not take.
        MissingDependencyError: matplotlib is not installed.
        CheckpointWriteError: The file cannot be written.
    """
    policy = as_policy(policy)
    early = records.num_exits - 1
    thresholds = policy.check_threshold(list(threshold) if isinstance(threshold, Sequence) else threshold, early)
    records.require_classes("plot_scores")
    scores = exit_scores(records, policy)
    index = exit_indices(scores, policy, thresholds)
    name, among = policy_name(policy), [*default_thresholds(records, policy), *thresholds]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, early, sharey=True, squeeze=False)[0]
        right = records.logits.argmax(-1) == records.labels
        finite = scores[scores.isfinite()]
        low, high = float(finite.min()), float(finite.max())
        edges = torch.linspace(low, max(high, low + 1e-6), bins + 1).tolist()
        for e, ax in enumerate(axes):
            here = index >= e
            parts = [scores[e][here & right[e]].tolist(), scores[e][here & ~right[e]].tolist()]
            ax.hist(
                parts, edges, stacked=True, color=[_BLUE, _ORANGE], label=["right", "wrong"], edgecolor="white",
                linewidth=0.4, hatch=["", "////"],
            )  # fmt: skip
            leave = "leave →" if policy.leaves_above else "← leave"
            label = threshold_label(thresholds[e], name, among)
            nobody = policy.never_leaves(thresholds[e])
            ax.set_title(f"{records.exit_names[e]}\n{'nobody leaves' if nobody else f'{leave} at θ = {label}'}")
            if low <= thresholds[e] <= high:
                ax.axvline(thresholds[e], color="black", linewidth=2)
        axes[0].set_ylabel("samples that get here")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
        figure.supxlabel(f"score ({type(policy).__name__.removesuffix('Policy').lower()})")

    _save(draw, path, (3.1 * early + 0.9, 3.8))


def plot_shares(records: ExitRecords, policy: str | ExitPolicy, path: str | os.PathLike[str]) -> None:
    """Draws which share of the samples leaves at each exit, against the mean cost that a shared threshold gives.

    Args:
        records: Of test data; calibrated if the model is.
        policy: A key of the policies table, or a policy.
        path: The picture; the ending gives the format.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        CheckpointWriteError: The file cannot be written.
    """
    policy = as_policy(policy)
    scores, early = exit_scores(records, policy), records.num_exits - 1
    macs = torch.tensor(records.cumulative_macs, dtype=torch.float64)
    points = []
    for threshold in [*fine_thresholds(records, policy), policy.never_threshold]:
        index = exit_indices(scores, policy, policy.check_threshold(threshold, early))
        share = torch.bincount(index, minlength=records.num_exits).double() / records.num_samples
        points.append((float(100 * (share @ macs) / macs[-1]), (100 * share).tolist()))
    points.sort()

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        cost = [x for x, _ in points]
        layers = list(zip(*(y for _, y in points), strict=True))
        stacks = ax.stackplot(
            cost, layers, colors=[_SHADES[e % len(_SHADES)] for e in range(len(layers))], edgecolor="white"
        )
        for e, stack in enumerate(stacks):
            stack.set_hatch(_HATCHES[e % len(_HATCHES)])
        ax.set_xlim(cost[0], cost[-1])
        ax.set_ylim(0, 100)
        ax.set_xlabel("mean cost, % of the full model")
        ax.set_ylabel("samples that leave, %")
        figure.legend(stacks, records.exit_names, loc="outside upper center", ncols=min(4, len(layers)), frameon=False)

    _save(draw, path, (6.4, 4.4))


def _save(draw: Any, path: str | os.PathLike[str], size: tuple[float, float]) -> None:
    try:
        import matplotlib.style as mpl_style  # noqa: PLC0415 - an extra
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise MissingDependencyError(
            'drawing needs matplotlib: install it with `pip install "erde-hub[train]"`'
        ) from error
    suffix = Path(path).suffix.lstrip(".").lower() or "png"
    with mpl_style.context(["default", _STYLE]):
        figure = Figure(figsize=size, dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        with replacing(path) as temporary:
            blank = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None}, "svg": {"Date": None}}
            figure.savefig(temporary, format=suffix, metadata=blank.get(suffix))
