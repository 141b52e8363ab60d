"""Wrapping, saving, truncating and counting leave a network as they found it, whatever it shares and in any mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from network_state import changes, mix_states, network_state
from support_models import TRANSFORMERS_TEXT, TRANSFORMERS_VISION, timm_choice, timm_families, transformers_model
from torch import Tensor, nn

from erde_hub import EarlyExitWrapper, list_exit_points
from erde_hub.export import export_onnx
from tests.fakes.networks import FAMILIES, Plain, build, sequential
from tests.fakes.transformers_models import CAUSAL, causal

#: Modules registered twice, biases kept in eval mode (coat, levit), staged and hooked families, buffers of positions.
QUICK = ("coat", "levit", "resnet", "swin_transformer", "twins")
QUICK_TRANSFORMERS = ("Pvt", "Bert", "Albert", "ModernBert", "gpt2", "llama3")
REFUSED = ("gemma4_vit",)
#: Of each kind that the exporter tells apart, those whose export takes seconds: others take up to four minutes, and
#: `support_matrix.py` looks at the same things after it exported them.
EXPORTED = (
    *("beit", "convnext", "levit", "resnet", "swin_transformer", "vision_transformer"),
    *("ViT", "Swin", "TimmWrapper", "Bert", "DebertaV2", "ModernBert"),
)


pytestmark = pytest.mark.usefixtures("quiet_transformers")


def _check_unchanged(module: nn.Module, inputs: tuple[Tensor, ...], run: Callable[[nn.Module], None]) -> None:
    """Looks at everything of a network in use, before and after."""
    with torch.no_grad():
        for tensor in module.state_dict().values():  # what nobody could draw again by the same seed
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))
    mix_states(module)
    before = network_state(module, inputs)
    run(module)
    assert changes(module, before, inputs) == []


def _everything(
    tmp_path: Path, size: int | None = None, kwargs: dict[str, Any] | None = None, export: bool = False, **given: Any
) -> Callable[[nn.Module], None]:
    if size is not None:
        given["input_size"] = (3, size, size)

    def run(module: nn.Module) -> None:
        list_exit_points(module, **given)
        model = EarlyExitWrapper(module, exits="auto", backbone_kwargs=kwargs or None, **given)
        model.exit_table()
        model.truncate(0)
        model.truncate("classifier")
        model.save_pretrained(tmp_path / "model")
        if export:
            modes = {name: child.training for name, child in model.named_modules()}
            export_onnx(model, tmp_path / "model.onnx")
            assert {name: child.training for name, child in model.named_modules()} == modes

    return run


def _check_family(family: str, tmp_path: Path, export: bool = False) -> None:
    torch.manual_seed(0)
    size, kwargs = None, {}
    inputs: tuple[Tensor, ...] = (torch.randint(5, 49, (2, 7)),)
    if family in CAUSAL:
        module = causal(family)
    elif family in TRANSFORMERS_TEXT:
        module = transformers_model(family)
    else:
        if family in TRANSFORMERS_VISION:
            module, size = transformers_model(family), TRANSFORMERS_VISION[family][1]
        else:
            name, size, kwargs = timm_choice(family, timm_families()[family])
            module = timm.create_model(name, num_classes=5, **kwargs)
        inputs = (torch.randn(2, 3, size, size),)
    _check_unchanged(module, inputs, _everything(tmp_path, size, kwargs, export))


@pytest.mark.parametrize("family", [*QUICK, *QUICK_TRANSFORMERS])
def test_quick_families(family, tmp_path):
    _check_family(family, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    "family",
    [f for f in (*timm_families(), *TRANSFORMERS_VISION, *TRANSFORMERS_TEXT, *CAUSAL) if f not in REFUSED],
)
def test_every_family(family, tmp_path):
    _check_family(family, tmp_path, export=family in EXPORTED)


@pytest.mark.parametrize("make", [Plain, sequential])
def test_modules_of_ones_own(make, tmp_path):
    torch.manual_seed(0)
    _check_unchanged(make(), (torch.randn(2, 3, 16, 16),), _everything(tmp_path, 16, None))


def test_activation_checkpointing_of_some_stages_stays_so(tmp_path):
    module = build("swin")
    module.layers[1].grad_checkpointing = True
    size = FAMILIES["swin"].size
    _check_unchanged(module, (torch.randn(2, 3, size, size),), _everything(tmp_path, size, FAMILIES["swin"].kwargs))


def test_exporting(tmp_path):
    family = FAMILIES["resnet"]
    _check_unchanged(
        build("resnet"),
        (torch.randn(2, *family.input_size),),
        _everything(tmp_path, family.size, family.kwargs, export=True),
    )
