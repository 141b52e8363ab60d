"""HTML of the page: what each exit said, what it cost, all samples so far, the frontier of the test set."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from .networks import Answers, Network
from .samples import Item, Shown

#: Exits from shallow to deep, Okabe and Ito's hues dark enough for white digits; each is numbered as well.
COLORS = ("#007A5A", "#0072B2", "#8A5A00", "#B0451F", "#93396B", "#444444")
#: Of the networks that are compared.
LINES = ("#0072B2", "#B0451F")
#: Answers of an exit that are shown.
BEST = 3

CSS = """
.exits { font-size: 15px; line-height: 1.4; color: var(--body-text-color) }
.exits * { box-sizing: border-box }
.exits p { margin: 0 0 8px }
.exits .soft { opacity: .75; font-size: 14px }
.exits .answer { display: flex; align-items: center; gap: 12px; min-height: 72px; margin-bottom: 8px }
.exits .answer img { width: 72px; height: 72px; object-fit: contain; border-radius: 6px; background: #000 }
.exits .big { font-size: 26px; font-weight: 700; overflow-wrap: anywhere }
.exits .chip { display: inline-block; min-width: 22px; padding: 0 6px; border-radius: 11px; color: #fff;
  font-weight: 700; text-align: center }
.exits .exit { display: flex; flex-wrap: wrap; gap: 4px 10px; align-items: center; padding: 6px 8px;
  border-left: 4px solid transparent }
.exits .said { flex: 1 1 8em }
.exits .bars { flex: 2 1 15em }
.exits .exit.taken { border-left-color: var(--exit); background: var(--background-fill-secondary) }
.exits .exit.idle { opacity: .6 }
.exits .bar { display: grid; grid-template-columns: var(--names) 1fr 3.2em; gap: 8px; align-items: center }
.exits .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.exits .track { height: 10px; border-radius: 5px; background: var(--border-color-primary); overflow: hidden }
.exits .track i { display: block; height: 100%; background: var(--exit) }
.exits .number { text-align: right; font-variant-numeric: tabular-nums }
.exits table { border-collapse: collapse; width: 100%; margin: 10px 0 8px }
.exits th, .exits td { text-align: right; padding: 4px 0 4px 8px; border: 0; font-weight: 400;
  border-bottom: 1px solid var(--border-color-primary); font-variant-numeric: tabular-nums }
.exits th:first-child, .exits td:first-child { text-align: left; padding-left: 0 }
.exits .tiles { display: grid; gap: 5px; grid-template-columns: repeat(auto-fill, minmax(46px, 1fr)); padding: 4px;
  max-height: 330px; overflow-y: auto; align-items: start }
.exits .tiles.text { grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)) }
.exits .tile { position: relative; padding: 0; border: 4px solid var(--exit); border-radius: 6px; cursor: pointer;
  background: var(--background-fill-primary); color: inherit; font: inherit; overflow: hidden; text-align: left }
.exits .tile img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover }
.exits .tile .words { display: block; padding: 6px 26px 6px 6px; font-size: 13px; overflow-wrap: anywhere }
.exits .tile .chip { position: absolute; right: 0; bottom: 0; font-size: 12px; min-width: 18px; padding: 0 4px;
  border-radius: 6px 0 0 0; background: var(--exit) }
