"""Publishes a checkpoint on the Hugging Face Hub: see erde_hub/scripts/push.py, or --help."""

from erde_hub_command import run

if __name__ == "__main__":
    run("push")
