"""A runtime for users without torch: NumPy, onnxruntime, and Pillow where images must be resized."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from erde_hub._arguments import plain_threshold, threshold_rows
from erde_hub.errors import CheckpointError, ConfigError, InputTypeError, ShapeError, ThresholdError, unknown_name

from ._inputs import as_array, file_path
from ._requirements import require
from .metadata import FileInfo

#: Channels of the images that Pillow can resize.
_RESIZABLE = (1, 3)


@dataclass(frozen=True)
class SessionOutput:
    """What :class:`EarlyExitSession` answers.

    Attributes:
        logits: (N, K) float32, of the exit that each sample took; NaN for samples with NaN or infinity in the input.
        exit_index: (N,) int64, 0 = first exit, number of early exits = the backbone's own classifier.
    """

    logits: NDArray[np.float32]
    exit_index: NDArray[np.int64]


class EarlyExitSession:
    """Runs a file that :func:`~erde_hub.export.export_onnx` wrote.

    Layers behind the exit that the last sample of a batch took are not run. A sample with NaN or infinity in its input
    never leaves early and gets NaN logits; nor does one leave at an exit whose logits overflowed to NaN or infinity, so
    only the classifier, behind which nothing is left to ask, can answer with such.

    Args:
        path: The ONNX file; one above 2 GB needs its ``.data`` file beside it.
        threads: Threads of onnxruntime; None leaves it to onnxruntime (one per core).
        providers: Execution providers of onnxruntime, in order of preference: names, or pairs of name and options.

    Attributes:
        info: What the file says of itself: exits, costs, class names, preprocessing.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        InputTypeError: The path is none.
        CheckpointError: No such file, a damaged one, or not one of erde_hub's.
        ConfigError: A number of threads below 1, or a provider that this onnxruntime does not have.

    Example:
        >>> session = EarlyExitSession("model.onnx")  # doctest: +SKIP
        >>> out = session(images, threshold=0.3)  # doctest: +SKIP
        >>> [session.info.id2label[i] for i in out.logits.argmax(1)]  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        providers: Sequence[str | tuple[str, dict[str, Any]]] = ("CPUExecutionProvider",),
    ) -> None:
        runtime: Any = require("onnxruntime", "EarlyExitSession", "onnxruntime")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ConfigError(f"threads must be an integer of at least 1, or None for one per core, got {threads!r}")
        file = file_path(path)
        try:
            found = file.is_file()
        except OSError:  # a name that is too long
            found = False
        if not found:
            raise CheckpointError(f"no file {str(path)!r}: erde_hub.export.export_onnx(model, path) writes one")
        _check_providers(providers, runtime.get_available_providers())
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        if _products_overflow():
            options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            self._session = runtime.InferenceSession(str(file), options, providers=list(providers))
        except Exception as error:  # onnxruntime's own classes have no common base
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"onnxruntime cannot load {str(path)!r}: {reason}") from error
        self.info = FileInfo.from_metadata(self._session.get_modelmeta().custom_metadata_map, file.name)
        self._check_fits_its_graph(file.name)
        self._made_from = (file.resolve(), threads, tuple(providers))

    def __reduce__(self) -> Any:
        """A pickle names the file, which is opened again."""
        path, threads, providers = self._made_from
        return functools.partial(type(self), threads=threads, providers=providers), (path,)

    def _check_fits_its_graph(self, name: str) -> None:
        """Raises :class:`CheckpointError` where the metadata speak of other inputs or classes than the graph has."""
        inputs = {entry.name: entry.shape for entry in self._session.get_inputs()}
        outputs = {entry.name: entry.shape for entry in self._session.get_outputs()}
        found = [inputs.get("pixel_values", [])[1:], *(outputs.get("logits", [])[1:])]
        stored = [self.info.input_size, len(self.info.id2label)]
        if found != stored or "threshold" not in inputs or "exit_index" not in outputs:
            raise CheckpointError(
                f"the metadata of {name} are damaged (input_size={stored[0]} and {stored[1]} classes, the graph has"
                f" {found}): export the model again"
            )

    def __call__(
        self,
        images: ArrayLike | Sequence[ArrayLike],
        threshold: float | Sequence[float] | NDArray[np.floating] | None = None,
    ) -> SessionOutput:
        """Answers for a batch.

        Args:
            images: Normalised floats (N, C, H, W), or uint8 pixels (N, H, W, C), or a list of uint8 images (H, W, C) of
                any size. Pixels are resized, cropped and normalised as the model expects. Arrays, or tensors of any
                kind.
            threshold: One number for all early exits, or one per early exit; None takes the one stored in the file. As
                an array also one number per sample, (N, 1) or (N,), or one per sample and early exit; samples of one
                threshold run together.

        Raises:
            ShapeError: Wrong number of axes, channels or pixels.
            InputTypeError: Neither floats nor uint8.
            ThresholdError: NaN, out of the policy's range, or of the wrong length.
            ConfigError: uint8 images for a file without preprocessing.
            MissingDependencyError: Images must be resized and Pillow is not installed.
        """
        pixel_values = self.preprocess(images)
        count = len(pixel_values)
        rows = threshold_rows(threshold, count, self.info.num_early_exits)
        if rows is None:
            shared = self._thresholds(threshold)
            if count > 0:
                return self._run(pixel_values, shared)
        logits, exit_index = np.zeros((count, len(self.info.id2label)), np.float32), np.zeros(count, np.int64)
        same: dict[tuple[float, ...], list[int]] = {}
        for sample, own in enumerate(rows or ()):
            same.setdefault(tuple(self._thresholds(own)), []).append(sample)
        for thresholds, samples in same.items():
            out = self._run(pixel_values[samples], thresholds)
            logits[samples], exit_index[samples] = out.logits, out.exit_index
        return SessionOutput(logits, exit_index)

    def _run(self, pixel_values: NDArray[np.float32], thresholds: Sequence[float]) -> SessionOutput:
        with np.errstate(over="ignore"):  # what lies above float32 is infinite, as in torch
            feed = {"pixel_values": pixel_values, "threshold": np.asarray(thresholds, dtype=np.float32)}
        return SessionOutput(*self._session.run(["logits", "exit_index"], feed))

    def preprocess(self, images: ArrayLike | Sequence[ArrayLike]) -> NDArray[np.float32]:
        """Returns ``pixel_values`` (N, C, H, W); see :meth:`__call__` for what it takes and raises."""
        batch = _as_batch(images)
        if isinstance(batch, list) or batch.dtype == np.uint8:
            return self._preprocess_pixels(batch)
        if not np.issubdtype(batch.dtype, np.floating):
            raise InputTypeError(
                f"images must be normalised floats (N, C, H, W) or uint8 pixels (N, H, W, C), got {batch.dtype}"
            )
        size = tuple(self.info.input_size)
        if batch.shape[1:] != size:
            raise ShapeError(
                f"floats must have shape (N, {', '.join(map(str, size))}), got {batch.shape}: the file was exported for"
                " this size; images of other sizes can be given as uint8 (N, H, W, C)"
            )
        return np.ascontiguousarray(batch, dtype=np.float32)

    def _preprocess_pixels(self, images: list[NDArray[np.uint8]] | NDArray[np.uint8]) -> NDArray[np.float32]:
        preprocessing = self.info.preprocessing
        if preprocessing is None:
            raise ConfigError(
                "the file holds no preprocessing, so uint8 images cannot be normalised: pass floats (N, C, H, W), or"
                " call model.set_preprocessing(...) before exporting"
            )
        if not isinstance(images, list) and images.ndim != 4:
            raise ShapeError(
                f"uint8 images must be (N, H, W, C), got shape {images.shape}; for one image: images[None]"
            )
        mean, std = (np.asarray(preprocessing[key], np.float32) for key in ("mean", "std"))
        for image in images[:1] if not isinstance(images, list) else images:
            if image.shape[2] != len(mean) or 0 in image.shape:
                raise ShapeError(f"uint8 images must be (H, W, {len(mean)}), channels last, got {image.shape}")
        height, width = preprocessing["size"]
        pixels = np.empty((len(images), height, width, len(mean)), np.uint8)
        for row, image in enumerate(images):
            pixels[row] = _resize_and_crop(image, (height, width), preprocessing)
        values = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2))

    def _thresholds(self, threshold: Any) -> list[float]:
        if threshold is None:
            return self.info.threshold
        plain, early = plain_threshold(threshold), self.info.num_early_exits
        values = plain if isinstance(plain, list) else [plain]
        if isinstance(plain, list) and len(plain) != early:
            raise ThresholdError(f"got {len(plain)} thresholds for {early} early exits: give one number, or {early}")
        low, high = self.info.threshold_range
        for value in values:
            if math.isnan(value) or not low <= value <= high:
                raise ThresholdError(
                    f"threshold {value!r} is not allowed for policy {self.info.policy!r}: give a number in"
                    f" [{low:g}, {high:g}]"
                )
        return values


