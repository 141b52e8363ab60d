"""Measures a checkpoint on a data set: see erde_hub/scripts/evaluate.py, or --help."""

import os

if __name__ == "__main__":
    # Threads that wait for others sleep; otherwise they slow a busy machine down. Read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from erde_hub.scripts import evaluate
    from erde_hub.scripts.common.command_line import run_script

    run_script(evaluate.main)
