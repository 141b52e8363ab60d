"""The page of `erde-hub demo` without its browser: what is computed and said. See test_demo_page.py for the page."""

import re
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForSequenceClassification

from erde_hub import EarlyExitWrapper
from erde_hub.data import BatchLoader, load_image_data
from erde_hub.errors import CheckpointError, ConfigError, DataError, NotSupportedError
from erde_hub.evaluation import collect_exit_records, load_results, per_exit_metrics, sweep_thresholds
from erde_hub.export import EarlyExitSession, export_onnx
from erde_hub.policies import get_policy, list_policies
from erde_hub.scripts import demo
from erde_hub.scripts.playground.checkpoint import open_checkpoint
from erde_hub.scripts.playground.networks import SCORES, Answers, Network, open_onnx, promise_of, slider
from erde_hub.scripts.playground.samples import SHIPPED, Item, Shown, first_samples
from erde_hub.scripts.playground.views import frontier, pictures, views
from tests.fakes.networks import resnet8
from tests.fakes.onnx_models import tiny
from tests.fakes.texts import make_tokenizer, write_encoder


@pytest.fixture(scope="module", autouse=True)
def no_timing():
    """Times of exits are those of test_latency.py."""
    with pytest.MonkeyPatch.context() as patch:
        times = {"settings": [{"exit_milliseconds": [1.0, 2.0, 3.0, 4.0]}]}
        patch.setattr("erde_hub.scripts.playground.checkpoint.measure_exits", lambda *_, **__: times)
        yield


@pytest.fixture(scope="module")
def shipped():
    return open_checkpoint(str(SHIPPED))


@pytest.fixture(scope="module")
def digits(shipped):
    return first_samples([shipped])


@pytest.fixture
def toy():
    """Three exits and three samples, whose numbers can be followed by hand."""
    probs = np.array([[[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]], [[0.3, 0.7]] * 3, [[0.2, 0.8]] * 3])
    answers = Answers(probs, probs[:-1].max(-1))
    rows = [
        {"threshold": t, "accuracy": a, "mean_macs": m, "exit_share": []}
        for t, a, m in ((0.5, 0.5, 1e6), (0.8, 0.75, 2e6), ("inf", 0.9, 4e6))
    ]
    network = Network(
        name="toy <b>", kind="image", exit_names=["a", "b", "last"], macs=[10**6, 2 * 10**6, 4 * 10**6],
        milliseconds=[1.0, 2.0, 4.0], class_names=["cat", "<i>"], policy="confidence", exits_above=True, threshold=0.8,
        slider=(0.0, 1.0, 0.01), promise="", results={"sweep": rows}, answer=lambda samples: answers,
    )  # fmt: skip
    return network, Shown([Item(f"<{n}>", "data:", label) for n, label in enumerate(["cat", "cat", None])], [answers])


def test_the_threshold_says_which_answer_is_taken(toy):
    network, shown = toy
    (answers,) = shown.answers
    assert network.route(answers, 0.8).tolist() == [2, 0, 2]
    assert network.route(answers, 0.7).tolist() == [1, 0, 1], "at or above"
    assert network.route(answers, [0.95, 0.7]).tolist() == [1, 1, 1], "one per exit"
    answers.scores[0, 1] = np.nan
    assert network.route(answers, 0.8).tolist() == [2, 2, 2], "NaN never exits"


def test_costs_and_totals_are_those_of_the_exits_taken(toy):
    network, shown = toy
    _, curve, panel = views([network], shown, 1, [0.8])
    cells = [re.sub("<.*?>", " ", row).split() for row in re.findall("<tr>(.*?)</tr>", panel)]
    assert cells[1] == ["this", "one,", "million", "MACs", "1", "4", "75", "%"]
    assert cells[2] == ["this", "one,", "milliseconds", "1", "4", "75", "%"]
    assert cells[3] == ["all", "3", "so", "far,", "million", "MACs", "9", "12", "25", "%"]  # 4 + 1 + 4 of 3 x 4
    assert "cat</span> ✓ right" in panel
    assert "exits: confidence 0.9 ≥ 0.8" in panel
    assert panel.count("not run") == 2
    assert "Right: 1 of 2 with a known label; without exits 0." in panel
    assert "<b>75.0 %</b> right at <b>2</b> million MACs" in curve
    assert "goes on: confidence 0.6 &lt; 0.8" in views([network], shown, 0, [0.8])[2]


