"""Writes a checkpoint into one ONNX file: see erde_hub/scripts/export_onnx.py, or --help."""

from erde_hub_command import run

if __name__ == "__main__":
    run("export")
