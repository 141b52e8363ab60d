"""The benchmark of generation on a tiny model: what it counts is exact, its times are only there."""

import json

import pytest
from benchmarks import generation as benchmark
from pages import speed

from erde_hub import EarlyExitWrapper
from erde_hub.data import train_tokenizer
from erde_hub.errors import ConfigError
from erde_hub.scripts.common.turns import summary
from tests.fakes.transformers_models import causal

pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture
def results(tmp_path, call):
    (tmp_path / "train.txt").write_text("to be or not to be, that is the question\n" * 60)
    model = EarlyExitWrapper(causal("llama", vocab_size=257), exits=["model.layers.0", "model.layers.2"])
    model.save_pretrained(tmp_path / "model")
    train_tokenizer(["to be"]).save_pretrained(tmp_path / "model")
    sizes = ["--prompt_tokens", "8", "--new_tokens", "9", "--rounds", "1", "--min_rounds", "1", "--cpu_threads", "1"]
    places = ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path), "--output", str(tmp_path / "b.json")]
    call(benchmark, *places, *sizes, "--drafts", "2", "--thresholds", "1.0", "9.0", "--confidence", "0")
    return json.loads((tmp_path / "b.json").read_text())


@pytest.mark.long
def test_every_way_is_counted_and_timed(results):
    early = ["model.layers.0", "model.layers.2"]
    drafts = [f"{theirs}{exit_} drafts 2" for exit_ in early for theirs in ("", "transformers, ")]
    thresholds = ["threshold 0", "threshold 1", "threshold 9", "threshold 9, states copied"]
    assert sorted(results["work"]) == sorted(["bare", *thresholds, *drafts, "prompt lookup, 2"])
    work = {name: found["layers_per_token"] for name, found in results["work"].items()}
    assert work["bare"] == work["threshold 0"] == 5
    assert work["threshold 9"] == work["threshold 9, states copied"] == 1, "every token exits after the first layer"
    for exit_ in early:
        assert 5 <= work[f"{exit_} drafts 2"] < work[f"transformers, {exit_} drafts 2"]
    for name in ("bare", "threshold 0", "prompt lookup, 2", *drafts):
        assert results["work"][name]["same_text"] == 1, name
    assert results["added"] == 0
    (timed,) = results["threads"]
    assert timed["tokens_per_second"].keys() == results["work"].keys()
    assert min(timed["tokens_per_second"].values()) > 0
    assert "threshold 0 / bare" in timed["ratios"]
    assert f"{early[0]} drafts 2 / transformers, {early[0]} drafts 2" in timed["ratios"]


def test_the_table_compares_with_the_bare_model_and_transformers_own():
    times = {"bare": [2.0, 2.0], "exit drafts 4": [1.0, 1.6], "transformers, exit drafts 4": [1.5, 1.6]}
    work = {name: {"layers_per_token": 12.5, "same_text": 1.0} for name in times}
    timed = {"threads": 1, "tokens_per_second": dict.fromkeys(times, 30.0)}
    timed |= summary(times, [("exit drafts 4", "transformers, exit drafts 4")])
    lines = speed.generation_table({"work": work, "threads": [timed]}).splitlines()
    assert lines[2:] == [
        "| bare | 12.50 | 100 | 30.0 | - | - |",
        "| exit drafts 4 | 12.50 | 100 | 30.0 | 1.54 | 1.20 |",  # medians of 0.5 and 0.8, of 2 / 3 and 1
    ]


@pytest.mark.parametrize(
    ("flags", "words"), [([], "--model and --dataset are needed"), (["--large", "--drafts", "0"], "drafts must be")]
)
def test_what_it_refuses(call, flags, words):
    with pytest.raises(ConfigError, match=words):
        call(benchmark, *flags)
