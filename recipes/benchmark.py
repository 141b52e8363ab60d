"""Measures what the early exits of a checkpoint save on this machine: see erde_hub/scripts/benchmark.py, or --help."""

from erde_hub_command import run

if __name__ == "__main__":
    run("benchmark")
