"""From stored bytes to pixels: decoding, the content hash of a data set, the cache of decoded images."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from erde_hub._files import replacing
from erde_hub._image_files import decode, header_size
from erde_hub._progress import passing_bar
from erde_hub.errors import CheckpointWriteError, DataError

from .preprocessing import SMALL_IMAGE_PIXELS, Preprocessing, complete

_logger = logging.getLogger(__name__)

# Decoding fewer rows than this takes less than half a second, which is not worth a file.
_CACHE_MIN_ROWS = 5_000
# A decoded set that would take more than this stays encoded.
_DECODED_BYTES_LIMIT = 4 << 30
# Of a split of which nearly all rows are needed all are decoded, so that they can be kept on disk.
_NEARLY_ALL = 0.9
_FULL_HASH_BYTES = 1 << 30
_SAMPLED_ROWS = 256
#: Rows at the beginning of train by which a stream is known.
HASHED_ROWS = 64


class RowName:
    """A row's name, looked up when a message needs it and not for every image."""

    def __init__(self, images: EncodedImages, row: int) -> None:
        self.images, self.row = images, row

    def __str__(self) -> str:
        return self.images.name(self.row)


class EncodedImages:
    """The image column of one source split, as stored: encoded bytes in Arrow, or paths to files.

    Args:
        table: A ``datasets.Dataset``; it is what workers inherit or pickle.
        column: Its image column, of feature type Image.
        dataset: Name of the data set, for messages.
        split: Name of the source split, for messages.
        roots: Folders in which files named by the column may lie; see :func:`stored_bytes`.
    """

    def __init__(self, table: Any, column: str, dataset: str, split: str, roots: Sequence[str] | None = None) -> None:
        self._table, self._column, self._dataset, self._split, self._roots = table, column, dataset, split, roots

    def __len__(self) -> int:
        return len(self._table)

    def read(self, row: int) -> bytes:
        """Returns the encoded bytes of a row."""
        return stored_bytes(self._storage()[int(row)].as_py(), self.where(row), self._roots)

    def image(self, row: int) -> Image.Image:
        """Decodes a row to RGB; an unreadable one raises :class:`erde_hub.errors.DataError` that names it."""
        return decode(self.read(row), self.where(row))

    def iterate(self, rows: Sequence[int] | NDArray[np.int64] | None = None) -> Iterator[tuple[int, bytes]]:
        """Yields row number and encoded bytes of all rows, or of the given ones."""
        if rows is not None:
            for row in rows:
                yield int(row), self.read(row)
            return
        row = 0
        for chunk in self._storage().iterchunks():
            for cell in chunk.to_pylist():
                yield row, stored_bytes(cell, self.where(row), self._roots)
                row += 1

    def where(self, row: int) -> RowName:
        """Names a row for a message."""
        return RowName(self, int(row))

    def name(self, row: int) -> str:
        """Returns the row's number, split and data set, and the file's name where the data came as files."""
        path = (self._storage()[row].as_py() or {}).get("path")
        file = f" ({'/'.join(Path(path).parts[-2:])})" if path else ""
        return f"row {row} of split {self._split!r} of {self._dataset!r}{file}"

    def _storage(self) -> Any:
        return self._table.data.column(self._column)


def stored_bytes(cell: Mapping[str, Any] | None, where: object, roots: Sequence[str] | None) -> bytes:
    """Returns the encoded bytes of a cell of an undecoded image column, from the cell or from the file it names.

    Args:
        cell: ``bytes`` or ``path``.
        where: Names the row in messages.
        roots: Folders and addresses below which the path must lie, relative paths below the first one; None for paths
            that were listed here.

    Raises:
        DataError: No image, a file outside ``roots``, or one that cannot be read.
    """
    content, path = (cell or {}).get("bytes"), (cell or {}).get("path")
    if content:
        return content
    if not path:
        raise DataError(f"{where} holds no image: remove the row")
    try:
        if roots is None:
            return Path(path).read_bytes()
        if "://" in path:
            return _read_remote(path, where, roots)
        place = Path(roots[0], path).resolve()
        if not any(place.is_relative_to(Path(root).resolve()) for root in roots if "://" not in root):
            raise _outside(path, where)
        if not place.is_file():
            raise FileNotFoundError("there is no such file")
        return place.read_bytes()
    except DataError:
        raise
    except (OSError, ValueError) as error:  # a zero byte is in no path
        raise DataError(f"the image file {Path(path).name!r} of {where} cannot be read: {error}") from error


def _read_remote(path: str, where: object, roots: Sequence[str]) -> bytes:
    """Reads a file of a repository of the Hub, perhaps out of an archive (``zip://name::hf://...``)."""
    *archives, address = path.split("::")
    if not any("://" in root and address.startswith(root) for root in roots) or not all(
        archive.startswith(("zip://", "tar://")) for archive in archives
    ):
        raise _outside(path, where)
    with fsspec.open(path, "rb") as file:
        return file.read()


