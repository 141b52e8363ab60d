"""The recipes themselves: every configuration for two steps, resuming at any phase, refusals before time is spent."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

from erde_hub.errors import ConfigError, DataError, RunExistsError
from erde_hub.scripts import distill, evaluate, train_teacher
from erde_hub.scripts.common import THRESHOLD_RULE, Interrupted
from erde_hub.training import Distiller
from erde_hub.training.checkpointing import newest_checkpoint
from tests.fakes.texts import columns, write_encoder, write_texts

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
FAST_TEACHER = ["--teacher_kwargs", "width=4", "--epochs", "1", "--no_progress_bar", "--cpu_threads", "1",
                "--mixed_precision", "no", "--checkpoint_steps", "4"]  # fmt: skip
FAST = [*FAST_TEACHER, "--student_kwargs", "width=4"]
LEFT = ("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "results.json", "sweep.csv", "frontier.png")  # fmt: skip # noqa: E501


def write_images(folder: Path, settings: dict) -> Path:
    """Writes what a configuration expects of its data set: its columns, its configuration name, three tiny splits."""
    image, label = settings.get("image_column", "image"), settings.get("label_column", "label")
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=["ant", "bee", "cat"])})
    generator = np.random.default_rng(0)
    folder.mkdir()
    splits = []
    for split, size in (("train", 60), ("test", 18)):
        rows = {
            image: [Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(size)],
            label: [i % 3 for i in range(size)],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
        splits.append({"split": split, "path": f"{split}.parquet"})
    card = {"configs": [{"config_name": settings.get("dataset_config", "default"), "data_files": splits}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    return folder


def shrink(architecture: str) -> list[str]:
    """Creation arguments that make a network small enough for a test."""
    if architecture.startswith("convnext"):
        return ["depths=[1,1,1,1]", "dims=[4,8,12,16]"]
    if architecture.endswith("_cifar"):
        return ["width=4"]
    return []


TEXT_CONFIGS = [path for path in CONFIGS if "MiniLM" in path.read_text()]
LANGUAGE_CONFIGS = [path for path in CONFIGS if "_llama" in path.stem]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem == "sst2_minilm-small" else pytest.mark.long)
        for path in TEXT_CONFIGS
    ],
)
@pytest.mark.slow
def test_configuration_of_texts_runs(config, call, tmp_path, drawn_figures):
    """Ends in a checkpoint that loads with its tokenizer, in pipelines and in the other recipes."""
    encoder = write_encoder(tmp_path / "all-MiniLM-L6-v2", layers=6)
    topics = "agnews" in config.stem
    names = {"text_column": "text"} if topics else {}
    data = {"train": columns(80, **names), "test" if topics else "validation": columns(60, first=200, **names)}
    flags = ["--dataset", write_texts(tmp_path / "texts", data), "--cache_dir", tmp_path / "cache"]
    networks = ["--teacher_architecture", encoder, "--student_architecture", encoder]
    fast = ["--max_steps", "2", "--batch_size", "16", "--max_length", "12", "--no_progress_bar", "--cpu_threads", "1"]
    call(distill, "--config", config, *flags, *networks, *fast, "--output_dir", "out")
    left = [name for name in LEFT if name != "preprocessor_config.json"]
    for name in (*left, "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).is_file()
        assert (tmp_path / "out" / "teacher" / name).is_file()
    text = (tmp_path / "out" / "results.json").read_text()
    assert str(tmp_path) not in text
    results = json.loads(text)
    assert results["dataset"]["kind"] == "text"
    assert results["dataset"]["input_size"] == [12]
    assert results["student"]["backbone_kwargs"]["num_hidden_layers"] == 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "image" not in card.split("## Training")[0]
    if config.stem == "agnews_minilm-small":
        call(distill, "--config", config, *flags, *fast, "--teacher", "out/teacher", "--student_architecture", encoder,
             "--output_dir", "second")  # fmt: skip
        second = json.loads((tmp_path / "second" / "results.json").read_text())
        assert second["teacher"]["accuracy"] == results["teacher"]["accuracy"]
    if config.stem != "sst2_minilm-small":
        return
    answers = pipeline("text-classification", model="out")(["good film", "a very bad film"])
    assert [answer["label"] in ("negative", "positive") for answer in answers] == [True, True]
    call(evaluate, "--model", "out", *flags, "--output_dir", "check", "--cpu_threads", "1")
    check = json.loads((tmp_path / "check" / "results.json").read_text())
    assert [row["accuracy"] for row in check["per_exit"]] == [row["accuracy"] for row in results["per_exit"]]
    assert check["dataset"]["split"] == results["dataset"]["split"]


@pytest.mark.parametrize("config", LANGUAGE_CONFIGS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_configuration_of_a_language_model_runs(config, call, tmp_path):
    """Ends in a checkpoint that generates, with the tokenizer of its text, and in a card that says so."""
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "train.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    sizes = ["hidden_size=16", "intermediate_size=16", "num_attention_heads=2"]
    flags = ["--dataset", tmp_path / "shakespeare", "--block_size", "16", "--max_steps", "2", "--batch_size", "4",
             "--no_progress_bar", "--cpu_threads", "1", "--max_eval_samples", "6"]  # fmt: skip
    settings = yaml.safe_load(config.read_text())
    for role, key in (("teacher", "teacher_exit_points"), ("student", "exits")):
        if f"{role}_kwargs" in settings:
            layers = 2 + max(int(name.rpartition(".")[2]) for name in settings[key])
            flags += [f"--{role}_kwargs", f"num_hidden_layers={layers}", *sizes]
    call(distill, "--config", config, *flags, "--output_dir", "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["dataset"]["kind"] == "token"
    assert len(results["per_exit"]) == len(settings["exits"]) + 1
    assert (results["teacher"] is not None) == ("teacher_kwargs" in settings)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert "image" not in card.split("## Training")[0]
    (answer,) = pipeline("text-generation", model="out")("To be", max_new_tokens=5, threshold=9.0)
    assert answer["generated_text"].startswith("To be")
    if config.stem.endswith("small"):
        own = [*flags[:4], "--max_eval_samples", "6", "--cpu_threads", "1"]
        call(evaluate, "--model", "out", *own, "--output_dir", "check")
        check = json.loads((tmp_path / "check" / "results.json").read_text())
        assert [row["accuracy"] for row in check["per_exit"]] == [row["accuracy"] for row in results["per_exit"]]


#: One of each kind of network and data; the others differ in names and numbers.
QUICK = ("digits", "own_images", "cifar10_convnext_tiny_convnext_atto", "cifar10_resnet18_resnet10-small")


class ReachesTheDataError(Exception):
    """Raised where a script would load its data: all arguments are accepted."""


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configuration_is_accepted(config, call, monkeypatch):
    def load(*_, **__):
        raise ReachesTheDataError

    monkeypatch.setattr(distill.recipe, "load_data", load)
    with pytest.raises(ReachesTheDataError):
        call(distill, "--config", config, "--cpu_threads", "1", "--output_dir", "out")


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.long)
        for path in CONFIGS
        if path not in (*TEXT_CONFIGS, *LANGUAGE_CONFIGS)
    ],
)
@pytest.mark.slow
def test_configuration_runs(config, call, tmp_path):
    settings = yaml.safe_load(config.read_text())
    flags = ["--dataset", write_images(tmp_path / "images", settings), "--image_size", "32"]
    if settings.get("dataset", "digits") == "digits":
        flags = ["--max_train_samples", "80", "--max_eval_samples", "40"]
    for role in ("teacher", "student"):
        if small := shrink(settings[f"{role}_architecture"]):
            flags += [f"--{role}_kwargs", *small]
        flags += [f"--{role}_pretrained", "false"]
    flags += ["--max_steps", "2", "--batch_size", "16", "--num_workers", "0", "--no_progress_bar", "--cpu_threads", "1"]
    call(distill, "--config", config, *flags, "--output_dir", "out", "--cache_dir", tmp_path / "cache")
    for name in LEFT:
        assert (tmp_path / "out" / name).is_file()
        assert (tmp_path / "out" / "teacher" / name).is_file()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["training"]["steps"] == 2
    assert results["args"]["config"] == config.stem
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()


@pytest.mark.slow
def test_streamed_data(call, tmp_path, capsys):
    images = write_images(tmp_path / "images", {})
    call(distill, *FAST, "--dataset", images, "--streaming", "--max_steps", "2", "--batch_size", "16")
    assert "streamed images of 32x32, 3 classes" in capsys.readouterr().out
    left = {path.name for path in (tmp_path / "runs" / "images-1").iterdir()}
    assert set(LEFT) <= left
    split = json.loads((tmp_path / "runs" / "images-1" / "split.json").read_text())
    assert split["splits"]["validation"] | {"from": 0, "below": 10} == split["splits"]["validation"]

    # evaluated without streaming: the rows that the stream held out
    cache = ["--dataset", images, "--cache_dir", tmp_path / "cache"]
    call(evaluate, "--model", "runs/images-1", *cache, "--split", "validation", "--output_dir", "check")
    shares = json.loads((tmp_path / "check" / "results.json").read_text())["dataset"]["split"]
    assert shares["validation"]["rule"] == "hash of the image modulo 100"
    assert shares["train"]["rows"] + shares["validation"]["rows"] == 60

    # the other way round: row numbers are refused where they matter
    call(train_teacher, *FAST_TEACHER, *cache, "--batch_size", "16", "--max_steps", "1", "--output_dir", "loaded")
    with pytest.raises(DataError, match=r"'loaded' loaded 'images' and held out rows of validation.*leave --streaming"):
        call(evaluate, "--model", "loaded", *cache, "--streaming", "--split", "validation", "--output_dir", "no")
    call(evaluate, "--model", "loaded", *cache, "--streaming", "--output_dir", "yes")  # the set's own test split
    call(distill, *FAST, *cache, "--teacher", "runs/images-1", "--max_steps", "1", "--batch_size", "16",
         "--output_dir", "student")  # fmt: skip
    shares = json.loads((tmp_path / "student" / "results.json").read_text())["dataset"]["split"]
    assert shares["validation"]["rule"] == "hash of the image modulo 100"


def test_there_are_configurations():
    assert {"digits", "cifar10_resnet18_resnet10-small"} <= {path.stem for path in CONFIGS}
    for path in CONFIGS:  # the README shows it
        assert path.read_text().startswith("# ")


def test_static_student_and_evaluate_of_another_policy(call, tmp_path, capsys):
    call(distill, *FAST, "--train_static", "--output_dir", "out", "--max_steps", "4")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    static = results["static_student"]
    assert static["exits"] == []
    assert results["threshold_choice"]["rule"] == THRESHOLD_RULE
    assert static["macs"] < results["student"]["macs"]  # no heads
    assert "(static student)" in capsys.readouterr().out
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    call(evaluate, "--model", "out", "--policy", "confidence", "--output_dir", "check", "--save_records")
    check = json.loads((tmp_path / "check" / "results.json").read_text())
    assert [row["accuracy"] for row in check["per_exit"]] == [row["accuracy"] for row in results["per_exit"]]
    assert check["student"]["policy"] == "confidence"
    assert (tmp_path / "check" / "records.safetensors").is_file()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    with pytest.raises(ConfigError, match="holds a checkpoint"):
        call(evaluate, "--model", "out", "--output_dir", "out", "--overwrite_output_dir")


def test_stored_split_is_used_by_evaluate(call, tmp_path):
    """A run whose held-out rows are not the usual ones: evaluate reports on the rows that this run held out."""
    call(train_teacher, *FAST_TEACHER, "--output_dir", "out", "--max_steps", "2")
    split_file = tmp_path / "out" / "split.json"
    split = json.loads(split_file.read_text())
    split["rows"]["test"] = split["rows"]["test"][:100]
    split_file.write_text(json.dumps(split))
    call(evaluate, "--model", "out", "--output_dir", "check")
    check = json.loads((tmp_path / "check" / "results.json").read_text())
    assert check["metrics"]["samples"] == 100


def test_published_thresholds_follow_the_rule_of_today():
    chosen = [json.loads(path.read_text()).get("threshold_choice") for path in (RECIPES / "results").glob("*.json")]
    rules = [choice["rule"] for choice in chosen if choice and "split" in choice]
    assert len(rules) >= 2
    assert set(rules) == {THRESHOLD_RULE}


@pytest.mark.slow
def test_other_data_without_a_file_get_the_general_settings(call, tmp_path, capsys):
    images = write_images(tmp_path / "images", {})
    flags = ["--loss", "ce", "--max_steps", "1", "--batch_size", "16", "--student_kwargs", "width=4",
             "--output_dir", "out"]  # fmt: skip
    call(distill, "--dataset", images, "--cache_dir", tmp_path / "cache", *flags)
    assert "own_images.yaml of erde_hub, as there is no --config" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["args"]
    assert settings["epochs"] == yaml.safe_load((RECIPES / "configs" / "own_images.yaml").read_text())["epochs"]
    assert settings["teacher_kwargs"] == {"width": 32}
    call(distill, *flags, "--overwrite_output_dir")
    assert "digits.yaml of erde_hub, as there is no --config" in capsys.readouterr().out


def test_a_stop_says_who_was_stopped_and_has_the_exit_code_of_its_signal(call, tmp_path, capsys, monkeypatch):
    stopped = Interrupted("the training of the teacher is not finished", "SIGINT")
    assert stopped.exit_code == 130
    assert Interrupted("", "SIGTERM").exit_code == Interrupted("", "its launcher died").exit_code == 143
    monkeypatch.setattr(Distiller, "_log_step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"training of the teacher is not finished \(2 of 3 steps\).*--resume"):
        call(distill, *FAST, "--max_steps", "3", "--output_dir", "out")
    assert "saved as" in capsys.readouterr().err


def test_teacher_arguments_differ_only_where_the_file_says_so(call, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(
        "dataset: digits\nmax_steps: 4\nlr: 0.05\nteacher_training: {max_steps: 2}\nentropy_weight: 0.01\n"
    )
    call(distill, "--config", config, *FAST)
    out = tmp_path / "runs" / "mine-1"
    assert json.loads((out / "results.json").read_text())["training"]["steps"] == 4
    teacher = json.loads((out / "teacher" / "results.json").read_text())
    assert teacher["training"]["steps"] == 2
    call(train_teacher, "--config", config, *FAST_TEACHER)
    alone = tmp_path / "runs" / "mine-teacher-1"
    assert json.loads((alone / "results.json").read_text())["training"]["steps"] == 2
    assert same_weights(alone, out / "teacher")


def test_refusals_leave_no_folder(call, tmp_path):
    for flags, error in [
        (["--exits", "layer9"], "no stage 'layer9'"),
        (["--loss", "erd"], "did you mean 'erde'"),
        (["--loss", "kd", "--entropy_weight", "0.1"], "no argument 'entropy_weight'"),
        (["--threshold", "0.1", "0.2"], "2 thresholds for 3 early exits"),
        (["--teacher", "out"], "there is no folder 'out'"),
        (["--dataset", "./nowhere"], "there is no folder"),
        (["--batch_size", "100000"], "lower batch_size to 1294 or less"),
        (["--teacher_training", "gradient_accumulation_steps=5000"], "gradient_accumulation_steps"),
    ]:
        with pytest.raises(ValueError, match=error):
            call(distill, *FAST, *flags)
    assert not (tmp_path / "runs").exists()


def test_runs_are_numbered_and_not_overwritten(call, tmp_path):
    flags = [*FAST, "--max_steps", "1", "--loss", "ce"]
    call(distill, *flags)
    call(distill, *flags)
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["digits-1", "digits-2"]
    with pytest.raises(RunExistsError):
        call(distill, *flags, "--output_dir", "runs/digits-1")
    call(distill, *flags, "--output_dir", "runs/digits-1", "--overwrite_output_dir")


def test_a_broken_image_is_found_before_training_unless_nobody_is_to_look(call, tmp_path, monkeypatch):
    for number in range(40):
        folder = tmp_path / "images" / "train" / ("ant", "bee")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    broken = tmp_path / "images" / "train" / "ant" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:-2000])
    flags = [*FAST, "--dataset", "images", "--cache_dir", tmp_path / "cache", "--batch_size", "8"]
    with pytest.raises(DataError, match=r"in row 0 of split 'train' of 'images' \(ant/0\.jpg\) cannot be read"):
        call(distill, *flags)
    assert not (tmp_path / "runs").exists()

    class ReachedError(Exception):
        pass

    def build(*_):
        raise ReachedError

    monkeypatch.setattr(distill.recipe, "build_student", build)
    for how in ("headers", "none"):
        with pytest.raises(ReachedError):
            call(distill, *flags, "--check_images", how)


@pytest.mark.slow
def test_what_is_finished_is_not_handed_out_under_other_settings(call, tmp_path, capsys):
    few = ["--max_train_samples", "130", "--max_eval_samples", "40"]
    flags = [*FAST, *few, "--max_steps", "2", "--batch_size", "32", "--output_dir", "out"]
    call(distill, *flags, "--train_static")
    printed = capsys.readouterr().out
    assert "exit of the student <- exit of the teacher: layer1 <- layer1, layer2 <- layer2" in printed
    roles = [line.split()[:2] for line in printed.splitlines() if " / " in line and line[:1] in "ts"]
    assert roles[:2] == [["teacher", "resnet18_cifar"], ["student", "resnet10_cifar"]], "one table"
    assert "exits of the teacher: " in printed
    assert "exits of the student: " in printed
    assert re.search(r"time: .* in all, .* of it the training of this network", printed)
    results_file = tmp_path / "out" / "results.json"
    results = json.loads(results_file.read_text())
    parts = [results["training"], results["static_student"]]
    parts.append(json.loads((tmp_path / "out" / "teacher" / "results.json").read_text())["training"])
    assert results["training"]["run_seconds"] > sum(part["seconds"] for part in parts)
    assert "args" not in results["static_student"]

    for name in ("check_images", "train_static", "entropy_weight"):  # as an older version would have left it
        results["args"].pop(name)
    results["args"]["train_static"] = True
    results_file.write_text(json.dumps(results))
    call(distill, *flags, "--train_static", "--resume", "--num_workers", "1")
    assert "all samples at" in capsys.readouterr().out
    for changed, message in (
        (["--epochs", "2"], r"--resume with epochs=2.*epochs=1: continue with --epochs 1"),
        (["--loss", "kd"], r"--resume with loss='kd'.*loss='erde'"),
    ):
        with pytest.raises(ConfigError, match=message):
            call(distill, *flags, "--train_static", "--resume", *changed)

    results_file.unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    with pytest.raises(ConfigError, match=r"teacher_kwargs=\{'width': 8\}, but the teacher .*--teacher_kwargs width=4"):
        call(distill, *flags, "--train_static", "--resume", "--teacher_kwargs", "width=8")
    with pytest.raises(ConfigError, match=r"student_kwargs=\{'width': 8\}, but the static student"):
        call(distill, *flags, "--train_static", "--resume", "--student_kwargs", "width=8")
    call(distill, *flags, "--train_static", "--resume", "--loss", "kd")
    again = json.loads(results_file.read_text())
    assert again["static_student"] == results["static_student"]
    assert again["loss"]["name"] == "kd"


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_it_starts_at_step_0(call, tmp_path, monkeypatch, capsys):
    few = ["--max_train_samples", "130", "--max_eval_samples", "40", "--batch_size", "32"]
    flags = [*FAST_TEACHER, *few, "--max_steps", "2", "--checkpoint_steps", "0"]
    with monkeypatch.context() as patched:
        patched.setattr(Distiller, "_save", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        for output_dir in (["--output_dir", "out"], []):
            with pytest.raises(KeyboardInterrupt):
                call(train_teacher, *flags, *output_dir)
    for output_dir in (["--output_dir", "out"], []):
        capsys.readouterr()
        call(train_teacher, *flags, *output_dir, "--resume")
        assert "training starts at step 0" in capsys.readouterr().err
    assert same_weights(tmp_path / "out", tmp_path / "runs" / "digits-teacher-1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="nothing to resume"):
        call(train_teacher, *flags, "--resume", "--output_dir", "empty")


def same_weights(a: Path, b: Path) -> bool:
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def start_and_kill(folder: Path, flags: list[str], checkpoints: Path, with_signal: int) -> int:
    """Starts distill.py, waits for a checkpoint, and sends a signal; returns the exit code."""
    process = subprocess.Popen(
        [sys.executable, str(RECIPES / "distill.py"), *flags],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    deadline = time.monotonic() + 200
    while newest_checkpoint(checkpoints) is None:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(with_signal)
    return process.wait(120)


@pytest.mark.long
def test_killed_in_any_phase_and_resumed_gives_the_same_weights(call, tmp_path, capsys):
    flags = [*FAST, "--output_dir", "run"]
    call(distill, *FAST, "--output_dir", "whole")
    run, whole = tmp_path / "run", tmp_path / "whole"

    # during the teacher's training, as the power fails; then during the student's, politely
    assert start_and_kill(tmp_path, flags, run / "teacher" / "checkpoints", signal.SIGKILL) == -signal.SIGKILL
    assert not (run / "teacher" / "results.json").exists()
    assert start_and_kill(tmp_path, [*flags, "--resume"], run / "checkpoints", signal.SIGTERM) == 143
    assert not (run / "results.json").exists()
    teacher = (run / "teacher" / "results.json").stat().st_mtime_ns
    capsys.readouterr()
    call(distill, *flags, "--resume")
    assert (run / "teacher" / "results.json").stat().st_mtime_ns == teacher  # not trained again
    assert same_weights(run, whole)
    assert same_weights(run / "teacher", whole / "teacher")

    # while the report is written: it is made again
    finished = json.loads((run / "results.json").read_text())
    (run / "results.json").unlink()
    (run / "README.md").write_text("half")
    call(distill, *flags, "--resume")
    again = json.loads((run / "results.json").read_text())
    assert again["sweep"] == finished["sweep"]
    assert again["operating_point"] == finished["operating_point"]
    assert "model-index" in (run / "README.md").read_text()

    # a run that is finished says so once more and does nothing
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    call(distill, *flags, "--resume")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert "all samples at" in capsys.readouterr().out
