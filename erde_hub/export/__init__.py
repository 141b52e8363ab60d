"""One file with the exits inside, for ONNX or ExecuTorch, and a small runtime for it.

What writes files needs torch and the extra ``onnx`` or ``executorch``; for ONNX files :class:`EarlyExitSession` needs
neither torch nor onnx. Names are looked up when they are used, so that importing one side does not import what the
other needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from erde_hub.errors import MissingDependencyError

if TYPE_CHECKING:
    from .executorch_file import export_executorch
    from .metadata import FileInfo
    from .onnx_file import ExportCheck, check_onnx, export_onnx
    from .session import EarlyExitSession, SessionOutput

__all__ = [
    "EarlyExitSession",
    "ExportCheck",
    "FileInfo",
    "SessionOutput",
    "check_onnx",
    "export_executorch",
    "export_onnx",
]

_HOME = {
    "EarlyExitSession": "session",
    "ExportCheck": "onnx_file",
    "FileInfo": "metadata",
    "SessionOutput": "session",
    "check_onnx": "onnx_file",
    "export_executorch": "executorch_file",
    "export_onnx": "onnx_file",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "timm", "transformers"):
            raise
        raise MissingDependencyError(
            f"erde_hub.export.{name} needs {error.name}, which is not installed: pip install 'erde-hub[onnx]'"
        ) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
