"""Early exits for image and text classifiers: attach, train, route, publish.

Without torch and transformers (``pip install --no-deps erde-hub``) this still imports, for
:class:`erde_hub.export.EarlyExitSession`; the names below then say what is missing.
"""

from typing import Any

from ._version import __version__ as __version__
from .allocator import keep_freed_memory
from .budget import BudgetController

_NEEDED = ("torch", "torchvision", "timm", "transformers", "safetensors", "huggingface_hub", "accelerate", "datasets")
_missing: str | None = None

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    )

    from .backbones import cifar_resnet as networks
    from .config import EarlyExitConfig
    from .engine.streaming import route_batches
    from .generation import EarlyExitForCausalLM
    from .modeling.attach import list_exit_points
    from .modeling.pipelines import register_pipelines
    from .modeling.truncated import TruncatedConfig, TruncatedModel
    from .modeling.wrapper import EarlyExitWrapper
    from .outputs import EarlyExitOutput
except ModuleNotFoundError as error:
    if error.name not in _NEEDED:
        raise
    _missing = error.name
else:
    AutoConfig.register(EarlyExitConfig.model_type, EarlyExitConfig, exist_ok=True)
    AutoModelForImageClassification.register(EarlyExitConfig, EarlyExitWrapper, exist_ok=True)
    AutoModelForSequenceClassification.register(EarlyExitConfig, EarlyExitWrapper, exist_ok=True)
    AutoModelForCausalLM.register(EarlyExitConfig, EarlyExitForCausalLM, exist_ok=True)
    AutoConfig.register(TruncatedConfig.model_type, TruncatedConfig, exist_ok=True)
    AutoModelForImageClassification.register(TruncatedConfig, TruncatedModel, exist_ok=True)
    AutoModelForSequenceClassification.register(TruncatedConfig, TruncatedModel, exist_ok=True)
    register_pipelines()

__all__ = [
    "BudgetController",
    "EarlyExitConfig",
    "EarlyExitForCausalLM",
    "EarlyExitOutput",
    "EarlyExitWrapper",
    "TruncatedConfig",
    "TruncatedModel",
    "keep_freed_memory",
    "list_exit_points",
    "networks",
    "route_batches",
]


def __getattr__(name: str) -> Any:
    if _missing is None or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .errors import without_dependencies  # noqa: PLC0415 - on the way to an error

    raise without_dependencies(f"erde_hub.{name}", _missing)