def _outside(path: str, where: object) -> DataError:
    return DataError(
        f"{where} names {path!r}, which is not in the data set's folder: store the image itself, or put the file there"
    )


def common_size(images: Mapping[str, EncodedImages]) -> tuple[int, int] | None:
    """Returns (H, W) if a few rows of every split have one and the same size, else None; opens headers only."""
    sizes = set()
    for encoded in images.values():
        for row in evenly_spaced(len(encoded), 32):
            sizes.add(header_size(encoded.read(row), encoded.where(row)))
    return sizes.pop() if len(sizes) == 1 else None


def evenly_spaced(size: int, count: int) -> NDArray[np.int64]:
    """Returns up to ``count`` evenly spaced row numbers, the first and the last among them."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).astype(np.int64))


@dataclass(frozen=True)
class DecodedImages:
    """Decoded rows of one source split.

    Args:
        pixels: uint8 (N, H, W, 3).
        rows: Row numbers in the source split, rising, (N,).
    """

    pixels: NDArray[np.uint8]
    rows: NDArray[np.int64]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def positions(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns where these rows of the source split are in ``pixels``."""
        return np.searchsorted(self.rows, rows)


def decode_splits(
    stored: Mapping[str, EncodedImages | NDArray[np.uint8]],
    needed: Mapping[str, NDArray[np.int64]],
    fingerprint: str,
    overrides: Mapping[str, Any],
    cache_folder: Path | None,
    progress: bool,
) -> dict[str, DecodedImages] | None:
    """Decodes the rows that are needed, if images and input are small enough to keep; otherwise returns None.

    Whole source splits are kept on disk; parts of one are taken from there, or decoded again each time.

    Raises:
        DataError: An image cannot be read; the message names its row.
    """
    arrays = {split: images for split, images in stored.items() if not isinstance(images, EncodedImages)}
    if arrays:
        return {split: DecodedImages(pixels, np.arange(len(pixels))) for split, pixels in arrays.items()}
    encoded = {split: images for split, images in stored.items() if isinstance(images, EncodedImages)}
    size = common_size(encoded)
    if size is None or size[0] * size[1] > SMALL_IMAGE_PIXELS:
        return None
    target = complete({**overrides, "mean": (0.0,) * 3, "std": (1.0,) * 3}, input_size=(3, *size))
    pixels = target.input_size[1] * target.input_size[2]
    if pixels > SMALL_IMAGE_PIXELS or sum(map(len, needed.values())) * pixels * 3 > _DECODED_BYTES_LIMIT:
        return None
    cache = None if cache_folder is None else DecodedCache(cache_folder, fingerprint, target)
    stores = {}
    for split, rows in needed.items():
        store = _decode_split(encoded[split], split, rows, size, target, cache, progress)
        if store is None:
            _logger.info("images of split %r differ in size, so they are decoded when they are needed", split)
            return None
        stores[split] = store
    return stores


def _decode_split(
    encoded: EncodedImages,
    split: str,
    rows: NDArray[np.int64],
    size: tuple[int, int],
    target: Preprocessing,
    cache: DecodedCache | None,
    progress: bool,
) -> DecodedImages | None:
    whole = len(rows) >= _NEARLY_ALL * len(encoded)
    rows = np.arange(len(encoded)) if whole else rows
    kept = cache.load(split, len(encoded)) if cache else None
    if kept is not None:
        return DecodedImages(kept if whole else kept[rows], rows)
    pixels = np.empty((len(rows), *target.input_size[1:], 3), np.uint8)
    as_stored = size == target.input_size[1:] and target.crop_pct == 1.0
    bar = passing_bar(encoded.iterate(None if whole else rows), "decoding images", len(rows), shown=progress)
    with bar:
        for position, (row, content) in enumerate(bar):
            image = decode(content, encoded.where(row))
            if (image.height, image.width) != size:
                return None
            pixels[position] = np.asarray(image) if as_stored else target.pixels([image])[0]
    if cache and whole:
        cache.save(split, pixels)
    return DecodedImages(pixels, rows)


