"""Writes what is generated: tables in README.md and docs/, card and picture of published runs in model_cards/.

    python recipes/make_tables.py           # rewrites them
    python recipes/make_tables.py --check   # exit code 1 if they are not current

A part stands between `<!-- table: NAME -->` and `<!-- end -->`. Numbers come from recipes/results/*.json and nowhere
else; a picture is drawn from one of these files and remembers which by its hash.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from pages import calibration, export, inference, methods, pretrained, rotation, speed, studies, support
from pages.markdown import RESULTS, load, registry_table, table
from PIL import Image, PngImagePlugin

from erde_hub import list_exit_points
from erde_hub.calibration import list_calibrators
from erde_hub.evaluation import load_results, plot_frontier
from erde_hub.evaluation.formatting import mmacs, percent
from erde_hub.heads import get_head, list_heads
from erde_hub.hub import render_model_card
from erde_hub.losses import list_losses
from erde_hub.policies import get_policy, list_policies

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = (README, ROOT / "recipes" / "studies" / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
INFERENCE = RESULTS / "benchmark_inference.json"
CONFIGS = ROOT / "recipes" / "configs"
CARDS = ROOT / "model_cards"
NETWORKS = ("resnet8_cifar", "resnet10_cifar", "resnet18_cifar", "resnet50_cifar")

_PART = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Rewrites or checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if something is not current")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        current = render(text)
        if current != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if not check:
                page.write_text(current, encoding="utf-8")
    for path, results in run_results():
        card, picture = CARDS / path.stem / "README.md", CARDS / path.stem / "frontier.png"
        card.parent.mkdir(parents=True, exist_ok=True)
        written = render_model_card(results)
        if not card.is_file() or card.read_text(encoding="utf-8") != written:
            stale.append(card.relative_to(ROOT).as_posix())
            if not check:
                card.write_text(written, encoding="utf-8")
        if not picture_is_current(picture, path):
            stale.append(picture.relative_to(ROOT).as_posix())
            if not check:
                draw_picture(picture, path, results)
    picture = INFERENCE.with_suffix(".png")
    if not picture_is_current(picture, INFERENCE):
        stale.append(picture.relative_to(ROOT).as_posix())
        if not check:
            inference.draw_saving(load(INFERENCE.stem), str(picture))
            _make_small(picture, INFERENCE)
    if stale and check:
        print(f"not current: {', '.join(stale)}; run `python recipes/make_tables.py`", file=sys.stderr)
        raise SystemExit(1)
    print(f"{'rewritten: ' + ', '.join(stale) if stale else 'everything is current'}")


def render(text: str) -> str:
    """Returns a page with every generated part made anew."""

    def part(match: re.Match[str]) -> str:
        if match[2] not in _TABLES:
            raise SystemExit(f"a page asks for a table {match[2]!r}; there are {', '.join(_TABLES)}")
        return f"{match[1]}{_TABLES[match[2]]()}\n{match[3]}"

    return _PART.sub(part, text)


def networks_table() -> str:
    """Cost of every stage of the networks that come with the library, at full width, without heads."""
    rows = []
    for name in NETWORKS:
        model = timm.create_model(name, num_classes=10)
        points = {point.name: mmacs(point.macs) for point in list_exit_points(model, input_size=(3, 32, 32))}
        params = sum(p.numel() for p in model.parameters()) / 1e6
        rows.append((f"`{name}`", *(points.get(f"layer{i}", "-") for i in range(1, 5)), f"{params:.2f} M"))
    header = ("timm name", *(f"up to layer{i}, MMACs" for i in range(1, 5)), "parameters")
    return table(header, rows)


def headline() -> str:
    """One sentence on the CIFAR-10 run."""
    results = load("cifar10_resnet18_resnet10-small")
    teacher, full, point = results["teacher"], results["per_exit"][-1], results["operating_point"]
    static = results["per_exit"][-2]  # every image takes the last exit before the end
    return (
        f"CIFAR-10, one run of {results['training']['epochs']} epochs: with all its layers a small network has"
        f" {percent(full['accuracy'])} % at {mmacs(full['macs'])} million multiply-accumulates (MACs) per image, with"
        f" early exits {percent(point['accuracy'])} % at {mmacs(point['mean_macs'])} million. If every image,"
        f" easy or not, left at the last early exit, it would have {percent(static['accuracy'])} % at"
        f" {mmacs(static['macs'])} million. The larger network that it learned from has"
        f" {percent(teacher['accuracy'])} % at {mmacs(teacher['macs'])} million."
    )


def keys() -> str:
    """One line each: losses, heads, policies, calibrators."""
    tables = {
        "Losses": (list_losses(), "loss="),
        "Heads": (list_heads(), "head="),
        "Policies": (list_policies(), "policy="),
        "Calibrators": (list_calibrators(), "--calibrator"),
    }
    return "\n".join(
        f"- **{title}**, `{argument}`: {', '.join(f'`{name}`' for name in names)}"
        for title, (names, argument) in tables.items()
    )


def results_table() -> str:
    """One row per published run: teacher, student at its last exit, student at its stored threshold."""
    rows = []
    for path, results in run_results():
        if results.get("teacher") is None:
            continue
        teacher, full, point = results["teacher"], results["per_exit"][-1], results["operating_point"]
        rows.append(
            (
                f"[{path.stem}](recipes/results/{path.name})",
                f"{percent(teacher['accuracy'])} at {mmacs(teacher['macs'])}",
                f"{percent(full['accuracy'])} at {mmacs(full['macs'])}",
                f"{percent(point['accuracy'])} at {mmacs(point['mean_macs'])}",
                percent(1 - point["mean_macs"] / full["macs"]),
            )
        )
    header = ("run", "teacher", "student, all layers", "student, early exits on", "MACs saved %")
    return table(header, rows)


def configs_table() -> str:
    """One row per file in recipes/configs, with its first line."""
    rows = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        rows.append((f"`{path.stem}`", first.lstrip("# ")))
    return table(("--config", "what it is"), rows)


def run_results() -> list[tuple[Path, dict[str, Any]]]:
    """Returns the files of all published runs, which are named after a configuration, and what is in them."""
    paths = [path for path in sorted(RESULTS.glob("*.json")) if (CONFIGS / f"{path.stem}.yaml").is_file()]
    return [(path, load_results(path)) for path in paths]


def picture_is_current(picture: Path, source: Path) -> bool:
    """Tells whether a picture was drawn from these results; its pixels depend on matplotlib's version."""
    if not picture.is_file():
        return False
    with Image.open(picture) as drawn:
        return drawn.info.get("Source") == _hash(source)


def draw_picture(picture: Path, source: Path, results: dict[str, Any]) -> None:
    """Draws the picture of a run."""
    plot_frontier(results, picture)
    _make_small(picture, source)


def _make_small(picture: Path, source: Path) -> None:
    """Leaves few colours, so that a picture stays small, and the hash of what it shows."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Source", _hash(source))
    with Image.open(picture) as drawn:
        small = drawn.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    small.save(picture, optimize=True, pnginfo=notes)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


_PAGES = (calibration, export, inference, methods, pretrained, rotation, speed, studies, support)
_TABLES: dict[str, Callable[[], str]] = {
    **{name: make for page in _PAGES for name, make in page.TABLES.items()},
    "policies": lambda: registry_table(list_policies(), get_policy),
    "heads": lambda: registry_table(list_heads(), get_head),
    "headline": headline,
    "keys": keys,
    "networks": networks_table,
    "configs": configs_table,
    "results": results_table,
}


if __name__ == "__main__":
    main()
