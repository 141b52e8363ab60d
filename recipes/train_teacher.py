"""Trains a teacher with exits: see erde_hub/scripts/train_teacher.py, or --help."""

from erde_hub_command import run

if __name__ == "__main__":
    run("train-teacher")
