"""Publishes a checkpoint on the Hugging Face Hub: see erde_hub/scripts/push.py, or --help."""

import os

if __name__ == "__main__":
    # Threads that wait for others sleep; otherwise they slow a busy machine down. Read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from erde_hub.scripts import push
    from erde_hub.scripts.common.command_line import run_script

    run_script(push.main)
