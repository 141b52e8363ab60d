"""Writing files whole or not at all, with the access rights that the user's other files have."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from erde_hub.errors import CheckpointError, CheckpointWriteError, ErdeError

#: Temporary files and folders begin like this.
_PREFIX = ".saving-"
#: Age in seconds at which a temporary file must be that of a process that was killed.
_ABANDONED = 86400.0
#: Of config, index and the like: names of a million classes take less.
_LARGEST_JSON = 2**26
#: Folders in which this process has looked for temporary files of killed processes.
_cleaned: set[Path] = set()


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path next to ``path`` and renames it to ``path`` once the block has ended well.

    Raises:
        CheckpointWriteError: The folder is missing or not writable, or the disk is full; an earlier file survives.
    """
    target = Path(path)
    temporary = None
    try:
        with disk_errors(target):
            if target.parent not in _cleaned:  # once: a folder may hold many files
                _cleaned.add(target.parent)
                remove_abandoned(target.parent)
            temporary, mode = _new_file(target.parent)
            yield temporary
            temporary.chmod(mode)  # what filled it may have put a private file in its place, see set_default_mode
            _sync(temporary)
            temporary.replace(target)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_all(folder: str | os.PathLike[str], last: str, apart: str | None = None) -> Iterator[Path]:
    """Yields an empty folder on the same disk and moves its files into ``folder`` once the block has ended well.

    A full disk, or an exception in the block, leaves every earlier file as it was. Errors of the block keep their type:
    wrap what writes in :func:`disk_errors`. Files are replaced one by one, so a process that is killed meanwhile leaves
    old and new ones: give files that belong together names of their own, or a mark by which a reader sees it. What it
    leaves unfinished is removed by the next call.

    Args:
        folder: Made if it is missing, and removed again if nothing was written. Other files in it stay.
        last: Name of the file that is moved last, once everything that it refers to is in place.
        apart: Name of a file that no mark tells to belong to the others: where it changes, the earlier one is taken
            away first and the new one comes after ``last``, so that a kill leaves none and not that of another save.

    Raises:
        CheckpointWriteError: ``folder`` is a file or cannot be written, or the disk is full.
    """
    target = Path(folder)
    made: list[Path] = []
    staging, lock = None, -1
    try:
        with disk_errors(target):
            made = _make_folder(target)
            staging, lock = _new_folder(target)
        yield staging
        with disk_errors(target):
            files = sorted(staging.iterdir(), key=lambda path: (path.name == apart, path.name == last, path.name))
            for path in files:
                set_default_mode(path)
                _sync(path)
            _move(files, target, last, apart)
            _sync(target)
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(lock)
        for parent in made:
            with contextlib.suppress(OSError):  # it is not empty: something was written
                parent.rmdir()


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder next to ``path`` and renames it to ``path`` once the block has ended well.

    Raises:
        CheckpointWriteError: The folder above cannot be written, or the disk is full; an earlier folder survives.
    """
    staging, lock = None, -1
    replaced = path.with_name(f"{_PREFIX}{path.name}-replaced")
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            staging, lock = _new_folder(path.parent)
            yield staging
            for part in sorted(staging.rglob("*"), reverse=True):  # files before the folders that hold them
                _sync(part)
            _sync(staging)
            if path.exists():
                path.rename(replaced)
            staging.rename(path)
            _sync(path.parent)
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            shutil.rmtree(replaced, ignore_errors=True)
            os.close(lock)


def remove_abandoned(folder: Path, age: float = _ABANDONED) -> None:
    """Removes what killed processes left: folders that no process holds any more, and what is older than ``age``.

    Args:
        folder: Where to look.
        age: In seconds since the last change.
    """
    for path in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another process was faster
            if path.is_symlink():
                continue
            old = time.time() - path.stat().st_mtime >= age
            if path.is_dir() and (old or _is_free(path)):
                shutil.rmtree(path, ignore_errors=True)
            elif old:
                path.unlink()


def _new_folder(parent: Path) -> tuple[Path, int]:
    """Makes a temporary folder, which is held until the handle is closed: at the end of the process at the latest."""
    handle = os.open(parent, os.O_RDONLY)
    try:
        _lock(handle)  # so that no other process finds the new folder before it is held
        remove_abandoned(parent)
        folder = parent / f"{_PREFIX}{secrets.token_hex(8)}"
        folder.mkdir()
        held = os.open(folder, os.O_RDONLY)
        _lock(held)
    finally:
        os.close(handle)
    return folder, held


def _is_free(folder: Path) -> bool:
    """Whether the process that made a temporary folder has ended."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        return _lock(handle, wait=False)
    finally:
        os.close(handle)


