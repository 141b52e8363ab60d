"""A file and a session need NumPy and onnxruntime, nothing else."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from erde_hub.export import EarlyExitSession
from tests.fakes.onnx_models import images

#: Everything that the package depends on, but for NumPy, onnxruntime and Pillow.
ABSENT = (
    *("torch", "torchvision", "timm", "transformers", "accelerate", "datasets", "safetensors", "huggingface_hub"),
    *("onnx", "onnx_ir", "onnxscript", "yaml", "matplotlib", "sklearn", "tqdm"),
)
SCRIPT = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None  # as if it were not installed
import numpy as np
import erde_hub
from erde_hub.export import EarlyExitSession
from erde_hub.errors import MissingDependencyError
"""


def run(code, *arguments):
    command = [sys.executable, "-c", SCRIPT + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_session_answers_without_torch(tiny_file, tmp_path):
    model, path = tiny_file
    pixels = ((images(model, 3).numpy().transpose(0, 2, 3, 1) + 3) * 40).clip(0, 255).astype("uint8")
    pixels.tofile(tmp_path / "pixels")
    code = """
pixels = np.fromfile(sys.argv[2], np.uint8).reshape(3, 16, 16, 3)
out = EarlyExitSession(sys.argv[1], threads=1)(pixels, 1.0)
print(erde_hub.__version__)
print(out.exit_index.tolist())
print(np.round(out.logits, 3).tolist())
"""
    _, index, logits = run(code, path, tmp_path / "pixels")
    expected = EarlyExitSession(path, threads=1)(pixels, 1.0)
    assert index == str(expected.exit_index.tolist())
    assert logits == str(expected.logits.round(3).tolist())


def test_a_budget_is_kept_without_torch(tiny_file):
    code = """
session = EarlyExitSession(sys.argv[1], threads=1)
costs, noise = session.info.cumulative_macs, np.random.default_rng(0).normal(size=(16, 3, 16, 16))
controller = erde_hub.BudgetController(session, target_macs=costs[1], threshold=2.0)
for _ in range(5):
    before = controller.thresholds
    assert controller(noise).exit_index.tolist() == session(noise, before).exit_index.tolist()
print(controller.samples, controller.thresholds != before)
"""
    assert run(code, tiny_file[1]) == ["80 True"]


def test_a_file_is_shown_without_torch(tiny_file, tmp_path):
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    code = """
from erde_hub.errors import DataError
from erde_hub.scripts import demo
from erde_hub.scripts.playground import samples, views
network = demo.open_network(sys.argv[1])
shown = samples.Shown([], []).add_files([network], [sys.argv[2] + "/red.png"])
print(network.route(shown.answers[0], 1.0).tolist())
print("by exit" in views.views([network], shown, 0, [1.0])[2])
try:
    shown.add_files([network], [sys.argv[2] + "/broken.png"])
except DataError as error:
    print(error)
"""
    index, said, message = run(code, tiny_file[1], tmp_path)
    expected = EarlyExitSession(tiny_file[1], threads=1)(np.full((1, 30, 20, 3), (255, 0, 0), np.uint8), 1.0)
    assert (index, said) == (str(expected.exit_index.tolist()), "True")
    assert message.startswith("the image in broken.png cannot be read")


@pytest.mark.parametrize(
    "statement",
    [
        "from erde_hub import EarlyExitWrapper",
        "erde_hub.EarlyExitConfig",
        "from erde_hub.export import export_onnx",
        "from erde_hub.policies import create_policy",
        "import erde_hub.training",
    ],
)
def test_names_that_need_torch_say_so(statement):
    (message,) = run(f"try:\n    {statement}\nexcept MissingDependencyError as error:\n    print(error)\n")
    assert "needs torch" in message
    assert "pip install" in message
