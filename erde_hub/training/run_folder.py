"""Folders of runs: the next free one, the newest one, and none overwritten by accident."""

from __future__ import annotations

import atexit
import logging
import re
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from erde_hub.errors import CheckpointWriteError, ConfigError, RunExistsError
from erde_hub.evaluation.figures import FIGURES

from ._launch import LOGS
from .checkpointing import CHECKPOINTS, newest_checkpoint

logger = logging.getLogger(__name__)

#: Folders inside that of a distillation, for the networks that are trained in addition to the student.
COMPANIONS = ("teacher", "static", "exits")
#: File that is locked by the process that trains in the folder.
LOCK = ".lock"
#: Describes a static student whose training is complete.
STATIC_STUDENT = "static_student.json"

#: Any of these makes a folder a run.
_MARKS = ("config.json", "model.safetensors", "results.json", STATIC_STUDENT)
#: Other files of a run; deleted with it.
_REST = (
    "preprocessor_config.json",
    "split.json",
    "trained_on.safetensors",
    "fitted_on.safetensors",
    "sweep.csv",
    *FIGURES,
    "README.md",
    "records.safetensors",
)


def open_run_folder(
    output_dir: str | Path | None,
    config: str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    root: str | Path = "runs",
) -> Path:
    """Returns the folder of a run, made if it was not there; called once, before time is spent.

    Args:
        output_dir: The folder, or None for ``root/<config>-<n>``: the next free n, or with ``resume`` the newest one.
        config: Name of the configuration (a file's stem).
        resume: Continue the run in the folder.
        overwrite: Delete the run in the folder (its checkpoints and results, no other file).
        root: Parent of the folders that are named automatically.

    Raises:
        RunExistsError: The folder holds a run, and neither ``resume`` nor ``overwrite`` is set.
        ConfigError: There is nothing to resume, both are set, or the path is not a folder, or one of other files; or
            another process trains there.
        CheckpointWriteError: The folder cannot be made.
    """
    try:
        folder = _find_run_folder(output_dir, config, resume, overwrite, Path(root))
    except RunExistsError:
        raise
    except OSError as error:
        raise CheckpointWriteError(
            f"output_dir {str(output_dir or root)!r} cannot be written: {error.strerror or error}; choose another"
            " --output_dir"
        ) from error
    _hold(folder)
    if overwrite:
        for part in reversed(_parts(folder)):
            clear_run(part)
    return folder


def _find_run_folder(output_dir: str | Path | None, config: str, resume: bool, overwrite: bool, root: Path) -> Path:
    if resume and overwrite:
        raise ConfigError("resume and overwrite_output_dir contradict each other: choose one")
    if output_dir is None:
        if not resume:
            return _next_run_folder(root, config)
        newest = newest_run(root, config)
        if newest is None:
            raise ConfigError(f"nothing to resume: no folder {root / config}-<n>; start without --resume")
        return newest
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {str(output_dir)!r} is a file, not a folder")
    if resume and not any(has_begun(part) for part in _parts(folder)):
        raise ConfigError(f"nothing to resume in output_dir {str(output_dir)!r}; start without --resume")
    check_run_folder(folder, resume=resume, overwrite=overwrite)
    others = [p.name for p in folder.iterdir() if p.is_dir() and not _is_ours(p)] if folder.is_dir() else []
    if others and not any(has_begun(part) for part in _parts(folder)):
        raise ConfigError(
            f"output_dir {str(output_dir)!r} is no folder of a run, it holds {min(others)!r}: choose a new or empty one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_ours(folder: Path) -> bool:
    return folder.name.startswith(".") or folder.name in (CHECKPOINTS, LOGS, *COMPANIONS)


#: Folders that this process trains in, with their locks.
_held: dict[Path, FileLock] = {}


def _hold(folder: Path, patience: float = 8.0) -> None:
    """Keeps other processes out of a run's folder until this one ends, however it ends.

    Args:
        folder: The folder.
        patience: Seconds to wait: what a killed run has left running, such as its workers, ends in that time.

    Raises:
        ConfigError: Another process trains there.
    """
    key = folder.resolve()
    if key in _held:
        return
    lock = FileLock(key / LOCK)
    try:
        lock.acquire(timeout=patience)
    except Timeout as error:
        raise ConfigError(
            f"another process trains in {str(folder)!r}: wait for it, stop it, or choose another --output_dir"
        ) from error
    _held[key] = lock
    atexit.register(_release, lock)


def _release(lock: FileLock) -> None:
    """Leaves nothing in the folder when the process ends; the lock of a killed one ends with it and its file stays."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def check_run_folder(folder: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Raises :class:`RunExistsError` if a folder holds a run and nothing says what to do with it."""
    folder = Path(folder)
    if not resume and not overwrite and any(map(holds_run, _parts(folder))):
        raise RunExistsError(
            f"{str(folder)!r} already holds a run: continue it with --resume, delete it with --overwrite_output_dir, or"
            " choose another --output_dir"
        )


def holds_run(folder: str | Path) -> bool:
    """Tells whether a folder holds checkpoints or results of a run."""
    folder = Path(folder)
    checkpoints = folder / CHECKPOINTS
    return any((folder / name).exists() for name in _MARKS) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def has_begun(folder: str | Path) -> bool:
    """Tells whether a training has begun in a folder, even if it was killed before its first checkpoint."""
    return (Path(folder) / CHECKPOINTS).is_dir() or holds_run(folder)


def clear_run(folder: str | Path) -> None:
    """Deletes the checkpoints and results of a run and no other file; an empty folder of a companion is removed."""
    folder = Path(folder)
    if not has_begun(folder):
        return
    for name in (CHECKPOINTS, LOGS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (*_MARKS, *_REST):
        (folder / name).unlink(missing_ok=True)
    if folder.name in COMPANIONS and not any(folder.iterdir()):
        folder.rmdir()


def newest_run(root: str | Path, config: str) -> Path | None:
    """Returns the folder ``root/<config>-<n>`` with the highest n, or None."""
    runs = _runs(Path(root), config)
    return runs[max(runs)] if runs else None


def find_checkpoint(folder: str | Path) -> Path | None:
    """Returns the newest complete checkpoint of a run, or None."""
    return newest_checkpoint(Path(folder) / CHECKPOINTS)


def warn_from_start(folder: str | Path) -> None:
    """Says that a run is resumed of which nothing is left to continue from."""
    logger.warning("no complete checkpoint in %s: training starts at step 0", folder)


def _parts(folder: Path) -> list[Path]:
    """Returns the folder of a run and those of its companions."""
    return [folder, *(folder / name for name in COMPANIONS)]


def _next_run_folder(root: Path, config: str) -> Path:
    if not config or Path(config).name != config:
        raise ConfigError(f"config name {config!r} cannot be part of a folder's name")
    number = max(_runs(root, config), default=0) + 1
    while True:  # another process may take the same number in this moment
        folder = root / f"{config}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


def _runs(root: Path, config: str) -> dict[int, Path]:
    pattern = re.compile(rf"{re.escape(config)}-(\d+)")
    paths = root.iterdir() if root.is_dir() else []
    return {int(m[1]): path for path in paths if path.is_dir() and (m := pattern.fullmatch(path.name))}
