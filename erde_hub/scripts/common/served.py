"""What ``erde-hub serve`` serves: a checkpoint or an ONNX file, and how bodies of requests become rows of a batch."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from erde_hub._image_files import decode
from erde_hub.data.texts import load_tokenizer
from erde_hub.errors import DataError, NotSupportedError
from erde_hub.export import EarlyExitSession
from erde_hub.stored_sets import StoredSets
from erde_hub.tasks import REGRESSION

from .networks import load_model

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
#: A small file may hold a large picture.
MAX_PIXELS = 50_000_000
#: Characters of a text.
MAX_TEXT = 1_000_000


@dataclass(frozen=True)
class Served:
    """A classifier with exits, as the server sees it.

    Attributes:
        name: What /health calls it.
        kind: ``image`` or ``text``.
        class_names: K names.
        exit_names: E names, the last is the network's own classifier.
        macs: Of a sample that takes each exit, E integers.
        threshold: The stored one.
        prepare: Turns a request's content type and body into a row of a batch; raises an error of ours for a bad one.
        check_threshold: Returns one number per early exit, raises :class:`~erde_hub.errors.ThresholdError`.
        answer: Takes N rows and thresholds (N, E - 1); returns logits (N, K) and exit indices (N,).
        sets: Prediction sets of the answers, None where the model has none.
        input_size: Shape of one image, (C, H, W).
        model: What answers, EarlyExitWrapper or EarlyExitSession; for a controller of its budget.
    """

    name: str
    kind: str
    class_names: Sequence[str]
    exit_names: Sequence[str]
    macs: Sequence[int]
    threshold: Sequence[float]
    prepare: Callable[[str, bytes], Any]
    check_threshold: Callable[[float | list[float]], list[float]]
    answer: Callable[[list[Any], NDArray[np.float64]], tuple[NDArray[Any], NDArray[np.int64]]]
    sets: StoredSets | None = None
    input_size: Sequence[int] = ()
    model: Any = None


def open_served(model: str, cpu_threads: int = 0, device: str = "cpu") -> Served:
    """Opens what is served, an ONNX file by its ending.

    Raises:
        CheckpointError: There is none, or it is damaged.
        NotSupportedError: It does not classify images or texts.
    """
    if model.endswith(".onnx"):
        return _open_file(model, cpu_threads)
    return _open_checkpoint(model, cpu_threads, device)


def _open_checkpoint(source: str, cpu_threads: int, device: str) -> Served:
    if cpu_threads:
        torch.set_num_threads(cpu_threads)
    model = load_model(source).eval().to(device)
    config, early = model.config, model.num_exits - 1
    if config.problem_type == REGRESSION or config.task != "classification":
        raise NotSupportedError(f"{source!r} is no classifier of images or texts, which serve is for")
    if model.main_input_name == "input_ids":
        kind = "text"
        prepare: Callable[[str, bytes], Any] = _read_text
        tokenizer = load_tokenizer(source)
        longest = tokenizer.model_max_length if tokenizer.model_max_length < 1e6 else config.input_size[0]

        def inputs(rows: list[Any]) -> Any:
            return tokenizer(rows, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)

    else:
        kind = "image"
        processor = model.image_processor() if config.preprocessing else None

        def pixels(image: NDArray[np.uint8]) -> NDArray[np.float32]:
            if processor is None:
                raise DataError("this checkpoint has no preprocessing: send JSON with pixel_values")
            prepared = processor([image], return_tensors="np", input_data_format="channels_last")
            return np.asarray(prepared["pixel_values"][0], np.float32)

        prepare = _image_reader(tuple(config.input_size), pixels)

        def inputs(rows: list[Any]) -> Any:
            return {"pixel_values": torch.from_numpy(np.stack(rows)).to(device, model.dtype)}

    @torch.inference_mode()
    def answer(rows: list[Any], thresholds: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        out = model(**inputs(rows), threshold=thresholds)
        return out.logits.float().cpu().numpy(), out.exit_index.cpu().numpy()

    def check(threshold: Any) -> list[float]:
        return model.policy.check_threshold(threshold, early)

    return Served(
        name=Path(source).name,
        kind=kind,
        class_names=[config.id2label[i] for i in range(len(config.id2label))],
        exit_names=model.exit_names,
        macs=[int(macs) for macs in model.exit_table().cumulative_macs],
        threshold=check(model.threshold),
        prepare=prepare,
        check_threshold=check,
        answer=answer,
        sets=model.prediction_sets,
        input_size=config.input_size,
        model=model,
    )


def _open_file(path: str, cpu_threads: int) -> Served:
    session = EarlyExitSession(path, threads=cpu_threads or None)
    info = session.info

    def pixels(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        return session.preprocess([image])[0]

    def answer(rows: list[Any], thresholds: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        out = session(rows if info.reads_texts else np.stack(rows), thresholds)
        return out.logits, out.exit_index

    return Served(
        name=Path(path).name,
        kind="text" if info.reads_texts else "image",
        class_names=[info.id2label[i] for i in range(len(info.id2label))],
        exit_names=info.exit_names,
        macs=info.cumulative_macs,
        threshold=info.threshold,
        prepare=_read_text if info.reads_texts else _image_reader(tuple(info.input_size), pixels),
        check_threshold=info.check_threshold,
        answer=answer,
        sets=info.prediction_sets,
        input_size=info.input_size,
        model=session,
    )


def measure_exits(served: Served, calls: int = 20) -> list[float]:
    """Returns the milliseconds of one sample that takes each exit, (E,): a black image, or a text of 32 words.

    For the policies that a :class:`~erde_hub.BudgetController` knows; what another one takes longer is not in it.
    """
    row: Any = " ".join(["word"] * 32)
    if served.kind == "image":
        row = np.zeros([*served.input_size], np.float32)
    early = len(served.exit_names) - 1

    def run(plan: list[float]) -> int:
        return int(served.answer([row], np.array([plan], np.float64))[1][0])

    exit_now, go_on = (0.0, math.inf) if run([0.0] * early) == 0 else (math.inf, 0.0)
    medians = []
    for e in range(early + 1):
        times = []
        for _ in range(calls):
            began = time.perf_counter()
            run([go_on] * e + [exit_now] * (early - e))
            times.append(1e3 * (time.perf_counter() - began))
        medians.append(float(np.median(times)))
    return [max(medians[: e + 1]) for e in range(early + 1)]  # a deeper exit is not quicker but by noise


def _read_json(body: bytes, key: str) -> Any:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the body is no JSON: {error}") from error
    if not isinstance(values, dict) or [*values] != [key]:
        raise DataError(f'the body must be a JSON object with the one key "{key}"')
    return values[key]


def _read_text(content_type: str, body: bytes) -> str:
    if content_type != "application/json":
        raise DataError('send JSON, {"text": "..."}, with Content-Type: application/json')
    text = _read_json(body, "text")
    if not isinstance(text, str) or not 0 < len(text) <= MAX_TEXT:
        raise DataError(f"text must be text of 1 to {MAX_TEXT:,} characters")
    return text.encode(errors="replace").decode()  # half a surrogate pair is no text that a tokenizer reads


def _image_reader(
    size: tuple[int, ...], pixels: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
) -> Callable[[str, bytes], NDArray[np.float32]]:
    """Returns what turns a body into ``pixel_values`` (C, H, W)."""

    def read(content_type: str, body: bytes) -> NDArray[np.float32]:
        if content_type != "application/json":
            return pixels(_read_image(body, size[0]))
        given = _read_json(body, "pixel_values")
        try:
            with np.errstate(over="ignore"):
                values = np.asarray(given, np.float32)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise DataError("pixel_values must be numbers, as lists of lists of lists of one length") from error
        if values.shape != size or not np.isfinite(values).all():
            raise DataError(f"pixel_values must be finite and of shape {size}, got {values.shape}")
        return values

    return read


def _read_image(body: bytes, channels: int) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(body), formats=FORMATS) as header:
            width, height = header.size
    except Exception as error:  # Pillow's formats raise anything for files that are not theirs
        raise DataError(f"the body is no image that can be read ({', '.join(FORMATS)})") from error
    if width * height > MAX_PIXELS:
        raise DataError(f"the image has {width} x {height} pixels, more than {MAX_PIXELS:,}")
    image = decode(body, "the request")
    return np.array(image) if channels != 1 else np.array(image.convert("L"))[..., None]
