"""README.md and docs/: their code runs in order as a reader would run it, and what they name is there."""

from __future__ import annotations

import importlib
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import erde_hub_command
import make_tables
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import erde_hub
from erde_hub import calibration, errors, heads, losses, policies
from erde_hub.export import export_onnx
from tests.fakes import hub_server
from tests.fakes.networks import resnet8

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, DOCS, README = ROOT / "erde_hub", ROOT / "docs", ROOT / "README.md"
PAGES = {page.relative_to(ROOT).as_posix(): page for page in [README, ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]}

#: Pages whose code trains nothing that takes long and needs no checkpoint: `make test` runs them.
QUICK = ["docs/extending.md", "docs/language_models.md", "docs/losses.md", "docs/routing.md", "docs/text.md"]
#: Lines of pages that the fixture has run already.
DONE = re.compile(r"^(make demo|erde-hub distill) *(#.*)?$", re.MULTILINE)

#: Runs the blocks of a page in one process, those of the shell below it.
DRIVER = """
import json, subprocess, sys
names = {"__name__": "__main__"}
for language, text in json.load(open(sys.argv[1])):
    if language == "bash":
        subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True)
    else:
        exec(compile(text, sys.argv[1], "exec"), names)
"""

#: Runs a command line and says how much memory the largest process below it has needed; a small parent, since a
#: process begins with the memory of the one that started it.
PEAK = """
import resource, subprocess, sys
code = subprocess.run(["bash", "-euo", "pipefail", "-c", sys.argv[1]]).returncode
print(f"peak of a process: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss} KiB")
sys.exit(code)
"""


def blocks(page: str) -> list[tuple[str, str]]:
    """Returns language and text of the blocks that run; `console` and `py` mark what needs more."""
    text = PAGES[page].read_text(encoding="utf-8")
    found = re.findall(r"^```(\S*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert {language for language, _ in found} <= {"bash", "python", "py", "cpp", "console", "text", "bibtex", "",
                                                   "{toctree}", "{eval-rst}", "{include}"}  # fmt: skip
    return [(language, block) for language, block in found if language in ("bash", "python")]


LONG = [page for page in PAGES if blocks(page) and page not in QUICK]


# Code


def restored(monkeypatch):
    """Puts the tables back that a page adds methods to."""
    for table in (losses._LOSSES, heads._HEADS, policies._POLICIES, calibration._CALIBRATORS):
        monkeypatch.setattr(table, "_entries", dict(table._entries))


