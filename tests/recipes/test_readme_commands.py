"""Every code block of README.md is run, in order, in one folder, as a reader would run them."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import make_tables
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)
BASH = [text.strip() for language, text in BLOCKS if language == "bash"]
PYTHON = [text for language, text in BLOCKS if language == "python"]

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stand-in for a checkout after installation: this environment in the place of .venv, and a folder of images."""
    here = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "Makefile", "pyproject.toml", "tests", "README.md"):
        (here / name).symlink_to(ROOT / name)
    programs = here / ".venv" / "bin"
    programs.mkdir(parents=True)
    launcher = f"#!/bin/sh\nexec '{sys.executable}' -m accelerate.commands.accelerate_cli \"$@\"\n"
    for name, text in {
        "python": f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n",
        "accelerate": launcher,
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for stamp in (".train", ".dev"):  # what make looks at to see whether it has to install
        (here / ".venv" / stamp).touch()
    generator = np.random.default_rng(0)
    for label in ("cat", "dog"):
        images = here / "path" / "to" / "folder" / "train" / label
        images.mkdir(parents=True)
        for i in range(150):
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(images / f"{i}.png")
    return here


def run(folder: Path, command: str, **env: str) -> str:
    """Runs one command line, with the folder's .venv active, and returns what it printed."""
    path = f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "ACCELERATE_"))}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**inherited, "PATH": path, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


#: Runs a command line and says how much memory the largest process below it has needed; a small parent, since a
#: process begins with the memory of the one that started it.
PEAK = """
import resource, subprocess, sys
code = subprocess.run(["bash", "-euo", "pipefail", "-c", sys.argv[1]]).returncode
print(f"peak of a process: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss} KiB")
sys.exit(code)
"""


def block_with(part: str) -> str:
    """Returns the one shell block that holds these words."""
    (found,) = [block for block in BASH if part in block]
    return found


def test_every_block_is_covered_here():
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    covered = ["make demo", "make test", "pip install", "--dataset path", "train_teacher.py", "--num_processes 2"]
    assert len(BASH) == len(covered)
    assert all(block_with(part) for part in covered)
    assert len(PYTHON) == 7


@pytest.mark.long
def test_make_demo_leaves_everything_the_readme_promises(folder):
    (folder / "peak.py").write_text(PEAK)
    printed = run(folder, f"python peak.py {shlex.quote(block_with('make demo'))}")
    assert int(re.search(r"^peak of a process: (\d+) KiB$", printed, re.MULTILINE)[1]) < 2 * 1024**2
    left = folder / "runs" / "digits-1"
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "results.json",
                 "sweep.csv", "frontier.png"):  # fmt: skip
        assert (left / name).stat().st_size > 0
        assert (left / "teacher" / name).stat().st_size > 0
    results = json.loads((left / "results.json").read_text())
    assert results["per_exit"][-1]["accuracy"] >= 0.95
    assert results["threshold_choice"]["split"] == "validation"
    assert results["training"]["seconds"] < results["training"]["run_seconds"]
    assert 'EarlyExitWrapper.from_pretrained("runs/digits-1")' in printed
    assert str(folder) not in (left / "results.json").read_text()


@pytest.mark.slow
def test_make_test_runs_pytest(folder):
    printed = run(folder, block_with("make test"), PYTEST_ADDOPTS="--collect-only -q tests/recipes/test_cli.py", CI="")
    assert "test_cli.py" in printed


def test_install_is_what_make_does(folder):
    (extra,) = re.fullmatch(r'pip install -e "\.\[(\w+)\]"', block_with("pip install")).groups()
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    printed = run(folder, "make --dry-run --always-make demo")
    assert f'pip install -e ".[{extra}]"' in printed
    assert "/python recipes/distill.py" in printed  # a launcher in between would answer Ctrl-C with its own traceback


@pytest.mark.long
def test_own_images_and_network(folder):
    run(folder, block_with("--dataset path"))
    results = json.loads((folder / "runs" / "folder-1" / "results.json").read_text())
    assert results["dataset"]["class_names"] == ["cat", "dog"]
    assert results["student"]["architecture"] == "resnet8_cifar"


@pytest.mark.long
def test_the_two_halves_and_evaluate(folder):
    run(folder, block_with("train_teacher.py"))
    student = json.loads((folder / "runs" / "student" / "results.json").read_text())
    check = json.loads((folder / "runs" / "check" / "results.json").read_text())
    assert [row["accuracy"] for row in check["per_exit"]] == [row["accuracy"] for row in student["per_exit"]]
    assert sorted(p.name for p in (folder / "runs" / "check").iterdir()) == [
        "frontier.png",
        "reliability.png",
        "results.json",
        "scores.png",
        "shares.png",
        "sweep.csv",
    ]


@pytest.mark.long
def test_two_processes(folder):
    run(folder, block_with("--num_processes 2"))
    newest = max((folder / "runs").glob("digits-*"), key=lambda path: int(path.name.removeprefix("digits-")))
    results = json.loads((newest / "results.json").read_text())
    assert results["training"] | {"processes": 2, "batch_size": 64, "steps": 20} == results["training"]


@pytest.mark.long
def test_python_blocks_run_one_after_the_other(folder):
    script = folder / "blocks.py"
    script.write_text("\n".join(PYTHON) + "\nassert classify(__import__('PIL.Image').Image.new('RGB', (28, 28)))\n")
    printed = run(folder, "python blocks.py")
    assert "torch.Size([8, 10])" in printed
    assert "classifier" in printed


def test_generated_parts_are_current(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_tables.py", "--check"])
    make_tables.main()
    assert capsys.readouterr().out == "everything is current\n"
    pictures = list(make_tables.CARDS.glob("*/frontier.png"))
    assert len(pictures) >= 2
    assert all(picture.stat().st_size < 200_000 for picture in pictures)


def test_a_change_of_a_table_or_of_the_results_is_noticed(tmp_path, monkeypatch):
    text = make_tables.README.read_text(encoding="utf-8")
    assert make_tables.render(text.replace("`patience`", "`patiense`")) == text
    other = tmp_path / "digits.json"
    other.write_bytes(b"other results")
    picture = make_tables.CARDS / "digits" / "frontier.png"
    assert make_tables.picture_is_current(picture, make_tables.RESULTS / "digits.json")
    assert not make_tables.picture_is_current(picture, other)
