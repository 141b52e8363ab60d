"""The installed command ``erde-hub``: its help needs no torch, it finds its configurations, it runs a script."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import erde_hub_command
import pytest

from erde_hub import __version__

ROOT = Path(__file__).parents[2]


def test_help_is_instant_and_names_every_command():
    code = "import sys, erde_hub_command; erde_hub_command.main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "recipes")
    assert done.stdout.endswith("False\n")
    assert all(f"  {name} " in done.stdout for name in erde_hub_command.COMMANDS)
    scripts = {path.stem for path in (ROOT / "erde_hub" / "scripts").glob("[a-z]*.py")}
    assert {script for script, _ in erde_hub_command.COMMANDS.values()} == scripts
    assert scripts <= {path.stem for path in (ROOT / "recipes").glob("*.py")}, "each has a caller"


def test_an_unknown_command_is_refused():
    with pytest.raises(SystemExit, match=r"no command 'destil' \(there are: distill"):
        erde_hub_command.main(["destil"])


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_wheel_has_command_and_configurations(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    # the dependencies are those of this environment, the package is the wheel's
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    def run(*flags):
        command = [str(tmp_path / "venv" / "bin" / "erde-hub"), *flags]
        return subprocess.run(command, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)

    assert "train-teacher" in run("--help").stdout
    assert run("--version").stdout.strip() == __version__
    fast = ["--max_steps", "2", "--max_train_samples", "80", "--max_eval_samples", "40", "--no_progress_bar"]
    done = run("distill", "--config", "digits", *fast, "--cpu_threads", "1", "--output_dir", "run")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.safetensors").is_file()
    (installed,) = site.glob("erde_hub/scripts/playground/digits")
    shipped = ROOT / "erde_hub" / "scripts" / "playground" / "digits"
    assert {path.name for path in installed.iterdir()} == {path.name for path in shipped.iterdir()}
    wrong = run("evaluate", "--modl", "run")
    assert (wrong.returncode, wrong.stderr.splitlines()[0]) == (
        2,
        "erde-hub evaluate: error: unknown argument '--modl'; did you mean '--model'?",
    )
    missing = run("train-teacher", "--config", "digit")
    assert missing.stderr.startswith("erde-hub train-teacher: ConfigError: --config digit: cannot be read")


def test_ctrl_c_during_the_imports_is_one_line(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(erde_hub_command.importlib, "import_module", interrupted)
    monkeypatch.setattr(sys, "argv", ["recipes/distill.py"])
    with pytest.raises(SystemExit) as stop:
        erde_hub_command.run("distill")
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\ndistill.py: interrupted\n"