class DecodedCache:
    """Decoded source splits on disk, one safetensors file each, written beside and renamed, checked when read.

    A file that cannot be written or read costs time, never the run: it is logged and the images are decoded again.

    Args:
        folder: Where the files are; created when first written to.
        fingerprint: Content hash of the data set.
        preprocessing: Decides the pixels, so its resizing part is in the file's name.
            v2: transparent colours are white.
    """

    def __init__(self, folder: Path, fingerprint: str, preprocessing: Preprocessing) -> None:
        _, height, width = preprocessing.input_size
        self._folder = folder
        self._stem = f"{fingerprint}-v2-{height}x{width}-{preprocessing.interpolation}-{preprocessing.crop_pct:g}"
        if preprocessing.crop_mode != "center":
            self._stem += f"-{preprocessing.crop_mode}"

    def path(self, split: str) -> Path:
        """Returns the file of a source split."""
        return self._folder / f"{self._stem}-{split}.safetensors"

    def load(self, split: str, rows: int) -> NDArray[np.uint8] | None:
        """Returns the pixels of a source split, or None where there are no valid ones."""
        path = self.path(split)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                checksum, pixels = file.metadata()["checksum"], file.get_tensor("pixels").numpy().copy()
        except Exception as error:  # noqa: BLE001 (whatever is wrong with the file, decoding again is the answer)
            _logger.warning("the decoded images in %s cannot be read (%s); decoding again", path.name, error)
            return None
        if len(pixels) != rows or _checksum(pixels) != checksum:
            _logger.warning("the decoded images in %s are damaged; decoding again", path.name)
            return None
        return pixels

    def save(self, split: str, pixels: NDArray[np.uint8]) -> None:
        """Writes the pixels of a source split; small ones are not worth a file."""
        if len(pixels) < _CACHE_MIN_ROWS:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.path(split)) as partial:
                save_file({"pixels": torch.from_numpy(pixels)}, partial, metadata={"checksum": _checksum(pixels)})
        except Exception as error:  # noqa: BLE001 (whatever it is, the run goes on without a cache)
            _logger.warning("the decoded images could not be kept in %s: %s", self._folder, error)


def _checksum(pixels: NDArray[np.uint8]) -> str:
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).hexdigest()


def content_hash(
    class_names: Sequence[str],
    labels: Mapping[str, NDArray[np.int64]],
    images: Mapping[str, EncodedImages | NDArray[np.uint8]],
    progress: bool = False,
) -> str:
    """Returns 16 hexadecimal digits that identify class names, labels and images, wherever the files lie.

    All image bytes are hashed up to about a gigabyte, beyond that those of 256 evenly spaced rows of every split.
    """
    digest = hashlib.blake2b(repr(list(class_names)).encode(), digest_size=8)
    for split in sorted(images):
        stored = images[split]
        digest.update(f"{split}:{len(stored)}".encode())
        digest.update(np.ascontiguousarray(labels[split], dtype="<i8").data)
        if not isinstance(stored, EncodedImages):
            digest.update(repr(stored.shape).encode())
            digest.update(np.ascontiguousarray(stored).data)
            continue
        sample = evenly_spaced(len(stored), _SAMPLED_ROWS)
        every = _mean_bytes(stored) * len(stored) <= _FULL_HASH_BYTES
        contents, total = stored.iterate(None if every else sample), len(stored) if every else len(sample)
        for _, content in passing_bar(contents, "hashing images", total, shown=progress):
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
    return digest.hexdigest()


def content_keys(
    images: EncodedImages | NDArray[np.uint8], kept: Path | None = None, whole: bool = True, progress: bool = False
) -> NDArray[np.uint64] | None:
    """Returns 64 bits of the content of every row, by which copies are known, (N,).

    Args:
        images: A source split.
        kept: File in which those of a set of more than about a gigabyte are kept, so that it is read once.
        whole: Read such a set; otherwise None is returned for it.
        progress: Show a progress bar.
    """
    if not isinstance(images, EncodedImages):
        return row_hashes(np.ascontiguousarray(images))
    if _mean_bytes(images) * len(images) <= _FULL_HASH_BYTES:
        return row_hashes(content for _, content in images.iterate())
    if not whole:
        return None
    if kept is not None and kept.is_file():
        keys = np.fromfile(kept, "<u8")
        if len(keys) == len(images):
            return keys
    bar = passing_bar(images.iterate(), "looking for copies", len(images), shown=progress)
    keys = row_hashes(content for _, content in bar)
    if kept is not None:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as temporary:
                keys.tofile(temporary)
        except (OSError, CheckpointWriteError) as error:  # costs time on the next run, nothing else
            _logger.warning("what identifies the images could not be kept in %s: %s", kept.parent, error)
    return keys


def row_hashes(contents: Iterable[Any]) -> NDArray[np.uint64]:
    """Returns 64 bits of the bytes of every row, (N,)."""
    digests = (hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    return np.frombuffer(b"".join(digests), "<u8")


def _mean_bytes(images: EncodedImages) -> float:
    return float(np.mean([len(content) for _, content in images.iterate(evenly_spaced(len(images), 32))]))


def content_digest(class_names: Sequence[str], rows: Sequence[tuple[bytes, int]]) -> str:
    """As :func:`content_hash`, of the first rows only, which a stream can read too."""
    digest = hashlib.blake2b(repr(list(class_names)).encode(), digest_size=8)
    for content, label in rows:
        digest.update(f"{label}:{len(content)}".encode())
        digest.update(content)
    return digest.hexdigest()
