"""Writing files whole or not at all, with the access rights that the user's other files have."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from erde_hub.errors import CheckpointWriteError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` and renames it onto ``path`` once the block has ended well.

    Raises:
        CheckpointWriteError: The folder is not there or not writable, or the disk is full; an earlier file survives.
    """
    target = Path(path)
    temporary = None
    try:
        temporary, mode = _new_file(target.parent, target.name)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(mode)  # what filled it may have put a private file in its place, see set_default_mode
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise CheckpointWriteError(
            f"could not write {target.name}: {error}; an earlier {target.name} is untouched. Check that the folder"
            " exists, is writable and has space left"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_all(folder: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """Gives an empty folder on the same disk and, once the block has ended well, moves its files into ``folder``.

    So a disk that fills up, or an exception, leaves every earlier file as it was.

    Args:
        folder: Is made if it is not there; other files in it stay.
        last: Name of the file that is moved last, when all that it speaks of is in place.

    Raises:
        CheckpointWriteError: ``folder`` is a file or cannot be written, or the disk is full.
    """
    target = Path(folder)
    made = not target.exists()
    staging = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
        yield staging
        files = sorted(staging.iterdir(), key=lambda path: (path.name == last, path.name))
        for path in files:
            set_default_mode(path)
            with path.open("rb") as written:
                os.fsync(written.fileno())
        for path in files:
            path.replace(target / path.name)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        kept = "" if made else "; what was there before is untouched"
        raise CheckpointWriteError(
            f"could not save to {str(target)!r}: {error}{kept}. Make space, or choose another folder"
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):  # only if it is empty: nothing was saved
                target.rmdir()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text with newlines as given; see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


def set_default_mode(path: str | os.PathLike[str]) -> None:
    """Gives a file the mode that any new file in its folder gets, so that other users read what the umask lets them.

    safetensors and ``tempfile`` make files that only their owner can read. The mode is read off a new empty file beside
    it: asking for the umask means setting it, which the files of another thread would see.

    Raises:
        OSError: The folder cannot be written, or the file is not there.
    """
    path = Path(path)
    probe, mode = _new_file(path.parent, path.name)
    probe.unlink()
    path.chmod(mode)


def _new_file(folder: Path, name: str) -> tuple[Path, int]:
    """Makes an empty file of a name that is free and returns it with its mode."""
    while True:
        path = folder / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            continue
        try:
            return path, stat.S_IMODE(os.fstat(handle).st_mode)
        finally:
            os.close(handle)
