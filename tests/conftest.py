"""What every test gets: no network, no traces left for the next test, and the shared reference data."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before anything imports torch, for the tests and what they start: see recipes/distill.py.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Several test processes share the cores.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

import gc
import json
import logging
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# torch and transformers are imported inside the fixtures: the process that hands out the tests needs neither.

pytest.register_assert_rewrite("tests.fakes")

# The same examples on every run and machine: a failure is then a change of the code, not of the luck.
settings.register_profile(
    "erde_hub", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("erde_hub")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: processes that get whole files in turn then end at about the same time."""
    slow = {item.path for item in items if any(item.iter_markers("slow")) or any(item.iter_markers("long"))}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What was imported need not be searched with every collection of garbage; each training ends with one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _set_up_process() -> None:
    import torch  # noqa: PLC0415

    from erde_hub import keep_freed_memory  # noqa: PLC0415

    keep_freed_memory()
    torch.set_num_threads(1)  # networks of tests are so small that a second thread only waits


@pytest.fixture(autouse=True)
def _fresh_state(_set_up_process: None) -> Iterator[None]:
    """Seeds every generator before a test; puts all of the process's state back after it."""
    import torch  # noqa: PLC0415
    from accelerate.state import AcceleratorState  # noqa: PLC0415

    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global generator is meant
    torch_state = torch.random.get_rng_state()
    dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    logger = logging.getLogger("erde_hub")  # recipes set it up for a terminal, in fixtures of modules too
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps one precision per process
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from it
    torch.manual_seed(0)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    random.setstate(python_state)
    np.random.set_state(numpy_state)  # noqa: NPY002 - as above
    torch.random.set_rng_state(torch_state)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    torch.use_deterministic_algorithms(deterministic)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers, whose content our errors repeat."""
    import transformers  # noqa: PLC0415

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity(level)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``shared/`` beside the checkout: reference vectors and data sets. A checkout alone has none."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        message = f"the reference data are not there: {folder.name}/ is looked for beside the checkout"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture
def golden(shared: Path) -> Callable[[str], dict[str, Any]]:
    """Reads one file of golden vectors by name."""
    return lambda name: json.loads((shared / "reference" / "golden" / f"{name}.json").read_text())


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Runs a script or recipe in this process, as if from a shell in tmp_path."""
    from accelerate.state import AcceleratorState  # noqa: PLC0415

    monkeypatch.chdir(tmp_path)

    def _call(recipe: ModuleType, *flags: object) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # what an earlier call of the same test has set
        monkeypatch.setattr(sys, "argv", [f"{recipe.__name__}.py", *map(str, flags)])
        recipe.main()

    return _call
