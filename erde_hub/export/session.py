"""A session for users without torch: NumPy, onnxruntime or OpenVINO, Pillow to resize images, tokenizers for texts."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from erde_hub._arguments import threshold_rows
from erde_hub.errors import CheckpointError, ConfigError, InputTypeError, ShapeError

from ._inputs import as_array, file_path, is_picture, read_picture
from ._requirements import require
from ._texts import read_tokenizer, text_arrays, tokenize
from .metadata import FileInfo
from .runtimes import CPU_PROVIDER, find_runtime

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = str | os.PathLike[str] | Image

#: Channels of the images that Pillow can resize.
_RESIZABLE = (1, 3)


@dataclass(frozen=True)
class SessionOutput:
    """What :class:`EarlyExitSession` answers.

    Attributes:
        logits: (N, K) float32, of the exit that each sample took; NaN for samples with NaN or infinity in the input.
        exit_index: (N,) int64, 0 = first exit, number of early exits = the backbone's own classifier.
        sets: (N, K) bool, the classes in the prediction set of each answer; with ``output_sets`` only.
    """

    logits: NDArray[np.float32]
    exit_index: NDArray[np.int64]
    sets: NDArray[np.bool_] | None = None


class EarlyExitSession:
    """Runs a file that :func:`~erde_hub.export.export_onnx` or :func:`~erde_hub.export.export_executorch` wrote.

    Layers behind the exit that the last sample of a batch took are not run. A sample with NaN or infinity in its input
    never leaves early and gets NaN logits; nor does one leave at an exit whose logits overflowed to NaN or infinity, so
    only the classifier, behind which nothing is left to ask, can answer with such.

    A file for one sample runs the samples of a batch one after the other, as OpenVINO does with any int8 file.

    Args:
        path: The ONNX file; one above 2 GB needs its ``.data`` file beside it. Or the ExecuTorch program, ``.pte``.
        runtime: ``onnxruntime``, or ``openvino``, which runs on the processor; None takes the first that is installed.
            ``executorch`` for a program, which is also known by its name.
        threads: Threads of the runtime; None leaves it to the runtime (one per core).
        providers: Execution providers of onnxruntime, in order of preference: names, or pairs of name and options.

    Attributes:
        info: What the file says of itself: exits, costs, class names, preprocessing.

    Raises:
        MissingDependencyError: The runtime is not installed.
        UnknownNameError: No such runtime.
        InputTypeError: The path is none.
        CheckpointError: No such file, a damaged one, or not one of erde_hub's.
        ConfigError: A number of threads below 1, or a provider that this onnxruntime does not have, or for OpenVINO.

    Example:
        >>> session = EarlyExitSession("model.onnx")  # doctest: +SKIP
        >>> out = session(["a.jpg", "b.jpg"], threshold=0.3)  # doctest: +SKIP
        >>> [session.info.id2label[i] for i in out.logits.argmax(1)]  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        runtime: str | None = None,
        threads: int | None = None,
        providers: Sequence[str | tuple[str, dict[str, Any]]] = CPU_PROVIDER,
    ) -> None:
        file = file_path(path)
        open_file = find_runtime(runtime, file)
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ConfigError(f"threads must be an integer of at least 1, or None for one per core, got {threads!r}")
        try:
            found = file.is_file()
        except OSError:  # a name that is too long
            found = False
        if not found:
            raise CheckpointError(f"no file {str(path)!r}: erde_hub.export.export_onnx(model, path) writes one")
        self._session = open_file(file, threads, providers)
        self.info = FileInfo.from_metadata(self._session.metadata, file.name)
        self._check_fits_its_graph(file.name)
        self._tokenizer: Any = None
        self._made_from = (file.resolve(), runtime, threads, tuple(providers))

    def __repr__(self) -> str:
        exits, thresholds = ("/".join(map(str, given)) for given in (self.info.exit_names, self.info.threshold))
        runtime = type(self._session).__name__
        return f"EarlyExitSession({str(self._made_from[0])!r}: exits {exits}, {runtime}, threshold {thresholds})"

    def __reduce__(self) -> Any:
        """A pickle names the file, which is opened again."""
        path, runtime, threads, providers = self._made_from
        return functools.partial(type(self), runtime=runtime, threads=threads, providers=providers), (path,)

    def _check_fits_its_graph(self, name: str) -> None:
        """Raises :class:`CheckpointError` where the metadata speak of other inputs or classes than the graph has."""
        info, inputs, outputs = self.info, self._session.inputs, self._session.outputs
        found = [*(inputs.get(name, [])[1:] for name in info.input_names), *outputs.get("logits", [])[1:]]
        stored: list[Any] = [info.input_size, len(info.id2label)]
        if info.reads_texts:
            length = info.input_size[0] if info.batch_size else None
            stored = [*([length] for _ in info.input_names), len(info.id2label)]
        if found != stored or "threshold" not in inputs or "exit_index" not in outputs:
            raise CheckpointError(
                f"the metadata of {name} are damaged (input_size={info.input_size} and {stored[-1]} classes, the graph"
                f" has {found}): export the model again"
            )

    def __call__(
        self,
        inputs: ArrayLike | Picture | Sequence[ArrayLike | Picture] | Mapping[str, ArrayLike],
        threshold: float | Sequence[float] | NDArray[np.floating] | None = None,
        output_sets: bool = False,
    ) -> SessionOutput:
        """Answers for a batch.

        Args:
            inputs: Of images the path of a file, an image of Pillow, or a list of these; uint8 pixels (N, H, W, C), or
                a list of uint8 images (H, W, C) of any size; or normalised floats (N, C, H, W). All but floats are
                resized, cropped and normalised as the model expects. Of texts a list of strings, or of pairs of
                strings, where the file has a tokenizer, which cuts those that are too long; or a dict of ``input_ids``
                (N, L), ``attention_mask`` and ``token_type_ids``. Arrays, or tensors of any kind.
            threshold: One number for all early exits, or one per early exit; None takes the one stored in the file. As
                an array also one number per sample, (N, 1) or (N,), or one per sample and early exit; samples of one
                threshold run together.
            output_sets: Also the prediction set of each answer.

        Raises:
            ShapeError: Wrong number of axes, channels, pixels or tokens.
            InputTypeError: Neither floats nor uint8; not texts, or tokens that the model does not know.
            DataError: No such file, or no image that can be read.
            ThresholdError: NaN, out of the policy's range, or of the wrong length.
            ConfigError: uint8 images for a file without preprocessing, texts for one without tokenizer.
            MissingDependencyError: Images must be read or resized and Pillow is not installed, or tokenizers for texts.
        """
        stored = self.info.prediction_sets
        if output_sets and stored is None:
            raise ConfigError("the file holds no prediction sets: call model.set_prediction_sets(...) before exporting")
        out = self._answer(inputs, threshold)
        if stored is None or not output_sets:
            return out
        return dataclasses.replace(out, sets=stored.sets(out.logits, out.exit_index))

    def _answer(self, inputs: Any, threshold: Any) -> SessionOutput:
        arrays = self.tokenize(inputs) if self.info.reads_texts else {"pixel_values": self.preprocess(inputs)}
        count = len(arrays[self.info.input_names[0]])
        rows = threshold_rows(threshold, count, self.info.num_early_exits)
        if rows is None:
            shared = self.info.threshold if threshold is None else self.info.check_threshold(threshold)
            if count > 0:
                return self._run(arrays, count, shared)
        logits, exit_index = np.zeros((count, len(self.info.id2label)), np.float32), np.zeros(count, np.int64)
        same: dict[tuple[float, ...], list[int]] = {}
        for sample, own in enumerate(rows or ()):
            same.setdefault(tuple(self.info.check_threshold(own)), []).append(sample)
        for thresholds, samples in same.items():
            out = self._run({name: array[samples] for name, array in arrays.items()}, len(samples), thresholds)
            logits[samples], exit_index[samples] = out.logits, out.exit_index
        return SessionOutput(logits, exit_index)

    def _run(self, arrays: Mapping[str, NDArray[Any]], count: int, thresholds: Sequence[float]) -> SessionOutput:
        with np.errstate(over="ignore"):  # what lies above float32 is infinite, as in torch
            own = np.broadcast_to(np.asarray(thresholds, np.float32), (self.info.num_early_exits,))
        apart = self.info.quantization is not None and not self._session.batches_int8
        step = 1 if apart else self.info.batch_size or count
        parts = [
            self._session.run({**{name: array[i : i + step] for name, array in arrays.items()}, "threshold": own})
            for i in range(0, count, step)
        ]
        if len(parts) == 1:
            return SessionOutput(*parts[0])
        return SessionOutput(*(np.concatenate(rows) for rows in zip(*parts, strict=True)))

    def tokenize(self, texts: Any) -> dict[str, NDArray[np.int64]]:
        """Returns the inputs of a text model by name, (N, L); see :meth:`__call__` for what it takes and raises."""
        if isinstance(texts, Mapping) or hasattr(texts, "keys"):
            return text_arrays(texts, self.info)
        if not isinstance(texts, (list, tuple)):
            raise InputTypeError(
                f"texts must be a list of strings, or a dict of input_ids and the rest, got {type(texts).__name__}"
            )
        if not texts:
            return text_arrays({"input_ids": np.zeros((0, self.info.input_size[0]), np.int64)}, self.info)
        if self._tokenizer is None:
            self._tokenizer = read_tokenizer(self.info, self._made_from[0].name)
        return text_arrays(tokenize(texts, self._tokenizer, self.info), self.info)

    def preprocess(self, images: Any) -> NDArray[np.float32]:
        """Returns ``pixel_values`` (N, C, H, W); see :meth:`__call__` for what it takes and raises."""
        batch = _as_batch(images, self.info.input_size[0])
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


def _as_batch(images: Any, channels: int) -> Any:
    """Returns one array, or a list of uint8 images (H, W, C)."""
    if is_picture(images):
        images = [images]
    if not isinstance(images, (list, tuple)) or not images:
        return as_array(images, "images")
    arrays = [
        read_picture(image, channels, number) if is_picture(image) else as_array(image, f"image {number}")
        for number, image in enumerate(images)
    ]
    if all(array.dtype == np.uint8 and array.ndim == 3 for array in arrays):
        return arrays
    try:
        return np.stack(arrays)
    except (ValueError, TypeError) as error:
        kinds = ", ".join(sorted({f"{array.dtype} {array.shape}" for array in arrays})[:4])
        raise ShapeError(
            "a list of images must hold files, images of Pillow or uint8 images (H, W, C), or floats (C, H, W) of one"
            f" shape, got {kinds}"
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
