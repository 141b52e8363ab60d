"""The benchmark of losses, and the page that lists them."""

import json
import re
import sys

import egad
import make_tables
import pytest
import timm
import torch
from benchmarks import losses as benchmark
from pages import methods

from erde_hub import EarlyExitWrapper, losses
from erde_hub.errors import ConfigError
from erde_hub.losses import get_loss, list_additions, list_losses

TINY = ["--widths", "4", "--batch_size", "4", "--rounds", "2", "--repeats", "1"]


def test_every_loss_is_timed_beside_a_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["losses.py", *TINY, "--output", str(tmp_path / "b.json")])
    benchmark.main()
    results = json.loads((tmp_path / "b.json").read_text())
    (student,) = results["students"]
    assert [row["loss"] for row in student["losses"]] == list_losses()
    assert student["exits"] > 1
    for row in student["losses"]:
        assert 0 < row["seconds"] < student["step_seconds"] * 20
        assert row["share"] > 0
    assert "egad" in capsys.readouterr().out


def test_shares_are_medians_of_rounds(monkeypatch):
    times = iter([4.0, 1.0, 2.0, 1.0])  # step, loss; step, loss
    monkeypatch.setattr(benchmark, "timed", lambda _: next(times))
    settings = benchmark.LossBenchmark(batch_size=4, losses=["ce"], rounds=2, repeats=1)
    measured = benchmark.measure(settings, 4)
    assert measured["step_seconds"] == 3.0
    assert measured["losses"] == [{"loss": "ce", "seconds": 1.0, "share": (0.25 + 0.5) / 2}]


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--losses", "kdd"], "unknown loss 'kdd'; did you mean 'kd'"), (["--rounds", "0"], "rounds must be at least 1")],
)
def test_what_it_refuses(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["losses.py", *flags])
    with pytest.raises(ConfigError, match=message):
        benchmark.main()


def test_the_page_lists_every_loss_with_its_formula():
    (path,) = [page for page in make_tables.PAGES if page.name == "methods.md"]
    page = path.read_text(encoding="utf-8")
    for name in list_losses():
        assert f"| `{name}` | `L = " in page
        assert methods.formula(get_loss(name).cls) in page
    for name in list_additions():
        assert f"| `{name}` | `--" in page
    assert "a weight per training sample" in page


def test_the_figures_keep_within_the_limit():
    """At full width; for a student a quarter as wide the page says that `feature_kd` takes more."""
    results = json.loads((make_tables.ROOT / "recipes" / "results" / "benchmark_losses.json").read_text())
    (student,) = [student for student in results["students"] if student["width"] == 64]
    assert [row["loss"] for row in student["losses"]] == list_losses()
    assert results["limit"] == benchmark.LIMIT == 0.03
    for row in student["losses"]:
        assert row["share"] <= results["limit"], row["loss"]


def image_models():
    student, teacher = (
        EarlyExitWrapper(
            timm.create_model("resnet8_cifar", num_classes=10, width=width), exits=exits,
            backbone_kwargs={"width": width},
        )
        for width, exits in ((4, ["layer1", "layer2"]), (6, ["layer1"]))
    )  # fmt: skip
    images = torch.randn(70, 3, 32, 32)
    return {"student": student, "teacher": teacher.eval(), "images": images, "labels": torch.arange(70) % 10}


def language_models():
    student, teacher = egad.build_model(1, 24, 11, 8, seed=0), egad.build_model(1, 48, 11, 8, seed=1)
    return {"student": student, "teacher": teacher, "batches": torch.randint(11, (3, 2, 8))}


def test_the_python_of_the_page_runs(monkeypatch):
    monkeypatch.setattr(losses._LOSSES, "_entries", dict(losses._LOSSES._entries))
    page = (make_tables.ROOT / "recipes" / "methods.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    given = [{}, image_models(), {}, language_models()]
    for block, names in zip(blocks, given, strict=True):
        student, teacher = names.get("student"), names.get("teacher")
        before = [parameter.detach().clone() for parameter in student.parameters()] if student else []
        exec(block, names)
        if student:
            assert all(parameter.grad is None for parameter in teacher.parameters())
            learnt = zip(before, student.parameters(), strict=True)
            assert all(not torch.equal(old, new) for old, new in learnt)
    by_hand, own = given[1], given[2]["loss"]
    assert by_hand["readout"].table.max() > 1
    assert {"feature", "dedier_weight"} <= set(by_hand["result"].terms)
    logits, teacher, labels = [torch.randn(4, 5)] * 3, [torch.randn(4, 5)] * 3, torch.arange(4)
    result = own(logits, teacher, labels)
    distance = (logits[0] - teacher[0]).square().mean(1)
    weight = losses.EntropyWeight().weights(losses.ExitBatch(torch.stack(logits), labels, torch.stack(teacher)))
    torch.testing.assert_close(result.exit_terms["logits"], (weight * distance).mean(1))
    assert set(result.terms) == {"logits", "ce", "teacher_right", "ea_kd_weight"}
