"""Figures of what exits do: reliability, scores of correct and wrong samples, fractions per exit, a contact sheet.

Drawn from records; legible at half size, and told apart without colour.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from erde_hub._arguments import check_whole
from erde_hub.policies import ExitPolicy, PolicyKey, as_policy, policy_name
from erde_hub.policies.recorded import exit_indices
from erde_hub.records import ExitRecords

from .figures import BLUE, GREY, ORANGE, RED, SHADES, save_figure
from .formatting import threshold_label
from .metrics import ECE_BINS, calibration_error
from .sweep import default_thresholds, exit_scores, fine_thresholds, route_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PALE = "#B3D4E8"
#: Samples in a bin of a reliability diagram below which its bar is pale: its height says little.
_FEW = 10


def plot_reliability(records: ExitRecords, path: str | os.PathLike[str], bins: int = 10) -> None:
    """Draws accuracy against confidence for each exit, with the fraction of samples in each bin below.

    On the diagonal confidence equals accuracy; below it the exit is too confident. Bars of fewer than ten samples are
    pale. The number is the calibration error with 15 bins, as in tables.

    Args:
        records: Of test data; calibrated if the model is.
        path: The figure; the ending gives the format.
        bins: Equal, right-closed bins of the figure.

    Raises:
        MissingDependencyError: matplotlib or adjustText is not installed.
        CheckpointWriteError: The file cannot be written.
    """
    records.require_classes("plot_reliability")

    def draw(figure: Figure) -> None:
        correct = records.logits.argmax(-1) == records.labels
        confidence = records.logits.double().softmax(-1).amax(-1)
        axes = figure.subplots(
            2, records.num_exits, sharex=True, sharey="row", squeeze=False, gridspec_kw={"height_ratios": [4, 1]}
        )
        for e, name in enumerate(records.exit_names):
            edges = torch.arange(1, bins, dtype=torch.float64) / bins
            place = torch.bucketize(confidence[e], edges)
            count = torch.bincount(place, minlength=bins).double()
            hits = torch.bincount(place, weights=correct[e].double(), minlength=bins)
            middle = ((torch.arange(bins, dtype=torch.float64) + 0.5) / bins).tolist()
            top, low = axes[0, e], axes[1, e]
            top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.5)
            filled = count > 0
            heights = torch.where(filled, hits / count.clamp_min(1), 0.0)
            colors = [BLUE if n >= _FEW else _PALE for n in count.tolist()]
            top.bar(middle, heights.tolist(), width=0.9 / bins, color=colors, edgecolor="white", linewidth=0.8)
            error = calibration_error(confidence[e], correct[e], ECE_BINS)
            top.set_title(f"{name}\nECE {error:.3f}")
            low.bar(middle, (100 * count / count.sum()).tolist(), width=0.9 / bins, color=GREY)
            top.set_xlim(0, 1)
            top.set_ylim(0, 1)
            low.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes[0, 0].set_ylabel("accuracy")
        axes[1, 0].set_ylabel("samples, %")
        figure.supxlabel("confidence")

    save_figure(draw, path, (2.4 * records.num_exits + 0.8, 4.6))


def plot_slices(slices: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], most: int = 25) -> None:
    """Draws accuracy per slice, with early exits and at the last exit, the worst slice on top.

    Args:
        slices: Of :func:`~erde_hub.evaluation.slice_metrics`.
        path: The figure; the ending gives the format.
        most: Slices that are shown, the worst ones.

    Raises:
        MissingDependencyError: matplotlib or adjustText is not installed.
        CheckpointWriteError: The file cannot be written.
    """
    shown = slices[:most]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        places = range(len(shown))
        accuracy, full = ([100 * row[key] for row in shown] for key in ("accuracy", "full_accuracy"))
        axes.hlines(places, accuracy, full, color=GREY, linewidth=1.5, zorder=1)
        axes.plot(full, places, "D", markerfacecolor="white", markeredgecolor=ORANGE, label="all layers")
        axes.plot(accuracy, places, "o", color=BLUE, label="early exits on")
        broken = {"broken": " (bound broken)", "open": " (bound not supported)"}
        names = [f"{row['slice']}, n={row['samples']}{broken.get(row.get('promise', ''), '')}" for row in shown]
        axes.set_yticks(places, [name.replace("$", r"\$") for name in names])  # no formula
        axes.invert_yaxis()
        axes.set_xlabel("accuracy (%)")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)

    save_figure(draw, path, (6.4, 1.4 + 0.32 * len(shown)))


def plot_scores(
    records: ExitRecords,
    policy: PolicyKey | ExitPolicy,
    threshold: float | Sequence[float],
    path: str | os.PathLike[str],
    bins: int = 30,
) -> None:
    """Draws the policy's score of correct and wrong samples at each early exit, with the threshold.

    Only the samples that reach an exit are counted. With a good score the wrong samples are on the side that goes on.

    Args:
        records: Of test data; calibrated if the model is.
        policy: A key of the policies table, or a policy.
        threshold: One number, or one per early exit.
        path: The figure; the ending gives the format.
        bins: Of the histograms.

    Raises:
        ThresholdError: A threshold that the policy does not take.
        MissingDependencyError: matplotlib or adjustText is not installed.
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
        correct = records.logits.argmax(-1) == records.labels
        finite = scores[scores.isfinite()]
        low, high = float(finite.min()), float(finite.max())
        edges = torch.linspace(low, max(high, low + 1e-6), bins + 1).tolist()
        for e, ax in enumerate(axes):
            here = index >= e
            parts = [scores[e][here & correct[e]].tolist(), scores[e][here & ~correct[e]].tolist()]
            ax.hist(
                parts, edges, stacked=True, color=[BLUE, ORANGE], label=["correct", "wrong"], edgecolor="white",
                linewidth=0.4, hatch=["", "////"],
            )  # fmt: skip
            exits = "exit →" if policy.leaves_above else "← exit"
            label = threshold_label(thresholds[e], name, among)
            says = "no sample exits" if policy.never_leaves(thresholds[e]) else f"{exits} at θ = {label}"
            ax.set_title(f"{records.exit_names[e]}\n{says}")
            if low <= thresholds[e] <= high:
                ax.axvline(thresholds[e], color="black", linewidth=2)
        axes[0].set_ylabel("samples that reach the exit")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
        figure.supxlabel(f"score ({type(policy).__name__.removesuffix('Policy').lower()})")

    save_figure(draw, path, (3.1 * early + 0.9, 3.8))


