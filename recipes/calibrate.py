"""Chooses the threshold of a checkpoint: see erde_hub/scripts/calibrate.py, or --help."""

from erde_hub_command import run

if __name__ == "__main__":
    run("calibrate")
