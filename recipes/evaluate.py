"""Measures a checkpoint on a data set: see erde_hub/scripts/evaluate.py, or --help."""

from erde_hub_command import run

if __name__ == "__main__":
    run("evaluate")
