"""Measures what each threshold of a checkpoint takes on this machine: see erde_hub/scripts/latency.py, or --help."""

from erde_hub_command import run

if __name__ == "__main__":
    run("latency")
