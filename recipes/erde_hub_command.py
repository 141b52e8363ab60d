"""The command ``erde-hub``: imports the one script that is asked for, and for its own help nothing at all.

Installed, it lies next to the package, whose import takes seconds; here it lies next to the scripts that call it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

#: Command to the script in erde_hub/scripts/ and what it does.
COMMANDS = {
    "distill": ("distill", "train a teacher, and a student with exits from it"),
    "train-teacher": ("train_teacher", "train a teacher with exits"),
    "attach": ("attach", "give a network that you have already exits for your data"),
    "evaluate": ("evaluate", "measure a checkpoint: every exit, and a sweep of thresholds"),
    "calibrate": ("calibrate", "choose the threshold of a checkpoint"),
    "latency": ("latency", "measure accuracy, share saved and milliseconds per threshold on this machine"),
    "benchmark": ("benchmark", "measure the routed model next to its bare backbone"),
    "export": ("export_onnx", "write a checkpoint into one ONNX file"),
    "demo": ("demo", "open a page to play with: an image, a threshold, what each exit says"),
    "serve": ("serve", "answer over HTTP, on this machine, with a checkpoint or an ONNX file"),
    "push": ("push", "publish a checkpoint on the Hugging Face Hub"),
}
#: Commands with --resume.
RESUMABLE = ("distill", "train-teacher", "attach")
#: Commands that tell their own errors, since they also run where there is no torch.
WITHOUT_TORCH = ("demo",)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs ``erde-hub COMMAND --FLAG VALUE ...``."""
    command, *flags = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in COMMANDS:
        sys.argv = [f"erde-hub {command}", *flags]
        run(command)
    elif command == "--version":
        print(metadata.version("erde-hub"))
    elif command in ("--help", "-h"):
        lines = (f"  {name:15}{summary}" for name, (_, summary) in COMMANDS.items())
        print("usage: erde-hub COMMAND [--FLAG VALUE ...]\n\n" + "\n".join(lines))
        print("\nerde-hub COMMAND --help lists the flags of one.")
    else:
        raise SystemExit(f"erde-hub: error: no command {command!r} (there are: {', '.join(COMMANDS)})")


def run(command: str) -> None:
    """Runs a command with the flags of this process, ``sys.argv[1:]``."""
    # Threads that wait for others sleep; otherwise they slow a busy machine down. Read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        script = importlib.import_module(f"erde_hub.scripts.{COMMANDS[command][0]}")
        if command in WITHOUT_TORCH:
            script.main()
            return
        command_line = importlib.import_module("erde_hub.scripts.common.command_line")
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    command_line.run_script(script.main, command in RESUMABLE)


if __name__ == "__main__":
    main()