def test_samples_are_coloured_by_exit_and_names_are_escaped(toy):
    network, shown = toy
    grid, curve, panel = views([network], shown, 0, [0.8])
    assert re.findall(r"exit (\d)\"", grid) == ["3", "1", "3"]
    assert grid.count('aria-pressed="true"') == 1
    assert "last: 2" in re.sub("<.*?>", "", grid)
    assert "&lt;0&gt;" in grid
    assert "<i>" not in panel
    assert "toy &lt;b&gt;" in curve


def test_the_point_on_the_frontier_is_a_measured_one(toy):
    network, _ = toy
    assert network.measured(0.7)["accuracy"] == 0.75
    assert network.measured(float("inf"))["accuracy"] == 0.9
    assert network.measured([0.5, 0.6]) is None, "thresholds per exit that nobody measured"
    assert frontier([network, network], [0.8, 0.5]).count("<circle") == 2
    assert "No results.json" in frontier([Network(**{**vars(network), "results": None})], [0.8])


def test_pictures_next_to_the_network_are_shown(shipped, toy):
    shown = pictures([shipped])
    for png in shipped.pictures.values():
        with Image.open(BytesIO(png)) as picture:
            assert picture.width > 800
    assert shown.count('<img src="data:image/png;base64,') == len(shipped.pictures) == 3
    assert pictures([toy[0]]) == ""


def test_the_shipped_checkpoint_is_small_and_its_report_holds(shipped, digits):
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 500_000
    data, results = load_image_data("digits", progress=False), load_results(SHIPPED / "results.json")
    published = load_results(Path(__file__).parents[2] / "recipes" / "results" / "digits.json")
    assert published | {"figures": results["figures"]} == results, "the published results are of this run"
    assert data.fingerprint == results["dataset"]["fingerprint"]
    model = EarlyExitWrapper.from_pretrained(SHIPPED).eval()
    records = collect_exit_records(model, BatchLoader(data.test, 256), progress=False)
    for now, then in zip(per_exit_metrics(records), results["per_exit"], strict=True):
        assert (now["exit"], now["macs"]) == (then["exit"], then["macs"])
        assert now["accuracy"] == pytest.approx(then["accuracy"], abs=1.5 / records.num_samples)  # bf16 then
    (point,) = sweep_thresholds(records, [model.threshold])
    assert point["accuracy"] == pytest.approx(results["operating_point"]["accuracy"], abs=1.5 / records.num_samples)
    assert point["mean_macs"] == pytest.approx(results["operating_point"]["mean_macs"], rel=0.01)
    images = data.test.images(range(len(digits.items)))
    assert torch.equal(records.logits[:, : len(images)].argmax(-1), torch.tensor(digits.answers[0].probs.argmax(-1)))
    assert [item.label for item in digits.items] == [str(int(label)) for label in data.test.labels[: len(images)]]
    assert shipped.promise.startswith(
        "The stored threshold promises: loss of accuracy against the full model at most 1"
    )


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.926, [0.2, 1.0, 0.1], 2.3])
def test_what_is_shown_is_what_the_model_does(shipped, digits, threshold):
    model = EarlyExitWrapper.from_pretrained(SHIPPED).eval()
    with np.load(SHIPPED / "samples.npz") as stored:
        images = [Image.fromarray(pixels).convert("RGB") for pixels in stored["images"]]
    out = model(model.image_processor()(images, return_tensors="pt")["pixel_values"], threshold=threshold)
    taken = shipped.route(digits.answers[0], threshold)
    assert taken.tolist() == out.exit_index.tolist()
    shown = digits.answers[0].probs[taken, np.arange(len(taken))]
    assert shown == pytest.approx(out.logits.softmax(-1).detach().numpy(), abs=1e-5)