.exits .tile[aria-pressed=true] { outline: 3px solid var(--body-text-color) }
.exits .tile:focus-visible { outline: 3px dashed var(--body-text-color); outline-offset: 1px }
.exits .legend { display: flex; flex-wrap: wrap; gap: 4px 14px; margin-bottom: 8px }
.exits summary { cursor: pointer; margin: 8px 0 }
.exits details { overflow-x: auto }
.exits details img { max-width: max(100%, 640px); height: auto; padding: 8px; margin-bottom: 16px; background: #fff }
.exits svg { width: 100%; max-width: 560px; height: auto }
.exits svg text { fill: var(--body-text-color); font-size: 15px }
"""


def views(networks: Sequence[Network], shown: Shown, selected: int, thresholds: Sequence[Any]) -> list[str]:
    """Returns all HTML: the grid, coloured by the first network's exits, the frontier, and a panel per network."""
    taken = [network.route(answers, t) for network, answers, t in zip(networks, shown.answers, thresholds, strict=True)]
    panels = [
        panel(network, shown, own, selected, t, exits)
        for network, own, t, exits in zip(networks, shown.answers, thresholds, taken, strict=True)
    ]
    return [grid(networks[0], shown.items, taken[0], selected), frontier(networks, thresholds), *panels]


def panel(network: Network, shown: Shown, answers: Answers, selected: int, threshold: Any, taken: Any) -> str:
    """What one network says to the selected sample, what that cost, and what all samples so far cost."""
    own, item, names = int(taken[selected]), shown.items[selected], network.class_names
    answer = names[answers.probs[own, selected].argmax()]
    known = "" if item.label is None else " ✓ right" if item.label == answer else f" ✗ it is {escape(item.label)}"
    rows = []
    for e, name in enumerate(network.exit_names):
        state = "taken" if e == own else "idle" if e > own else ""
        why, bars = _why(network, answers, selected, e, own, threshold), _bars(answers.probs[e, selected], names)
        rows.append(
            f'<div class="exit {state}" style="--exit:{_color(network, e)}">{_chip(network, e)}'
            f'<div class="said"><b>{escape(name)}</b><br><span class="soft">{why}</span></div>{bars}</div>'
        )
    picture = f'<img src="{item.picture}" alt="{escape(item.name)}">' if item.picture else ""
    return (
        f'<div class="exits" role="status"><div class="answer">{picture}<div><span class="big">{escape(answer)}</span>'
        f"{known}<br>by exit {_chip(network, own)} of {len(network.exit_names)}</div></div>{''.join(rows)}"
        f"{_costs(network, taken, own)}{_hits(network, shown, answers, taken)}</div>"
    )


def _bars(probs: Any, names: Sequence[str]) -> str:
    """The likeliest classes of one exit."""
    bars = (
        f'<div class="bar"><span class="name" title="{escape(names[k])}">{escape(names[k])}</span>'
        f'<span class="track"><i style="width:{100 * probs[k]:.1f}%"></i></span>'
        f'<span class="number">{100 * probs[k]:.0f} %</span></div>'
        for k in probs.argsort()[::-1][:BEST]
    )
    width = min(max(map(len, names)), 14)
    return f'<div class="bars" style="--names:{width + 1}ch">{"".join(bars)}</div>'


def _why(network: Network, answers: Answers, n: int, e: int, exit_index: int, threshold: Any) -> str:
    """Why the sample exits here, or does not."""
    if e > exit_index:
        return "not run"
    if e == len(network.exit_names) - 1:
        return "the last: it answers what is left"
    if network.slider is None:
        return "exits" if e == exit_index else "goes on"
    limit, score = np.broadcast_to(threshold, len(network.exit_names) - 1)[e], answers.scores[e, n]
    exits = e == exit_index
    sign = ("≥" if exits else "&lt;") if network.exits_above else ("&lt;" if exits else "≥")
    return f"{'exits' if exits else 'goes on'}: {escape(network.policy)} {score:.3g} {sign} {limit:.3g}"


def _costs(network: Network, taken: Any, exit_index: int) -> str:
    """Used and saved: of this sample, and of all so far."""
    lines = [("million MACs", np.asarray(network.macs) / 1e6)]
    if network.milliseconds is not None:
        lines.append(("milliseconds", np.asarray(network.milliseconds)))
    rows = []
    for who, exits in (("this one", [exit_index]), (f"all {len(taken)} so far", taken)):
        for unit, costs in lines:
            used, full = costs[exits].sum(), len(exits) * costs[-1]
            cells = (
                f"{who}, {unit}",
                f"<b>{_number(used)}</b>",
                _number(full),
                f"<b>{100 * (1 - used / full):.0f} %</b>",
            )
            rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "<tr><th></th><th>used</th><th>without exits</th><th>saved</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _hits(network: Network, shown: Shown, answers: Answers, taken: Any) -> str:
    labels = [item.label for item in shown.items]
    known = [n for n, label in enumerate(labels) if label is not None]
    if not known:
        return ""
    names = network.class_names

    def right(exits: Any) -> int:
        return sum(names[answers.probs[exits[n], n].argmax()] == labels[n] for n in known)

    last = np.full(len(taken), len(network.exit_names) - 1)
    return f'<p class="soft">Right: {right(taken)} of {len(known)} with a known label; without exits {right(last)}.</p>'


def grid(network: Network, items: Sequence[Item], taken: Any, selected: int) -> str:
    """All samples so far as buttons, coloured by the exit that they take, and how many take each."""
    counts = np.bincount(taken, minlength=len(network.exit_names))
    legend = "".join(
        f"<span>{_chip(network, e)} {escape(name)}: {counts[e]}</span>" for e, name in enumerate(network.exit_names)
    )
    tiles = []
    for n, item in enumerate(items):
        what = escape(item.name)
        inside = f'<img src="{item.picture}" alt="">' if item.picture else f'<span class="words">{what[:120]}</span>'
        tiles.append(
            f'<button class="tile" data-index="{n}" style="--exit:{_color(network, taken[n])}"'
            f' aria-pressed="{str(n == selected).lower()}" title="{what}" aria-label="{what}, exit {taken[n] + 1}">'
            f'{inside}<span class="chip">{taken[n] + 1}</span></button>'
        )
    kind = "" if items and items[0].picture else " text"
    return f'<div class="exits"><div class="legend">{legend}</div><div class="tiles{kind}">{"".join(tiles)}</div></div>'


def frontier(networks: Sequence[Network], thresholds: Sequence[Any]) -> str:
    """Accuracy against mean cost on the test set, with the point of the present threshold, as SVG."""
    known = [(i, network) for i, network in enumerate(networks) if network.results is not None]
    if not known:
        said = "No results.json lies next to the network: nothing is known of a test set."
        return f'<div class="exits"><p class="soft">{said}</p></div>'
    curves = {i: _curve(network) for i, network in known}
    costs, accuracies = np.concatenate([np.array(curve).T for curve in curves.values()], 1)
    width, height, left, bottom, top = 460, 290, 52, 46, 14
    right, low = 1.08 * costs.max(), max(0.0, accuracies.min() - 0.1 * np.ptp(accuracies) - 0.2)
    high = min(100.0, accuracies.max() + 0.1 * np.ptp(accuracies) + 0.2)

    def place(cost: float, accuracy: float) -> tuple[float, float]:
        x = left + (width - left - 12) * cost / right
        return x, top + (height - top - bottom) * (high - accuracy) / (high - low)

    marks, words = [], []
    for value in _ticks(0, right):
        x, y = place(value, low)
        marks.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{value:g}</text>')
    for value in _ticks(low, high):
        x, y = place(0, value)
        marks.append(
            f'<line x1="{x:.0f}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" opacity=".15"/>'
            f'<text x="{x - 8:.0f}" y="{y + 4:.0f}" text-anchor="end">{value:g}</text>'
        )
    for i, network in known:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curves[i]))
        marks.append(f'<polyline points="{path}" fill="none" stroke="{LINES[i]}" stroke-width="2.5"/>')
        row = network.measured(thresholds[i])
        if row is not None:
            x, y = place(row["mean_macs"] / 1e6, 100 * row["accuracy"])
            dot = f'cx="{x:.1f}" cy="{y:.1f}" r="8" fill="{LINES[i]}" stroke="white" stroke-width="2"'
            marks.append(f"<circle {dot}/>")
            words.append(
                f'<p><span class="chip" style="background:{LINES[i]}">&nbsp;</span> {escape(network.name)} on its test'
                f" set: <b>{100 * row['accuracy']:.1f} %</b> right at <b>{row['mean_macs'] / 1e6:.3g}</b> million MACs"
                f" per {network.kind}.</p>"
            )
    axes = (
        f'<text x="{(left + width) / 2:.0f}" y="{height - 4}" text-anchor="middle">mean cost per {networks[0].kind},'
        f' million MACs</text><text transform="rotate(-90)" x="{20 - height / 2:.0f}" y="14" text-anchor="middle">'
        "accuracy, %</text>"
    )
    label = "accuracy against mean cost on the test set"
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(marks)}{axes}</svg>'
    return f'<div class="exits">{"".join(words)}{svg}</div>'


