"""The first step of an export: one graph without control flow that computes every exit.

Besides the logits, it says for every early exit who leaves there, with the policy traced as it is in torch, so that the
two cannot drift apart.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from erde_hub.backbones.transformers import longest_text
from erde_hub.engine.routing import AllExits, pools_tokens
from erde_hub.errors import ExportError
from erde_hub.modeling.wrapper import EarlyExitWrapper
from erde_hub.policies import ExitPolicy

from .signature import input_names, reads_texts

if TYPE_CHECKING:
    import onnx_ir as ir

#: Names of the symbolic axes in the file.
BATCH, LENGTH = "batch", "length"


class _Passes:
    """Remembers the latest pass."""

    def __init__(self) -> None:
        self.latest: AllExits | None = None
        self.complete = False

    def exits_seen(self) -> int:
        """Number of early exits whose logits it has computed."""
        return sum(1 for logits in self.latest.exit_logits if logits is not None) if self.latest else 0


class EveryExit(nn.Module):
    """What the flat graph computes.

    Args:
        model: In eval mode.
        last: Index of the deepest exit whose logits are wanted; None for all.
        passes: Gets the engine's pass, which knows how far it came. (torch.export undoes changes of a module.)

    Shape:
        The inputs of :func:`~erde_hub.export.signature.input_names`, (N, ...) each, then threshold (E,). Returns E + 1
        times logits (N, K), E times who leaves (N,) bool, and (N,) 0, or NaN for samples with NaN or infinity in the
        input, which never leave.
    """

    def __init__(self, model: EarlyExitWrapper, last: int | None = None, passes: _Passes | None = None) -> None:
        super().__init__()
        self.model = model
        self.last = last
        self.passes = passes or _Passes()
        self.names = input_names(model)

    def _exit_logits(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        model = self.model
        texts = dict(zip(self.names, inputs, strict=True)) if reads_texts(model) else {}
        heads: Any = model.heads.active
        visitor = AllExits(heads, mask=model.runner.token_mask(texts) if pools_tokens(heads) else None)
        self.passes.latest = visitor
        final = model.runner.run(visitor, () if texts else tuple(inputs), texts)
        exit_logits = visitor.finish(model.runner.adapter.logits(final), model.runner.exits)
        self.passes.complete = True
        if model.calibrator is not None:  # one number per exit; the file answers with calibrated logits
            exit_logits = tuple(model.calibrator(e, logits, None, []) for e, logits in enumerate(exit_logits))
        return exit_logits

    def forward(self, *inputs_and_threshold: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        *inputs, threshold = inputs_and_threshold
        exit_logits = self._exit_logits(inputs)
        if self.last is not None:
            return (exit_logits[self.last],)
        # onnxruntime's pooling, and quantisation, turn NaN into numbers, so they are looked for where they come in. The
        # difference is 0, and NaN where anything is NaN or infinite.
        main = inputs[0]
        total = main.sum(tuple(range(1, main.ndim))).float()
        poison = total - total
        leaves = []
        log_probs: list[Tensor] = []
        for logits, own in zip(exit_logits, threshold.split(1), strict=False):
            log_probs = [*(log_probs if self.model.policy.uses_history else ()), logits.float().log_softmax(-1)]
            leaves.append(exit_decision(self.model.policy, logits, torch.stack(log_probs), own, poison))
        return (*exit_logits, *leaves, poison)


def exit_decision(policy: ExitPolicy, logits: Tensor, log_probs: Tensor, threshold: Tensor, poison: Tensor) -> Tensor:
    """Returns which samples exit, (N,), with operators that can be traced.

    Args:
        policy: Decides.
        logits: (N, K), of this exit. What overflowed on the way answers nothing: such a sample goes on, as in torch.
        log_probs: (exits so far, N, K).
        threshold: (1,).
        poison: (N,), NaN for samples that never exit.
    """
    check = poison + logits.sum(-1)
    return policy(log_probs, threshold) & (check - check == 0)


def flat_model(model: EarlyExitWrapper, opset: int, batch_size: int | None = None) -> ir.Model:
    """Returns the graph of all exits.

    Inputs are those of :func:`~erde_hub.export.signature.input_names`, and ``threshold``, one element per early exit.
    Outputs are ``logits_0 .. logits_E``, ``leaves_0 .. leaves_E-1`` and ``poison``.

    Args:
        model: Is copied, not touched.
        opset: Version of the ONNX operator set.
        batch_size: None leaves the batch, and the length of texts, free; a number fixes both.

    Raises:
        ExportError: torch or its ONNX exporter cannot; the message names exit and reason.
    """
    return _flat_graph(exportable_copy(model), opset, batch_size)


def _flat_graph(clone: EarlyExitWrapper, opset: int, batch_size: int | None) -> ir.Model:
    early = len(clone.heads.active)
    names = [*(f"logits_{i}" for i in range(early + 1)), *(f"leaves_{i}" for i in range(early)), "poison"]
    passes = _Passes()
    module = EveryExit(clone, passes=passes)
    try:
        program = trace(module, batch_size)
    except Exception as error:
        if passes.complete:  # it ran, and what torch.export found out about shapes does not hold for every batch
            raise ExportError(
                f"{type(clone.backbone).__name__} cannot be exported for batches of any size ({error_reason(error)}):"
                " try batch_size=1"
            ) from error
        raise _export_error(clone, passes.exits_seen(), "torch.export cannot trace", error) from error
    try:
        return _translate(program, module, names, opset, batch_size)
    except Exception as error:
        if _spell_out_attention(clone):  # torch.onnx knows the fused operator with four axes only; hiera has five
            return _flat_graph(clone, opset, batch_size)
        step = "torch.onnx cannot translate"
        for exit_index in range(early + 1):
            module = EveryExit(clone, exit_index)
            try:
                _translate(trace(module, batch_size), module, names[:1], opset, batch_size)
            except Exception as inner:
                raise _export_error(clone, exit_index, step, inner) from inner
        raise ExportError(
            f"policy {clone.config.policy!r} cannot be exported: {step} it ({error_reason(error)})"
        ) from error


def exportable_copy(model: EarlyExitWrapper) -> EarlyExitWrapper:
    """Returns a float32 copy on the CPU, in eval mode, without recomputation and without compiled parts."""
    try:
        clone = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval()
    except (NotImplementedError, RuntimeError) as error:
        raise ExportError(f"the model cannot be copied to the CPU in float32 ({error_reason(error)})") from error
    clone.backbone = getattr(clone.backbone, "_orig_mod", clone.backbone)
    for module in clone.modules():
        if getattr(module, "grad_checkpointing", False) is True:
            module.grad_checkpointing = False
    return clone


def _spell_out_attention(clone: EarlyExitWrapper) -> bool:
    """Has timm's layers compute attention with plain operators; returns False where none used the fused one."""
    fused = [module for module in clone.modules() if getattr(module, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False
    return bool(fused)


@torch.no_grad()
def trace(module: EveryExit, batch_size: int | None) -> torch.export.ExportedProgram:
    """Returns the traced graph; for ``batch_size`` see :func:`flat_model`."""
    model = module.model
    size, dtype = tuple(model.config.input_size or ()), torch.float32
    if reads_texts(model):
        size, dtype = size if batch_size else (8,), torch.int64
    # Two samples: torch.export takes an axis of 1 to be always 1.
    inputs = [torch.ones((batch_size or 2, *size), dtype=dtype) for _ in module.names]
    threshold = torch.zeros(len(model.heads.active))
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # where it prints the graph so far before it raises
        shapes = _dynamic_shapes(module, batch_size)
        return torch.export.export(module, (*inputs, threshold), dynamic_shapes=shapes, strict=False)


def _dynamic_shapes(module: EveryExit, batch_size: int | None) -> Any:
    axes = {}
    if batch_size is None:
        axes[0] = torch.export.Dim(BATCH)
        if reads_texts(module.model):
            axes[1] = torch.export.Dim(LENGTH, max=longest_text(module.model.backbone))
    return ((*({**axes} for _ in module.names), {}),)


@torch.no_grad()  # attention is decomposed otherwise where gradients are wanted, into views that some strides forbid
def _translate(
    program: torch.export.ExportedProgram, module: EveryExit, outputs: list[str], opset: int, batch_size: int | None
) -> ir.Model:
    with quiet():
        exported = torch.onnx.export(
            program,
            input_names=[*module.names, "threshold"],
            output_names=outputs,
            dynamic_shapes=_dynamic_shapes(module, batch_size),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    if exported is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    return exported.model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What torch logs and warns of while it traces is for its own developers; what matters to a user is raised."""
    loggers = [
        logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch.onnx", "onnxscript")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _export_error(model: EarlyExitWrapper, exit_index: int, step: str, error: BaseException) -> ExportError:
    names = model.exit_names
    return ExportError(
        f"{type(model.backbone).__name__} cannot be exported: {step} what exit {names[exit_index]!r} (number"
        f" {exit_index} of 0 to {len(names) - 1}) computes ({error_reason(error)})"
    )


def error_reason(error: BaseException) -> str:
    """The first lines of the error that started it; the exporter's own are a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:400]}"
