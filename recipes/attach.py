"""Gives a network that you have already exits for your data: see erde_hub/scripts/attach.py, or --help."""

from erde_hub_command import run

if __name__ == "__main__":
    run("attach")
