"""Language models with exits: logits and losses for every token. They are trained and scored; nobody leaves early.

A token that left at a layer would leave a hole in the keys and values that later tokens attend to; what to put there is
a question of its own, which transformers' own early-exit decoding answers. So eval mode gives the last exit's logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputTypeError, LabelError, ShapeError, ThresholdError
from .policies import ExitPolicy

#: Label of tokens that do not count.
IGNORED = -100


def check_token_labels(labels: object, shape: Sequence[int], vocabulary: int, *, values: bool = True) -> Tensor:
    """Returns token labels (N, L) as int64.

    Args:
        labels: Usually the ``input_ids`` themselves: they are shifted here, as in transformers; -100 does not count.
        shape: (N, L).
        vocabulary: Number of tokens there are.
        values: Check the range too, which on an accelerator waits for the device.

    Raises:
        InputTypeError: Not an integer tensor.
        ShapeError: Not (N, L).
        LabelError: A label that is no token.
    """
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise InputTypeError(f"labels must be token ids (int64), got {kind}")
    if tuple(labels.shape) != tuple(shape):
        raise ShapeError(f"labels must have shape {tuple(shape)}, one per token, got {tuple(labels.shape)}")
    if values and labels.numel():
        counted = labels[labels != IGNORED]
        if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= vocabulary):
            wrong = int(counted.min()) if int(counted.min()) < 0 else int(counted.max())
            raise LabelError(
                f"labels hold {wrong}, but there are {vocabulary} tokens: labels lie in 0 to"
                f" {vocabulary - 1}, or are {IGNORED} where a token does not count"
            )
    return labels.long()


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each next token.

    Shape:
        logits: (N, L, V). labels: (N, L), unshifted. Returns a scalar; 0 where no token counts.
    """
    ahead = labels[:, 1:].reshape(-1)
    losses = F.cross_entropy(logits[:, :-1].reshape(len(ahead), -1), ahead, ignore_index=IGNORED, reduction="sum")
    return losses / (ahead != IGNORED).sum().clamp_min(1)


def check_nobody_leaves(policy: ExitPolicy, thresholds: Sequence[float]) -> None:
    """Raises :class:`ThresholdError` for a threshold at which a token could leave early."""
    if not all(policy.never_leaves(threshold) for threshold in thresholds):
        raise ThresholdError(
            f"threshold={list(thresholds)}: exits of a language model give logits for every token and are not routed;"
            " use threshold=0 with policy='entropy', and output_all_exits=True for the logits of every exit"
        )
