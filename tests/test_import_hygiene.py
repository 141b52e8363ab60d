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
child = os.fork()
if child == 0:  # as if these were not installed
    sys.modules.update(dict.fromkeys(("datasets", "matplotlib", "sklearn", "onnx", "onnxruntime")))
    import erde_hub
    backbone = timm.create_model("resnet8_cifar", width=4)
    model = erde_hub.EarlyExitWrapper(backbone, exits=1, backbone_kwargs={"width": 4}).eval()
    model(torch.randn(1, 3, 32, 32)).logits, str(model.exit_table())
    os._exit(0)
alone = os.waitpid(child, 0)[1]
before, loaded = state(), set(sys.modules)
import erde_hub
after, core = state(), set(sys.modules)
import tqdm.auto
import erde_hub.evaluation, erde_hub.hub
print(json.dumps({"alone": alone, "changed": [key for key in before if before[key] != after[key]],
                  "loaded": sorted(core - loaded), "later": sorted(set(sys.modules) - core)}))
"""
#: What a model is trained, measured, drawn and exported with.
LIBRARIES = {
    "datasets",
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "sklearn",
    "torchmetrics",
    "yaml",
}


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
    assert packages & LIBRARIES == set()
    ours = {name for name in found["loaded"] if name.startswith("erde_hub.")}
    parts = {name.split(".")[1] for name in ours}
    assert parts & {"data", "training", "evaluation", "export", "hub", "scripts"} == set()
    assert "erde_hub.backbones.cifar_resnet" in ours


def test_evaluation_and_hub_load_no_data_or_plotting_library(found):
    assert {name.split(".")[0] for name in found["later"]} & (LIBRARIES | {"scipy"}) == set()


def test_the_core_needs_no_data_or_plotting_library(found):
    assert found["alone"] == 0, "a process without them failed"


def test_the_public_names():
    import erde_hub  # noqa: PLC0415

    assert {"EarlyExitConfig", "EarlyExitOutput", "EarlyExitWrapper", "list_exit_points"} <= set(erde_hub.__all__)
    assert all(hasattr(erde_hub, name) for name in erde_hub.__all__)
    import timm  # noqa: PLC0415

    assert all(timm.is_model(f"resnet{depth}_cifar") for depth in (8, 10, 18, 50))