def plot_fractions(records: ExitRecords, policy: PolicyKey | ExitPolicy, path: str | os.PathLike[str]) -> None:
    """Draws the fraction of samples that takes each exit, against a shared threshold and against what it saves.

    Args:
        records: Of test data; calibrated if the model is.
        policy: A key of the policies table, or a policy.
        path: The figure; the ending gives the format.

    Raises:
        MissingDependencyError: matplotlib or adjustText is not installed.
        CheckpointWriteError: The file cannot be written.
    """
    policy = as_policy(policy)
    scores, early = exit_scores(records, policy), records.num_exits - 1
    macs = torch.tensor(records.cumulative_macs, dtype=torch.float64)
    thresholds, saved, fractions = [], [], []
    for threshold in sorted([*fine_thresholds(records, policy), policy.never_threshold]):
        index = exit_indices(scores, policy, policy.check_threshold(threshold, early))
        taken = torch.bincount(index, minlength=records.num_exits).double() / records.num_samples
        thresholds.append(threshold)
        saved.append(float(100 * (1 - taken @ macs / macs[-1])))
        fractions.append((100 * taken).tolist())
    near = [i for i, threshold in enumerate(thresholds) if abs(threshold) < 1e7] or [0]  # without "never"
    by_cost = sorted(range(len(saved)), key=saved.__getitem__)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        colors = [SHADES[round(e * (len(SHADES) - 1) / early)] for e in range(records.num_exits)]
        sides = ((thresholds, near, f"threshold ({policy_name(policy)})"), (saved, by_cost, "MACs saved, %"))
        for ax, (values, order, label) in zip(axes, sides, strict=True):
            places, layers = [values[i] for i in order], zip(*(fractions[i] for i in order), strict=True)
            stacks = ax.stackplot(places, list(layers), colors=colors, edgecolor="white", linewidth=1)
            ax.set_xlim(places[0], max(places[-1], places[0] + 1e-6))
            ax.set_xlabel(label)
            ax.grid(visible=False)
        axes[0].set_ylim(0, 100)
        axes[0].set_ylabel("samples, %")
        figure.legend(stacks, records.exit_names, loc="outside right center", title="exit", reverse=True)

    save_figure(draw, path, (8.4, 4.0))


def plot_contact_sheet(
    records: ExitRecords,
    policy: PolicyKey | ExitPolicy,
    threshold: float | Sequence[float],
    images: Callable[[list[int]], Sequence[Any]],
    path: str | os.PathLike[str],
    per_exit: int = 10,
) -> None:
    """Draws images that take each exit, with their predictions: a row per exit, what exits early above what exits late.

    The images of an exit are evenly spaced in the order of the records. A wrong prediction is written in red, with the
    label after it.

    Args:
        records: Of test data; calibrated if the model is.
        policy: A key of the policies table, or a policy.
        threshold: One number, or one per early exit.
        images: Takes values of ``records.index`` and returns images, of PIL or as arrays (H, W, 3).
        path: The figure; the ending gives the format.
        per_exit: Images per exit, at most.

    Raises:
        ThresholdError: A threshold that the policy does not take.
        ConfigError: ``per_exit`` is below 1.
        MissingDependencyError: matplotlib or adjustText is not installed.
        CheckpointWriteError: The file cannot be written.
    """
    records.require_classes("plot_contact_sheet", labels=False)
    check_whole("per_exit", per_exit, 1)
    taken, logits = route_records(records, policy, threshold)
    predictions = logits.argmax(-1)

    def caption(row: int) -> tuple[str, str]:
        prediction, label = int(predictions[row]), int(records.labels[row])
        name = records.class_names[prediction]
        wrong = records.labelled and prediction != label
        return (f"{name}\nnot {records.class_names[label]}", RED) if wrong else (name, "black")

    def draw(figure: Figure) -> None:
        axes = figure.subplots(records.num_exits, per_exit, squeeze=False)
        for e, name in enumerate(records.exit_names):
            rows = (taken == e).nonzero()[:, 0]
            if len(rows) > per_exit:
                rows = rows[torch.linspace(0, len(rows) - 1, per_exit).round().long()]
            shown = images(records.index[rows].tolist()) if len(rows) else []
            for ax in axes[e]:
                ax.set_axis_off()
            for ax, row, image in zip(axes[e], rows.tolist(), shown, strict=False):
                ax.imshow(image, cmap="gray")
                text, color = caption(row)
                ax.set_title(text, fontsize=9, color=color)
            fraction = float((taken == e).double().mean())
            axes[e, 0].text(
                -0.15, 0.5, f"{name}\n{100 * fraction:.1f} %", transform=axes[e, 0].transAxes, ha="right", va="center"
            )

    save_figure(draw, path, (1.0 * per_exit + 1.4, 1.35 * records.num_exits))
