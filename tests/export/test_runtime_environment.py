"""The runtime for ONNX files where it is meant to run: in an environment with onnxruntime and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from erde_hub.export import EarlyExitSession
from tests.fakes.onnx_models import images

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long

SCRIPT = """
import importlib, importlib.metadata, json, sys
import numpy as np
import erde_hub
from erde_hub.errors import MissingDependencyError
from erde_hub.export import EarlyExitSession

path, folder = sys.argv[1:]
found = {"home": erde_hub.__file__, "version": erde_hub.__version__}
found["installed"] = sorted(d.metadata["Name"].lower() for d in importlib.metadata.distributions())
found["loaded"] = sorted({name.partition(".")[0] for name in sys.modules})

def refusal(ask):
    try:
        return f"no error, {ask()!r}"
    except MissingDependencyError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

found["names"] = {name: refusal(lambda: getattr(erde_hub, name)) for name in erde_hub.__all__}
parts = ("calibration", "evaluation", "heads", "hub", "losses", "policies", "prediction_sets", "training")
found["parts"] = {part: refusal(lambda: importlib.import_module(f"erde_hub.{part}")) for part in parts}
found["export"] = refusal(lambda: erde_hub.export.export_onnx)

session = EarlyExitSession(path, threads=1)
for kind in ("floats", "pixels", "photos"):
    given = np.load(f"{folder}/{kind}.npy")
    try:
        out = session(given, 1.0)
        found[kind] = {"exit_index": out.exit_index.tolist(), "logits": out.logits.tolist()}
    except MissingDependencyError as error:
        found[kind] = str(error)
print(json.dumps(found))
"""


def pip(python: Path, *arguments: str) -> None:
    """Installs, or skips the test where pip cannot: without a network the environment cannot be made."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if done.returncode:
        pytest.skip(f"pip cannot install {' '.join(arguments)} here: {done.stderr[-300:]}")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with NumPy, onnxruntime and this package without its dependencies."""
    folder = tmp_path_factory.mktemp("runtime")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    pip(python, "numpy", "onnxruntime")
    pip(python, "--no-deps", str(ROOT))
    return python


@pytest.fixture(scope="module")
def given(tiny_file, tmp_path_factory):
    """What the session is asked: normalised floats, pixels of the right size, and photos to be resized."""
    model, _ = tiny_file
    floats = images(model, 4).numpy()
    pixels = ((floats.transpose(0, 2, 3, 1) + 3) * 40).clip(0, 255).astype(np.uint8)
    inputs = {"floats": floats, "pixels": np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")}
    inputs["photos"] = pixels.repeat(3, 1).repeat(2, 2)
    folder = tmp_path_factory.mktemp("given")
    for name, array in inputs.items():
        np.save(folder / f"{name}.npy", array)
    return folder, inputs


def ask(python: Path, path: Path, folder: Path) -> dict:
    command = [str(python), "-I", "-c", SCRIPT, str(path), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_session_in_an_environment_without_torch(python, tiny_file, given):
    path, (folder, inputs) = tiny_file[1], given
    without = ask(python, path, folder)
    assert Path(without["home"]).is_relative_to(python.parents[1]), "the installed package, not the checkout"
    assert {"numpy", "onnxruntime"} <= set(without["installed"])
    absent = {"torch", "timm", "transformers", "safetensors", "huggingface-hub", "onnx", "onnx-ir", "pillow"}
    assert not absent & set(without["installed"])
    assert not {"torch", "onnx", "PIL"} & set(without["loaded"])

    free = {"keep_freed_memory", "BudgetController"}
    for name, message in {**without["names"], **without["parts"], "export_onnx": without["export"]}.items():
        assert ("needs " in message and "pip install" in message) != (name in free), (name, message)

    pip(python, "pillow")
    with_pillow = ask(python, path, folder)
    session = EarlyExitSession(path, threads=1)
    for kind, array in inputs.items():
        expected = session(array, 1.0)
        for found in (without[kind], with_pillow[kind]):
            if kind == "photos" and found is without[kind]:
                assert "resizing an image of 48x32 pixels to 27x18 needs PIL: pip install pillow" in found
                continue
            assert found["exit_index"] == expected.exit_index.tolist(), kind
            np.testing.assert_allclose(found["logits"], expected.logits, atol=1e-5)
