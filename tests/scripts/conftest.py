"""What tests of recipes share."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from erde_hub.data.images import BatchLoader, load_image_data
from erde_hub.evaluation import build_results, collect_exit_records
from erde_hub.scripts import common as recipe
from tests.fakes.networks import resnet8


@pytest.fixture
def drawn_figures():
    """Figures are drawn, for a test that asks for this."""


@pytest.fixture(autouse=True)
def _blank_figures(request, monkeypatch):
    """Figures are written but not drawn: the five of a report take longer than all else in a small run."""
    if "drawn_figures" not in request.fixturenames:
        draw_nothing(monkeypatch)


def draw_nothing(monkeypatch):
    def write(draw, path, size):
        Image.new("L", (1, 1)).save(Path(path))

    for module in ("plots", "diagnostics", "set_plots"):
        monkeypatch.setattr(f"erde_hub.evaluation.{module}.save_figure", write)


@pytest.fixture
def run(finished_run, tmp_path):
    """What a run leaves: a small network on digits whose heads were fitted by least squares, and its report."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    torch.manual_seed(0)
    data = load_image_data("digits", progress=False)
    model = resnet8(10, head="linear", id2label=data.class_names).eval()
    model.set_preprocessing(**data.preprocessing)
    records = collect_exit_records(model, BatchLoader(data.validation, 256), features=True, progress=False)
    targets = 8 * torch.nn.functional.one_hot(records.labels, 10).float()
    layers = [model.heads[0], model.heads[1], model.backbone]
    for feature, module in zip(records.features, layers, strict=True):
        layer = [m for m in module.modules() if isinstance(m, torch.nn.Linear)][-1]
        x = torch.nn.functional.pad(feature, (0, 1), value=1.0)
        solution = torch.linalg.lstsq(x.T @ x + 1e-3 * torch.eye(x.shape[1]), x.T @ targets).solution
        with torch.no_grad():
            layer.weight.copy_(solution[:-1].T)
            layer.bias.copy_(solution[-1])
    folder = tmp_path_factory.mktemp("finished") / "run"
    model.save_pretrained(folder)
    test = collect_exit_records(model, BatchLoader(data.test, 256), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        recipe.write_report(build_results(test, model, data, {"seed": 0}), folder)
    return folder
