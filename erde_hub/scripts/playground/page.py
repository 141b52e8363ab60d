"""The page itself, of Gradio: it needs the extra ``demo``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import gradio as gr
import numpy as np

from erde_hub.errors import ConfigError, ErdeError

from .networks import Network
from .samples import first_samples
from .views import CSS, frontier, pictures, views

#: The largest file that is taken.
LARGEST_FILE = "50mb"
#: Fonts of the computer: none is downloaded.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
#: Of small text.
DARKER = {"block_info_text_color": "*neutral_600", "body_text_color_subdued": "*neutral_600"}
INTRODUCTION = """# Early exits: {}
An easy {} takes an early exit, and the layers after it do not run. The threshold sets how many do."""
#: Clicks on samples, and the keyboard's place among them when they are drawn anew.
CLICKS = """
element.addEventListener('click', event => {
  const tile = event.target.closest('.tile');
  if (tile) { element.focused = tile.dataset.index; trigger('click', {index: Number(tile.dataset.index)}); }
});
watch('value', () => {
  const tile = element.querySelector(`.tile[data-index="${element.focused}"]`);
  if (tile && document.activeElement === document.body) tile.focus();
});
"""


def build_page(networks: Sequence[Network], images: str | None = None) -> gr.Blocks:
    """Builds the page for one network, or for two that are compared.

    Args:
        networks: One or two, for the same kind of input.
        images: Folder of images to begin with.

    Raises:
        ConfigError: Other networks, or a folder without images.
    """
    if not 1 <= len(networks) <= 2 or len({network.kind for network in networks}) > 1:
        raise ConfigError("the page shows one network, or compares two, which take the same: images or texts")
    kind, stored, start = networks[0].kind, [network.threshold for network in networks], first_samples(networks, images)

    def draw(shown: Any, selected: int, thresholds: list[Any]) -> list[str]:
        if shown.items:
            return views(networks, shown, selected, thresholds)
        return ["", frontier(networks, thresholds), *[f"Add a {kind} to see what each exit says."] * len(networks)]

    def move(i: int, threshold: Any, shown: Any, selected: int, thresholds: list[Any]) -> list[Any]:
        thresholds = [*thresholds[:i], threshold, *thresholds[i + 1 :]]
        return [thresholds, *draw(shown, selected, thresholds)]

    def restore(i: int, *state: Any) -> list[Any]:
        return [_position(stored[i]), *move(i, stored[i], *state)]

    def add(given: Any, shown: Any, selected: int, thresholds: list[Any]) -> list[Any]:
        note = ""
        try:
            if kind == "image":
                shown = shown.add_files(networks, given)
            elif given.strip():
                shown = shown.add_text(networks, given.strip())
            selected = len(shown.items) - 1
        except ErdeError as error:
            note = f"⚠ {error}"
        return [None, note, shown, selected, *draw(shown, selected, thresholds)]

    def pick(shown: Any, thresholds: list[Any], event: gr.EventData) -> list[Any]:
        return [event.index, *draw(shown, event.index, thresholds)]

    with gr.Blocks(title="erde_hub: early exits", analytics_enabled=False) as page:
        shown, selected, thresholds = state = [gr.State(start), gr.State(0), gr.State(stored)]
        first = draw(start, 0, stored)
        gr.Markdown(INTRODUCTION.format(" and ".join(network.name for network in networks), kind))
        sliders, buttons, panels = [], [], []
        with gr.Row():
            for network, html in zip(networks, first[2:], strict=True):
                with gr.Column(min_width=320):
                    slider, button = _threshold(network)
                    sliders.append(slider)
                    buttons.append(button)
                    panels.append(gr.HTML(html, apply_default_css=False))
                    gr.Markdown(network.promise)
            with gr.Column(min_width=320):
                tiles = gr.HTML(first[0], js_on_load=CLICKS, apply_default_css=False)
                if kind == "image":
                    types, label = ["image"], "Your own images"
                    given: Any = gr.File(label=label, file_count="multiple", file_types=types, height=140)
                else:
                    given = gr.Textbox(label="Your own text", info="Enter adds it")
                note = gr.Markdown("", elem_id="note")
                curve = gr.HTML(first[1], apply_default_css=False)
        gr.HTML(pictures(networks), apply_default_css=False)
        drawn: list[Any] = [tiles, curve, *panels]
        quick: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
        for i, (slider, button) in enumerate(zip(sliders, buttons, strict=True)):
            slider.input(partial(move, i), [slider, *state], [thresholds, *drawn], **quick)
            button.click(partial(restore, i), state, [slider, thresholds, *drawn], **quick)
        added = given.upload if kind == "image" else given.submit
        added(add, [given, *state], [given, note, shown, selected, *drawn], **quick)
        tiles.click(pick, [shown, thresholds], [selected, *drawn], **quick)
    return page


def serve(page: gr.Blocks, port: int | None = None, browser: bool = False) -> str:
    """Serves a page to this computer alone, in the background, and returns its address."""
    settings: dict[str, Any] = {"server_name": "127.0.0.1", "server_port": port, "share": False, "inbrowser": browser}
    look: dict[str, Any] = {"theme": gr.themes.Default(**FONTS).set(**DARKER), "css": CSS, "footer_links": []}
    _, address, _ = page.launch(**settings, **look, max_file_size=LARGEST_FILE, quiet=True, prevent_thread_lock=True)
    return str(address)


def _threshold(network: Network) -> tuple[gr.Slider, gr.Button]:
    low, high, step = network.slider or (0, 1, 1)
    what = f"{network.policy}; higher: {'fewer' if network.exits_above else 'more'} {network.kind}s exit early"
    used = network.slider is not None
    slider = gr.Slider(
        low,
        high,
        _position(network.threshold),
        step=step,
        label=f"Threshold of {network.name}",
        info=what,
        visible=used,
        buttons=[],
    )
    label = " / ".join("never" if abs(value) >= 1e8 else f"{value:.3g}" for value in np.atleast_1d(network.threshold))
    return slider, gr.Button(f"Back to the stored threshold, {label}", size="sm", visible=used)


def _position(threshold: Any) -> float:
    """Where the slider stands at a stored threshold, in three digits; with one per exit, at their mean."""
    return float(f"{np.mean(threshold):.3g}")
