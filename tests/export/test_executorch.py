"""ExecuTorch programs: the answers of the model, later methods not called for samples that exit; what is refused."""

import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from erde_hub.errors import CheckpointError, ConfigError, ExportError, InputTypeError, MissingDependencyError
from erde_hub.export import EarlyExitSession, check_onnx, executorch_file, export_executorch
from tests.fakes.onnx_models import build, images, safe_thresholds, tiny
from tests.fakes.transformers_models import tiny_bert

pytestmark = pytest.mark.timeout(900)  # lowering a network takes up to a minute, longer on a busy machine

CASES = {
    "resnet8_cifar": (32, {"width": 8}),
    "mobilenetv4_conv_small_035": (32, {}),
    "vit_tiny_patch16_224": (32, {"img_size": 32, "depth": 3}),
    "twins_svt_small": (32, {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 32], "num_heads": [1, 1, 1, 1]}),
}


@pytest.fixture(scope="module", params=CASES)
def program(request, tmp_path_factory):
    """A model and its program, written as the page says."""
    pytest.importorskip("executorch", reason="ExecuTorch is not installed: pip install 'erde-hub[executorch]'")
    size, arguments = CASES[request.param]
    model = build(request.param, size, arguments, 2)
    model.set_preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), size=(size, size))
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
    (code,) = re.findall(
        r"^```py\n(from erde_hub.export import EarlyExitSession, export_executorch\n.*?)^```$",
        page,
        re.DOTALL | re.MULTILINE,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("executorch"))
        exec(code, {"model": model, "images": images(model, 2)})
        return model, Path("model.pte").absolute()


@pytest.mark.long
def test_answers_are_the_models(program):
    model, path = program
    x = images(model, 5)
    thresholds = safe_thresholds(model, x)
    assert sorted(model(x, threshold=thresholds).exit_index.unique().tolist()) == [0, 1, 2]
    check = check_onnx(model, path, x, [0.0, thresholds, 50.0])
    assert check.same_exit == check.same_answer == 1
    assert check.relative_difference < 1e-4
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert path.stat().st_size < 1.1 * weights + 300_000, "no weight is there twice"
    session = EarlyExitSession(path)
    assert session.info.exit_names == model.exit_names
    x[1, 0, 0, 0] = np.nan
    out = session(x, 50.0)
    assert out.exit_index.tolist() == [0, 2, 0, 0, 0]
    assert np.isnan(out.logits).any(1).tolist() == [False, True, False, False, False]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 36, 3), dtype=np.uint8)
    expected = model(torch.from_numpy(session.preprocess(pixels)), threshold=0.0).logits.detach()
    np.testing.assert_allclose(pickle.loads(pickle.dumps(session))(pixels, 0.0).logits, expected, atol=1e-3)


@pytest.mark.long
def test_later_methods_are_not_called(program, monkeypatch):
    model, path = program
    x = images(model, 2)[:1]
    session = EarlyExitSession(path)
    calls = []
    for i, stage in enumerate(session._session._stages):
        monkeypatch.setattr(stage, "execute", lambda tensors, i=i, run=stage.execute: calls.append(i) or run(tensors))
    session(x, 50.0)
    assert calls == [0]
    session(x, [0.0, 50.0])
    assert calls == [0, 0, 1]


@pytest.mark.long
def test_what_a_program_refuses(program, tmp_path):
    _, path = program
    with pytest.raises(ConfigError, match="leave them out for ExecuTorch"):
        EarlyExitSession(path, providers=["CUDAExecutionProvider"])
    with pytest.raises(ConfigError, match="which all share"):
        EarlyExitSession(path, threads=97)
    for content in (b"", b"no program", path.read_bytes()[:5000]):
        damaged = tmp_path / "damaged.pte"
        damaged.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cannot load .*damaged\.pte"):
            EarlyExitSession(damaged)


def test_what_cannot_be_written(tmp_path, monkeypatch):
    model = tiny()
    for name in ("executorch.exir", "executorch.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'erde-hub\[executorch\]'"):
        export_executorch(model, tmp_path / "model.pte")
    (tmp_path / "model.pte").write_bytes(b"")
    with pytest.raises(MissingDependencyError, match=r"a \.pte file needs executorch"):
        EarlyExitSession(tmp_path / "model.pte")
    monkeypatch.setattr(executorch_file, "require", lambda *_: None)
    with pytest.raises(InputTypeError, match="takes an EarlyExitWrapper, got Linear"):
        export_executorch(torch.nn.Linear(2, 2), tmp_path / "model.pte")
    with pytest.raises(ConfigError, match=r"ends with \.pte, got 'model\.onnx'"):
        export_executorch(model, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"TinyNet is run with hooks.*export_onnx"):
        executorch_file.trace_parts(model)
    with pytest.raises(ExportError, match="text models"):
        export_executorch(tiny_bert(), tmp_path / "model.pte")
    assert (tmp_path / "model.pte").read_bytes() == b""
