"""Serves a checkpoint or an ONNX file over HTTP: see erde_hub/scripts/serve.py, or --help."""

from erde_hub_command import run

if __name__ == "__main__":
    run("serve")
