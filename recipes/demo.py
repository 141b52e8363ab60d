"""Opens a page with a slider: see erde_hub/scripts/demo.py, or --help."""

from erde_hub_command import run

if __name__ == "__main__":
    run("demo")
