"""Opens a page in the browser: choose an image or type a text, move the threshold, see which exit answers.

    erde-hub demo                                    # handwritten digits, with a network that comes with the package
    erde-hub demo --model runs/digits-1              # a checkpoint, from a folder or the Hub
    erde-hub demo --model model.onnx                 # a file of `erde-hub export`; needs no torch
    erde-hub demo --model runs/a runs/b --images my_images

Two networks are compared. Every exit answers each sample once, so moving the slider runs no network. The page is for
this computer alone (127.0.0.1) and sends nothing anywhere.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path
from typing import Any

from erde_hub.errors import ConfigError, ErdeError, MissingDependencyError
from erde_hub.scripts.playground.networks import Network, open_onnx
from erde_hub.scripts.playground.samples import MOST_IMAGES, SHIPPED


def main() -> None:
    """Opens the networks, builds the page, serves it until Ctrl-C."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    models = "folder, Hub repository or ONNX file; two are compared; default: digits, which come with the package"
    parser.add_argument("--model", nargs="+", default=[str(SHIPPED)], metavar="MODEL", help=models)
    parser.add_argument("--images", metavar="FOLDER", help=f"images to begin with, {MOST_IMAGES} at most")
    parser.add_argument("--port", type=int, metavar="N", help="default: the first free one from 7860")
    parser.add_argument("--no_browser", action="store_true", help="only print the address")
    plugins = "Python modules that register heads, policies or calibrators of your own"
    parser.add_argument("--import", dest="plugins", nargs="+", metavar="MODULE", help=plugins)
    args = parser.parse_args()
    try:
        page = import_page()
        if args.plugins:
            from erde_hub.scripts.common.command_line import import_plugins  # noqa: PLC0415 - needs torch

            import_plugins(args.plugins)
        networks = [open_network(model) for model in args.model]
        built = page.build_page(networks, args.images)
        try:
            address = page.serve(built, args.port, browser=not args.no_browser)
        except OSError as error:  # gradio's names one of its own variables
            which = "no port from 7860 on is free" if args.port is None else f"port {args.port} is taken"
            raise ConfigError(f"{which}: choose another with --port") from error
    except (ErdeError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"{address} (Ctrl-C ends it)", flush=True)
    threading.Event().wait()


def open_network(model: str) -> Network:
    """Opens an ONNX file, or a checkpoint from a folder or the Hub.

    Raises:
        CheckpointError: There is none, or it is damaged.
        NotSupportedError: It is no classifier with exits.
        MissingDependencyError: Torch, for a checkpoint, or onnxruntime, for a file, is not installed.
    """
    if model.endswith(".onnx"):
        return open_onnx(Path(model).expanduser())
    from erde_hub.scripts.playground.checkpoint import open_checkpoint  # noqa: PLC0415 - needs torch

    return open_checkpoint(model)


def import_page() -> Any:
    """Returns the module that builds the page.

    Raises:
        MissingDependencyError: gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by gradio when it is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from erde_hub.scripts.playground import page  # noqa: PLC0415 - gradio is an extra
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise MissingDependencyError('the page needs gradio: pip install "erde-hub[demo]"') from error
    return page


if __name__ == "__main__":
    main()