def _lock(handle: int, wait: bool = True) -> bool:
    """Locks a folder; False where another process holds it, or where folders cannot be locked."""
    try:
        import fcntl  # noqa: PLC0415 - not on Windows

        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns errors of the disk into :class:`CheckpointWriteError`; what is typed already passes.

    Args:
        path: What is written, for the message.
    """
    try:
        yield
    except ErdeError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        raise CheckpointWriteError(
            f"could not write {path.name}: {error}{_space_left(path)}; what was there before is untouched. Check that"
            f" the folder {str(path.parent)!r} exists, is writable and has space left"
        ) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text with newlines as given; see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Reads what may come from a stranger: a JSON object in a file of at most 64 MiB; see :func:`parse_json`."""
    size = path.stat().st_size
    if size > _LARGEST_JSON:
        raise CheckpointError(f"{path.name} has {size:,} bytes, more than the {_LARGEST_JSON:,} that are read")
    return parse_json(path.read_bytes(), f"{path.name} of {str(path.parent)!r}")


def parse_json(text: str | bytes, name: str) -> dict[str, Any]:
    """Returns a JSON object as a dict.

    Args:
        text: As stored.
        name: What it is, for the message.

    Raises:
        CheckpointError: It is damaged, nested too deeply, or no object.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, not text, numbers of thousands of digits
        raise CheckpointError(f"{name} is damaged: {error}; save the checkpoint again, or fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{name} is damaged: it must be a JSON object, got {type(values).__name__}")
    return values


def set_default_mode(path: str | os.PathLike[str]) -> None:
    """Gives a file the mode that any new file in its folder gets, so that other users read what the umask lets them.

    safetensors and ``tempfile`` make files that only their owner can read. The mode is read off a new empty file next
    to it: reading the umask means setting it, which would affect the files of another thread.

    Raises:
        OSError: The folder cannot be written, or the file is missing.
    """
    path = Path(path)
    probe, mode = _new_file(path.parent)
    probe.unlink()
    path.chmod(mode)


def _new_file(folder: Path) -> tuple[Path, int]:
    """Makes an empty file of a name that is free and returns it with its mode."""
    while True:
        path = folder / f"{_PREFIX}{secrets.token_hex(8)}"
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            continue
        try:
            return path, stat.S_IMODE(os.fstat(handle).st_mode)
        finally:
            os.close(handle)


def _move(files: list[Path], folder: Path, last: str, apart: str | None) -> None:
    """Moves files into a folder; what stops it before ``last`` has it undone, and what stops it then finished."""
    new = [folder / path.name for path in files if not (folder / path.name).exists()]
    aside: dict[Path, Path] = {}
    try:
        for path in files:
            there = folder / path.name
            if path.name == apart and there.is_file() and there.read_bytes() != path.read_bytes():
                aside[there] = path.with_name(f"{apart}-replaced")
                there.replace(aside[there])
        for path in files:
            path.replace(folder / path.name)
    except BaseException:  # Ctrl-C too
        waiting = [path for path in files if path.exists()]
        if last in (path.name for path in waiting):
            for path in new:
                path.unlink(missing_ok=True)
            for there, old in aside.items():
                if old.exists():
                    old.replace(there)
        else:
            for path in waiting:
                path.replace(folder / path.name)
        raise


def _make_folder(folder: Path) -> list[Path]:
    """Makes a folder and those above it; returns those that were missing, the deepest first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _sync(path: Path) -> None:
    """Waits until a file, or the list of files of a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _space_left(path: Path) -> str:
    try:
        return f" ({shutil.disk_usage(path if path.is_dir() else path.parent).free / 2**20:.0f} MiB free)"
    except OSError:
        return ""
