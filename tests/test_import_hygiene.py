"""Importing the library loads nothing that it may not need, and changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, logging, os, sys, warnings
import torch, timm, accelerate  # what the core needs may do as it likes
from transformers import AutoModelForImageClassification, BitImageProcessor, PreTrainedConfig, PreTrainedModel, utils
def state():
    root = logging.getLogger()
    return {"filters": list(map(str, warnings.filters)), "environment": dict(os.environ), "level": root.level,
            "handlers": len(root.handlers), "dtype": str(torch.get_default_dtype()), "grad": torch.is_grad_enabled(),
            "threads": torch.get_num_threads(), "random": torch.random.get_rng_state().tolist(),
            "verbosity": utils.logging.get_verbosity()}
before, loaded = state(), set(sys.modules)
import erde_hub
after = state()
print(json.dumps({"changed": [key for key in before if before[key] != after[key]],
                  "loaded": sorted(set(sys.modules) - loaded)}))
"""


@pytest.fixture(scope="module")
def found():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\n") == 1, "importing printed something"
    return json.loads(run.stdout)


def test_importing_changes_nothing(found):
    assert found["changed"] == []


def test_importing_loads_only_the_core(found):
    packages = {name.split(".")[0] for name in found["loaded"]}
    assert "erde_hub" in packages
    unwanted = {
        "matplotlib",
        "sklearn",
        "torchmetrics",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "yaml",
        "jinja2",
        "pandas",
    }
    assert packages & unwanted == set()
    ours = {name for name in found["loaded"] if name.startswith("erde_hub.")}
    parts = {name.split(".")[1] for name in ours}
    assert parts & {"data", "training", "evaluation", "export", "hub", "scripts"} == set()
    assert "erde_hub.backbones.cifar_resnet" in ours


def test_the_core_needs_no_data_or_plotting_library():
    script = (
        "import sys\n"
        "blocked = ('datasets', 'matplotlib', 'sklearn', 'onnx', 'onnxruntime')\n"
        "sys.modules.update(dict.fromkeys(blocked))\n"
        "import torch, timm, erde_hub\n"
        "model = erde_hub.EarlyExitWrapper(timm.create_model('resnet8_cifar', width=4), exits=1,"
        " backbone_kwargs={'width': 4}).eval()\n"
        "model(torch.randn(1, 3, 32, 32)); print(model.exit_table())\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_the_public_names():
    import erde_hub  # noqa: PLC0415

    assert {"EarlyExitConfig", "EarlyExitOutput", "EarlyExitWrapper", "list_exit_points"} <= set(erde_hub.__all__)
    assert all(hasattr(erde_hub, name) for name in erde_hub.__all__)
    import timm  # noqa: PLC0415

    assert all(timm.is_model(f"resnet{depth}_cifar") for depth in (8, 10, 18, 50))
