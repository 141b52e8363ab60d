"""The recipe of EGAD on a text made for the test."""

import json

import egad
import pytest
import torch

from erde_hub.errors import ConfigError, DataError, ResultsError

FAST = [
    "--context", "8", "--batch_size", "4", "--teacher_layers", "2", "--teacher_width", "48", "--teacher_steps", "3",
    "--student_layers", "1", "--student_width", "24", "--student_steps", "3", "--no_progress_bar",
]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for split, times in (("train", 40), ("validation", 5), ("test", 5)):
        (folder / f"{split}.txt").write_text("to be, or not to be:\n" * times)
    return folder


def test_every_variant_trains_and_a_file_is_added_to(call, text, tmp_path, capsys):
    output = tmp_path / "results.json"
    call(egad, *FAST, "--data", text, "--output", output, "--variants", "ce", "egad")
    first = json.loads(output.read_text())["runs"]
    call(egad, *FAST, "--data", text, "--output", output)
    results = json.loads(output.read_text())
    assert results["runs"][:2] == first
    assert [run["variant"] for run in results["runs"]] == [
        "ce", "egad", "uniform_kd", "egad_without_curriculum", "egad_without_temperature", "egad_without_features",
    ]  # fmt: skip
    assert len({run["nll"] for run in results["runs"]}) == 6, "every part does something"
    assert all(run["params"] < results["teachers"][0]["params"] for run in results["runs"])
    assert "egad_without_features" in capsys.readouterr().out
    assert str(tmp_path) not in output.read_text()
    with pytest.raises(ResultsError, match="other settings"):
        call(egad, *FAST, "--data", text, "--output", output, "--max_temperature", "3")


def test_a_student_learns(text):
    data = egad.read_text(str(text), 8)
    assert data.characters == "\n ,:benort"
    model = egad.build_model(1, 24, len(data.characters), 8, seed=0)
    before = egad.evaluate(model, data.pieces("test", 8))
    egad.train(model, list(model.parameters()), egad.cross_entropy_step(model), data.batches(8, 8, 0), 40, 1e-2, None)
    after = egad.evaluate(model, data.pieces("test", 8))
    assert after["nll"] < 0.7 * before["nll"]
    assert after["accuracy"] > 0.5
    pieces = data.pieces("test", 8)
    assert torch.equal(pieces[0, -1], pieces[1, 0]), "pieces follow one another"


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ([], ConfigError, "--data is needed"),
        (["--data", "nowhere"], DataError, "train.txt is not there"),
        (["--variants", "eagd"], ConfigError, "unknown variant 'eagd'; did you mean 'egad'"),
        (["--student_width", "25"], ConfigError, "student_width must be a multiple of 24, got 25"),
        (["--context", "0"], ConfigError, "context must be at least 1"),
        (["--cpu_threads", "0"], ConfigError, "cpu_threads must be at least 1"),
        (["--lr", "0"], ConfigError, "lr must be above 0, got 0"),
        (["--min_temperature", "5"], ConfigError, r"max_temperature 4.0 is below min_temperature 5\.0"),
        (["--exit_weights", "linaer"], ConfigError, "unknown exit_weights preset 'linaer'"),
    ],
)
def test_what_it_refuses(call, flags, error, message):
    with pytest.raises(error, match=message):
        call(egad, *FAST, *flags)


def test_texts_that_do_not_fit(text):
    (text / "test.txt").write_text("to be§ " * 9)
    with pytest.raises(DataError, match=r"test.txt has the character '§'"):
        egad.read_text(str(text), 8)
    (text / "test.txt").write_text("short")
    with pytest.raises(DataError, match="has 5 characters, --context 8 needs more"):
        egad.read_text(str(text), 8)