def _check_providers(providers: Any, available: Sequence[str]) -> None:
    """Refuses wrong names, for which onnxruntime takes the processor, with a banner on stdout."""
    listed = isinstance(providers, (list, tuple)) and len(providers) > 0
    for entry in providers if listed else [providers]:
        name = entry[0] if listed and isinstance(entry, tuple) and len(entry) == 2 else entry
        if not listed or not isinstance(name, str):
            raise ConfigError(
                f"providers must be a list of names such as ['CPUExecutionProvider'], got {providers!r} (available:"
                f" {', '.join(available)})"
            )
        if name not in available:
            raise unknown_name("execution provider", name, available)


@functools.cache
def _products_overflow() -> bool:
    """Whether 8-bit arithmetic saturates: on x86 processors with AVX2 and without VNNI (known on Linux only).

    onnxruntime has an exact way, which takes longer, and does not tell by itself where it is needed.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx2" in flags and "vnni" not in flags


def _as_batch(images: Any) -> Any:
    """Returns one array, or a list of uint8 images (H, W, C)."""
    if not isinstance(images, (list, tuple)) or not images:
        return as_array(images, "images")
    arrays = [as_array(image, f"image {number}") for number, image in enumerate(images)]
    if all(array.dtype == np.uint8 and array.ndim == 3 for array in arrays):
        return arrays
    try:
        return np.stack(arrays)
    except (ValueError, TypeError) as error:
        kinds = ", ".join(sorted({f"{array.dtype} {array.shape}" for array in arrays})[:4])
        raise ShapeError(
            f"a list of images must hold uint8 images (H, W, C), or floats (C, H, W) of one shape, got {kinds}"
        ) from error


def _resize_and_crop(
    image: NDArray[np.uint8], size: tuple[int, int], preprocessing: dict[str, Any]
) -> NDArray[np.uint8]:
    """Shorter side to size / crop_pct, then the centre, as the model's image processor does."""
    height, width = size
    before = image.shape[:2]
    target = tuple(int(side / preprocessing["crop_pct"]) for side in size)
    if height == width and preprocessing.get("crop_mode") != "squash":
        short, edge = min(before), target[0]
        target = tuple(edge if side == short else int(edge * side / short) for side in before)
    if target != before:
        task = f"resizing an image of {before[0]}x{before[1]} pixels to {target[0]}x{target[1]}"
        if image.shape[2] not in _RESIZABLE:
            raise ShapeError(f"{task} is possible with 1 or 3 channels, not with {image.shape[2]}: resize it first")
        instead = (
            f"pillow; or pass normalised floats ({image.shape[2]}, {height}, {width}), or pixels of"
            f" {target[0]}x{target[1]}, whose centre is taken (crop_pct is {preprocessing['crop_pct']:g})"
        )
        pillow: Any = require("PIL.Image", task, instead)
        picture = pillow.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        resampling = pillow.Resampling[preprocessing["interpolation"].upper()]
        image = np.asarray(picture.resize(target[::-1], resampling)).reshape(*target, -1)
    top, left = (target[0] - height) // 2, (target[1] - width) // 2
    return image[top : top + height, left : left + width]
