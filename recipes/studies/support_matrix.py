"""Tries one network of every family of timm and of the classifiers of transformers, and writes what worked.

    python recipes/studies/support_matrix.py                                    # all, two to three hours on one core
    python recipes/studies/support_matrix.py --only resnet swin_transformer Bert # some; the other rows are kept
    python recipes/studies/support_matrix.py --resume                           # rows that are missing or of other code

Each family runs in a process of its own with a limit, and its row is written at once, with a digest of the code that
was tried; several such commands may share the file. What is tried: exits attached, which leaves the network as it was
(weights, buffers, modes, hooks, outputs) as everything after it does, a training step in which every head gets
gradients, routing against the full forward masked per sample, a stream of small batches against calls of their own, a
checkpoint that comes back bit for bit, a copy that answers alike, and an ONNX file that does. The result is
recipes/results/support_matrix.json, from which `make_tables.py` makes docs/support_matrix.md.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from network_state import changes, mix_states, network_state
from support_models import (
    CLASSES,
    TRANSFORMERS_TEXT,
    TRANSFORMERS_VISION,
    timm_choice,
    timm_families,
    transformers_model,
)
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

import erde_hub
from erde_hub import EarlyExitWrapper, route_batches
from erde_hub.errors import ErdeError, ExportError, MissingDependencyError, unknown_name
from erde_hub.scripts.common.command_line import parse_arguments, run_script
from erde_hub.scripts.common.results_files import write_results

OUTPUT = Path(__file__).parents[1] / "results" / "support_matrix.json"
CHECKS = ("attach", "train", "routing", "stream", "save", "copy", "onnx")
BATCH = 6
#: How a stream cuts these samples into batches.
BATCHES = (2, 3, 1)
#: Thresholds lie at least this far from every score, so that rounding lets nobody take another exit.
CLEARANCE = 1e-4


@dataclass
class MatrixArguments:
    """What is tried, and where the result goes."""

    only: list[str] | None = HfArg(default=None, help="families; default: all of timm and transformers")
    skip: list[str] | None = HfArg(default=None, help=f"checks to leave out, of {', '.join(CHECKS)}")
    resume: bool = HfArg(default=False, help="leave out families of which the file has a whole row of this very code")
    timeout: int = HfArg(default=600, help="seconds that one family may take")
    output: str = HfArg(default=str(OUTPUT), help="the file; rows of families that are not tried are kept")


def main() -> None:
    """Runs the families one after the other and writes the file after each."""
    args, _ = parse_arguments({"matrix": MatrixArguments}, __doc__ or "")
    skip = set(args.skip or [])
    for check in skip - set(CHECKS):
        raise unknown_name("check", check, CHECKS)
    everything = [*timm_families(), *TRANSFORMERS_VISION, *TRANSFORMERS_TEXT]
    for name in args.only or []:
        if name not in everything:
            raise unknown_name("family", name, everything)
    torch.set_num_threads(1)  # threads of this process would not be there in its forks
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path, code = Path(args.output), code_digest()
    for name in args.only or everything:
        before = stored_rows(path).get(name, {})
        before = before if before.get("code") == code else {}  # a row is of one state of the code, or says less
        tried = before.get("attach") != "yes" or all(check in before for check in CHECKS if check not in skip)
        if args.resume and "seconds" in before and tried:
            continue
        row = {**before, **in_process(name, skip, args.timeout), "code": code}
        print(name, {check: row.get(check) for check in CHECKS}, flush=True)
        rows = {**stored_rows(path), name: row}  # another command may have added to the file meanwhile
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        versions = {  # rows that are kept may be of earlier ones
            module.__name__: " and ".join(
                dict.fromkeys([*filter(None, stored.get(module.__name__, "").split(" and ")), module.__version__])
            )
            for module in (erde_hub, timm, transformers, torch)
        }
        ordered = {family: rows[family] for family in everything if family in rows}
        write_results(args.output, {**versions, "families": ordered})


def stored_rows(path: Path) -> dict[str, Any]:
    """The rows that the file holds by family; none where there is no file."""
    return json.loads(path.read_text(encoding="utf-8"))["families"] if path.is_file() else {}


def code_digest() -> str:
    """Of all Python files of the installed erde_hub."""
    root = Path(erde_hub.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def in_process(name: str, skip: set[str], timeout: int) -> dict[str, Any]:
    """Tries a family in a process of its own; one that takes too long or too much memory costs its own row only."""
    context = multiprocessing.get_context("fork")  # what takes seconds to import is there already
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(sender, name, skip))
    process.start()
    sender.close()
    row: dict[str, Any] = {}
    ends = time.monotonic() + timeout
    try:
        while receiver.poll(max(ends - time.monotonic(), 0)):
            row = receiver.recv()
            if "seconds" in row:
                return row
        missing = f"not within {timeout} s"
    except EOFError:
        process.join()
        missing = f"the process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return {**{check: missing for check in CHECKS if check not in skip}, **row}


def _send_rows(sender: Any, name: str, skip: set[str]) -> None:
    sender.send(try_family(name, skip, sender.send))


def try_family(
    name: str, skip: set[str], report: Callable[[dict[str, Any]], None] = lambda row: None
) -> dict[str, Any]:
    """Tries a family in this process and returns its row; ``report`` sees it after every check."""
    started = time.perf_counter()
    if name in TRANSFORMERS_VISION:
        row = {"library": "transformers", "model": f"{name}ForImageClassification"}
        size, kwargs = TRANSFORMERS_VISION[name][1], {}
        make: Callable[[], nn.Module] = lambda: transformers_model(name)  # noqa: E731
    elif name in TRANSFORMERS_TEXT:
        row = {"library": "transformers", "model": f"{name}ForSequenceClassification"}
        size, kwargs = None, {}
        make = lambda: transformers_model(name)  # noqa: E731
    else:
        try:
            model, size, kwargs = timm_choice(name, timm_families()[name])
        except ErdeError as error:
            return {"library": "timm", "attach": f"refused: {_line(error)}"}
        row = {"library": "timm", "model": model, "input_size": size, "kwargs": kwargs}
        make = lambda: timm.create_model(model, num_classes=CLASSES, **kwargs)  # noqa: E731
    report(row)
    row |= check_model(make, size, kwargs, skip, lambda part: report({**row, **part}))
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def check_model(
    make: Callable[[], nn.Module],
    size: int | None,
    kwargs: dict[str, Any],
    skip: Collection[str] = (),
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Returns ``"yes"`` or the reason for every check.

    Args:
        make: Makes the backbone.
        size: Height and width of its images, None for texts.
        kwargs: Its creation arguments, for timm.
        skip: Checks to leave out.
        report: Sees the row after every check.
    """
    torch.manual_seed(0)
    row: dict[str, Any] = {}
    given = {} if size is None else {"input_size": (3, size, size)}
    try:
        backbone = lively(make(), size)
        inputs = example(size, backbone)
        own_inputs: Any = inputs if size is None else (*inputs.values(),)  # timm calls images x
        hook = mix_states(backbone)
        before = network_state(backbone, own_inputs)
        model = EarlyExitWrapper(backbone, exits="auto", backbone_kwargs=kwargs or None, **given)
    except ErdeError as error:
        return {"attach": f"refused: {_line(error)}"}
    except Exception as error:  # noqa: BLE001 - the row says which
        return {"attach": f"{type(error).__name__}: {_line(error)}"}
    changed = changes(backbone, before, own_inputs)
    if changed:
        return {"attach": f"wrapping changed {len(changed)} things, first the {changed[0]}"}
    hook.remove()
    model.requires_grad_(True).eval()
    before = network_state(backbone, own_inputs)
    row["attach"] = "yes"
    row["exits"] = model.exit_names[:-1]
    row["parameters"] = sum(p.numel() for p in model.backbone.parameters())
    decisive(model, inputs)
    for check, function in _FUNCTIONS.items():
        report(row)
        if check not in skip:
            try:
                row[check] = function(model, inputs)
            except MissingDependencyError:
                raise
            except ErdeError as error:
                row[check] = f"refused: {_line(error)}"
            except Exception as error:  # noqa: BLE001 - the row says which
                row[check] = f"{type(error).__name__}: {_line(error)}"
    changed = changes(backbone, before, own_inputs)
    if changed:
        row["attach"] = f"a later check changed {len(changed)} things, first the {changed[0]}"
    return row


