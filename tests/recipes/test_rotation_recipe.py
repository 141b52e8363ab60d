"""The recipe of a regression on a few turned digits, and its tables."""

import json
import math

import make_tables
import pytest
import rotation
import torch

from erde_hub import EarlyExitWrapper
from erde_hub.errors import ConfigError

FAST = [
    "--architecture_kwargs", "width=4", "--exits", "layer1", "--copies", "1", "--epochs", "1", "--max_steps", "2",
    "--max_train_samples", "64", "--max_eval_samples", "40", "--cpu_threads", "1", "--no_progress_bar",
    "--mixed_precision", "no", "--head", "linear",
]  # fmt: skip


def test_it_trains_fits_and_measures(call, tmp_path, capsys):
    flags = [*FAST, "--output", tmp_path / "r.json", "--output_dir", tmp_path / "run", "--draws", "2"]
    call(rotation, *flags, "--widths", "0", "360")
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["dataset"]["samples"] == {"train": 64, "validation": 40, "test": 40}
    assert [row["exit"] for row in results["per_exit"]] == ["layer1", "classifier"]
    methods = {row["method"]: row for row in results["intervals"]}
    avcs = [f"AVCS as published, draws: {n}" for n in (1, 2)] + ["AVCS, level from samples, draws: 2"]
    assert list(methods) == [*avcs, "conformal, each exit", "conformal, all exits"]
    for name in (*avcs, "conformal, all exits"):
        assert methods[name]["nested"] == [1.0, 1.0]
        assert methods[name]["width"][1] <= methods[name]["width"][0]
    assert methods[avcs[1]]["width"][0] <= methods[avcs[0]]["width"][0]
    never, wide = results["routing"]
    assert never["exit_share"] == [0, 1]
    assert never["mae"] == results["per_exit"][1]["mae"]
    assert wide["threshold"] == pytest.approx(360)
    assert wide["mean_macs"] <= never["mean_macs"]
    assert str(tmp_path) not in (tmp_path / "r.json").read_text()
    assert "conformal, all exits" in capsys.readouterr().out
    model = EarlyExitWrapper.from_pretrained(tmp_path / "run")
    assert (model.config.problem_type, model.config.policy) == ("regression", "set_size")
    assert model(torch.randn(2, 3, 32, 32), threshold=math.radians(360)).logits.shape == (2, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha", "1"], "alpha must be between 0 and 1"),
        (["--draws", "0"], "draws must be at least 1, got 0"),
        (["--widths", "-3"], "widths must be degrees of at least 0"),
        (["--architecture", "resnet10_cifer"], "did you mean 'resnet10_cifar'"),
        (["--architecture_kwargs", "num_classes=3"], "'num_classes' cannot be a creation argument of 'resnet10_cifar'"),
        (["--degrees", "200"], "degrees must be above 0 and at most 180, got 200"),
    ],
)
def test_what_it_refuses(call, flags, message):
    with pytest.raises(ConfigError, match=message):
        call(rotation, *FAST, *flags)


def test_the_tables_are_those_of_the_results():
    page = (make_tables.ROOT / "docs" / "experiments" / "regression.md").read_text(encoding="utf-8")
    results = json.loads((make_tables.RESULTS / "rotation_digits.json").read_text(encoding="utf-8"))
    for row in results["intervals"]:
        assert f"| {row['method']} | {' / '.join(f'{value:.1f}' for value in row['width'])} |" in page
