"""Imported first by the subpackages that need torch: where there is none, they say what to install."""

from .errors import without_dependencies

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise without_dependencies("this part of erde_hub", error.name) from error