def test_scores_without_torch_are_those_of_the_policies():
    logits = torch.randn(3, 50, 7) * 4
    logits[:, 0, 0] = 500.0  # a class of probability 1
    for name, score in SCORES.items():
        policy = get_policy(name).cls()
        expected = torch.stack([policy.score(log_probs[None]) for log_probs in logits.log_softmax(-1)])
        assert score(logits.double().softmax(-1).numpy()) == pytest.approx(expected.numpy(), abs=1e-5)
    exportable = {name for name in list_policies() if get_policy(name).cls.exportable}
    assert exportable == set(SCORES), "a policy that can be exported can be shown"


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "thresholds"), [("entropy", [0.0, 1.5, 2.2]), ("margin", [0.0, 0.2, 1.0])])
def test_a_file_is_shown_as_its_session_answers(tmp_path, policy, thresholds):
    model = tiny(policy=policy, threshold=thresholds[1])
    model.set_preprocessing(mean=(0.5,) * 3, std=(0.2,) * 3, size=(16, 16))
    path = export_onnx(model, tmp_path / "tiny.onnx")
    images = list(np.random.default_rng(0).integers(0, 256, (12, 20, 24, 3), np.uint8))
    network, session = open_onnx(path), EarlyExitSession(path)
    answers = network.answer([Image.fromarray(image) for image in images])
    for threshold in thresholds:
        out = session(images, threshold)
        assert network.route(answers, threshold).tolist() == out.exit_index.tolist()
        best = answers.probs[out.exit_index, np.arange(12)].argmax(-1)
        assert best.tolist() == out.logits.argmax(-1).tolist()
    assert (network.exits_above, network.threshold) == (policy == "margin", pytest.approx(thresholds[1]))
    assert network.results is None
    (tmp_path / "results.json").write_text((SHIPPED / "results.json").read_text())
    assert open_onnx(path).results is None, "a report of another network"


@pytest.mark.parametrize(("texts", "lacks"), [(False, "preprocessing"), (True, "tokenizer")])
def test_a_file_that_cannot_read_samples_is_refused(monkeypatch, texts, lacks):
    bare = SimpleNamespace(info=SimpleNamespace(reads_texts=texts, preprocessing=None, tokenizer=None))
    monkeypatch.setattr("erde_hub.scripts.playground.networks.EarlyExitSession", lambda path: bare)
    with pytest.raises(NotSupportedError, match=rf"bare\.onnx holds no {lacks}"):
        open_onnx("bare.onnx")


@pytest.mark.slow
def test_texts_are_shown(tmp_path):
    encoder = write_encoder(tmp_path / "encoder", layers=2)
    backbone = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    model = EarlyExitWrapper(backbone, exits=["bert.encoder.layer.0"], input_size=(8,), policy="patience")
    model.save_pretrained(tmp_path / "run")
    make_tokenizer().save_pretrained(tmp_path / "run")
    network = open_checkpoint(str(tmp_path / "run"))
    shown = first_samples([network]).add_text([network], "the film <was> " + 30 * "very ")
    assert (network.kind, network.slider) == ("text", (1.0, 2.0, 1.0))
    assert shown.answers[0].probs.shape == (2, 3, 2)
    assert "the film &lt;was&gt;" in views([network], shown, 2, [1.0])[0]
    assert network.promise == promise_of(None)

    model.set_policy(get_policy("entropy").cls())
    file = open_onnx(export_onnx(model, tmp_path / "texts.onnx", tokenizer=make_tokenizer()))
    shown = first_samples([file]).add_text([file], "a film")
    assert (file.kind, shown.answers[0].probs.shape) == ("text", (2, 3, 2))
    expected = network.answer(["a film"]).probs
    np.testing.assert_allclose(shown.answers[0].probs[:, 2:], expected, atol=1e-5)
    assert "a film" in views([file], shown, 2, [0.3])[0]