def pictures(networks: Sequence[Network]) -> str:
    """Figures of the test set that lie next to the networks, folded."""
    shown = "".join(
        f"<p>{escape(network.name)}. {escape(caption)}:</p>"
        f'<img src="data:image/png;base64,{b64encode(png).decode()}" alt="{escape(caption)}">'
        for network in networks
        for caption, png in network.pictures.items()
    )
    summary = "Pictures of the test set"
    return f'<div class="exits"><details><summary>{summary}</summary>{shown}</details></div>' if shown else ""


def _curve(network: Network) -> list[tuple[float, float]]:
    results: Any = network.results
    rows = {row["mean_macs"]: row["accuracy"] for row in [*results["sweep"], *results.get("fine_sweep", [])]}
    return [(macs / 1e6, 100 * rows[macs]) for macs in sorted(rows)]


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two."""
    rough = (high - low) / 5
    size = 10 ** np.floor(np.log10(rough))
    step = next(size * k for k in (1, 2, 5, 10) if size * k >= rough)
    return [round(float(v), 10) for v in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _color(network: Network, e: int) -> str:
    return COLORS[round(e * (len(COLORS) - 1) / max(len(network.exit_names) - 1, 1))]


def _chip(network: Network, e: int) -> str:
    return f'<span class="chip" style="background:{_color(network, e)}">{e + 1}</span>'
