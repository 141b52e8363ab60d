"""The per-sample quantities that losses are made of: pure functions, in nats, always through log-softmax.

Logits come in any floating dtype. Everything is computed in float32, or in float64 for float64 logits: bf16 keeps three
significant digits, so a cross-entropy of 0.003 or the tail of a softened teacher would be lost in it. Entropies and
divergences written as ``log(softmax + eps)`` lose the tail as well and bias the entropy by about K * eps; nothing here
adds an eps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from erde_hub.errors import unknown_name

#: How the divergence is scaled before its weight: by T^2 over the number of classes (ERDE), or by T^2 (Hinton).
KL_SCALES = ("T2_over_K", "T2")

# exp(-1e4) is 0 in float64 too, so a clamp here changes no value; it keeps 0 * log 0 from being 0 * -inf.
_LOG_ZERO = -1e4


def upcast(logits: Tensor) -> Tensor:
    """Returns float64 logits as they are and all others as float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns log softmax(logits / temperature) over the last axis, in float32 (float64 for float64 logits).

    Shape:
        logits: (..., K). Returns (..., K).
    """
    logits = upcast(logits)
    return F.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def kl_divergence(teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
    """Divergence of the student from the teacher, KL(p_T || p_S) = sum_k p_T (log p_T - log p_S), with 0 log 0 = 0.

    The teacher's side is detached. The direction is that of Hinton's distillation: the student pays for missing mass
    where the teacher has some. Both sides are taken as they are, so soften both with the same temperature beforehand;
    the gradient with respect to the student's logits is then (p_S - p_T) / T.

    Args:
        teacher_log_probs: Normalised log-probabilities; -inf is a class of probability 0.
        student_log_probs: Normalised log-probabilities; finite.

    Shape:
        both: (..., K). Returns (...).
    """
    teacher = teacher_log_probs.detach()
    return (teacher.exp() * (teacher.clamp_min(_LOG_ZERO) - student_log_probs)).sum(-1)


def kl_factor(kl_scale: str, temperature: float, num_classes: int) -> float:
    """Returns what the divergence is multiplied by: T^2 / K for ``"T2_over_K"``, T^2 for ``"T2"``.

    With T^2 the gradient keeps its size when T changes (arXiv 1503.02531, section 2). Divided by K the batch mean
    equals T^2 times ``torch.nn.functional.kl_div(reduction="mean")``.

    Raises:
        UnknownNameError: The scale is neither of the two.
    """
    if kl_scale not in KL_SCALES:
        raise unknown_name("kl_scale", kl_scale, KL_SCALES)
    square = temperature * temperature
    return square / num_classes if kl_scale == "T2_over_K" else square


def cross_entropy(log_probs: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy per sample, -log p_y, or (1 - s)(-log p_y) + s mean_k(-log p_k) with smoothing s.

    Args:
        log_probs: Normalised log-probabilities, one or more exits of the same samples.
        labels: Class indices in [0, K); they are not checked here.
        label_smoothing: Fraction of the target that is spread evenly over all K classes, as in torch.

    Shape:
        log_probs: (..., N, K). labels: (N,). Returns (..., N).
    """
    leading = log_probs.shape[:-1]
    targets = labels.expand(leading).reshape(-1)
    # nll_loss and not gather: the backward of gather is not deterministic on GPUs.
    nll = F.nll_loss(log_probs.reshape(-1, log_probs.shape[-1]), targets, reduction="none").view(leading)
    if label_smoothing == 0.0:
        return nll
    return (1.0 - label_smoothing) * nll - label_smoothing * log_probs.mean(-1)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats, H(p) = -sum_k p_k log p_k, in [0, log K]; 0 log 0 counts 0, in the gradient too.

    The gradient with respect to logits z is -p_j (log p_j + H), at most log K in size, and 0 where p is one-hot.

    Shape:
        log_probs: (..., K). Returns (...).
    """
    return -(log_probs.exp() * log_probs.clamp_min(_LOG_ZERO)).sum(-1)


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Tells per sample whether the largest logit is the label's; of equal logits the first counts.

    Shape:
        logits: (..., N, K). labels: (N,). Returns (..., N), bool.
    """
    return logits.argmax(-1) == labels
