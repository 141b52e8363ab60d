"""Optional packages, or an error with the command that installs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from erde_hub.errors import MissingDependencyError


def require(module: str, purpose: str, install: str) -> ModuleType:
    """Imports a module that is not a dependency of the core.

    Args:
        module: Its import name.
        purpose: What it is needed for, as the subject of a sentence.
        install: What pip is told to install.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise MissingDependencyError(f"{purpose} needs {name}: pip install {install}") from error
