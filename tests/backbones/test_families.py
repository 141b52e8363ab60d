"""One network of many families of timm: attached, trained, routed, saved and copied, by the recipe's own checks.

What runs on every change are small members of families that differ in what their stages hand on; the rest is behind the
marker ``families``, as are all of them as ONNX files.
"""

from __future__ import annotations

import pytest
import timm
import torch
from pages import support
from support_matrix import CHECKS, check_model, try_family
from support_models import CLASSES, TIMM, TRANSFORMERS_TEXT, TRANSFORMERS_VISION, timm_choice, timm_families

from erde_hub import EarlyExitWrapper, list_exit_points
from erde_hub.errors import ExitPointError, InputTypeError

#: Tuples and lists (coat, crossvit, hrnet, mvitv2, pit, tnt, deit's two classifiers), channels last (swin, volo,
#: sequencer), class and register tokens (beit, cait, eva, levit, xcit), modules used twice (coat), cells that read
#: two cells before (none is small), the size of the map kept aside (twins, qwen3_vit), plain maps.
QUICK = (
    "beit",
    "cait",
    "coat",
    "convnext",
    "crossvit",
    "deepseek_vit",
    "deit",
    "efficientnet",
    "efficientvim",
    "eva",
    "hiera",
    "hrnet",
    "levit",
    "mobilenetv3",
    "mvitv2",
    "pit",
    "qwen3_vit",
    "regnet",
    "resnet",
    "sequencer",
    "swin_transformer",
    "tnt",
    "twins",
    "vision_transformer",
    "volo",
    "xcit",
)
#: Families that cannot have exits, and why.
REFUSED = {"gemma4_vit": "no classifier"}


pytestmark = pytest.mark.usefixtures("quiet_transformers")


def failed(family: str, skip: set[str]) -> dict[str, str]:
    row = try_family(family, skip)
    return {check: row.get(check, "not tried") for check in CHECKS if check not in skip and row.get(check) != "yes"}


def test_there_are_enough():
    assert len(QUICK) >= 25
    assert set(QUICK) | set(REFUSED) <= set(timm_families())


@pytest.mark.parametrize("family", QUICK)
def test_quick_families(family):
    assert failed(family, {"onnx", "copy"}) == {}  # the training step is taken by a copy


def test_dinov3_beside_the_other_of_its_family():
    """timm's file ``eva`` holds it as well: rotary positions that are drawn anew for every size, register tokens."""
    name, kwargs = "vit_small_patch16_dinov3", {"depth": 3, "embed_dim": 96, "num_heads": 3}
    row = check_model(lambda: timm.create_model(name, num_classes=CLASSES, **kwargs), 64, kwargs, {"onnx", "copy"})
    assert [row.get(check) for check in ("attach", "train", "routing", "save")] == ["yes"] * 4


@pytest.mark.families
@pytest.mark.parametrize("family", [name for name in timm_families() if name not in REFUSED])
def test_every_family_of_timm(family):
    assert failed(family, {"onnx"} if family not in QUICK else {"save"}) == {}


@pytest.mark.families
@pytest.mark.parametrize("family", [*TRANSFORMERS_VISION, *TRANSFORMERS_TEXT])
def test_every_family_of_transformers(family):
    assert failed(family, {"onnx"} if family in TRANSFORMERS_TEXT else set()) == {}


@pytest.mark.families
@pytest.mark.parametrize("family", REFUSED)
def test_families_without_a_classifier(family):
    architecture, _, kwargs = timm_choice(family, timm_families()[family])
    with torch.device("meta"):
        backbone = timm.create_model(architecture, **kwargs)
    with pytest.raises(InputTypeError, match=REFUSED[family]):
        EarlyExitWrapper(backbone)


def test_places_that_are_offered_can_be_used():
    """coat reshapes with the number of samples it began with until its parallel blocks, twins has steps of its own."""
    name, _, kwargs = TIMM["coat"]
    with torch.device("meta"):
        coat = timm.create_model(name, num_classes=3, **kwargs)
        twins = timm.create_model("twins_svt_small", num_classes=3, depths=[2, 1, 2, 2])
    assert {p.name.split(".")[0] for p in list_exit_points(coat, input_size=(3, 64, 64))} == {"parallel_blocks"}
    with pytest.raises(ExitPointError, match=r"cannot shrink behind all of \['serial_blocks1\.0'\].*list_exit_points"):
        EarlyExitWrapper(coat, exits=["serial_blocks1.0"], input_size=(3, 64, 64), backbone_kwargs=kwargs)
    names = [p.name for p in list_exit_points(twins)]
    assert "blocks.0.0" in names
    assert "pos_block.2" in names


def test_a_check_of_later_has_a_column_once_a_row_was_tried_with_it(monkeypatch):
    """The rows of the page may be older than a check: running all of them again takes hours."""
    old = {"library": "timm", "model": "a", "exits": ["x"], "attach": "yes", "routing": "yes", "code": "1"}
    families = {"a": dict(old), "b": {**old, "model": "b"}}
    versions = {"timm": "1", "transformers": "5", "torch": "2"}
    monkeypatch.setattr(support, "matrix", lambda: {**versions, "families": families})
    assert support.columns() == ["attach", "routing"]
    assert support.support_rows("timm")[0] == ("`a`", "`a`", "`x`", "yes", "yes")
    assert "in a stream" not in support.support_summary()
    families["b"]["stream"] = "differs by 3.0e-02 of the largest logit"
    assert support.columns() == ["attach", "routing", "stream"]
    assert [row[-1] for row in support.support_rows("timm")] == ["not tried", "no"]
    summary = support.support_summary()
    assert "in a stream 0 of the 1 that were tried" in summary
    assert "- `b`, stream: differs by 3.0e-02" in summary


@pytest.mark.families
def test_cells_that_read_two_cells_before():
    with torch.device("meta"):
        backbone = timm.create_model("nasnetalarge", num_classes=3)
    model = EarlyExitWrapper(backbone, exits=["cell_5", "cell_6", "cell_12"], input_size=(3, 64, 64))
    assert [head.spec.width for head in model.heads] == [1008, 2016, 4032]
