"""Early exits for any vision model: attach, distil with ERDE, route, publish."""

from transformers import AutoConfig, AutoModelForImageClassification

__version__ = "0.1.0"

from . import networks
from .config import EarlyExitConfig
from .modeling import EarlyExitWrapper, list_exit_points
from .outputs import EarlyExitOutput

AutoConfig.register(EarlyExitConfig.model_type, EarlyExitConfig, exist_ok=True)
AutoModelForImageClassification.register(EarlyExitConfig, EarlyExitWrapper, exist_ok=True)

__all__ = ["EarlyExitConfig", "EarlyExitOutput", "EarlyExitWrapper", "list_exit_points", "networks"]