def run_here(page: str) -> dict:
    """Runs the Python of a page in this process and returns its names."""
    names: dict = {}
    for _, text in blocks(page):
        exec(compile(text, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", QUICK)
def test_code_that_is_quick_runs(page, tmp_path, monkeypatch):
    restored(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert {language for language, _ in blocks(page)} == {"python"}
    names = run_here(page)
    if page == "docs/losses.md":
        assert names["readout"].table.max() > 1
        assert {"feature", "dedier_weight"} <= set(names["result"].terms)
        for model in ("student", "teacher"):
            gradients = [parameter.grad for parameter in names[model].parameters()]
            assert all(gradient is None for gradient in gradients)


def test_the_loss_of_the_page_is_what_it_says(tmp_path, monkeypatch):
    restored(monkeypatch)
    monkeypatch.chdir(tmp_path)
    own = run_here("docs/extending.md")["loss"]
    logits, teacher, labels = [torch.randn(4, 5)] * 3, [torch.randn(4, 5)] * 3, torch.arange(4)
    result = own(logits, teacher, labels)
    distance = (logits[0] - teacher[0]).square().mean(1)
    weight = losses.EntropyWeight().weights(losses.ExitBatch(torch.stack(logits), labels, torch.stack(teacher)))
    torch.testing.assert_close(result.exit_terms["logits"], (weight * distance).mean(1))
    assert set(result.terms) == {"logits", "ce", "teacher_right", "ea_kd_weight"}


def test_the_fastapi_app_of_the_page_answers(tmp_path, monkeypatch):
    testclient = pytest.importorskip("fastapi.testclient", reason="fastapi is not installed")
    monkeypatch.chdir(tmp_path)
    export_onnx(resnet8(3, 4, 8, ("layer1",)).eval(), "model.onnx")
    (app,) = re.findall(r"^```py\n(from io.*?)^```$", PAGES["docs/deploy.md"].read_text(), re.DOTALL | re.MULTILINE)
    names: dict = {}
    exec(compile(app, "docs/deploy.md", "exec"), names)
    client, image = testclient.TestClient(names["app"]), io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(image, "png")
    for threshold, exit_ in ((0.0, "classifier"), (9.0, "layer1")):
        answer = client.post(f"/predict?threshold={threshold}", content=image.getvalue())
        assert (answer.status_code, answer.json()["exit"]) == (200, exit_)
    assert client.post("/predict", content=image.getvalue()).status_code == 200
    assert client.post("/predict", content=b"no image").status_code == 400
    assert client.post("/predict?threshold=-1", content=image.getvalue()).status_code == 400


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A stand-in for a checkout after installation: this environment in the place of .venv, and a folder of images."""
    here = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "Makefile", "pyproject.toml", "tests", "README.md"):
        (here / name).symlink_to(ROOT / name)
    programs = here / ".venv" / "bin"
    programs.mkdir(parents=True)
    modules = {
        "python": "",
        "accelerate": " -m accelerate.commands.accelerate_cli",
        "erde-hub": f" '{ROOT}/recipes/erde_hub_command.py'",
    }
    for name, module in modules.items():
        (programs / name).write_text(f"#!/bin/sh\nexec '{sys.executable}'{module} \"$@\"\n")
        (programs / name).chmod(0o755)
    for stamp in (".train", ".dev"):  # what make looks at to see whether it has to install
        (here / ".venv" / stamp).touch()
    generator = np.random.default_rng(0)
    for label in ("cat", "dog"):
        images = here / "path" / "to" / "folder" / "train" / label
        images.mkdir(parents=True)
        for i in range(150):
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(images / f"{i}.png")
    torch.save(timm.create_model("resnet18", num_classes=2).state_dict(), here / "my.pth")
    return here


def run(folder: Path, *command: str, **env: str) -> str:
    """Runs a command with the folder's .venv active, and returns what it printed."""
    # `make` of the folder takes the folder's own .venv, whichever one these tests were started from
    dropped = ("PYTEST_", "ACCELERATE_", "MAKE", "VENV")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    path = f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
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


@pytest.fixture(scope="module")
def demo(checkout):
    """The checkout after `make demo`."""
    (checkout / "printed").write_text(run(checkout, "python", "-c", PEAK, "make demo"))
    return checkout


def run_page(folder: Path, page: str, **env: str) -> str:
    """Runs the blocks of a page in the checkout; `make test` collects one file only.

    Two warnings are not ours: torch's where the Trainer's loader pins no memory, and that of transformers about a name
    that peft still uses.
    """
    foreign = "ignore:'pin_memory' argument,ignore:`is_gradient_checkpointing` is"
    script = folder / "blocks.json"
    script.write_text(json.dumps([(kind, DONE.sub("", text)) for kind, text in blocks(page)]))
    return run(
        folder, "python", "-c", DRIVER, str(script),
        CI="", PYTEST_ADDOPTS="--collect-only -q tests/test_files.py", PYTHONWARNINGS=foreign, **env,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_make_demo_leaves_everything_the_pages_promise(demo):
    printed = (demo / "printed").read_text()
    assert int(re.search(r"^peak of a process: (\d+) KiB$", printed, re.MULTILINE)[1]) < 2 * 1024**2
    left = demo / "runs" / "digits-1"
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "results.json",
                 "sweep.csv", "frontier.png"):  # fmt: skip
        assert (left / name).stat().st_size > 0
        assert (left / "teacher" / name).stat().st_size > 0
    results = json.loads((left / "results.json").read_text())
    assert results["per_exit"][-1]["accuracy"] >= 0.95
    assert results["threshold_choice"]["split"] == "validation"
    assert results["training"]["seconds"] < results["training"]["run_seconds"]
    assert 'EarlyExitWrapper.from_pretrained("runs/digits-1")' in printed
    assert str(demo) not in (left / "results.json").read_text()


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", LONG)
def test_code_runs(page, demo, tmp_path):
    with hub_server.running() as hub:
        pushes = page == "docs/transformers.md"
        env = hub_server.environment(hub, str(tmp_path), HF_TOKEN=hub.token) if pushes else {}
        printed = run_page(demo, page, **env)
    runs = demo / "runs"
    if page == "README.md":
        assert "torch.Size([8, 10])" in printed
        assert "test_files.py" in printed
        found = [json.loads(path.read_text()) for path in sorted(runs.glob("*/results.json"))]
        networks = [results["student"]["architecture"] for results in found if results["dataset"]["name"] == "folder"]
        assert sorted(networks) == ["resnet18", "resnet8_cifar"]
    if pushes:
        pushed = {name: own.commits[own.refs["main"]].keys() for name, own in hub.repositories.items()}
        assert pushed["org/name"] > {"README.md", "results.json", "frontier.png", "model.safetensors"}
        assert pushed["org/other-name"] > {"config.json", "preprocessor_config.json", "model.safetensors"}
    if page == "docs/commands.md":
        student = json.loads((runs / "student" / "results.json").read_text())
        check = json.loads((runs / "check" / "results.json").read_text())
        assert [row["accuracy"] for row in check["per_exit"]] == [row["accuracy"] for row in student["per_exit"]]
        pictures = {"contact_sheet", "frontier", "reliability", "sample", "scores", "sets", "shares"}
        left = {*(f"{name}.png" for name in pictures), "results.json", "sweep.csv"}
        assert {path.name for path in (runs / "check").iterdir()} == left
    if page == "docs/distributed.md":
        newest = max(runs.glob("digits-*"), key=lambda path: int(path.name.removeprefix("digits-")))
        training = json.loads((newest / "results.json").read_text())["training"]
        assert training | {"processes": 2, "batch_size": 64, "steps": 20} == training


def test_install_is_what_make_does(checkout, monkeypatch):
    monkeypatch.setenv("VENV", "/another/environment")  # as .ci/run sets it
    assert "pip install" not in run(checkout, "make", "--dry-run", "demo")
    (extra,) = re.search(r'pip install -e "\.\[(\w+)\]"', README.read_text(encoding="utf-8")).groups()
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    printed = run(checkout, "make", "--dry-run", "--always-make", "demo")
    assert f'pip install -e ".[{extra}]"' in printed
    assert "/python recipes/distill.py" in printed  # a launcher in between would answer Ctrl-C with its own traceback


# What the pages name


def test_the_readme_is_short():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 170
    assert len(text.split()) <= 1600


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = PAGES[page].read_text(encoding="utf-8")
    assert all((PAGES[page].parent / target).exists() for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", text))


def test_every_public_package_has_a_page_of_its_names():
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    names = ["erde_hub", *(f"erde_hub.{m.name}" for m in pkgutil.iter_modules(erde_hub.__path__) if m.ispkg)]
    public = [name for name in names if hasattr(importlib.import_module(name), "__all__")]
    assert len(public) > 10
    within = {"erde_hub.modeling"}  # its one name is at the top
    assert [n for n in public if f"automodule:: {n}\n" not in text and n not in within] == []
    assert [n for n in erde_hub.__all__ if not re.search(rf"(:: |`)erde_hub\.{n}(\n|`)", text)] == []


def test_every_command_is_listed():
    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert [name for name in erde_hub_command.COMMANDS if f"| `erde-hub {name}` |" not in text] == []


def test_errors_of_the_limits_exist():
    found = set(re.findall(r"`(\w+Error)`", (DOCS / "limits.md").read_text(encoding="utf-8")))
    assert len(found) > 8
    assert [name for name in found if not hasattr(errors, name)] == []


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/glossary.md"])
def test_paths_are_there(page):
    text = PAGES[page].read_text(encoding="utf-8")
    paths = {path for path in re.findall(r"[\w/]+/[\w/]*(?:\.py|\.md)?", text) if re.search(r"\.\w+$|^\w+/$", path)}
    assert len(paths) > 5
    assert [p for p in paths if "NAME" not in p and not any((base / p).exists() for base in (PACKAGE, ROOT))] == []


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/glossary.md"])
def test_names_are_where_the_page_says(page):
    """Names after the path they are in (a table), or before it (the ways through the code)."""
    text = PAGES[page].read_text(encoding="utf-8")
    pairs = re.findall(r"`([\w/]+\.py)`, `(\w+)`", text)
    pairs += [(path, name) for name, path in re.findall(r"^ *(\w+)(?:\.\w+)* +([\w/]+\.py)\b", text, re.MULTILINE)]
    assert len(pairs) > 5
    for path, name in pairs:
        module = importlib.import_module("erde_hub." + path.removesuffix(".py").replace("/", "."))
        assert hasattr(module, name), f"{name} is not in {path}"


# Generated parts


def test_generated_parts_are_current(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_tables.py", "--check"])
    make_tables.main()
    assert capsys.readouterr().out == "everything is current\n"
    pictures = list(make_tables.CARDS.glob("*/frontier.png"))
    assert len(pictures) >= 2
    assert all(picture.stat().st_size < 200_000 for picture in pictures)


def test_a_change_of_a_table_or_of_the_results_is_noticed(tmp_path):
    text = (DOCS / "choosing.md").read_text(encoding="utf-8")
    assert make_tables.render(text.replace("`patience`", "`patiense`")) == text
    other = tmp_path / "digits.json"
    other.write_bytes(b"other results")
    picture = make_tables.CARDS / "digits" / "frontier.png"
    assert make_tables.picture_is_current(picture, make_tables.RESULTS / "digits.json")
    assert not make_tables.picture_is_current(picture, other)