# Models whose exits disagree


@torch.no_grad()
def lively(module: nn.Module, size: int | None) -> nn.Module:
    """Weights and statistics whose answers differ between inputs: fresh networks answer all alike."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if "running_var" in name:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.is_floating_point() and tensor.ndim < 2:
            tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
        elif tensor.is_floating_point() and "weight" in name:
            fan_in = tensor[0].numel()
            if tensor.std() < 0.5 / fan_in**0.5:  # 0.02 in every layer of a deep network: nothing arrives
                tensor.mul_(1 / (fan_in**0.5 * tensor.std().clamp_min(1e-6)))
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    if norms and size is not None:
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0  # the statistics of this batch, which random ones are far from
        module.train()(_images(size, 8, 9))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return module.eval()


@torch.no_grad()
def decisive(model: EarlyExitWrapper, inputs: dict[str, Tensor]) -> None:
    """Gives the heads answers that range from sure to unsure."""
    generator = torch.Generator().manual_seed(2)
    for layer in model.heads.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.in_features**0.5)
    for head, logits in zip(model.heads, model(**inputs, output_all_exits=True).exit_logits, strict=False):
        last = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
        scale = 2 / logits.std(0).mean().clamp_min(1e-6)
        last.weight *= scale
        last.bias.copy_(scale * (last.bias - logits.mean(0)))


def _images(size: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((count, 3, 4, 4), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return smooth + 0.3 * torch.randn((count, 3, size, size), generator=generator)


def example(size: int | None, backbone: nn.Module, count: int = BATCH) -> dict[str, Tensor]:
    """Images, or padded texts of different lengths."""
    if size is not None:
        return {"pixel_values": _images(size, count, 3)}
    padding = int(backbone.config.pad_token_id or 0)
    ids = torch.randint(5, 99, (count, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(count):
        mask[row, 11 - row % BATCH :] = 0
    ids[mask == 0] = padding
    return {"input_ids": ids, "attention_mask": mask}


# Checks


@torch.no_grad()
def routed(model: EarlyExitWrapper, inputs: dict[str, Tensor]) -> tuple[list[float], Tensor, Tensor]:
    """Thresholds that split the batch, and what routing must give, from the logits of all exits, sample by sample."""
    every = model(**inputs, output_all_exits=True).exit_logits
    thresholds: list[float] = []
    taken = torch.full((len(every[0]),), len(every) - 1)
    alive = torch.ones(len(every[0]), dtype=torch.bool)
    for index, logits in enumerate(every[:-1]):
        log_probs = logits.float().log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        points = sorted({0.0, *entropy[alive].tolist()})
        between = [(a + b) / 2 for a, b in itertools.pairwise(points)]
        clear = [t for t in between if (entropy - t).abs().min() > CLEARANCE]
        aim = alive.sum() / 2
        thresholds.append(min(clear, key=lambda t: abs(int((entropy[alive] < t).sum()) - aim), default=0.0))
        leaving = alive & (entropy < thresholds[-1])
        taken[leaving] = index
        alive &= ~leaving
    answers = torch.stack([every[exit_index][row] for row, exit_index in enumerate(taken.tolist())])
    return thresholds, answers, taken


def _train(model: EarlyExitWrapper, inputs: dict[str, Tensor]) -> str:
    clone = copy.deepcopy(model).train()
    clone(**inputs, labels=torch.arange(BATCH) % CLASSES).loss.backward()
    without = [n for n, p in clone.heads.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    return f"no finite gradient in {without[0]}" if without else "yes"


@torch.no_grad()
def _routing(model: EarlyExitWrapper, inputs: dict[str, Tensor]) -> str:
    thresholds, answers, taken = routed(model, inputs)
    if len(taken.unique()) == 1:
        return f"all samples alike: everybody takes exit {taken[0]}"
    got = model(**inputs, threshold=thresholds)
    if not torch.equal(got.exit_index, taken):
        return f"exits {got.exit_index.tolist()} where {taken.tolist()} were due"
    difference = float((got.logits - answers).abs().max() / answers.abs().max())
    return "yes" if difference < 1e-3 else f"differs by {difference:.1e} of the largest logit"


@torch.no_grad()
def _stream(model: EarlyExitWrapper, inputs: dict[str, Tensor]) -> str:
    if "pixel_values" not in inputs:
        return "images only"
    thresholds, _, _ = routed(model, inputs)
    batches = inputs["pixel_values"].split(BATCHES)
    alone = [model(batch, threshold=thresholds) for batch in batches]
    largest = max(float(out.logits.abs().max()) for out in alone)
    for batch_size, max_pending in ((4, 64), (2, 1)):  # stages on parts of batches, and on parts of several together
        sizes = {"batch_size": batch_size, "max_pending": max_pending}
        for out in route_batches(model, batches, threshold=thresholds, **sizes):
            expected = alone[out.index]
            if not torch.equal(out.exit_index, expected.exit_index):
                return f"exits {out.exit_index.tolist()} where {expected.exit_index.tolist()} were due"
            difference = float((out.logits - expected.logits).abs().max()) / largest
            if not difference < 1e-3:
                return f"differs by {difference:.1e} of the largest logit"
    return "yes"


@torch.no_grad()
def _save(model: EarlyExitWrapper, inputs: dict[str, Tensor]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = EarlyExitWrapper.from_pretrained(folder)
    state = loaded.state_dict()
    wrong = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])]
    if wrong:
        return f"{wrong[0]} differs"
    pairs = zip(
        model(**inputs, output_all_exits=True).exit_logits,
        loaded(**inputs, output_all_exits=True).exit_logits,
        strict=True,
    )
    return "yes" if all(torch.equal(a, b) for a, b in pairs) else "the outputs differ in the last bits"


@torch.no_grad()
def _copy(model: EarlyExitWrapper, inputs: dict[str, Tensor]) -> str:
    thresholds, _, _ = routed(model, inputs)
    one, two = model(**inputs, threshold=thresholds), copy.deepcopy(model)(**inputs, threshold=thresholds)
    return "yes" if torch.equal(one.logits, two.logits) else "the copy answers otherwise"


def _onnx(model: EarlyExitWrapper, inputs: dict[str, Tensor]) -> str:
    """A file for any batch; where that is refused, one for one sample."""
    from erde_hub.export import check_onnx, export_onnx  # noqa: PLC0415 - an extra

    thresholds, _, _ = routed(model, inputs)
    given: Any = inputs.get("pixel_values", inputs)
    said = "yes"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            export_onnx(model, path)
        except ExportError as error:
            if "batch_size=1" not in str(error):
                raise
            export_onnx(model, path, batch_size=1)
            said = "one sample only"
        check = check_onnx(model, path, given, [0.0, thresholds, math.log(CLASSES) + 1], threads=1)
    if check.same_exit < 1:
        return f"{check.same_exit:.0%} of the samples take the same exit"
    if check.relative_difference >= 1e-3:
        return f"differs by {check.relative_difference:.1e}"
    return said if check.same_answer == 1 else f"{check.same_answer:.0%} of the samples get the same class"


_FUNCTIONS: dict[str, Callable[[EarlyExitWrapper, dict[str, Tensor]], str]] = {
    "train": _train,
    "routing": _routing,
    "stream": _stream,
    "save": _save,
    "copy": _copy,
    "onnx": _onnx,
}


def _line(error: BaseException) -> str:
    """The message in one line without what differs between machines."""
    return " ".join(str(error).split())[:300]


if __name__ == "__main__":
    run_script(main)
