"""Writing report files whole or not at all."""

from __future__ import annotations

import contextlib
import os
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
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes private files; reports are to be readable like any other file of the user.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise CheckpointWriteError(
            f"could not write {target.name}: {error}; an earlier {target.name} is untouched. Check that the folder"
            " exists, is writable and has space left"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text with newlines as given; see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())