@pytest.mark.parametrize(("policy", "taken"), [("always", [0, 0]), ("never", [2, 2])])
def test_policies_without_threshold_have_no_slider(tmp_path, policy, taken):
    model = resnet8(10, policy=policy)
    model.set_preprocessing(mean=(0.5,) * 3, std=(0.2,) * 3, size=(32, 32))
    model.save_pretrained(tmp_path)
    network = open_checkpoint(str(tmp_path))
    answers = network.answer([Image.new("RGB", (32, 32)), Image.new("RGB", (40, 30), "red")])
    assert network.slider is None
    assert network.route(answers, network.threshold).tolist() == taken
    shown = Shown([Item("a"), Item("b")], [answers])
    assert ("exits" if policy == "always" else "goes on") in views([network], shown, 0, [0.0])[2]


def test_what_is_no_image_is_named(shipped, tmp_path):
    Image.new("L", (5, 4), 9).save(tmp_path / "grey.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    assert [item.name for item in Shown([], []).add_files([shipped], [tmp_path / "grey.png"]).items] == ["grey.png"]
    with pytest.raises(DataError, match=r"broken\.png"):
        first_samples([shipped], str(tmp_path))


def test_images_of_a_folder(shipped, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no images: give a folder with some"):
        first_samples([shipped], str(tmp_path))
    for n in range(2):
        Image.new("RGB", (10 + n, 10), "red").save(tmp_path / f"{n}.jpg")
    (tmp_path / "notes.txt").write_text("none")
    assert [item.name for item in first_samples([shipped], str(tmp_path)).items] == ["0.jpg", "1.jpg"]


def test_the_range_of_a_slider_reads_well():
    assert slider(0.0, 2.305) == (0.0, 2.31, 0.01)
    assert slider(0.0, 1.0) == (0.0, 1.0, 0.01)
    assert slider(1.0, 4.0, whole=True) == (1.0, 4.0, 1.0)


def test_a_port_that_is_taken_is_one_line_that_names_the_flag(monkeypatch, capsys):
    def serve(*_, **__):
        raise OSError("Cannot find empty port in range: 7861-7861. Set GRADIO_SERVER_PORT")

    monkeypatch.setattr(demo, "import_page", lambda: SimpleNamespace(build_page=lambda *_: None, serve=serve))
    monkeypatch.setattr(demo, "open_network", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["erde-hub demo", "--port", "7861"])
    with pytest.raises(SystemExit):
        demo.main()
    said = "erde-hub demo: ConfigError: port 7861 is taken: choose another with --port\n"
    assert capsys.readouterr().err == said


def test_a_network_that_is_not_there_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "import_page", lambda: None)
    (tmp_path / "my_heads.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for module, said in (("my_heads", "CheckpointError: no file"), ("my_haeds", "ConfigError: --import my_haeds: ")):
        monkeypatch.setattr(sys, "argv", ["erde-hub demo", "--import", module, "--model", str(tmp_path / "none.onnx")])
        with pytest.raises(SystemExit) as stop:
            demo.main()
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith(f"erde-hub demo: {said}")
    assert "my_heads" in sys.modules
    with pytest.raises(CheckpointError):
        demo.open_network(str(tmp_path / "nowhere"))


def test_what_is_no_classifier_with_exits_is_refused(tmp_path):
    resnet8(1, problem_type="regression", policy="never").save_pretrained(tmp_path)
    with pytest.raises(NotSupportedError, match="no classifier with early exits"):
        open_checkpoint(str(tmp_path))


def test_gradio_is_asked_for(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "erde_hub.scripts.playground.page", raising=False)
    monkeypatch.setattr(sys, "argv", ["erde-hub demo"])
    with pytest.raises(SystemExit):
        demo.main()
    assert 'pip install "erde-hub[demo]"' in capsys.readouterr().err
