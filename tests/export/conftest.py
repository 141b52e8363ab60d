from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from erde_hub import EarlyExitWrapper
from erde_hub.export import export_onnx, flat
from tests.fakes.onnx_models import FAMILIES, build, tiny
from tests.fakes.texts import make_tokenizer
from tests.fakes.transformers_models import tiny_bert


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[EarlyExitWrapper, Path]:
    """A tiny model with two early exits and preprocessing, and its file."""
    model = tiny(id2label=[f"class {i}" for i in range(10)])
    model.set_preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), size=(16, 16), crop_pct=0.875)
    return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "tiny.onnx")


@pytest.fixture(scope="session")
def tiny_flat(tiny_file: tuple[EarlyExitWrapper, Path]) -> bytes:
    """The flat graph of the tiny model."""
    return ir.to_proto(flat.flat_model(tiny_file[0], 20)).SerializeToString()


@pytest.fixture
def flat_is_known(tiny_flat: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the tiny model start from its flat graph, for tests of what comes after it."""
    monkeypatch.setattr(flat, "flat_model", lambda *_: ir.from_proto(onnx.load_from_string(tiny_flat)))


@pytest.fixture(scope="session")
def text_model_and_flat() -> tuple[EarlyExitWrapper, bytes]:
    """A text classifier with one early exit, and its flat graph."""
    model = tiny_bert()
    return model, ir.to_proto(flat.flat_model(model, 20)).SerializeToString()


@pytest.fixture(scope="session")
def text_file(
    text_model_and_flat: tuple[EarlyExitWrapper, bytes], tmp_path_factory: pytest.TempPathFactory
) -> tuple[EarlyExitWrapper, Path]:
    """That classifier, and its file with a tokenizer."""
    model, graph = text_model_and_flat
    path = tmp_path_factory.mktemp("onnx") / "texts.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat, "flat_model", lambda *_: ir.from_proto(onnx.load_from_string(graph)))
        return model, export_onnx(model, path, tokenizer=make_tokenizer())


@pytest.fixture(scope="session")
def one_sample_file(
    tiny_file: tuple[EarlyExitWrapper, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[EarlyExitWrapper, Path]:
    """The tiny model, and its file for batches of one."""
    return tiny_file[0], export_onnx(tiny_file[0], tmp_path_factory.mktemp("onnx") / "one.onnx", batch_size=1)


#: Families exported by `make test`; the others by `make test-long`, because each takes up to twenty seconds.
QUICK = ("resnet", "vit")


@pytest.fixture(
    scope="session",
    params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES],
)
def family_file(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EarlyExitWrapper, Path]:
    """One model of a family and its file."""
    model = build(*FAMILIES[request.param])
    return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "model.onnx")
