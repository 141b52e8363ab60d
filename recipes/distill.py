"""Trains a teacher and distils a student with exits: see erde_hub/scripts/distill.py, or --help."""

from erde_hub_command import run

if __name__ == "__main__":
    run("distill")
