"""A file, or a file and its weights, is written beside its place; then both are moved in, or neither."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from erde_hub.errors import CheckpointWriteError, ErdeError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: Seconds after which a folder that nobody holds was left by a process that was killed.
ABANDONED = 600.0
#: Inside the folder: files that were there before, while new ones are moved in.
_ASIDE = "before"


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Gives an empty folder beside a file that is going to be written, and removes it in the end.

    Made before the work begins, it shows at once whether the place can be written. What a killed process left of the
    same file is removed first, where that is safe: nobody holds its lock, it is old, and holds nothing that was there
    before that process came.

    Args:
        target: The file. Folders above it are made where they are missing, and removed again if nothing came into them.

    Raises:
        CheckpointWriteError: The place cannot be written.
    """
    made: list[Path] = []
    folder = lock = None
    try:
        with write_errors(target):
            made = _make_folder(target.parent)
            _remove_abandoned(target)
            folder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
            lock = _hold(folder)
        yield folder
    finally:
        if folder is not None and not _holds_old_files(folder):
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        for parent in made:
            with contextlib.suppress(OSError):  # what was written lies in it
                parent.rmdir()


def move_in(source: Path, target: Path, names: Sequence[str]) -> None:
    """Moves files that belong together beside each other; where that ends early, what was there before is put back.

    Args:
        source: The folder of :func:`staging`, with the new files in it.
        target: The file that speaks of the others.
        names: The new files. The weights of an earlier file that the new one does not need are removed.
    """
    folder, weights = target.parent, weights_of(target)
    if len(names) == 1:
        (source / names[0]).replace(target)
        if weights is not None:
            weights.unlink(missing_ok=True)
        return
    aside = source / _ASIDE
    aside.mkdir()
    old = [name for name in names if (folder / name).exists()]
    try:
        for name in old:  # never an old file with new weights
            (folder / name).replace(aside / name)
        for name in names:
            (source / name).replace(folder / name)
        aside.rename(source / "replaced")  # from here on the new files count
    except BaseException:  # Ctrl-C too. What happened is read off the disk: it may have come behind any of the moves.
        for name in names if aside.is_dir() else ():
            if (aside / name).exists():
                (aside / name).replace(folder / name)
            elif name not in old and not (source / name).exists():
                (folder / name).unlink(missing_ok=True)
        raise


def weights_path(target: Path) -> Path:
    """Where the weights of a large file lie."""
    return target.with_name(f"{target.name}.data")


def weights_of(target: Path) -> Path | None:
    """Returns the file beside an ONNX file that holds its weights; None where it refers to none."""
    beside = weights_path(target)
    if not beside.is_file() or not target.is_file():
        return None
    try:
        model = ir.load(target, format="protobuf")
    except Exception:  # noqa: BLE001 - no ONNX file, of whatever kind
        return None
    graphs = [model.graph, *model.graph.subgraphs()]
    tensors = (value.const_value for graph in graphs for value in graph.initializers.values())
    external = {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return beside if beside.name in external else None


@contextlib.contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Turns errors of the disk into typed ones."""
    try:
        yield
    except ErdeError:
        raise
    except OSError as error:
        raise CheckpointWriteError(
            f"cannot write {target.name} ({error.strerror or error}): check space and permissions of its folder; what"
            " was there is unchanged"
        ) from error


def sync(path: Path) -> None:
    """Waits until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _prefix(target: Path) -> str:
    return f".{target.name}-exporting-"


def _make_folder(folder: Path) -> list[Path]:
    """Makes a folder and those above it; returns what was made, the deepest first."""
    missing: list[Path] = []
    for parent in (folder, *folder.parents):
        if parent.is_dir():
            break
        if parent.exists():
            raise CheckpointWriteError(f"cannot write into {str(folder)!r}: {str(parent)!r} is a file and no folder")
        missing.append(parent)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _hold(folder: Path) -> int | None:
    """Locks a folder as long as this process lives; returns what has to be closed, None where it cannot be locked."""
    if fcntl is None:
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another process, or a disk that knows no locks
        if handle is not None:
            os.close(handle)
        return None
    return handle


def _remove_abandoned(target: Path) -> None:
    prefix = _prefix(target)
    for folder in target.parent.iterdir():
        if not folder.name.startswith(prefix) or folder.is_symlink() or not folder.is_dir():
            continue
        lock = _hold(folder)
        if lock is None:
            continue
        try:
            if time.time() - folder.stat().st_mtime > ABANDONED and not _holds_old_files(folder):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # another process was faster
            continue
        finally:
            os.close(lock)


def _holds_old_files(folder: Path) -> bool:
    """Whether it holds the only copy of what somebody had: its process was stopped while it put them back."""
    aside = folder / _ASIDE
    return aside.is_dir() and any(aside.iterdir())
